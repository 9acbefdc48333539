"""Numbers that stand for a gap although the file does not declare them: -9999, 1e20, netCDF's 9.97e36."""

from __future__ import annotations

import re

import numpy as np
import xarray as xr
from numpy.typing import NDArray

_NEGATIVE = (-999.0, -999.9, -9999.0, -99999.0, -999999.0, -32767.0, -32768.0)
_HUGE = (1e15, 1e20, 9.999e20)
_SENTINELS = np.array([*_NEGATIVE, *_HUGE, *(-value for value in _HUGE)])
_NOTHING_IS = 1e30
"""Larger than any quantity of the atmosphere in any unit."""
_LARGEST_OF_A_TYPE = (32767.0, 32768.0, 65535.0, 2147483647.0, 2147483648.0)
_ONE_DIGIT = re.compile(r"([789])\1+(\.\1+)?")
_ABOVE = 3.0  # times as far: rain and the like have a long tail upwards
_SHORTEST = 100.0  # above 0, where 77, 88 and 99 are common
_ROUND = 1e10  # from which on a power of ten is no measurement


def sentinel(values: NDArray[np.floating]) -> float | None:
    """The number among `values` that stands for a gap, or None.

    It lies beyond all that is true, so only the smallest and the largest value are looked at. Numbers that may be true
    elsewhere, such as -99.9, 9999 or 65535, count where they are farther from all others than those are apart.
    """
    finite = values[np.isfinite(values)] if np.issubdtype(values.dtype, np.floating) else values
    for extreme in (finite.min(), finite.max()) if finite.size else ():
        if _surely(float(extreme)) or (_perhaps(float(extreme)) and _far_from_all(finite, extreme)):
            return float(extreme)
    return None


def _surely(value: float) -> bool:
    # packed and unpacked in float32, which keeps seven digits
    return abs(value) >= _NOTHING_IS or bool(np.isclose(value, _SENTINELS, rtol=1e-6, atol=0).any())


def _perhaps(value: float) -> bool:
    size = float(np.float32(abs(value)))
    written = f"{size:.6g}"
    round_one = size >= _ROUND and f"{size:.5e}".startswith(("1.00000", "9.99"))
    one_digit = _ONE_DIGIT.fullmatch(written) is not None and (value < 0 or size >= _SHORTEST)
    return round_one or one_digit or size in _LARGEST_OF_A_TYPE


def _far_from_all(values: NDArray[np.floating], extreme: np.floating) -> bool:
    others = values[values != extreme].astype(np.float64)
    if not others.size:
        return False
    lowest, highest = float(others.min()), float(others.max())
    apart = highest - lowest
    return lowest - float(extreme) > apart or float(extreme) - highest > max(_ABOVE * apart, highest)


def without_sentinels(array: xr.DataArray) -> xr.DataArray:
    """`array`, which is read whole, with NaN for the numbers that stand for gaps."""
    array = array.load()
    while (value := sentinel(array.to_numpy())) is not None:
        array = array.where(array != value)
    return array
