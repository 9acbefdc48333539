"""Numbers that stand for a gap although the file does not declare them: -9999, 1e20, netCDF's 9.97e36."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

_NEGATIVE = (-999.0, -999.9, -9999.0, -99999.0, -999999.0, -32767.0, -32768.0)
_HUGE = (1e15, 1e20, 9.999e20, 1e30, 1e35, 1e36, 9.96921e36, 9.99e33, 9.999e33, 1e37, 3.4028235e38)
_SENTINELS = np.array([*_NEGATIVE, *_HUGE, *(-value for value in _HUGE)])


def sentinel(values: NDArray[np.floating]) -> float | None:
    """The number among `values` that stands for a gap, or None.

    It lies beyond all that is true, so only the smallest and the largest value are looked at.
    """
    finite = values[np.isfinite(values)] if np.issubdtype(values.dtype, np.floating) else values
    for extreme in (finite.min(), finite.max()) if finite.size else ():
        # packed and unpacked in float32, which keeps seven digits
        if np.isclose(float(extreme), _SENTINELS, rtol=1e-6, atol=0).any():
            return float(extreme)
    return None


def without_sentinels(array: xr.DataArray) -> xr.DataArray:
    """`array`, which is read whole, with NaN for the numbers that stand for gaps."""
    array = array.load()
    while (value := sentinel(array.to_numpy())) is not None:
        array = array.where(array != value)
    return array
