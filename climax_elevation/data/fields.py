"""From the source's variables to ClimaX's channels: which, in what unit, checked for sense."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from climax_elevation.data.field import ANYTHING, BadDataError, Field, unit_of
from climax_elevation.data.grid import Grid
from climax_elevation.data.levels import NAMES as LEVELS
from climax_elevation.data.levels import NOT_PRESSURE, levels_hpa, suffix, tell_unit, told
from climax_elevation.data.names import (
    CLIMAX_LEVELS_HPA,
    LATITUDE_NAMES,
    OROGRAPHY,
    VARIABLES,
    Variable,
    conversion,
    find_variable,
)
from climax_elevation.data.static import find_static, is_static
from climax_elevation.errors import InputError

__all__ = ["BadDataError", "Field", "Fields", "find_fields"]

logger = logging.getLogger(__name__)

_COORDINATES = ("lat", "lon", "latitude", "longitude", *LEVELS)


@dataclass(frozen=True)
class Fields:
    """What is written: fields that change in time, and values `[H, W]` that do not."""

    changing: tuple[Field, ...]
    constant: Mapping[str, NDArray[np.float32]]

    @property
    def names(self) -> tuple[str, ...]:
        """All channels, constants last, as in ClimaX's own files."""
        return (*(field.name for field in self.changing), *self.constant)


def find_fields(
    dataset: xr.Dataset,
    constants: xr.Dataset | None,
    grid: Grid,
    *,
    variables: Sequence[str] | None,
    levels: Sequence[int] | None,
    units: Mapping[str, str],
    orography: str | None = None,
    sea_level_where_missing: bool = False,
    ground: bool = True,
) -> Fields:
    """Choose what is written.

    Args:
        dataset: The source, coordinates named `time`, `level`, `lat`, `lon`.
        constants: Another source on the same grid, for orography and land-sea mask, or None.
        grid: Where the values go.
        variables: ClimaX's or the source's names of what is wanted. None: all that ClimaX knows.
            A name that ClimaX does not know is taken as it is, without a check of its unit.
        levels: Pressure levels in hPa, all of which must be there. None: those of ClimaX's that are.
        units: Units by the source's or ClimaX's name, where the source states none or a wrong one.
        orography: The source's name of the orography; None: the first that is known.
        sea_level_where_missing: Whether the orography is 0 m where it is missing.
        ground: Whether the orography is needed.

    Returns:
        The fields; latitude is always among the constants, and orography where it is needed.

    Raises:
        InputError: If something wanted is missing or ambiguous, or a unit is unknown.
    """
    chosen: dict[str, Field] = {}
    left_out: list[str] = []
    elsewhere: list[str] = []
    wanted = _Wanted(variables)
    for key, array in dataset.data_vars.items():
        called = str(key)
        other = _not_pressure(called, array, grid)
        if other is not None:
            found = _off_pressure(called, array, other, wanted, units)
            if not found:
                elsewhere.append(f"{called} on {told(other)}")
        else:
            found = _channels(called, array, wanted, levels, units)
            if not found and not is_static(called, array) and called != orography:
                left_out.append(called)
        for field in found:
            if field.name in chosen:
                raise InputError(
                    f"{field.name} is in the source twice, as {chosen[field.name].called!r} and {called!r}: "
                    "say which with the option variables"
                )
            chosen[field.name] = field
    no_pressure = f", and no pressure levels are {'; '.join(elsewhere)}" if elsewhere else ""
    if not chosen:
        raise InputError(
            f"none of {', '.join(map(str, dataset.data_vars)) or 'its variables'} is a variable that changes in "
            f"time and that ClimaX knows{no_pressure}: name what you want with the option variables"
        )
    if elsewhere:
        logger.warning(
            "left out, not on pressure levels, which is what ClimaX's are: %s; interpolate to pressure, or take it "
            "under a name of its own with the option variables",
            "; ".join(elsewhere),
        )
    if left_out:
        logger.info("left out, not among ClimaX's variables or not wanted: %s", ", ".join(left_out))
    if "level" in dataset.coords and any("level" in field.array.coords for field in chosen.values()):
        tell_unit(dataset["level"])
    for field in chosen.values():
        _check_dims(field, grid)
    if levels is not None and not any(name.endswith(f"_{level}") for name in chosen for level in levels):
        raise InputError(f"the source has nothing on pressure levels: leave out the option levels {list(levels)}")
    unchanging = find_static(
        dataset,
        constants,
        grid,
        wanted,
        units,
        orography=orography,
        sea_level_where_missing=sea_level_where_missing,
        ground=ground,
    )
    wanted.check(dataset, orography)
    _check_units_used(units, dataset, constants)
    return Fields(tuple(chosen.values()), unchanging)


class _Wanted:
    """The option `variables`, and which of its names were met."""

    def __init__(self, variables: Sequence[str] | None) -> None:
        self._names = None if variables is None else set(variables)
        self._met: set[str] = set()

    def __call__(self, *names: str) -> bool:
        if self._names is None:
            return True
        self._met |= self._names.intersection(names)
        return not self._names.isdisjoint(names)

    @property
    def by_name(self) -> bool:
        return self._names is not None

    def on_levels(self, base: str) -> list[str]:
        """Names that mean `base`, or one level of it."""
        return [name for name in sorted(self._names or ()) if re.sub(r"_\d+$", "", name) == base]

    def check(self, dataset: xr.Dataset, orography: str | None) -> None:
        always = {OROGRAPHY.name, *OROGRAPHY.aliases, *LATITUDE_NAMES, orography}
        unmet = sorted((self._names or set()) - self._met - always)
        if unmet:
            raise InputError(
                f"the source has no {', '.join(map(repr, unmet))}; it has {', '.join(map(str, dataset.data_vars))}"
            )


