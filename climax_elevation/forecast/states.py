"""States of the atmosphere from a source, as a run's input wants them: its variables, on its grid."""

from __future__ import annotations

import datetime
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from climax_elevation.data.fields import BadDataError, Field, find_fields
from climax_elevation.data.grid import SAME_PLACE_DEG, Grid, degrees_apart, read_grid, same_places
from climax_elevation.data.names import (
    CLIMAX_LEVELS_HPA,
    GROUND,
    LAND_SEA_MASK,
    LATITUDE_NAMES,
    OROGRAPHY,
    find_variable,
)
from climax_elevation.data.record import RECORD
from climax_elevation.data.source import open_source
from climax_elevation.data.times import dates, written_date
from climax_elevation.errors import InputError
from climax_elevation.files import load_npz
from climax_elevation.forecast.loaded import Array, LoadedRun

logger = logging.getLogger(__name__)

STATIC = (*GROUND, *LATITUDE_NAMES)
"""Variables that are the same at all times."""
GROUND_MAY_DIFFER_M = 1.0
HOURS_PER_MONTH = 730.5
MONTHS_MAY_DIFFER = 0.02  # months have no fixed length: of a lead time in hours, its distance from whole ones
ALL, LAST = "all", "last"


@dataclass(frozen=True)
class States:
    """A source, seen as a run's input.

    Attributes:
        run: Whose input.
        fields: What changes in time, by the run's names.
        constant: What does not, `[H, W]`.
        grid: From the source's pixels to the run's.
        times: Of the source, `[N]`: datetime64 or of another calendar.
        stamps: The same as ISO 8601, to the second.
        months: Calendar months from input to forecast; 0: the source does not step in months.
    """

    run: LoadedRun
    fields: Mapping[str, Field]
    constant: Mapping[str, Array]
    grid: Grid
    times: NDArray[Any]
    stamps: tuple[str, ...]
    months: int

    def read(self, name: str, indices: Sequence[int]) -> Array:
        """A variable at some times, `[len(indices), H, W]`, checked.

        Raises:
            InputError: If values are missing or cannot be true, or the source is damaged.
        """
        if name in self.constant:
            return np.repeat(self.constant[name][None], len(indices), axis=0)
        field = self.fields[name]
        try:
            values = np.concatenate([field.read(self.grid, start, stop) for start, stop in _stretches(indices)])
        except BadDataError as error:  # what else it advises is an option of `prepare`
            raise InputError(f"{str(error).rpartition(': ')[0]}: fill them") from error
        except (OSError, RuntimeError) as error:  # RuntimeError: netCDF4's word for a damaged file
            raise InputError(f"cannot read {field.called!r} from the source ({error})") from error
        self._check(field, values, indices)
        return values

    def _check(self, field: Field, values: Array, indices: Sequence[int]) -> None:
        bad = field.first_bad(values)
        if bad is None:
            return
        what = f"{field.name} ({field.called!r} in the source) at {self.stamps[indices[bad[0]]]}"
        if not np.isfinite(values[bad]):
            raise InputError(f"{what} has {int((~np.isfinite(values[bad[0]])).sum())} missing values: fill them")
        low, high = field.valid
        raise InputError(
            f"{what} is {values[bad]:g}, outside {low:g} to {high:g} in ClimaX's unit: mend the source, "
            "or state its unit with --units"
        )

    def starts(self, wanted: Sequence[str]) -> list[int]:
        """Indices of the times to forecast from.

        Args:
            wanted: "last"; "all"; a year or date, for all times in it; or two, for all from one to the other.

        Raises:
            InputError: If there is none, or a date cannot be read.
        """
        if list(wanted) == [LAST]:
            return [int(np.argmax(self.times))]
        if list(wanted) == [ALL]:
            return list(range(len(self.stamps)))
        if not 1 <= len(wanted) <= 2:
            raise InputError(f"start is a date, two of them, {ALL!r} or {LAST!r}, not {' '.join(wanted)}")
        first, last = _date(wanted[0]), _date(wanted[-1])
        found = [i for i, stamp in enumerate(self.stamps) if stamp >= first and stamp[: len(last)] <= last]
        if not found:
            raise InputError(
                f"the source has no time {'from ' if first != last else ''}{' to '.join(wanted)}: its times are from "
                f"{min(self.stamps)} to {max(self.stamps)}"
            )
        return found

    def after(self, index: int, steps: int) -> Any:
        """The time that a forecast of so many steps from time `index` is for."""
        time, months = self.times[index], steps * self.months
        if not months:
            return advanced(time, steps * self.run.lead_hours)
        begin, _ = _month(time, months)
        month = stamp(begin)[:7]
        there = [number for number, when in enumerate(self.stamps) if when[:7] == month]
        same_day = len({when[7:] for when in self.stamps}) == 1
        return self.times[there[0]] if there else months_later(time, months, same_day=same_day)

    def index_of(self, time: Any) -> int | None:
        """Where the source has a time; None: it has not."""
        found = np.flatnonzero(self.times == time)
        return int(found[0]) if len(found) else None


