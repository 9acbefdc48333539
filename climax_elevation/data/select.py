"""The option `select`: one value, or several, of any coordinate of the source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from climax_elevation.errors import InputError

_HOURS = {"": 1.0, "h": 1.0, "d": 24.0, "m": 1 / 60, "min": 1 / 60, "s": 1 / 3600}
_LISTED = 8


class Selection:
    """Chooses along coordinates by value, in each part of a source, and knows whether every value was met.

    Args:
        chosen: Value by coordinate: "0", "6" or "6h" (a lead time), "0001", "2020-01" (all dates that begin so);
            several with commas between.
    """

    def __init__(self, chosen: Mapping[str, str] | None) -> None:
        self._chosen = {name: str(text) for name, text in (chosen or {}).items()}
        self._met: set[str] = set()
        self._seen: dict[str, dict[str, None]] = {name: {} for name in self._chosen}
        self._names: dict[str, None] = {}

    def __call__(self, part: xr.Dataset) -> xr.Dataset | None:
        """What is chosen of a part; all of one that has no such coordinate; None where nothing of it is chosen."""
        self._names.update(dict.fromkeys(map(str, (*part.coords, *part.sizes))))
        for name, text in self._chosen.items():
            key = next((str(key) for key in (*part.coords, *part.sizes) if str(key).lower() == name.lower()), None)
            if key is None:
                continue
            along = part[key] if key in part.coords else xr.DataArray(np.arange(part.sizes[key]), dims=key)
            if along.ndim > 1:
                raise InputError(f"select {name}: {key!r} varies along {', '.join(map(str, along.dims))}: choose those")
            values = np.atleast_1d(along.to_numpy())
            at = np.flatnonzero(np.any([_same(values, one.strip()) for one in text.split(",")], axis=0))
            self._seen[name].update(dict.fromkeys(listed(values)))
            if not len(at):
                return None
            self._met.add(name)
            if along.ndim:
                # a dimension of its own goes; one that it lies along, such as time, stays
                alone = len(at) == 1 and along.dims == (key,) and not np.issubdtype(values.dtype, np.datetime64)
                part = part.isel({along.dims[0]: int(at[0]) if alone else at})
        return part

    def check(self) -> None:
        """Raise InputError unless every value was met in some part."""
        for name, text in self._chosen.items():
            if name in self._met:
                continue
            if not self._seen[name]:
                raise InputError(f"select names {name!r}, and the source has {', '.join(self._names)}")
            raise InputError(f"select {name}={text}: the source has {name} {enumerated(self._seen[name])}")


def listed(values: NDArray) -> list[str]:
    """Values as one would write them after `select`."""
    flat = np.atleast_1d(values)
    if np.issubdtype(flat.dtype, np.timedelta64):
        return [f"{value / np.timedelta64(1, 'h'):g}" for value in flat]
    if np.issubdtype(flat.dtype, np.datetime64):
        return [str(value)[:16] for value in flat.astype("datetime64[m]")]
    if np.issubdtype(flat.dtype, np.number):
        return [f"{value:g}" for value in flat]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in flat]


def enumerated(values: Iterable[str]) -> str:
    """The first few."""
    all_of_them = list(values)
    if len(all_of_them) <= _LISTED:
        return ", ".join(all_of_them)
    return f"{', '.join(all_of_them[: _LISTED - 2])}, ... {all_of_them[-1]} ({len(all_of_them)})"


def _same(values: NDArray, text: str) -> NDArray[np.bool_]:
    if np.issubdtype(values.dtype, np.timedelta64):
        matched = re.fullmatch(r"(-?[\d.]+)\s*([a-z]*)", text.lower())
        unit = matched and (matched[2] if matched[2] in _HOURS else matched[2].removesuffix("s").removesuffix("our"))
        if matched is None or unit not in _HOURS:
            raise InputError(f"select takes hours for a lead time, such as 6 or 6h, not {text!r}")
        return np.isclose(values / np.timedelta64(1, "h"), float(matched[1]) * _HOURS[unit], atol=1e-6)
    if np.issubdtype(values.dtype, np.datetime64) or (values.dtype == object and hasattr(values[0], "isoformat")):
        dates = [str(value) if isinstance(value, np.datetime64) else value.isoformat() for value in values]
        return np.array([date.startswith(text.replace(" ", "T")) for date in dates])
    if np.issubdtype(values.dtype, np.number):
        try:
            return np.isclose(values.astype(float), float(text), rtol=1e-6, atol=1e-9)
        except ValueError:
            return np.zeros(len(values), dtype=bool)
    # experiment versions are filed as "0001" and called 1
    return np.array([value == text or (value.isdigit() and value.lstrip("0") == text) for value in listed(values)])
