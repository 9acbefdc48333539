"""From the source's variables to ClimaX's channels: which, in what unit, checked for sense."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from climax_elevation.data.grid import Grid
from climax_elevation.data.names import (
    CLIMAX_LEVELS_HPA,
    HIGHEST_GROUND_M,
    LAND_SEA_MASK,
    LATITUDE_NAMES,
    OROGRAPHY,
    VARIABLES,
    Variable,
    conversion,
    find_variable,
)
from climax_elevation.errors import InputError
from climax_elevation.terrain.units import Linear

logger = logging.getLogger(__name__)

_ANYTHING = (-np.inf, np.inf)
_BLOCK_BYTES = 2**26


class BadDataError(InputError):
    """The source's values, not its description, are wrong."""


@dataclass(frozen=True)
class Field:
    """One channel: where its values are, and how to make ClimaX's of them.

    Attributes:
        name: ClimaX's name, with the level where there is one.
        called: The source's name.
        array: The source's values, lazy, `[time, rows, columns]` or `[rows, columns]` in any order.
        linear: Factor and offset to ClimaX's unit.
        valid: Smallest and largest value that can be true.
    """

    name: str
    called: str
    array: xr.DataArray
    linear: Linear
    valid: tuple[float, float]

    def read(self, grid: Grid, start: int = 0, stop: int = 1) -> NDArray[np.float32]:
        """Steps `start` to `stop` on ClimaX's grid, in ClimaX's unit, `[N, H, W]` float32."""
        array = self.array if "time" in self.array.dims else self.array.expand_dims("time")
        array = array.transpose("time", *grid.dims)
        values = np.empty((stop - start, *grid.shape), dtype=np.float32)
        # Regridding keeps several copies of the finer source grid, so it goes in small blocks.
        block = max(1, _BLOCK_BYTES // (8 * array[0].size)) if grid.regridded else stop - start
        for first in range(start, stop, block):
            last = min(first + block, stop)
            values[first - start : last - start] = grid.place(self._in_unit(array[first:last].to_numpy()))
        return values

    def _in_unit(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        factor, offset = self.linear
        return values if self.linear == (1.0, 0.0) else values.astype(np.float64) * factor + offset

    def check(self, values: NDArray[np.float32], stamps: Sequence[str]) -> None:
        """Refuse gaps and values that cannot be true, `[N, H, W]`.

        Raises:
            BadDataError: Naming the first time at which it happens.
        """
        low, high = self.valid
        # Written so that NaN fails too.
        good = (values >= low) & (values <= high) & np.isfinite(values)
        if good.all():
            return
        step, row, column = (int(index[0]) for index in np.nonzero(~good))
        when = f" at {stamps[step]}" if stamps else ""
        value = float(values[step, row, column])
        if not np.isfinite(value):
            count = int((~np.isfinite(values)).sum())
            first = when and f", the first{when}"
            raise BadDataError(
                f"{self.name} ({self.called!r} in the source) has {count} missing values{first}, "
                "ClimaX takes none: fill them, or leave the variable out with the option variables"
            )
        raise BadDataError(
            f"{self.name} ({self.called!r} in the source) is {value:g}{when}, outside {low:g} to {high:g} in "
            "ClimaX's unit: its unit is misstated or mixed, or it is not this variable; mend the source or "
            "state the unit with the option units"
        )


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
    orography: bool = True,
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
        orography: Whether it has to be there.

    Returns:
        The fields; latitude is always among the constants, and so is orography where it has to be there.

    Raises:
        InputError: If something wanted is missing or ambiguous, or a unit is unknown.
    """
    chosen: dict[str, Field] = {}
    left_out: list[str] = []
    wanted = _Wanted(variables)
    for key, array in dataset.data_vars.items():
        called = str(key)
        found = _channels(called, array, wanted, levels, units)
        if not found and not _is_static(called, array):
            left_out.append(called)
        for field in found:
            if field.name in chosen:
                raise InputError(
                    f"{field.name} is in the source twice, as {chosen[field.name].called!r} and {called!r}: "
                    "say which with the option variables"
                )
            chosen[field.name] = field
    if not chosen:
        raise InputError(
            f"none of {', '.join(map(str, dataset.data_vars)) or 'its variables'} is a variable that changes in "
            "time and that ClimaX knows: name what you want with the option variables"
        )
    if left_out:
        logger.info("left out, not among ClimaX's variables or not wanted: %s", ", ".join(left_out))
    for field in chosen.values():
        _check_dims(field, grid)
    if levels is not None and not any(name.endswith(f"_{level}") for name in chosen for level in levels):
        raise InputError(f"the source has nothing on pressure levels: leave out the option levels {list(levels)}")
    unchanging = _constants(dataset, constants, grid, wanted, units, orography)
    wanted.check(dataset)
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

    def check(self, dataset: xr.Dataset) -> None:
        always = {OROGRAPHY.name, *OROGRAPHY.aliases, *LATITUDE_NAMES}
        unmet = sorted((self._names or set()) - self._met - always)
        if unmet:
            raise InputError(
                f"the source has no {', '.join(map(repr, unmet))}; it has {', '.join(map(str, dataset.data_vars))}"
            )


def _check_units_used(units: Mapping[str, str], dataset: xr.Dataset, constants: xr.Dataset | None) -> None:
    here = {str(name) for place in (dataset, constants) if place is not None for name in place.data_vars}
    for name in units:
        if name not in here and all(name != variable.name for variable in VARIABLES):
            raise InputError(f"units names {name!r}, but the source has {', '.join(sorted(here))}")


def _is_static(called: str, array: xr.DataArray) -> bool:
    if "level" in array.dims:
        return False
    variable = find_variable(called, has_levels=False)
    return variable is OROGRAPHY or (variable is LAND_SEA_MASK and "time" not in array.dims)


def _channels(
    called: str,
    array: xr.DataArray,
    wanted: _Wanted,
    levels: Sequence[int] | None,
    units: Mapping[str, str],
) -> list[Field]:
    """The channels that one variable of the source makes: one, or one a level."""
    if called in LATITUDE_NAMES or _is_static(called, array):
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
            if levels is not None and int(suffixed[2]) not in levels:
                return []
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
    here = {level: index for index, level in enumerate(_levels_hpa(array["level"]))}
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


def _levels_hpa(level: xr.DataArray) -> list[int]:
    values = np.atleast_1d(level.to_numpy()).astype(float)
    unit = str(level.attrs.get("units", "")).lower()
    # No pressure on Earth is above 1100 hPa, so larger numbers without a unit are pascals.
    pascals = unit in ("pa", "pascal", "pascals") or (not unit and values.max() > 1100)
    return [round(value) for value in (values / 100 if pascals else values)]


def _field(name: str, called: str, variable: Variable | None, array: xr.DataArray, units: Mapping[str, str]) -> Field:
    unit = _unit((name, called if variable is None else variable.name, called), array, units)
    if variable is None:
        logger.info("%s is not one of ClimaX's variables: taken as it is, in %s", called, unit or "no stated unit")
        return Field(name, called, array, (1.0, 0.0), _ANYTHING)
    linear = conversion(variable, unit, called)
    if linear != (1.0, 0.0):
        logger.info("%s: %s times %g plus %g gives ClimaX's unit", name, unit, *linear)
    return Field(name, called, array, linear, variable.valid)


def _unit(names: Sequence[str], array: xr.DataArray, units: Mapping[str, str]) -> str | None:
    for key in names:
        if key in units:
            return units[key]
    unit = array.attrs.get("units")
    return None if unit is None else str(unit)


def _check_dims(field: Field, grid: Grid) -> None:
    expected = {"time", *grid.dims}
    if set(field.array.dims) != expected:
        raise InputError(
            f"{field.called!r} must have the dimensions {', '.join(sorted(expected))}, "
            f"it has {', '.join(map(str, field.array.dims)) or 'none'}: select from the others, or leave it out "
            "with the option variables"
        )


def _constants(
    dataset: xr.Dataset,
    constants: xr.Dataset | None,
    grid: Grid,
    wanted: _Wanted,
    units: Mapping[str, str],
    needs_orography: bool,
) -> dict[str, NDArray[np.float32]]:
    places = [dataset] if constants is None else [constants, dataset]
    found: dict[str, NDArray[np.float32]] = {}
    mask = _find_static(places, LAND_SEA_MASK)
    if mask is not None and wanted(mask.name, LAND_SEA_MASK.name):
        found[LAND_SEA_MASK.name] = _read_static(mask, LAND_SEA_MASK, grid, units)
    orography = _find_static(places, OROGRAPHY) if needs_orography else None
    if needs_orography and orography is None:
        raise InputError(
            "the source has no orography: it needs one of orography, z or geopotential_at_surface without "
            "levels; add it, or name a file that has it with the option constants"
        )
    if orography is not None:
        found[OROGRAPHY.name] = _read_static(orography, OROGRAPHY, grid, units)
    found["lattitude"] = grid.lat2d.astype(np.float32)
    return found


@dataclass(frozen=True)
class _Static:
    name: str
    array: xr.DataArray


def _find_static(places: Sequence[xr.Dataset], variable: Variable) -> _Static | None:
    # In the order of aliases: a field already in metres is preferred to a geopotential.
    for place in places:
        lower = {str(name).lower(): str(name) for name in place.data_vars}
        here = [lower[alias] for alias in (variable.name, *variable.aliases) if alias in lower]
        here = [name for name in here if _is_static(name, place[name])]
        if here:
            if here[1:]:
                logger.info("%s taken from %s, not from %s", variable.name, here[0], ", ".join(here[1:]))
            return _Static(here[0], place[here[0]])
    return None


def _read_static(found: _Static, variable: Variable, grid: Grid, units: Mapping[str, str]) -> NDArray[np.float32]:
    array = found.array
    if not set(grid.dims) <= set(array.dims) <= {"time", *grid.dims}:
        raise InputError(f"{found.name!r} is not on the grid {grid.dims}, but on {array.dims}")
    if "time" in array.dims:
        array = _unchanging(found.name, array)
    unit = _unit((variable.name, found.name), array, units)
    if variable is OROGRAPHY and unit is None:
        unit = _unit_by_height(found.name, array)
    field = Field(variable.name, found.name, array, conversion(variable, unit, found.name), variable.valid)
    if field.linear != (1.0, 0.0):
        logger.info("%s: %r in %s times %g gives ClimaX's unit", field.name, found.name, unit, field.linear[0])
    values = field.read(grid)
    field.check(values, ())
    if variable is OROGRAPHY:
        logger.info("orography from %r: %.0f to %.0f m", found.name, values.min(), values.max())
    return values[0]


def _unit_by_height(called: str, array: xr.DataArray) -> str | None:
    """A geopotential gives itself away where it is too large to be a height."""
    highest = float(array.max())
    if highest <= HIGHEST_GROUND_M:
        return None
    logger.info(
        "%r names no unit, but reaches %.0f, and no ground is above %.0f m: taken as a geopotential in m2 s-2",
        called,
        highest,
        HIGHEST_GROUND_M,
    )
    return "m2 s-2"


def _unchanging(called: str, array: xr.DataArray) -> xr.DataArray:
    first = array.isel(time=0)
    scale = float(np.abs(first).max()) or 1.0
    # Compared at three times only, because reading all would take as long as writing; 1e-3 of the
    # largest value allows for files packed into 16 bits one by one.
    for step in (array.sizes["time"] // 2, -1):
        if float(np.abs(array.isel(time=step) - first).max()) > 1e-3 * scale:
            raise InputError(f"{called!r} should be a static field, but changes in time: give one that does not")
    logger.info("%r has a time axis but does not change: taken from the first time", called)
    return first
