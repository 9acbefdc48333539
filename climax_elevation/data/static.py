"""What does not change in time: orography and land-sea mask, under any name and in a file of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from climax_elevation.data.field import Field, unit_of
from climax_elevation.data.grid import Grid
from climax_elevation.data.names import (
    CALLED,
    HIGHEST_GROUND_M,
    LAND_SEA_MASK,
    OROGRAPHY,
    Variable,
    conversion,
    find_variable,
)
from climax_elevation.data.sentinels import without_sentinels
from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

_HIGHEST_GROUND_FT = HIGHEST_GROUND_M / 0.3048
_PACKED = 1e-3  # of the largest value: what 16 bits may lose, files being packed one by one
_GEOPOTENTIALS = ("geopotential_at_surface", "surface_geopotential", "geopotential", "phis", "fis")
_DOWNLOAD = (
    'of ERA5, download "Geopotential" of the data set on single levels, for any one time, and name its file with the '
    "option constants"
)


@dataclass(frozen=True)
class _Static:
    name: str
    array: xr.DataArray

    @property
    def called(self) -> str:
        """The source's own name."""
        return str(self.array.attrs.get(CALLED, self.name))


def find_static(
    dataset: xr.Dataset,
    constants: xr.Dataset | None,
    grid: Grid,
    wanted: Callable[..., bool],
    units: Mapping[str, str],
    *,
    orography: str | None,
    sea_level_where_missing: bool,
    ground: bool,
) -> dict[str, NDArray[np.float32]]:
    """Land-sea mask where there is one, orography, and latitude, each `[H, W]`.

    Args:
        dataset: The source, coordinates named `time`, `level`, `lat`, `lon`.
        constants: Another source on the same grid, which is looked at first, or None.
        grid: Where the values go.
        wanted: Whether a variable of these names is wanted.
        units: Units by the source's or ClimaX's name, where the source states none or a wrong one.
        orography: The source's name of the orography; None: the first that is known.
        sea_level_where_missing: Whether the orography is 0 m where it is missing.
        ground: Whether the orography is wanted.

    Raises:
        InputError: If there is no orography, or several that differ, or one that changes in time, is no height, or has
            gaps.
    """
    places = [dataset] if constants is None else [constants, dataset]
    found: dict[str, NDArray[np.float32]] = {}
    mask = _find(places, LAND_SEA_MASK)
    if mask is not None and wanted(mask.name, LAND_SEA_MASK.name):
        found[LAND_SEA_MASK.name] = _read(mask, LAND_SEA_MASK, grid, units)
    if ground:
        found[OROGRAPHY.name] = _orography(places, grid, units, orography, sea_level_where_missing)
    found["lattitude"] = grid.lat2d.astype(np.float32)
    return found


def _orography(
    places: Sequence[xr.Dataset],
    grid: Grid,
    units: Mapping[str, str],
    orography: str | None,
    sea_level_where_missing: bool,
) -> NDArray[np.float32]:
    ground = _find(places, OROGRAPHY) if orography is None else _named(places, orography)
    if ground is None:
        raise InputError(
            f"the source has no orography under a name that is known ({_candidates(places, grid)}); {_DOWNLOAD}"
        )
    if sea_level_where_missing:
        ground = _Static(ground.name, _at_sea_level(ground))
    values = _read(ground, OROGRAPHY, grid, units)
    if orography is None:
        _compare(ground, places, values, grid, units)
    return values


def is_static(called: str, array: xr.DataArray) -> bool:
    """Whether a variable of the source is orography or land-sea mask by its name and its dimensions."""
    if "level" in array.dims or len(set(array.dims) - {"time"}) != 2:
        return False
    variable = find_variable(called, has_levels=False)
    if variable is None and array.attrs.get("standard_name") == "surface_altitude" and "time" not in array.dims:
        return True
    return variable is OROGRAPHY or (variable is LAND_SEA_MASK and "time" not in array.dims)


def _find(places: Sequence[xr.Dataset], variable: Variable) -> _Static | None:
    for place in places:
        here = _all_of(place, variable)
        if here:
            return here[0]
    return None


def _all_of(place: xr.Dataset, variable: Variable) -> list[_Static]:
    """In the order of aliases: a field already in metres is preferred to a geopotential."""
    lower = {str(name).lower(): str(name) for name in place.data_vars}
    here = [lower[alias] for alias in (variable.name, *variable.aliases) if alias in lower]
    if variable is OROGRAPHY:
        standard = "surface_altitude"
        here += [
            str(name)
            for name, array in place.data_vars.items()
            if name not in here and array.attrs.get("standard_name") == standard and "time" not in array.dims
        ]
    return [_Static(name, place[name]) for name in here if is_static(name, place[name])]


def _named(places: Sequence[xr.Dataset], orography: str) -> _Static:
    for place in places:
        for name in (orography, "geopotential_at_surface" if orography in ("z", "geopotential") else orography):
            if name in place.data_vars:
                return _Static(name, place[name])
    here = dict.fromkeys(str(name) for place in places for name in place.data_vars)
    raise InputError(f"orography names {orography!r}, and the source has {', '.join(here)}")


def _candidates(places: Sequence[xr.Dataset], grid: Grid) -> str:
    """What may be meant, for whoever knows better."""
    fields = {
        str(name): str(array.attrs.get("units", "no unit"))
        for place in places
        for name, array in place.data_vars.items()
        if find_variable(str(name), has_levels=False) is None
        and set(array.dims) - {"time"} == set(grid.dims)
        and array.sizes.get("time", 1) == 1
        and np.issubdtype(array.dtype, np.number)
    }
    if not fields:
        return "nor any field without a time; another name is given with the option orography"
    told = ", ".join(f"{name} [{unit}]" for name, unit in fields.items())
    return f"if it is one of {told}, say so with the option orography"


