"""Forecasts as CF netCDF, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cftime
import netCDF4
import numpy as np

from climax_elevation.data.names import VARIABLES, Variable
from climax_elevation.errors import InputError
from climax_elevation.files import whole
from climax_elevation.forecast.loaded import Array
from climax_elevation.forecast.states import States

EPOCH = "seconds since 1970-01-01 00:00:00"
UNITS = {
    **{"k": "K", "ms-1": "m s-1", "pa": "Pa", "jm-2": "J m-2", "m": "m"},
    **{"m2s-2": "m2 s-2", "%": "percent", "kgkg-1": "kg kg-1", "": "1"},
}
"""CF's spelling of ClimaX's units."""
WINDS = {
    "10m_u_component_of_wind": "eastward_wind",
    "10m_v_component_of_wind": "northward_wind",
    "u_component_of_wind": "eastward_wind",
    "v_component_of_wind": "northward_wind",
}
STANDARD_NAMES = {
    "2m_temperature": "air_temperature",
    "temperature": "air_temperature",
    "mean_sea_level_pressure": "air_pressure_at_mean_sea_level",
    "surface_pressure": "surface_air_pressure",
    "total_precipitation": "lwe_thickness_of_precipitation_amount",
    "geopotential": "geopotential",
    "relative_humidity": "relative_humidity",
    "specific_humidity": "specific_humidity",
}


class Output:
    """A file that forecasts are written into, one start after the other.

    Args:
        file: Open for writing.
        states: Where the forecasts start.
        starts: Indices of the times.
        steps: Forecasts from each.
        attributes: Of the file.
    """

    def __init__(
        self, file: netCDF4.Dataset, states: States, starts: Sequence[int], steps: int, attributes: Mapping[str, Any]
    ) -> None:
        self._file = file
        run = states.run
        self._names = run.out_variables
        file.setncatts({"Conventions": "CF-1.10", **attributes})
        file.createDimension("time", len(starts))
        file.createDimension("lead_time", steps)
        self._times(states, starts, steps)
        dims, further = self._places(states), ["valid_time"]
        if dims[0] == "y":
            further += ["latitude", "longitude"]
        for name in run.out_variables:
            variable = file.createVariable(name, "f4", ("time", "lead_time", *dims))
            variable.setncatts(described(name, states))
            variable.coordinates = " ".join(further)

    def write(self, first: int, step: int, values: Array) -> None:
        """Forecasts `[B, Vo, h, w]`, in physical units, of starts number `first` and on, after step number `step`."""
        with _os_errors():
            for index, name in enumerate(self._names):
                self._file[name][first : first + len(values), step] = values[:, index]

    def _times(self, states: States, starts: Sequence[int], steps: int) -> None:
        begin = [states.times[index] for index in starts]
        valid = [[states.after(index, step) for step in range(1, steps + 1)] for index in starts]
        calendar = getattr(begin[0], "calendar", "proleptic_gregorian")
        for name, dims, times, standard_name in (
            ("time", ("time",), begin, "forecast_reference_time"),
            ("valid_time", ("time", "lead_time"), valid, "time"),
        ):
            variable = self._file.createVariable(name, "i8", dims)
            variable.setncatts({"standard_name": standard_name, "units": EPOCH, "calendar": calendar})
            variable[:] = _seconds(np.array(times), calendar)
        lead = self._file.createVariable("lead_time", "f8", ("lead_time",))
        lead.setncatts({"standard_name": "forecast_period", "units": "hours"})
        if states.months:
            lead.comment = "as the model is told; valid_time goes by calendar months"
        lead[:] = states.run.lead_hours * np.arange(1, steps + 1)

    def _places(self, states: States) -> tuple[str, str]:
        run = states.run
        rows, columns = run.pixels
        names = (("latitude", "degrees_north"), ("longitude", "degrees_east"))
        lat, lon = run.lat[rows], run.lon[columns]
        dims = ("latitude", "longitude") if run.places is None else ("y", "x")
        axes: list[tuple[tuple[str, ...], Array]] = [(dims[:1], lat), (dims[1:], lon)]
        if run.places is not None:
            axes = [(dims, values[rows, columns]) for values in run.places]
        for name, size in zip(dims, (len(lat), len(lon)), strict=True):
            self._file.createDimension(name, size)
        for (name, unit), (over, values) in zip(names, axes, strict=True):
            variable = self._file.createVariable(name, "f8", over)
            variable.setncatts({"standard_name": name, "units": unit})
            variable[:] = values
        return dims


@contextmanager
def writing(
    path: Path, states: States, starts: Sequence[int], steps: int, attributes: Mapping[str, Any]
) -> Iterator[Output]:
    """The file to write forecasts into; it is there at the end of the block, and not before.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial, _netcdf(partial) as file:
            yield Output(file, states, starts, steps, attributes)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror or error}): name another file, or make room") from error


@contextmanager
def _netcdf(path: Path) -> Iterator[netCDF4.Dataset]:
    file = netCDF4.Dataset(path, "w")
    try:
        yield file
    except BaseException:
        with suppress(RuntimeError):  # what is half written goes anyway
            file.close()
        raise
    with _os_errors():
        file.close()


@contextmanager
def _os_errors() -> Iterator[None]:
    """netCDF4's word for a full disk is RuntimeError, which torch's mistakes are too."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def described(name: str, states: States) -> dict[str, str]:
    """A variable's attributes: unit, names, and level."""
    variable, level = known(name)
    if variable is None:
        field = states.fields.get(name)
        unit = None if field is None else field.array.attrs.get("units")
        return {"long_name": name.replace("_", " "), **({} if unit is None else {"units": str(unit)})}
    attributes = {"units": UNITS[next(iter(variable.units))], "long_name": variable.name.replace("_", " ")}
    # winds of a projected grid may be relative to it
    standard_names = STANDARD_NAMES | (WINDS if states.run.places is None else {})
    if variable.name in standard_names:
        attributes["standard_name"] = standard_names[variable.name]
    if level is not None:
        attributes["long_name"] += f" at {level} hPa"
    return attributes


def known(name: str) -> tuple[Variable | None, int | None]:
    """One of ClimaX's variables, and its pressure level in hPa."""
    base, _, level = name.rpartition("_")
    for variable in VARIABLES:
        if not variable.on_levels and name == variable.name:
            return variable, None
        if variable.on_levels and base == variable.name and level.isdigit():
            return variable, int(level)
    return None, None


def _seconds(times: Array, calendar: str) -> Array:
    if np.issubdtype(times.dtype, np.datetime64):
        return times.astype("datetime64[s]").astype(np.int64)
    return np.asarray(cftime.date2num(times, EPOCH, calendar=calendar), dtype=np.int64)
