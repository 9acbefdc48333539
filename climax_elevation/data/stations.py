"""Point observations: CF station files (`featureType: timeSeries`), and CSV with the same columns.

netCDF: dimensions `time` and `station`; coordinates `lat`, `lon` (degrees) and `elevation` (with its unit), one a
station; variables `[time, station]`, gaps as missing values. CSV: a row an observation, with the columns `time` (UTC),
`station`, `lat`, `lon`, `elevation` and one a variable, between commas, semicolons or tabs; an empty field is a gap. A
unit may stand behind a column's name, as in `elevation (ft)`. Numbers that stand for gaps, such as -9999, are gaps.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from climax_elevation.data.sentinels import without_sentinels
from climax_elevation.data.source import open_netcdf
from climax_elevation.data.times import moment
from climax_elevation.errors import InputError
from climax_elevation.terrain.units import HEIGHT, conversion

Array = NDArray[np.float64]

LOWEST_M, HIGHEST_M = -500.0, 9000.0
PLACES = {
    "time": ("time",),
    "station": ("station", "station_id", "station_name"),
    "lat": ("lat", "latitude"),
    "lon": ("lon", "longitude"),
    # what may be the height of an instrument above its ground comes last
    "elevation": ("elevation", "surface_altitude", "altitude", "alt", "z", "height"),
}
STANDARD_NAMES = {"lat": "latitude", "lon": "longitude", "elevation": "surface_altitude"}
RAGGED = ("sample_dimension", "instance_dimension")  # CF's marks of it
SEPARATORS = ",;\t"


@dataclass(frozen=True)
class Stations:
    """One variable at places over time.

    Attributes:
        source: The file, for messages.
        variable, unit: Name, and unit as the file has it ("" where it names none).
        times: `[T]`, ascending, datetime64[s].
        names: Of the stations, `[S]`.
        lat, lon: Degrees, `[S]`.
        elevation_m: Metres, `[S]`.
        values: `[T, S]`, NaN where there is none.
    """

    source: str
    variable: str
    unit: str
    times: NDArray[np.datetime64]
    names: tuple[str, ...]
    lat: Array
    lon: Array
    elevation_m: Array
    values: Array

    def __len__(self) -> int:
        return len(self.names)

    def only(self, chosen: NDArray[np.integer]) -> Stations:
        """Some of the stations, in the order given."""
        return replace(
            self,
            names=tuple(self.names[index] for index in chosen),
            lat=self.lat[chosen],
            lon=self.lon[chosen],
            elevation_m=self.elevation_m[chosen],
            values=self.values[:, chosen],
        )


def read_stations(
    path: str | Path,
    variable: str | None = None,
    *,
    leave_out: Iterable[str] = (),
    units: Mapping[str, str] | None = None,
) -> Stations:
    """Read a variable of a station file.

    Heights are converted to metres from the unit that the file names, or `units` does; where neither names one, they
    are taken for metres, and refused if no ground lies there.

    Args:
        path: netCDF, or CSV if the name ends in .csv.
        variable: Which; None: the only one.
        leave_out: Names of stations that are not wanted.
        units: Of "elevation", where the file lacks it or has it wrong.

    Raises:
        InputError: If the file is no such file; if a station has no height or place, or comes twice; if heights cannot
            be metres; if there are fewer than two stations, or no time at which two of them have a value.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a CF station file (.nc), or a .csv with the same columns")
    given = dict(units or {})
    for name in given:
        if name != "elevation":
            raise InputError(f"units names the unit of elevation alone, since values keep theirs, not of {name!r}")
    found = _read_csv(path, variable) if path.suffix.lower() == ".csv" else _read_netcdf(path, variable)
    stations, unit = found
    values = without_sentinels(xr.DataArray(stations.values)).to_numpy()
    stations = _left(replace(stations, values=values), list(leave_out))
    _check_names(stations)
    unit = given.get("elevation", unit)
    stations = replace(stations, elevation_m=_metres(stations, unit))
    _check_places(stations)
    _check_values(stations)
    _check_times(stations)
    return stations


