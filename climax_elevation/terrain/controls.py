"""What biases may see in the place of the ground, to tell what terrain does from what else a bias does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from climax_elevation.terrain.fields import Terrain
from climax_elevation.terrain.sphere import eastward

CONTROLS = ("none", "flat", "mirrored", "permuted")


def level(terrain: Terrain) -> Terrain:
    """All ground at 0 m, and land."""
    land = None if terrain.land is None else torch.ones_like(terrain.land)
    return replace(terrain, elevation_m=torch.zeros_like(terrain.elevation_m), land=land)


def mirrored(terrain: Terrain) -> Terrain:
    """East and west exchanged: relief of the same kind, in the wrong places.

    Of places that are no grid, the one farthest west has the height of the one farthest east, and so on inwards.
    """
    if terrain.points:
        terrain.require({"lon"}, "control: mirrored")
        from_west = eastward(terrain.lon.double()).argsort(stable=True)  # type: ignore[union-attr]
        order = torch.empty_like(from_west)
        order[from_west] = from_west.flip(0)
        return permuted(terrain, order)
    patches = torch.arange(terrain.elevation_m.shape[1], device=terrain.elevation_m.device)
    return permuted(terrain, patches.unflatten(0, terrain.grid).flip(1).flatten())


def permuted(terrain: Terrain, order: Tensor) -> Terrain:
    """The ground of the patches in another order: shuffled, the same heights without their relief."""
    land = None if terrain.land is None else terrain.land[:, order]
    return replace(terrain, elevation_m=terrain.elevation_m[:, order], land=land)


def shuffled(count: int, seed: int) -> Tensor:
    """An order of `count` patches, the same on any machine."""
    return torch.from_numpy(np.random.RandomState(seed).permutation(count))  # whose numbers NumPy promises to keep


def controlled(terrain: Terrain, control: str, order: Tensor) -> Terrain:
    """What biases see of a whole grid's terrain.

    Args:
        terrain: As it is.
        control: One of `CONTROLS`.
        order: Of the patches, for "permuted".
    """
    if control == "flat":
        return level(terrain)
    if control == "mirrored":
        return mirrored(terrain)
    return permuted(terrain, order) if control == "permuted" else terrain
