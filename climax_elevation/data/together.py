"""Parts of a file, and files of a source, as one data set; what does not fit is named."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from contextlib import suppress

import numpy as np
import xarray as xr

from climax_elevation.data.levels import levels_hpa
from climax_elevation.data.names import CALLED, GROUND, find_variable
from climax_elevation.data.select import listed
from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

_PACKED = 1e-3  # of the largest value: what 16 bits may lose, files being packed one by one


def one_file(file: str, parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """The variables of a file, each of which has its own levels and times.

    Raises:
        InputError: If their times or grids differ.
    """
    if len(parts) == 1:
        return parts[0]
    parts = _levels_apart(_by_own_name(file, parts))
    first = next((part for part in parts if "time" in part.coords), parts[0])
    for part in parts:
        for name in ("time", "lat", "lon"):
            if name in part.coords and name in first.coords and not _same(part[name], first[name]):
                raise InputError(
                    f"{file}: {_names(part)} and {_names(first)} differ in {name} ({_extent(part[name])}, and "
                    f"{_extent(first[name])}): choose what goes together with the option variables"
                )
    return xr.merge(parts, join="exact", compat="override", combine_attrs="drop_conflicts")


def one_source(files: Sequence[tuple[str, xr.Dataset]], *, check_ground: bool) -> xr.Dataset:
    """Files side by side or one after another in time.

    Args:
        files: Name and content.
        check_ground: Whether orographies and land-sea masks that differ are refused.

    Raises:
        InputError: If they do not fit together, are in different units, or differ in what does not change in time.
    """
    if len(files) == 1:
        return files[0][1]
    _check_units(files)
    if check_ground:
        _check_static(files)
    parts = [part for _, part in files]
    try:
        return _combined(parts)
    except (ValueError, KeyError) as error:
        apart = [_split(part) for part in parts]
        if any(static for _, static in apart):
            with suppress(ValueError, KeyError):
                # files one after another in time, of which some have the ground
                changing = _combined([part for part, _ in apart if part.data_vars])
                grounds = [part[list(static)] for part, (_, static) in zip(parts, apart, strict=True) if static]
                return xr.merge([changing, *grounds], join="exact", compat="override", combine_attrs="override")
        said = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"the {len(files)} files from {files[0][0]} to {files[-1][0]} do not fit together: {said}"
        ) from error


def _combined(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    combined = xr.combine_by_coords(
        parts,
        join="exact",
        data_vars="minimal",
        coords="minimal",
        compat="override",
        combine_attrs="override",
    )
    return combined if isinstance(combined, xr.Dataset) else combined.to_dataset()


def _split(part: xr.Dataset) -> tuple[xr.Dataset, Sequence[Hashable]]:
    """What changes in time, and the names of what does not."""
    static = [name for name, array in part.data_vars.items() if "time" not in array.dims]
    return part.drop_vars(static), static


def _by_own_name(file: str, parts: Sequence[xr.Dataset]) -> list[xr.Dataset]:
    """GRIB has one name for a variable on all kinds of levels: pressure keeps it, others get their kind in their name.

    Those on pressure levels come last, whatever their order in the file.

    Raises:
        InputError: If a variable is there twice on one kind of level.
    """
    ordered = sorted(parts, key=lambda part: "level" in part.coords)
    reserved = {str(name) for part in parts if "level" in part.coords for name in part.data_vars}
    kinds: set[tuple[str, str, bool]] = set()
    own = []
    for part in ordered:
        pressure = "level" in part.coords
        names = {}
        for name, array in part.data_vars.items():
            called, kind = str(name), str(array.attrs.get("GRIB_typeOfLevel"))
            if (called, kind, pressure) in kinds and not pressure:
                raise InputError(
                    f"{file} has {called} twice on {kind}, of other times or kinds: choose with the option select, or "
                    "what else is wanted with the option variables"
                )
            kinds.add((called, kind, pressure))
            if called in reserved and not pressure:
                names[name] = f"{called}_{kind}"
            reserved.add(called)
        own.append(part.rename(names))
    return own


def _levels_apart(parts: Sequence[xr.Dataset]) -> list[xr.Dataset]:
    """Where variables have different pressure levels, one variable a level, such as `t_850`."""
    levels = [levels_hpa(part["level"]) for part in parts if "level" in part.coords]
    if all(others == levels[0] for others in levels[1:]):
        return list(parts)
    apart = []
    for part in parts:
        if "level" not in part.coords:
            apart.append(part)
            continue
        for index, level in enumerate(levels_hpa(part["level"])):
            if level is not None:
                one = part.isel(level=index) if "level" in part.dims else part
                apart.append(one.drop_vars("level").rename({name: f"{name}_{level}" for name in one.data_vars}))
    return apart


def _check_units(files: Sequence[tuple[str, xr.Dataset]]) -> None:
    units: dict[str, tuple[str | None, str]] = {}
    for file, part in files:
        for name, values in part.data_vars.items():
            unit = values.attrs.get("units")
            known, first = units.setdefault(str(name), (unit, file))
            if known != unit:
                raise InputError(
                    f"mixed units: {name} is in {known!r} in {first}, but in {unit!r} in {file}; convert one of them"
                )


def _check_static(files: Sequence[tuple[str, xr.Dataset]]) -> None:
    """Fields that do not change in time are taken from one file, so all have to have the same."""
    seen: dict[str, tuple[xr.DataArray, str]] = {}
    for file, part in files:
        for name, values in part.data_vars.items():
            variable = find_variable(str(name), has_levels=False)
            static = variable is not None and variable.name in GROUND
            if not static or "time" in values.dims or "level" in values.dims or values.ndim != 2:
                continue
            values = values.load()
            first, where = seen.setdefault(str(name), (values, file))
            if first.shape != values.shape or first.dims != values.dims:
                continue  # which is said when they are put together
            apart = float(np.abs(first.to_numpy() - values.to_numpy()).max(initial=0, where=_both(first, values)))
            if apart > _PACKED * float(np.abs(first).max()) or bool((first.isnull() != values.isnull()).any()):
                raise InputError(
                    f"{values.attrs.get(CALLED, name)} is not the same in {where} and in {file} (they differ by up to "
                    f"{apart:g}), and the ground has one height: give one with the option constants"
                )


def _both(first: xr.DataArray, second: xr.DataArray) -> np.ndarray:
    return np.isfinite(first.to_numpy()) & np.isfinite(second.to_numpy())


def _same(first: xr.DataArray, second: xr.DataArray) -> bool:
    return first.shape == second.shape and bool((first.to_numpy() == second.to_numpy()).all())


def _names(part: xr.Dataset) -> str:
    return ", ".join(map(str, part.data_vars))


def _extent(coordinate: xr.DataArray) -> str:
    values = listed(coordinate.to_numpy().ravel())
    return f"{len(values)} from {values[0]} to {values[-1]}"
