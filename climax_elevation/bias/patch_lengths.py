"""Lengths that are learned in patches, and remain the same kilometres on another grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from climax_elevation.bias.base import ElevationBias
from climax_elevation.errors import InputError
from climax_elevation.terrain.places import patch_angle, place_fields
from climax_elevation.transforms import readable

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

QUARTER = 0.25  # of the grid's longer side: the greatest length at the start


class PatchLengths(ElevationBias):
    """A bias whose parameters are lengths in patches.

    The angle between neighbouring patches of the grid that was trained on, `patch_rad`, is kept in the checkpoint.

    Args:
        grid: Rows and columns of patches.
    """

    who: str
    """How errors name it."""

    unread = ElevationBias.unread | {"side"}

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.side = max(grid)
        self.patch_rad: Tensor
        self.register_buffer("patch_rad", torch.tensor(math.nan))
        self._knows_its_grid = False  # looked for once: on a GPU a look at `patch_rad` waits

    @property
    def greatest(self) -> float:
        """Of the lengths at the start, patches; the least is one."""
        return max(2.0, QUARTER * self.side)

    def prepare(self, terrain: Terrain, cache_dir: Path | None = None) -> None:
        """Take the angle between patches, unless a checkpoint brought that of its own grid."""
        terrain.require(self.needs | place_fields(terrain), self.who)
        if bool(self.patch_rad.isnan()):
            self.patch_rad.fill_(patch_angle(terrain, self.side, self.who))
        self._knows_its_grid = True

    def ready_for(self, terrain: Terrain) -> None:
        """Check that `terrain` has what `inputs` takes, and `prepare` where that has not been done."""
        terrain.require(self.needs | place_fields(terrain), self.who)
        if not self._knows_its_grid and readable(self.patch_rad):
            self.prepare(terrain)

    def check_ready(self) -> None:
        """Raise InputError where `patch_rad` is not known yet."""
        if not self._knows_its_grid and readable(self.patch_rad) and bool(self.patch_rad.isnan()):
            raise InputError(f"{self.who} does not know its grid yet: call prepare(terrain) first")