Found = tuple[Stations, "str | None"]  # with heights as they are in the file, and their unit


def _read_netcdf(path: Path, variable: str | None) -> Found:
    with open_netcdf(path) as dataset:
        kind = str(dataset.attrs.get("featureType", "")).lower()
        if kind != "timeseries":
            came = f"featureType {kind!r}" if kind else "no featureType"
            raise InputError(f"{path} has {came}: a station file has featureType 'timeSeries' (a grid: prepare)")
        station = _station_dimension(path, dataset)
        places = {name: _find(path, dataset, station, name) for name in STANDARD_NAMES}
        candidates = [str(name) for name, v in dataset.data_vars.items() if set(v.dims) == {"time", station}]
        chosen = _chosen(path, candidates, variable)
        names = dataset[station] if station in dataset.variables else None
        if names is None:
            names = next((v for v in dataset.variables.values() if v.attrs.get("cf_role") == "timeseries_id"), None)
        number = dataset.sizes[station]
        found = dataset[chosen].transpose("time", station)
        height = dataset[places["elevation"]]
        stations = Stations(
            source=str(path),
            variable=chosen,
            unit=str(found.attrs.get("units", "")),
            times=_times(path, dataset["time"].to_numpy() if "time" in dataset.variables else np.array([])),
            names=tuple(map(_text, range(number) if names is None else names.to_numpy())),
            lat=_numbers(path, dataset[places["lat"]]),
            lon=_numbers(path, dataset[places["lon"]]),
            elevation_m=_numbers(path, height),
            values=_numbers(path, found),
        )
        return stations, height.attrs.get("units")


def _station_dimension(path: Path, dataset: xr.Dataset) -> str:
    ragged = [str(name) for name, v in dataset.variables.items() if any(mark in v.attrs for mark in RAGGED)]
    if ragged:
        raise InputError(
            f"{path} holds one station after another along one dimension (a ragged array, by {ragged[0]!r}): lay its "
            "variables out over time and station, or write it as CSV, a row an observation"
        )
    others = [str(name) for name in dataset.sizes if name != "time"]
    named = [name for name in others if name.lower() in PLACES["station"]]
    with_time = [name for name in others if any(set(v.dims) == {"time", name} for v in dataset.data_vars.values())]
    if "time" not in dataset.sizes or not (named or with_time):
        raise InputError(
            f"{path} has the dimensions {', '.join(map(str, dataset.sizes)) or 'none'}: a station file has time and "
            "station"
        )
    return (named or with_time)[0]


def _find(path: Path, dataset: xr.Dataset, station: str, wanted: str) -> str:
    names = {str(name).lower(): str(name) for name in dataset.variables}
    found = [str(name) for name, v in dataset.variables.items() if _standard_name(v) == STANDARD_NAMES[wanted]]
    found += [names[name] for name in PLACES[wanted] if name in names]
    found += [str(name) for name, v in dataset.variables.items() if _standard_name(v) == PLACES[wanted][-1]]
    for name in found:
        if dataset[name].dims == (station,):
            return name
    came = ", ".join(f"{name} ({', '.join(map(str, v.dims)) or 'one number'})" for name, v in dataset.variables.items())
    raise InputError(f"{path} has no {wanted} over ({station}), and {came}: add it, one a station")


def _standard_name(values: xr.Variable) -> object:
    return values.attrs.get("standard_name")


def _chosen(path: Path, candidates: list[str], variable: str | None) -> str:
    if variable is None and len(candidates) == 1:
        return candidates[0]
    if variable not in candidates:
        came = "name one with variable" if variable is None else f"it has no {variable!r}"
        raise InputError(f"{path} holds {', '.join(candidates) or 'no variable'} at stations over time: {came}")
    return variable