@contextmanager
def open_states(
    run: LoadedRun,
    source: Sequence[str],
    *,
    constants: str | None = None,
    units: Mapping[str, str] | None = None,
    select: Mapping[str, str] | None = None,
    time: str | None = None,
) -> Iterator[States]:
    """Open a source as a run's input.

    Args:
        run: Its variables are looked for, and its grid.
        source: netCDF, Zarr or GRIB, as `prepare` takes it, one or several.
        constants: A further file on the same grid, with orography and land-sea mask.
        units: Unit by variable, where the source names none or a wrong one.
        select: Value by coordinate, where the source has several runs or members.
        time: Of the source, where it states none: an ISO date.

    Raises:
        InputError: If the source lacks a variable, is of another grid or of no known time.
    """
    record = _record(run.data)
    # as the run's data were made of such a source
    options = record.get("options", {})
    regrid, orography = options.get("regrid"), options.get("orography")
    told = ", ".join(source)
    with ExitStack() as stack:
        opened = open_source(
            source,
            variables=[name for name in run.variables if name not in STATIC],
            select=select,
            units=units,
            winds=options.get("winds"),
            orography=orography,
            check_ground=constants is None,
        )
        dataset = _timed(stack.enter_context(opened), told, time)
        further = None
        if constants is not None:
            further = stack.enter_context(open_source(constants, units=units, orography=orography))
        times, stamps = _read_times(dataset["time"])
        dataset, grid = _on_grid(dataset, run, f"the source {told}", regrid)
        if further is not None:
            further, _ = _on_grid(further, run, f"the file of constants {constants}", regrid)
        places = [dataset] if further is None else [dataset, further]
        named = orography if any(orography in place.data_vars for place in places) else None
        own = _own_ground(run, places, named)
        wanted = [name for name in run.variables if name not in own]
        levels = _levels(wanted, dataset)
        with _advice_of_forecasts(wanted):
            found = find_fields(
                dataset,
                further,
                grid,
                variables=wanted,
                levels=levels,
                units=units or {},
                orography=named,
                sea_level_where_missing=bool(options.get("sea_level_where_missing")),
                ground=OROGRAPHY.name in wanted,
            )
        missing = [name for name in wanted if name not in found.names]
        if missing:
            raise InputError(f"the run's input has {', '.join(missing)}, and {told} has not: give a source that has")
        if OROGRAPHY.name in wanted:
            _check_ground(run, found.constant[OROGRAPHY.name])
        months = _months(stamps if len(stamps) > 1 else _stamps_of(record), run.lead_hours)
        fields = {field.name: field for field in found.changing}
        yield States(run, fields, {**found.constant, **own}, grid, times, stamps, months)


@contextmanager
def _advice_of_forecasts(variables: Sequence[str]) -> Iterator[None]:
    """What `find_fields` says to do, where that is an option of `prepare` that a forecast has not."""
    try:
        yield
    except InputError as error:
        what, _, advice = str(error).rpartition(": ")
        if not any(f"option {name}" in advice for name in ("variables", "levels")):
            raise
        raise InputError(f"{what}: give a source that has the run's input, {', '.join(variables)}") from error


