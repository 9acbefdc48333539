"""Wind scanning, taken literally: tokens in the order in which the wind reaches their patches.

A transformer block has no notion of order: where position embedding, terrain and everything else move
with their tokens and the order is undone, nothing changes (`patch_order="wind"`; a test shows it). The
first code that was published left the position embedding in raster order, so that a patch learned the
position of another: `"wind_as_published"` does so, with tokens in the published order. What it was after,
that upwind informs downwind, is the bias `advection`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from climax_elevation.terrain.fields import Terrain

PATCH_ORDERS = ("raster", "wind", "wind_as_published")
SECTORS = 16
SECTOR = 2 * math.pi / SECTORS
ODD_PATCHES_LATER = 1000  # places in raster order, as published


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

    Source: after the scan order of TopoFlow, arXiv 2602.16821. Departures: those of `published_order`, which is
    that order itself, are mended: v is northward wherever the first row lies, a direction is that of the nearest
    sector, bands differ in size by one patch at the most, and a band is in raster order.
    """
    terrain.require({"u", "v"}, "patch_order: wind")
    angle = torch.atan2(terrain.v.mean(dim=1), terrain.u.mean(dim=1))  # type: ignore[union-attr]
    sector = 2 * math.pi / sectors
    angle = (angle / sector).round() * sector
    northward = _northward(terrain) * terrain.rows
    # rounded, lest rounding decide between patches that are as far
    along = angle.cos()[:, None] * terrain.columns + angle.sin()[:, None] * northward
    rank = along.mul(1e4).round().argsort(dim=1, stable=True).argsort(dim=1)
    tokens = rank.shape[1]
    band = rank * max(terrain.grid) // tokens
    return band.argsort(dim=1, stable=True)


def published_order(terrain: Terrain) -> Tensor:
    """Patches in the published order along the wind, with its quirks.

    The mean wind of a sample is taken to the sector of 22.5 degrees in which it lies, counted from east, and to
    that sector's *first* direction. Patches are sorted by column * cos + row * sin of it, in float64: v points to
    higher rows, also where those lie in the south. They are cut into as many bands as the longer side has patches,
    all as long as the shorter side, with the rest in the last. Within a band a patch comes at its place in raster
    order, and 1000 places later where row + column is odd: a checkerboard, where there are no more patches.

    A region of patches is ordered as a grid of its own.

    Args:
        terrain: With u and v.

    Returns:
        The patch that comes to each place, `[B, L]`.

    Source: the wind bands of the code that followed TopoFlow (arXiv 2602.16821), AmmarKheder/cran-pm.
    """
    terrain.require({"u", "v"}, "patch_order: wind_as_published")
    angle = torch.atan2(terrain.v.mean(dim=1), terrain.u.mean(dim=1))  # type: ignore[union-attr]
    sector = ((angle + 2 * math.pi) % (2 * math.pi) / (2 * math.pi) * SECTORS).long() % SECTORS
    # by the C library's functions, whose rounding decides between patches that are as far
    eastward, rowward = (
        torch.tensor([function(SECTOR * n) for n in range(SECTORS)], dtype=torch.float64, device=angle.device)[sector]
        for function in (math.cos, math.sin)
    )
    rows, columns = terrain.rows - terrain.rows.min(), terrain.columns - terrain.columns.min()
    height, width = rows.max() + 1, columns.max() + 1  # not read: on a GPU that waits
    order = (rows * rowward[:, None] + columns * eastward[:, None]).argsort(dim=1, stable=True)
    bands = torch.maximum(height, width)
    band = torch.arange(len(rows), device=rows.device) // (len(rows) // bands).clamp(min=1)
    band = torch.minimum(band, bands - 1)
    place = (rows + columns) % 2 * ODD_PATCHES_LATER + rows * width + columns
    later_bands = band * (ODD_PATCHES_LATER + height * width)
    return order.gather(1, (later_bands + place[order]).argsort(dim=1, stable=True))


def _northward(terrain: Terrain) -> Tensor | int:
    """1 where later rows lie farther north, as in ClimaX's data, also where latitudes are not known; else -1."""
    if terrain.lat is None:
        return 1
    return torch.where((terrain.lat[-1] - terrain.lat[0]) * (terrain.rows[-1] - terrain.rows[0]) >= 0, 1, -1)
