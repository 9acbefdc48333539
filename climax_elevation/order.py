"""Wind scanning, taken literally: tokens in the order in which the wind reaches their patches.

A transformer block has no notion of order: where position embedding, terrain and everything else move
with their tokens and the order is undone, nothing changes (`patch_order="wind"`; a test shows it). What
was published left the position embedding in raster order, so that a patch learned the position of
another (`"wind_as_published"`). What it was after, that upwind informs downwind, is the bias `advection`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from climax_elevation.terrain import Terrain

PATCH_ORDERS = ("raster", "wind", "wind_as_published")
SECTORS = 16


def wind_order(terrain: Terrain, sectors: int = SECTORS) -> Tensor:
    """Patches from upwind to downwind, in bands across the wind.

    The mean wind of a sample is taken to the nearest of `sectors` directions. Patches are sorted by their
    distance along it, in rows and columns, and cut into as many bands of one size as the grid's longer side
    has patches; within a band they keep their raster order.

    Args:
        terrain: With u and v.
        sectors: Number of directions.

    Returns:
        The patch that comes to each place, `[B, L]`.

    Source: the scan order of TopoFlow, arXiv 2602.16821. Departure: v is northward, not downward, also where
    the first row is the southernmost.
    """
    terrain.require({"u", "v"}, "patch_order: wind")
    angle = torch.atan2(terrain.v.mean(dim=1), terrain.u.mean(dim=1))  # type: ignore[union-attr]
    sector = 2 * math.pi / sectors
    angle = (angle / sector).round() * sector
    northward = terrain.rows if _first_row_is_southern(terrain) else -terrain.rows
    # rounded, lest rounding decide between patches that are as far
    along = angle.cos()[:, None] * terrain.columns + angle.sin()[:, None] * northward
    rank = along.mul(1e4).round().argsort(dim=1, stable=True).argsort(dim=1)
    tokens = rank.shape[1]
    band = rank * max(terrain.grid) // tokens
    return band.argsort(dim=1, stable=True)


def _first_row_is_southern(terrain: Terrain) -> bool:
    """As in ClimaX's data, where latitudes are not known."""
    if terrain.lat is None:
        return True
    return bool(((terrain.lat[-1] - terrain.lat[0]) * (terrain.rows[-1] - terrain.rows[0])) >= 0)