def _read_csv(path: Path, variable: str | None) -> Found:
    header, body = _rows(path)
    columns, units = _columns(path, header)
    candidates = [name for name in columns if name and name not in PLACES]
    chosen = _chosen(path, candidates, variable)
    for number, row in body:
        if len(row) != len(header):
            raise InputError(f"{path}, row {number}: {len(row)} fields, and the header has {len(header)}")
        if not row[columns["station"]].strip():
            raise InputError(f"{path}, row {number}: no station is named: give its name, or take the row out")
    times = np.array([_date(path, number, row[columns["time"]]) for number, row in body])
    names = [row[columns["station"]].strip() for _, row in body]
    order = {name: index for index, name in enumerate(dict.fromkeys(names))}
    axis, place = np.unique(times, return_inverse=True) if body else (times, np.array([], dtype=int))
    values = np.full((len(axis), len(order)), np.nan)
    seen = np.zeros(values.shape, dtype=bool)
    fixed = {name: np.full(len(order), np.nan) for name in ("lat", "lon", "elevation")}
    for (number, row), name, at in zip(body, names, place, strict=True):
        column = order[name]
        if seen[at, column]:
            raise InputError(f"{path}, row {number}: station {name!r} has {axis[at]} twice: leave one out")
        seen[at, column] = True
        values[at, column] = _number(path, number, chosen, row[columns[chosen]])
        for what, known in fixed.items():
            new = _number(path, number, what, row[columns[what]])
            if np.isfinite(known[column]) and np.isfinite(new) and new != known[column]:
                raise InputError(
                    f"{path}, row {number}: station {name!r} has {what} {new:g}, and {known[column]:g} before: it is "
                    "one place, so give its rows one"
                )
            known[column] = new if np.isfinite(new) else known[column]
    stations = Stations(
        source=str(path),
        variable=chosen,
        unit=units.get(chosen) or "",
        times=axis.astype("datetime64[s]"),
        names=tuple(order),
        lat=fixed["lat"],
        lon=fixed["lon"],
        elevation_m=fixed["elevation"],
        values=values,
    )
    return stations, units.get("elevation")


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and the rows below it that are not empty, each with the number of its line in the file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        separator = max(SEPARATORS, key=text.partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}): save it as that") from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error
    return (rows[0][1] if rows else []), [(line, row) for line, row in rows[1:] if any(map(str.strip, row))]