def _check_units_used(units: Mapping[str, str], dataset: xr.Dataset, constants: xr.Dataset | None) -> None:
    here = {str(name) for place in (dataset, constants) if place is not None for name in place.data_vars}
    renamed = ("z", "geopotential") if "geopotential_at_surface" in here else ()
    for name in units:
        if name not in (*here, *renamed, *_COORDINATES) and all(name != variable.name for variable in VARIABLES):
            raise InputError(f"units names {name!r}, but the source has {', '.join(sorted(here))}")


def _channels(
    called: str,
    array: xr.DataArray,
    wanted: _Wanted,
    levels: Sequence[int] | None,
    units: Mapping[str, str],
) -> list[Field]:
    """The channels that one variable of the source makes: one, or one a level."""
    if called in LATITUDE_NAMES or is_static(called, array):
        return []
    if "level" in array.coords:
        variable = find_variable(called, has_levels=True)
        if variable is not None or "level" in array.dims:
            return _on_levels(called, variable, array, wanted, levels, units)
    variable = find_variable(called, has_levels=False)
    suffixed = re.fullmatch(r"(.+)_(\d+)", called)
    name = called if variable is None else variable.name
    if variable is None and suffixed is not None:
        variable = find_variable(suffixed[1], has_levels=True)
        if variable is not None:  # already one file variable a level, as `temperature_850`
            name = f"{variable.name}_{suffixed[2]}"
            name_by_level = wanted.by_name and wanted(called, name)
            # GRIB's are all levels of one variable, others were chosen by whoever wrote the file
            usual = CLIMAX_LEVELS_HPA if str(array.attrs.get("GRIB_typeOfLevel")).startswith("isobaric") else None
            if int(suffixed[2]) not in (levels or usual or [int(suffixed[2])]) and not name_by_level:
                return []
            if wanted(suffixed[1], variable.name):
                return [_field(name, called, variable, array, units)]
    if not wanted(called, name) or (variable is None and not wanted.by_name):
        return []
    return [_field(name, called, variable, array, units)]


def _on_levels(
    called: str,
    variable: Variable | None,
    array: xr.DataArray,
    wanted: _Wanted,
    levels: Sequence[int] | None,
    units: Mapping[str, str],
) -> list[Field]:
    base = called if variable is None else variable.name
    if variable is None and not wanted.by_name:
        return []
    here = {level: index for index, level in enumerate(levels_hpa(array["level"])) if level is not None}
    wanted_levels = CLIMAX_LEVELS_HPA if levels is None else levels
    absent = [level for level in wanted_levels if level not in here]
    fields = []
    for level in wanted_levels:
        if level in here and wanted(called, base, f"{base}_{level}"):
            one = array.isel(level=here[level]) if "level" in array.dims else array
            fields.append(_field(f"{base}_{level}", called, variable, one, units))
    if fields and absent:
        message = f"{base} has no level {', '.join(map(str, absent))} hPa, only {', '.join(map(str, here))}"
        if levels is not None:
            raise InputError(f"{message}: choose others with the option levels")
        logger.info("%s", message)
    return fields


def _not_pressure(called: str, array: xr.DataArray, grid: Grid) -> xr.DataArray | None:
    """The one coordinate besides time, pressure and the grid along which a variable lies, or at which, or None."""
    if find_variable(called, has_levels=False) is not None or not set(grid.dims) <= set(array.dims):
        return None
    others = [name for name in array.dims if name not in ("time", "level", *grid.dims)]
    if not others and NOT_PRESSURE in array.coords:
        return array[NOT_PRESSURE]
    return array[others[0]] if len(others) == 1 and "level" not in array.dims else None


def _off_pressure(
    called: str, array: xr.DataArray, other: xr.DataArray, wanted: _Wanted, units: Mapping[str, str]
) -> list[Field]:
    """A channel at each value of a coordinate that is not pressure, if asked for by the source's name, and named so."""
    known = find_variable(called, has_levels=True)
    if wanted.by_name and wanted(called):
        names = [f"{called}_{suffix(other, index)}" for index in range(other.size)]
        parts = [array.isel({other.dims[0]: index}) for index in range(other.size)] if other.ndim else [array]
        return [_field(name, called, None, part, units) for name, part in zip(names, parts, strict=True)]
    asked = [] if known is None else wanted.on_levels(known.name)
    if asked:
        raise InputError(
            f"{', '.join(asked)} is on pressure levels, and {called!r} in the source is on {told(other)}: interpolate "
            f"it to pressure, or take it under a name of its own with the option variables {called}"
        )
    return []


def _field(name: str, called: str, variable: Variable | None, array: xr.DataArray, units: Mapping[str, str]) -> Field:
    if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
        raise InputError(f"{called!r} in the source holds {array.dtype} and no numbers: leave it out")
    unit = unit_of((name, called if variable is None else variable.name, called), array, units)
    if variable is None:
        logger.info("%s is not one of ClimaX's variables: taken as it is, in %s", called, unit or "no stated unit")
        return Field(name, called, array, (1.0, 0.0), ANYTHING)
    linear = conversion(variable, unit, called)
    if linear != (1.0, 0.0):
        logger.info("%s: %s times %g plus %g gives ClimaX's unit", name, unit, *linear)
    return Field(name, called, array, linear, variable.valid)


def _check_dims(field: Field, grid: Grid) -> None:
    expected = {"time", *grid.dims}
    if set(field.array.dims) != expected:
        raise InputError(
            f"{field.called!r} must have the dimensions {', '.join(sorted(expected))}, "
            f"it has {', '.join(map(str, field.array.dims)) or 'none'}: select from the others, or leave it out "
            "with the option variables"
        )
