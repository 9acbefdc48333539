"""Which vertical coordinates are pressure: ClimaX's levels are hPa, and nothing else is read as such."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import xarray as xr

from climax_elevation.terrain.units import PRESSURE

logger = logging.getLogger(__name__)

NOT_PRESSURE = "other_level"
"""What a coordinate is renamed to that is called `level` and is no pressure."""

_SURELY = ("pressure_level", "isobaricinhpa", "isobaricinpa", "plev", "pressure", "isobaric", "pressure_levels")
_PERHAPS = ("level", "lev", "levels")
NAMES = (*_SURELY, *_PERHAPS)
"""Under which a pressure may be filed, in lower case."""

_JUDGED = "climax_elevation_is_pressure"
_OF_THE_MODEL = ("sigma", "hybrid", "model level", "model_level")
_OTHER_WORDS = ("model", "layer", "height", "depth", "altitude", "theta", "eta", "soil")
_NO_UNIT = ("", "1", "level", "levels", "none", "dimensionless")
_HIGHEST_HPA = 1100.0
_SURELY_HPA = 300.0  # heights, and numbers of layers, are smaller as often as not
_LOWEST_LEVELS = 0.01  # hPa from a whole number
_USUAL_HPA = frozenset(
    (1, 2, 3, 5, 7, 10, 20, 30, 40, 50, 60, 70, 80, 90, 115, 125, 150, 170, 175, 225, 775, 825, 875, 925, 950, 975)
) | frozenset(range(100, 1100, 25))


def judged(part: xr.Dataset, units: Mapping[str, str]) -> xr.Dataset:
    """`part` with vertical coordinates that remember whether they are pressure: one value alone does not tell.

    Args:
        part: The source.
        units: By name, where the source states none or a wrong one.
    """
    for name, coordinate in part.coords.items():
        if str(name).lower() in NAMES and coordinate.ndim < 2:
            if name in units:
                coordinate = coordinate.assign_attrs(units=units[str(name)])
            part = part.assign_coords({name: coordinate.assign_attrs({_JUDGED: int(is_pressure(coordinate))})})
    return part


def is_pressure(coordinate: xr.DataArray) -> bool:
    """Whether a vertical coordinate is pressure, by its unit, its names, and where those say nothing by its values."""
    if _JUDGED in coordinate.attrs:
        return bool(coordinate.attrs[_JUDGED])
    unit = _plain_unit(coordinate)
    said = " ".join(str(coordinate.attrs.get(key, "")) for key in ("long_name", "standard_name", "description")).lower()
    if any(word in said for word in _OF_THE_MODEL):
        return False  # in hPa too: what pressure it is where the ground is at 1000 hPa
    if unit in PRESSURE:
        return bool(_in_hpa(coordinate).max() <= _HIGHEST_HPA)
    if unit not in _NO_UNIT:
        return False
    if "pressure" in said and "model" not in said:
        return True
    if any(word in said for word in _OTHER_WORDS):
        return False
    if str(coordinate.name).lower() in _SURELY:
        return bool(_in_hpa(coordinate).max() <= _HIGHEST_HPA)
    return _may_be_pressure(coordinate) and bool(_in_hpa(coordinate).max() >= _SURELY_HPA)


def _may_be_pressure(coordinate: xr.DataArray) -> bool:
    """Whether what only is called a level has values of pressures.

    Levels 1, 2, 3 to 137 are numbers of layers, and 0 to 1 is sigma: pressures have the usual values.
    """
    values = _in_hpa(coordinate)
    numbered = len(values) > 1 and bool((np.abs(np.diff(values)) == 1).all())
    usual = all(value in _USUAL_HPA for value in values)
    return str(coordinate.attrs.get("called", coordinate.name)).lower() in _PERHAPS and not numbered and usual


def levels_hpa(level: xr.DataArray) -> list[int | None]:
    """Whole hPa of each level; None where one is no whole number, which ClimaX has no name for."""
    values = _in_hpa(level)
    return [round(value) if abs(value - round(value)) < _LOWEST_LEVELS and value >= 0.5 else None for value in values]


def tell_unit(level: xr.DataArray) -> None:
    """Say what levels without a unit are taken for."""
    if _plain_unit(level) in _NO_UNIT:
        logger.warning(
            "levels %s name no unit and are taken as hPa: if they are something else, state it with the option units, "
            "such as level=m",
            ", ".join(f"{value:g}" for value in _in_hpa(level)),
        )


def told(coordinate: xr.DataArray) -> str:
    """What a vertical coordinate is, for messages: its name, unit, what it says of itself, and its values."""
    values = np.atleast_1d(coordinate.to_numpy())
    about = [str(coordinate.attrs[key]) for key in ("long_name", "units") if coordinate.attrs.get(key)]
    called = coordinate.attrs.get("called", coordinate.name)
    told = f"{called!r} ({', '.join([*about, f'{values[0]} to {values[-1]}'])})"
    if not about and np.issubdtype(values.dtype, np.number) and _may_be_pressure(coordinate):
        return f"{told}, which has no unit: state it with the option units {called}=hPa if it is one"
    return told


def suffix(coordinate: xr.DataArray, index: int) -> str:
    """The end of a variable's name at one value of a coordinate that is no pressure: `lev3`, `level50m`."""
    value = np.atleast_1d(coordinate.to_numpy())[index]
    unit = _plain_unit(coordinate)
    unit = "" if unit in _NO_UNIT or not unit.isalpha() else unit
    shown = f"{value:g}" if np.issubdtype(np.asarray(value).dtype, np.number) else str(value)
    return f"{coordinate.attrs.get('called', coordinate.name)}{shown}{unit}"


def _in_hpa(coordinate: xr.DataArray) -> np.ndarray:
    values = np.atleast_1d(coordinate.to_numpy()).astype(np.float64)
    unit = _plain_unit(coordinate)
    if unit in PRESSURE:
        return values * PRESSURE[unit][0] / 100
    # No pressure on Earth is above 1100 hPa, so larger numbers without a unit are pascals.
    in_pascals = str(coordinate.name).lower() == "isobaricinpa" or bool(values.max() > _HIGHEST_HPA)
    return values / 100 if in_pascals else values


def _plain_unit(coordinate: xr.DataArray) -> str:
    return str(coordinate.attrs.get("units", "")).strip().lower().replace(" ", "_").replace("**", "")
