"""Which vertical coordinates are pressure: ClimaX's levels are hPa, and nothing else is read as such."""

from __future__ import annotations

import numpy as np
import xarray as xr

from climax_elevation.terrain.units import PRESSURE

NOT_PRESSURE = "other_level"
"""What a coordinate is renamed to that is called `level` and is no pressure."""

_SURELY = ("pressure_level", "isobaricinhpa", "isobaricinpa", "plev", "pressure", "isobaric", "pressure_levels")
_PERHAPS = ("level", "lev", "levels")
NAMES = (*_SURELY, *_PERHAPS)
"""Under which a pressure may be filed, in lower case."""

_JUDGED = "climax_elevation_is_pressure"
_OTHER_WORDS = ("model", "sigma", "hybrid", "layer", "height", "depth", "altitude", "theta", "eta", "soil")
_NO_UNIT = ("", "1", "level", "levels", "none", "dimensionless")
_HIGHEST_HPA = 1100.0
_LOWEST_LEVELS = 0.01  # hPa from a whole number
_USUAL_HPA = frozenset(
    (1, 2, 3, 5, 7, 10, 20, 30, 40, 50, 60, 70, 80, 90, 115, 125, 150, 170, 175, 225, 775, 825, 875, 925, 950, 975)
) | frozenset(range(100, 1100, 25))


def judged(part: xr.Dataset) -> xr.Dataset:
    """`part` with vertical coordinates that remember whether they are pressure: one value alone does not tell."""
    for name, coordinate in part.coords.items():
        if str(name).lower() in NAMES and coordinate.ndim < 2:
            part = part.assign_coords({name: coordinate.assign_attrs({_JUDGED: int(is_pressure(coordinate))})})
    return part


def is_pressure(coordinate: xr.DataArray) -> bool:
    """Whether a vertical coordinate is pressure, by its unit, its names, and where those say nothing by its values."""
    if _JUDGED in coordinate.attrs:
        return bool(coordinate.attrs[_JUDGED])
    name = str(coordinate.name).lower()
    unit = _plain_unit(coordinate)
    if unit in PRESSURE:
        return bool(_in_hpa(coordinate).max() <= _HIGHEST_HPA)
    if unit not in _NO_UNIT:
        return False
    said = " ".join(str(coordinate.attrs.get(key, "")) for key in ("long_name", "standard_name", "description")).lower()
    if "pressure" in said and not any(word in said for word in ("hybrid", "sigma", "model")):
        return True
    if any(word in said for word in _OTHER_WORDS):
        return False
    values = _in_hpa(coordinate)
    if name in _SURELY:
        return bool(values.max() <= _HIGHEST_HPA)
    # Levels 1, 2, 3 to 137 are numbers of layers, and 0 to 1 is sigma: pressures have the usual values.
    numbered = len(values) > 1 and bool((np.abs(np.diff(values)) == 1).all())
    return name in _PERHAPS and not numbered and all(value in _USUAL_HPA for value in values)


def levels_hpa(level: xr.DataArray) -> list[int | None]:
    """Whole hPa of each level; None where one is no whole number, which ClimaX has no name for."""
    values = _in_hpa(level)
    return [round(value) if abs(value - round(value)) < _LOWEST_LEVELS and value >= 0.5 else None for value in values]


def told(coordinate: xr.DataArray) -> str:
    """What a vertical coordinate is, for messages: its name, unit, what it says of itself, and its values."""
    values = np.atleast_1d(coordinate.to_numpy())
    about = [str(coordinate.attrs[key]) for key in ("long_name", "units") if coordinate.attrs.get(key)]
    called = coordinate.attrs.get("called", coordinate.name)
    return f"{called!r} ({', '.join([*about, f'{values[0]} to {values[-1]}'])})"


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
