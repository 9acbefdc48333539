"""One channel: where its values are, and ClimaX's of them, checked for sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from climax_elevation.data.grid import Grid
from climax_elevation.data.select import listed
from climax_elevation.data.sentinels import sentinel
from climax_elevation.errors import InputError
from climax_elevation.terrain.units import Linear

ANYTHING = (-np.inf, np.inf)
"""The range of a variable that ClimaX does not know."""

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
        """Steps `start` to `stop` on ClimaX's grid, in ClimaX's unit, `[N, H, W]` float32.

        Raises:
            BadDataError: If a number stands for a gap.
        """
        array = self.array if "time" in self.array.dims else self.array.expand_dims("time")
        array = array.transpose("time", *grid.dims)
        values = np.empty((stop - start, *grid.shape), dtype=np.float32)
        # Regridding keeps several copies of the finer source grid, so it goes in small blocks.
        block = max(1, _BLOCK_BYTES // (8 * array[0].size)) if grid.regridded else stop - start
        for first in range(start, stop, block):
            last = min(first + block, stop)
            read = array[first:last].to_numpy()
            self._check_sentinel(read, array["time"][first:last] if "time" in array.coords else None)
            values[first - start : last - start] = grid.place(self._in_unit(read))
        return values

    def _check_sentinel(self, read: NDArray[np.floating], times: xr.DataArray | None) -> None:
        """Before units, means and cropping, all of which hide it."""
        value = sentinel(read)
        if value is None:
            return
        step = int(np.nonzero(read == value)[0][0])
        when = "" if times is None else f", the first at {listed(times.to_numpy())[step]}"
        raise BadDataError(
            f"{self.name} ({self.called!r} in the source) is {value:g} at {int((read == value).sum())} places{when}, "
            "which stands for a gap, and ClimaX takes none: fill them, or leave the variable out with the option "
            "variables"
        )

    def _in_unit(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        factor, offset = self.linear
        return values if self.linear == (1.0, 0.0) else values.astype(np.float64) * factor + offset

    def first_bad(self, values: NDArray[np.floating]) -> tuple[int, ...] | None:
        """Where the first gap, or value that cannot be true, is; None: there is none."""
        low, high = self.valid
        # Written so that NaN fails too.
        good = (values >= low) & (values <= high) & np.isfinite(values)
        return None if good.all() else tuple(int(index[0]) for index in np.nonzero(~good))

    def check(self, values: NDArray[np.float32], stamps: Sequence[str]) -> None:
        """Refuse gaps and values that cannot be true, `[N, H, W]`.

        Raises:
            BadDataError: Naming the first time at which it happens.
        """
        bad = self.first_bad(values)
        if bad is None:
            return
        when = f" at {stamps[bad[0]]}" if stamps else ""
        value, (low, high) = float(values[bad]), self.valid
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


def unit_of(names: Sequence[str], array: xr.DataArray, units: Mapping[str, str]) -> str | None:
    """The unit stated by the user under any of `names`, or else by the source."""
    for key in names:
        if key in units:
            return units[key]
    unit = array.attrs.get("units")
    return None if unit is None else str(unit)
