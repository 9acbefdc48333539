"""A table of learnable biases over bucketed relative positions, without terrain."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from climax_elevation.bias.base import ElevationBias, Tensors
from climax_elevation.bias.registry import register_bias
from climax_elevation.checks import count
from climax_elevation.errors import InputError

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

TABLE_STD = 0.02


@register_bias("relative_2d")
class RelativePositionBias2D(ElevationBias):
    """One learnable bias a head for each pair of bucketed offsets in columns and rows.

        b[h, i, j] = table[bucket(x_j - x_i), bucket(y_j - y_i), h]

    x and y are columns and rows in units of 1 / `max_distance` of the grid's width and height. Half
    of the buckets are for each sign; of those, half hold one distance each and the others grow in
    equal ratios up to `max_distance`. It knows nothing of elevation, and does not wrap at the dateline.

    Args:
        num_heads: Heads of the attention.
        num_buckets: Buckets an axis; a multiple of 4.
        max_distance: Units to the grid's width and height, and the offset at which the last bucket begins.

    Raises:
        InputError: If an argument is not of its kind or out of its range.

    Source: the position bias of TopoFlow, arXiv 2602.16821; buckets as in T5, arXiv 1910.10683.
    """

    reads = frozenset()

    def __init__(self, num_heads: int, *, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        if count("num_buckets", num_buckets) % 4:
            raise InputError(f"num_buckets is a multiple of 4, not {num_buckets}")
        if count("max_distance", max_distance) <= num_buckets // 4:
            raise InputError(f"max_distance is above num_buckets / 4 = {num_buckets // 4}, not {max_distance}")
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bias_table = nn.Parameter(torch.empty(num_buckets, num_buckets, num_heads))
        nn.init.trunc_normal_(self.bias_table, std=TABLE_STD)

    def inputs(self, terrain: Terrain) -> Tensors:
        terrain.require_grid("the relative_2d bias")
        rows, columns = terrain.grid
        x = terrain.columns * self.max_distance // columns
        y = terrain.rows * self.max_distance // rows
        return (torch.stack([x, y], dim=-1)[None],)

    def features(self, position: Tensor) -> Tensors:
        """`position` itself: x and y of each token, `[B or 1, L, 2]`, whole numbers."""
        if position.dim() != 3 or position.shape[2] != 2:
            raise InputError(f"positions are [batch or 1, tokens, 2], not {list(position.shape)}")
        return (position,)

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        bucket = self._bucket(key[0][:, None] - query[0][:, :, None])
        return self.bias_table.to(self.value_dtype())[bucket[..., 0], bucket[..., 1]].permute(0, 3, 1, 2)

    def _bucket(self, offset: Tensor) -> Tensor:
        half, exact = self.num_buckets // 2, self.num_buckets // 4
        distance = offset.abs()
        ratio = (distance.clamp(min=exact) / exact).log() / math.log(self.max_distance / exact)
        wide = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        return (offset < 0) * half + torch.where(distance < exact, distance, wide)

    def extra_repr(self) -> str:
        return f"num_buckets={self.num_buckets}, max_distance={self.max_distance}"