def _columns(path: Path, header: list[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Where each column stands, by our names for the places', and the units behind their names."""
    columns, units = {}, {}
    for index, text in enumerate(header):
        match = re.fullmatch(r"\s*(.*?)\s*(?:[(\[](.*)[)\]])?\s*", text)
        name, unit = match.groups() if match else (text, None)
        name = next((ours for ours, theirs in PLACES.items() if name.lower() in theirs), name)
        if name and name in columns:
            raise InputError(f"{path} has the column {name!r} twice")
        columns[name] = index
        if unit:
            units[name] = unit
    for name in PLACES:
        if name not in columns:
            raise InputError(
                f"{path} has no column {name!r}, and {', '.join(header) or 'none at all'}: a CSV of stations has "
                f"{', '.join(PLACES)} and one a variable"
            )
    return columns, units


def _number(path: Path, row: int, column: str, text: str) -> float:
    if text.strip().lower() in ("", "na", "nan"):
        return float("nan")
    value = float("nan")
    with suppress(ValueError):
        value = float(text.replace("_", "?"))  # which Python would take for nothing
    if not np.isfinite(value):
        raise InputError(
            f"{path}, row {row}: {column} is a number with a decimal point, or empty where there is none, not {text!r}"
        )
    return value


def _date(path: Path, row: int, text: str) -> np.datetime64:
    stamp = moment(text)
    if stamp is None:
        raise InputError(f"{path}, row {row}: time is an ISO date of UTC such as 2004-01-01T06:00, not {text!r}")
    return stamp


def _times(path: Path, values: NDArray) -> NDArray[np.datetime64]:
    if not np.issubdtype(values.dtype, np.datetime64):
        raise InputError(f"{path}: time holds {values.dtype} and not dates of the usual calendar: give it CF units")
    if np.isnat(values).any():
        raise InputError(f"{path}: {np.isnat(values).sum()} of {len(values)} times are missing: give each its time")
    return values.astype("datetime64[s]")


def _numbers(path: Path, values: xr.DataArray) -> Array:
    if values.dtype.kind not in "iuf":
        raise InputError(f"{path}: {values.name} holds {values.dtype} and not numbers: write it as numbers")
    return np.asarray(values.to_numpy(), dtype=np.float64)


def _text(name: object) -> str:
    return (name.decode() if isinstance(name, bytes) else str(name)).strip()


def _left(stations: Stations, leave_out: list[str]) -> Stations:
    for name in leave_out:
        if name not in stations.names:
            raise InputError(f"leave_out names {name!r}, and {stations.source} has {_listed(stations.names)}")
    return stations.only(np.array([i for i, name in enumerate(stations.names) if name not in leave_out], dtype=int))


def _check_names(stations: Stations) -> None:
    if len(stations) < 2:
        raise InputError(
            f"{stations.source} has {len(stations)} station{'s' * (len(stations) != 1)}: a value is inferred from "
            "others, so give two or more"
        )
    if "" in stations.names:
        raise InputError(f"{stations.source}: one of its {len(stations)} stations has no name: give each its own")
    twice = [name for name in dict.fromkeys(stations.names) if stations.names.count(name) > 1]
    if twice:
        raise InputError(f"{stations.source} has the station {twice[0]!r} more than once: leave one out")


def _metres(stations: Stations, unit: str | None) -> Array:
    lacking = [name for name, z in zip(stations.names, stations.elevation_m, strict=True) if not np.isfinite(z)]
    if lacking:
        raise InputError(
            f"{stations.source}: no elevation of {_listed(lacking)}: give it in the file, or name them in leave_out"
        )
    remedy = "name the unit, by data.elevation_unit: ft in a comparison, by units={'elevation': 'ft'} in Python, say"
    factor, offset = conversion(HEIGHT, unit or "m", f"elevation in {stations.source}", remedy)
    metres = factor * stations.elevation_m + offset
    for extreme in (metres.min(), metres.max()):
        if not LOWEST_M <= extreme <= HIGHEST_M:
            name = stations.names[int(np.flatnonzero(metres == extreme)[0])]
            said = "it names no unit, and metres were taken" if unit is None else f"its unit is {unit!r}"
            raise InputError(
                f"{stations.source}: elevation of {name!r} would be {extreme:g} m, where no ground is ({said}): are "
                f"they feet? {remedy[0].upper()}{remedy[1:]}; or name what has none in leave_out"
            )
    return metres


def _check_places(stations: Stations) -> None:
    for what, values, (low, high) in (("lat", stations.lat, (-90, 90)), ("lon", stations.lon, (-360, 720))):
        bad = [n for n, value in zip(stations.names, values, strict=True) if not low <= value <= high]
        if bad:
            raise InputError(f"{stations.source}: {what} of {_listed(bad)} is not within [{low}, {high}] degrees")
    places: dict[tuple[float, ...], str] = {}
    turns = np.where(np.abs(stations.lat) == 90, 0.0, stations.lon % 360)
    for name, *place in zip(stations.names, stations.lat, turns, stations.elevation_m, strict=True):
        other = places.setdefault(tuple(place), name)
        if other != name:
            raise InputError(
                f"{stations.source}: {other!r} and {name!r} are at the same place, and one would tell the other's "
                "value: name one of them in leave_out"
            )


def _check_values(stations: Stations) -> None:
    bad = [name for name, own in zip(stations.names, stations.values.T, strict=True) if np.isinf(own).any()]
    if bad:
        raise InputError(
            f"{stations.source}: {stations.variable} of {_listed(bad)} is infinite at times: leave those values out"
        )


def _check_times(stations: Stations) -> None:
    steps = np.diff(stations.times)
    if (steps <= np.timedelta64(0, "s")).any():
        first = int(np.flatnonzero(steps <= np.timedelta64(0, "s"))[0])
        raise InputError(
            f"{stations.source}: times ascend and come once each, and {stations.times[first + 1]} follows "
            f"{stations.times[first]}"
        )
    if not (np.isfinite(stations.values).sum(axis=1) >= 2).any():
        raise InputError(
            f"{stations.source}: at no time have two stations a value of {stations.variable!r}, so none can be "
            "inferred from another: their times do not overlap"
        )


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