def advanced(time: Any, hours: float) -> Any:
    """A time of any calendar, later by hours."""
    if isinstance(time, np.datetime64):
        return time + np.timedelta64(round(3600 * hours), "s")
    return time + datetime.timedelta(seconds=round(3600 * hours))


def months_later(time: Any, months: int, *, same_day: bool) -> Any:
    """A time of any calendar, later by calendar months: on the same day, or as far into the month, of its length."""
    (begin, end), (later, later_end) = _month(time, 0), _month(time, months)
    if same_day:
        return later + (time - begin)
    second = np.timedelta64(1, "s") if isinstance(time, np.datetime64) else datetime.timedelta(seconds=1)
    return later + int((time - begin) / (end - begin) * ((later_end - later) / second)) * second


def _month(time: Any, months: int) -> tuple[Any, Any]:
    """Begin and end of the month that is so many after that of a time."""
    if isinstance(time, np.datetime64):
        month = time.astype("datetime64[M]") + months
        return month.astype("datetime64[s]"), (month + 1).astype("datetime64[s]")
    counts = [12 * time.year + time.month - 1 + months + further for further in (0, 1)]
    first = time.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    begin, end = (first.replace(year=count // 12, month=count % 12 + 1) for count in counts)
    return begin, end


def stamp(time: Any) -> str:
    """ISO 8601, to the second."""
    return str(np.datetime_as_string(time, unit="s")) if isinstance(time, np.datetime64) else time.isoformat()


def _stretches(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive indices: first, and one after the last."""
    start = indices[0]
    for before, after in pairwise([*indices, -1]):
        if after != before + 1:
            yield start, before + 1
            start = after


def _date(text: str) -> str:
    date = written_date(text)
    if date is None:
        raise InputError(
            f"start is {ALL!r}, {LAST!r}, a year or an ISO date of UTC such as 2000 or 2000-06-01T12, not {text!r}"
        )
    return date


def _moment(text: str) -> np.datetime64:
    try:
        return np.datetime64(_date(text), "ns")
    except ValueError as error:
        raise InputError(f"start {text}: {error}") from error


def _timed(dataset: xr.Dataset, source: str, time: str | None) -> xr.Dataset:
    """A source of one state has a time axis too."""
    if "time" in dataset.dims:
        return dataset
    changing = {name: array for name, array in dataset.data_vars.items() if not _is_static(str(name), array)}
    if not changing:
        raise InputError(f"{source} has nothing that changes in time, only {', '.join(map(str, dataset.data_vars))}")
    if time in (None, ALL, LAST):
        raise InputError(
            f"{source} states no time: say which one it is of with --start, an ISO date such as 2020-01-01T06"
        )
    moment = np.array([_moment(str(time))])
    changing = {name: array.expand_dims(time=moment) for name, array in changing.items()}
    return dataset.assign_coords(time=moment).assign(changing)


def _is_static(name: str, array: xr.DataArray) -> bool:
    variable = None if "level" in array.dims else find_variable(name, has_levels=False)
    return variable is not None and variable.name in STATIC


def _read_times(time: xr.DataArray) -> tuple[NDArray[Any], tuple[str, ...]]:
    values, stamps = dates(time)
    twice = next((one for one, other in pairwise(sorted(stamps)) if one == other), None)
    if twice is not None:
        raise InputError(f"the time {twice} comes twice: remove the duplicate from the source")
    return values, stamps


def _months(stamps: Sequence[str], lead_hours: float) -> int:
    """Calendar months from input to forecast, where times step in them and the lead time is so many."""
    counts = {12 * int(stamp[:4]) + int(stamp[5:7]) for stamp in stamps}
    days = {int(stamp[8:10]) for stamp in stamps}
    if len(stamps) < 2 or len(counts) < len(stamps):
        return 0
    # on one day and hour, in the middle, as CMIP has it, or on the last day of each
    if len({stamp[7:] for stamp in stamps}) > 1 and not days <= {14, 15, 16, 17} and min(days) < 28:
        return 0
    months = round(lead_hours / HOURS_PER_MONTH)
    close = abs(lead_hours - months * HOURS_PER_MONTH) <= MONTHS_MAY_DIFFER * lead_hours
    return months if months and close else 0


def _levels(variables: Sequence[str], dataset: xr.Dataset) -> list[int] | None:
    """Pressure levels that the run's variables name, where the source has levels and they are others than ClimaX's."""
    named = [re.fullmatch(r"(.+)_(\d+)", name) for name in variables]
    levels = {int(match[2]) for match in named if match and find_variable(match[1], has_levels=True)}
    return None if levels <= set(CLIMAX_LEVELS_HPA) or "level" not in dataset.coords else sorted(levels)


def _record(data: Path) -> Mapping[str, Any]:
    """How the run's data were prepared; nothing, where something else prepared them."""
    try:
        record = json.loads((data / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("options"), dict) else {}


def _stamps_of(record: Mapping[str, Any]) -> list[str]:
    shards = record.get("shards", [])
    return sorted({str(shard.get(end)) for shard in shards for end in ("first", "last")})


# ---- the grid ------------------------------------------------------------------------------------


def _on_grid(dataset: xr.Dataset, run: LoadedRun, what: str, regrid: str | None) -> tuple[xr.Dataset, Grid]:
    """The source cut to the run's rows and columns, in their order; and the way from there to the run's pixels."""
    for name in ("lat", "lon"):
        if name not in dataset.coords:
            raise InputError(f"{what} has no {'latitude' if name == 'lat' else 'longitude'}, and the run has")
    lat, lon = dataset["lat"], dataset["lon"]
    if run.places is None and lat.ndim == lon.ndim == 1:
        rows = _found(lat.to_numpy(), run.lat, goes_round=False)
        columns = _found(lon.to_numpy(), run.lon, goes_round=True)
        if rows is not None and columns is not None:
            if (len(rows), len(columns)) != (lat.size, lon.size):
                logger.info("%s: cut from %d x %d to the run's %d x %d pixels", what, lat.size, lon.size, *run.shape)
            dims = str(lat.dims[0]), str(lon.dims[0])
            lat2d = np.repeat(np.asarray(run.lat, dtype=np.float64)[:, None], run.shape[1], axis=1)
            grid = Grid(dims, run.lat, run.lon, lat2d, None, (False, False), 0, (run.lat, run.lon))
            return dataset.isel({dims[0]: rows, dims[1]: columns}), grid
        if regrid is None:
            raise _other_grid(what, run, lat.to_numpy(), lon.to_numpy())
    elif run.places is None or lat.ndim != 2:
        raise InputError(
            f"{what} and the run's data are on grids of two kinds, one with a latitude a row and one with a latitude a "
            "pixel: give a source on the run's grid"
        )
    else:
        dataset = _cut(dataset, run.places, what)
    grid = read_grid(dataset, patch_size=1, regrid=regrid)
    height, width = run.shape
    grid = Grid(
        grid.dims,
        grid.lat[:height],
        grid.lon[:width],
        grid.lat2d[:height, :width],
        None if grid.lon2d is None else grid.lon2d[:height, :width],
        grid.flips,
        grid.roll,
        grid.source,
        grid.regridded,
    )
    pairs = [(grid.lat, run.lat), (grid.lon, run.lon)]
    if run.places is not None and grid.lon2d is not None:
        pairs = [(grid.lat2d, run.places[0]), (grid.lon2d, run.places[1])]
    if any(here.shape != there.shape or not same_places(here, there).all() for here, there in pairs):
        raise _other_grid(what, run, lat.to_numpy(), lon.to_numpy())
    return dataset, grid


def _cut(dataset: xr.Dataset, places: tuple[Array, Array], what: str) -> xr.Dataset:
    """A grid with a place a pixel without what lies around the run's, as its first and last pixel say."""
    lat, lon = dataset["lat"], dataset["lon"].transpose(*dataset["lat"].dims)
    corners = []
    for at in ((0, 0), (-1, -1)):
        apart = np.hypot(degrees_apart(lat.to_numpy(), places[0][at]), degrees_apart(lon.to_numpy(), places[1][at]))
        corners.append(np.unravel_index(int(apart.argmin()), apart.shape))
    inside = [slice(int(min(ends)), int(max(ends)) + 1) for ends in zip(*corners, strict=True)]
    shape = tuple(part.stop - part.start for part in inside)
    if shape != places[0].shape or shape == lat.shape:
        return dataset  # another grid, which is said next, or all of it
    logger.info("%s: cut from %d x %d to the run's %d x %d pixels", what, *lat.shape, *shape)
    return dataset.isel(dict(zip(lat.dims, inside, strict=True)))


def _found(here: Array, wanted: Array, *, goes_round: bool) -> NDArray[np.integer] | None:
    """Indices in `here` of what is wanted, side by side there too; None: it is not all there."""
    apart = degrees_apart(np.asarray(here)[None], np.asarray(wanted)[:, None])
    indices = apart.argmin(axis=1)
    if (apart.min(axis=1) >= SAME_PLACE_DEG).any():
        return None
    steps = np.diff(indices)
    if goes_round:  # over the seam of a grid that goes all the way round
        steps = np.where(np.abs(steps) == len(here) - 1, -np.sign(steps), steps)
    # every second row of a finer grid is not the grid of which the run knows the means
    return indices if (steps == 1).all() or (steps == -1).all() else None


def _other_grid(what: str, run: LoadedRun, lat: Array, lon: Array) -> InputError:
    def of(lat: Array, lon: Array, shape: Sequence[int]) -> str:
        size = " x ".join(map(str, shape))
        return f"{size} pixels, {lat.min():g} to {lat.max():g} north and {lon.min():g} to {lon.max():g} east"

    shape = (lat.size, lon.size) if lat.ndim == lon.ndim == 1 else lat.shape
    return InputError(
        f"{what} is of another grid than the run: it has {of(lat, lon, shape)}, and the run "
        f"{of(run.lat, run.lon, run.shape)}; give one that has the run's rows and columns, or regrid it to them first"
    )


# ---- the ground ----------------------------------------------------------------------------------


def _own_ground(run: LoadedRun, places: Sequence[xr.Dataset], orography: str | None) -> dict[str, Array]:
    """Static fields of the run's data, where the sources lack them, under `orography` or a known name."""
    lacking = [
        variable.name
        for variable in (OROGRAPHY, LAND_SEA_MASK)
        if variable.name in run.variables
        and not any(_has(place, variable.name) for place in places)
        and not (variable is OROGRAPHY and orography is not None)
    ]
    own = _own_constants(run, lacking)
    if own:
        logger.info("%s: not in the source, taken from the run's data in %s", ", ".join(own), run.data)
    return own


def _has(dataset: xr.Dataset, name: str) -> bool:
    return any(
        _is_static(str(called), array) and getattr(find_variable(str(called), has_levels=False), "name", None) == name
        for called, array in dataset.data_vars.items()
    )


def _own_constants(run: LoadedRun, names: Sequence[str]) -> dict[str, Array]:
    """Static fields of the run's data, `[H, W]`; those that are not there are left out."""
    shards = sorted((run.data / "train").glob("*.npz"))
    if not names or not shards:
        return {}
    arrays = load_npz(shards[0], "prepare the run's data again", names)
    return {name: values[0, 0] for name, values in arrays.items() if values.shape[-2:] == run.shape}


def _check_ground(run: LoadedRun, orography_m: Array) -> None:
    """Say so where the run was trained over another ground."""
    own = _own_constants(run, [OROGRAPHY.name]).get(OROGRAPHY.name)
    apart = 0.0 if own is None else float(np.abs(own - orography_m).max())
    if apart > GROUND_MAY_DIFFER_M:
        logger.warning(
            "the source's orography is up to %.0f m off that of the run's training, and is taken as it is", apart
        )
