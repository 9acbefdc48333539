"""WRF's output: its time and its coordinates, under names that the rest understands.

By hand and not through xwrf, which decodes the same things, wants a whole `wrfout` with its global attributes, and
leaves files that were cut out of one, or had their dimension renamed, as they are.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from climax_elevation.errors import InputError

_COORDINATES = {"XLAT": "latitude", "XLONG": "longitude"}
_ON_OTHER_POINTS = ("XLAT_U", "XLAT_V", "XLONG_U", "XLONG_V")
_STILL_DEG = 1e-4  # float32 at 180 degrees, with room


def with_wrf_coordinates(part: xr.Dataset) -> xr.Dataset:
    """`part` with a dimension `time` and 2-D coordinates `latitude` and `longitude`; what is not WRF's as it is."""
    if not all(name in part.variables for name in _COORDINATES):
        return part
    part = part.drop_vars([name for name in _ON_OTHER_POINTS if name in part.variables])
    part = _with_time(part)
    for theirs, ours in _COORDINATES.items():
        array = part[theirs]
        if "time" in array.dims:
            array = _unmoving(theirs, array)
        part = part.drop_vars(theirs).assign_coords({ours: array.reset_coords(drop=True).variable})
    return part


def _with_time(part: xr.Dataset) -> xr.Dataset:
    """WRF's `Times` are text, such as 2020-01-01_00:00:00, and its dimension `Time` has no coordinate."""
    dimension = "Time" if "Time" in part.dims else "time"
    if dimension not in part.dims:
        return part
    times = None
    if "Times" in part.variables:
        text = np.char.replace(np.char.strip(part["Times"].to_numpy().astype(str)), "_", "T")
        try:
            times = text.astype("datetime64[ns]")
        except ValueError as error:
            raise InputError(f"WRF's Times are dates such as 2020-01-01_00:00:00, not {text[0]!r}: {error}") from error
    elif "XTIME" in part.variables and np.issubdtype(part["XTIME"].dtype, np.datetime64):
        times = part["XTIME"].to_numpy()
    part = part.drop_vars([name for name in ("Times", "XTIME") if name in part.variables])
    if dimension == "Time":
        own = [] if times is None or "Time" not in part.coords else ["Time"]
        part = part.drop_vars(own).rename(Time="time")
    return part if times is None or "time" in part.coords else part.assign_coords(time=("time", times))


def _unmoving(name: str, array: xr.DataArray) -> xr.DataArray:
    first = array.isel(time=0)
    for step in range(1, array.sizes["time"]):
        if float(np.abs(array.isel(time=step) - first).max()) > _STILL_DEG:
            raise InputError(
                f"{name} changes in time, so the nest moves, and ClimaX's pixels are places: regrid it first"
            )
    return first