def _at_sea_level(ground: _Static) -> xr.DataArray:
    array = without_sentinels(_unchanging(ground))
    missing = int(array.isnull().sum())
    logger.info("%r is missing at %d of %d places: 0 m there", ground.called, missing, array.size)
    return array.fillna(0.0)


def _read(found: _Static, variable: Variable, grid: Grid, units: Mapping[str, str]) -> NDArray[np.float32]:
    array = found.array
    if not set(grid.dims) <= set(array.dims) <= {"time", *grid.dims}:
        raise InputError(f"{found.called!r} is not on the grid {grid.dims}, but on {array.dims}")
    array = _unchanging(found)
    if variable is OROGRAPHY:
        array = without_sentinels(array)  # before its largest value says what unit it is in
    names = (variable.name, found.name, *_ours(found.name))
    unit = unit_of(names, array, units)
    if variable is OROGRAPHY:
        unit = _unit_of_ground(found.called, array, unit, given=any(name in units for name in names))
    field = Field(variable.name, found.called, array, conversion(variable, unit, found.called), variable.valid)
    if field.linear != (1.0, 0.0):
        logger.info("%s: %r in %s times %g gives ClimaX's unit", field.name, found.called, unit, field.linear[0])
    values = field.read(grid)
    if variable is OROGRAPHY and not np.isfinite(values).all():
        raise InputError(
            f"orography ({found.called!r} in the source) has {int((~np.isfinite(values)).sum())} missing values: where "
            f"that is the sea, the option sea_level_where_missing makes it 0 m; without gaps, {_DOWNLOAD}"
        )
    field.check(values, ())
    if variable is OROGRAPHY:
        logger.info("orography from %r: %.0f to %.0f m", found.called, values.min(), values.max())
    return values[0]


def _ours(called: str) -> tuple[str, ...]:
    """What the source may have called a surface geopotential before it was renamed."""
    return ("z", "geopotential") if called == "geopotential_at_surface" else ()


def _unit_of_ground(called: str, array: xr.DataArray, unit: str | None, *, given: bool) -> str | None:
    """A geopotential gives itself away by what it is called, or where it is too large to be a height.

    Raises:
        InputError: If it is called geopotential and stated to be in metres, or may be in feet.
    """
    geopotential = _says_geopotential(called, array)
    if unit is not None:
        if geopotential and conversion(OROGRAPHY, unit, called) == (1.0, 0.0) and not given:
            raise InputError(
                f"{called!r} says that it is geopotential, and that its unit is {unit!r}: say which with the option "
                f"units, {called}=m or '{called}=m2 s-2'"
            )
        return unit
    highest = float(array.max())
    if geopotential or highest > _HIGHEST_GROUND_FT:
        logger.info("%r names no unit, but %s: taken as a geopotential in m2 s-2", called, _why(geopotential, highest))
        return "m2 s-2"
    if highest > HIGHEST_GROUND_M:
        raise InputError(
            f"orography ({called!r} in the source) names no unit and reaches {highest:.0f}, too much for metres, and "
            f"feet or m2 s-2 are possible: state it with the option units, {called}=ft or '{called}=m2 s-2'"
        )
    return None


def _why(geopotential: bool, highest: float) -> str:
    if geopotential:
        return "it is called so"
    return f"reaches {highest:.0f}, and no ground is above {HIGHEST_GROUND_M:.0f} m or {_HIGHEST_GROUND_FT:.0f} ft"


def _says_geopotential(called: str, array: xr.DataArray) -> bool:
    said = [str(array.attrs.get(key, "")).lower().replace("_", " ") for key in ("standard_name", "long_name")]
    return called.lower() in _GEOPOTENTIALS or any(text in ("geopotential", "surface geopotential") for text in said)


def _compare(
    ground: _Static, places: Sequence[xr.Dataset], values: NDArray[np.float32], grid: Grid, units: Mapping[str, str]
) -> None:
    """Refuse another orography in the same place that is not the same; say of one in the other place how it differs."""
    for place in places:
        for other in _all_of(place, OROGRAPHY):
            if other.array.identical(ground.array) or (other.name == ground.name and place is _holder(places, ground)):
                continue
            try:
                theirs = _read(other, OROGRAPHY, grid, units)
            except InputError:
                logger.info("orography taken from %r, not from %r", ground.called, other.called)
                continue
            apart = float(np.abs(theirs - values).max())
            if apart > _PACKED * float(np.abs(values).max()) and place is _holder(places, ground):
                raise InputError(
                    f"{ground.called!r} and {other.called!r} may both be the orography, and differ by up to "
                    f"{apart:.0f} m: say which with the option orography"
                )
            logger.info("orography taken from %r, not from %r, up to %.3g m apart", ground.called, other.called, apart)


def _holder(places: Sequence[xr.Dataset], ground: _Static) -> xr.Dataset | None:
    return next((place for place in places if ground.name in place.data_vars), None)


def _unchanging(found: _Static) -> xr.DataArray:
    called, array = found.called, found.array
    if "time" not in array.dims:
        return array
    first = array.isel(time=0)
    scale = float(np.abs(first).max()) or 1.0
    # Compared where a file begins, in the middle and at the end, because reading all would take as long as writing.
    chunks = array.chunksizes.get("time", ())
    begins = {int(step) for step in np.cumsum((0, *chunks))[1:-1]}
    for step in sorted({*begins, array.sizes["time"] // 2, array.sizes["time"] - 1}):
        if float(np.abs(array.isel(time=step) - first).max()) > _PACKED * scale:
            raise InputError(f"{called!r} should be a static field, but changes in time: give one that does not")
    logger.info("%r has a time axis but does not change: taken from the first time", called)
    return first
