"""Common names for the coordinates of a source: `time`, `level`, `lat` and `lon`, in degrees."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import numpy as np
import xarray as xr

from climax_elevation.data.levels import NAMES as LEVELS
from climax_elevation.data.levels import NOT_PRESSURE, is_pressure
from climax_elevation.data.times import is_date
from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

TIMES = ("time", "valid_time")
LATITUDES = ("lat", "latitude", "xlat", "nav_lat")
LONGITUDES = ("lon", "longitude", "xlong", "nav_lon")
KNOWN = frozenset((*TIMES, *LEVELS, *LATITUDES, *LONGITUDES))

_OF_THE_PLANE = ("grid_latitude", "grid_longitude", "projection_x_coordinate", "projection_y_coordinate")
_DEGREES = re.compile(r"deg(rees?)?(_?(n|e|s|w|north|east|south|west|true))?|°(n|e)?", re.I)
_RADIANS = re.compile(r"rad(ians?)?(_?(n|e|north|east))?", re.I)
_LARGEST_RADIANS = (1.5709, 6.2833)  # a quarter and a whole turn


def name_coordinates(part: xr.Dataset) -> xr.Dataset:
    """`part` with coordinates called `time`, `level`, `lat` and `lon`, and `level` only where it is pressure."""
    names = {}
    for ours, theirs in (("time", TIMES), ("level", LEVELS), ("lat", LATITUDES), ("lon", LONGITUDES)):
        # Some files keep 2-D latitude and longitude among the data; a variable `pressure` is no level.
        among = part.variables if ours in ("lat", "lon") else {**part.coords, **part.sizes}
        here = [str(name) for name in among if str(name).lower() in theirs and _may_be(part, str(name), ours)]
        here = [name for name in here if name in part.dims] or here
        if not here and ours != "level":
            here = _by_attributes(part, ours)
        if here and ours not in here:
            names[here[0]] = ours
    others = [
        str(name)
        for name, coordinate in part.coords.items()
        if str(name).lower() in LEVELS and name not in names and coordinate.ndim < 2 and not is_pressure(coordinate)
    ]
    if others:
        part = part.assign_coords({others[0]: part[others[0]].assign_attrs(called=others[0])})
        names[others[0]] = NOT_PRESSURE
    part = part.rename({old: new for old, new in names.items() if new not in part.variables or new in names})
    return part.set_coords([name for name in ("lat", "lon") if name in part.data_vars])


def _may_be(part: xr.Dataset, name: str, ours: str) -> bool:
    """Whether what has the name of a coordinate is one of that kind."""
    if name not in part.variables:
        return True
    if ours == "level":
        return is_pressure(part[name])
    return ours == "time" or part[name].attrs.get("standard_name") not in _OF_THE_PLANE


def _by_attributes(part: xr.Dataset, ours: str) -> list[str]:
    """The coordinate that says by CF's attributes, or by holding dates, what it is; none where several do."""
    if ours == "time":
        dates = [str(name) for name in part.indexes if _holds_dates(part[name])]
        return dates if len(dates) == 1 else []
    standard, unit = {"lat": ("latitude", "degrees?_?n"), "lon": ("longitude", "degrees?_?e")}[ours]
    found = [
        str(name)
        for name, array in part.variables.items()
        if array.attrs.get("standard_name") == standard
        or ("standard_name" not in array.attrs and re.match(unit, str(array.attrs.get("units", "")), re.I))
    ]
    return found if len(found) == 1 else []


def _holds_dates(array: xr.DataArray) -> bool:
    values = array.to_numpy()
    return values.size > 0 and is_date(values.reshape(-1)[0])


def in_degrees(part: xr.Dataset, units: Mapping[str, str]) -> xr.Dataset:
    """`part` with latitudes and longitudes in degrees, by the unit that is stated, or that the values allow.

    Raises:
        InputError: If they are lengths on a plane, or name no unit and may be radians.
    """
    if "lat" not in part.coords or "lon" not in part.coords:
        return part
    stated = {name: _stated(units, long, part[name]) for name, long in (("lat", "latitude"), ("lon", "longitude"))}
    for name, unit in stated.items():
        coordinate = part[name]
        if unit is None:
            continue
        if _RADIANS.fullmatch(unit):
            logger.info("%s: radians, turned into degrees", name)
            attributes = {**coordinate.attrs, "units": "degrees"}
            part = part.assign_coords({name: (coordinate.dims, np.rad2deg(coordinate.to_numpy()), attributes)})
        elif not _DEGREES.fullmatch(unit):
            raise InputError(
                f"{_long(name)} is in {unit!r}, and places are known by degrees: give a file with latitude and "
                f"longitude in degrees, 1-D, or 2-D on the grid, or state the unit with the option units {name}=degrees"
            )
    if list(stated.values()) != [None, None]:
        return part
    if _may_be_lengths(part):
        raise InputError(
            f"latitudes from {float(part.lat.min()):g} to {float(part.lat.max()):g} and longitudes from "
            f"{float(part.lon.min()):g} to {float(part.lon.max()):g} name no unit and may be lengths on a plane: state "
            "the unit with the option units, lat=degrees lon=degrees, or give latitudes and longitudes"
        )
    if _may_be_radians(part):
        raise InputError(
            f"latitudes from {float(part.lat.min()):g} to {float(part.lat.max()):g} and longitudes from "
            f"{float(part.lon.min()):g} to {float(part.lon.max()):g} name no unit and may be radians: state the unit "
            "with the option units, lat=radians lon=radians or lat=degrees lon=degrees"
        )
    return part


def _stated(units: Mapping[str, str], long: str, coordinate: xr.DataArray) -> str | None:
    for name in (coordinate.name, long):
        if name in units:
            return units[str(name)]
    unit = str(coordinate.attrs.get("units", "")).strip()
    return unit or None


def _may_be_lengths(part: xr.Dataset) -> bool:
    """Whether both begin, or have their middle, at 0, and the globe does not."""
    lat, lon = (part[name].to_numpy().astype(np.float64) for name in ("lat", "lon"))
    if lat.ndim != 1 or lat.size < 2 or lon.size < 2 or np.abs(lat).max() > 80:
        return False
    ends = [sorted((values[0], values[-1])) for values in (lat, lon)]
    return all(low == 0 for low, _ in ends) or all(np.isclose(low, -high) for low, high in ends)


def _may_be_radians(part: xr.Dataset) -> bool:
    largest = [float(np.abs(part[name]).max()) for name in ("lat", "lon")]
    return all(value <= limit for value, limit in zip(largest, _LARGEST_RADIANS, strict=True))


def _long(name: str) -> str:
    return {"lat": "latitude", "lon": "longitude"}[name]
