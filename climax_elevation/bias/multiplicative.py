"""The mask that used to be applied after softmax, as the additive bias that it equals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import logsigmoid

from climax_elevation.bias.base import ElevationBias, Tensors, scalar
from climax_elevation.bias.physics import check_elevation
from climax_elevation.bias.registry import register_bias
from climax_elevation.checks import positive

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain


@register_bias("multiplicative")
class MultiplicativeBias(ElevationBias):
    """Attention weights times sigmoid(-s rise), renormalised: for comparison with the published mask.

        softmax(l)_j sigmoid(-s r_ij) / sum_k softmax(l)_k sigmoid(-s r_ik) = softmax(l + b)_j
        b[i, j] = log sigmoid(-s r_ij),     r_ij = (z_j - z_i) / H

    z is patch-mean elevation in metres. At s = 0 the bias is a constant, and attention plain.

    Args:
        strength_init: Start of s, `elevation_strength`, per `height_scale_m` of rise.
        height_scale_m: H, metres, > 0.

    Raises:
        InputError: If an argument is not of its kind or out of its range.

    Source: elevation_attention_summary.md, "previous approach". Departure: heights in metres over H, in
    the place of heights scaled to [0, 1], and no clamp.
    """

    reads = frozenset()

    def __init__(self, *, strength_init: float = 1.0, height_scale_m: float = 1000.0) -> None:
        super().__init__()
        self.height_scale_m = positive("height_scale_m", height_scale_m, "metres")
        self.elevation_strength = scalar("strength_init", strength_init)

    def inputs(self, terrain: Terrain) -> Tensors:
        return (terrain.elevation_m,)

    def features(self, elevation: Tensor) -> Tensors:
        """Per token: z / H, of `elevation` `[B or 1, L]` in metres."""
        check_elevation(elevation)
        return (elevation.to(self.value_dtype()) / self.height_scale_m,)

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        rise = key[0][:, None, :] - query[0][:, :, None]
        return logsigmoid(-self.elevation_strength.to(rise.dtype) * rise)[:, None]

    def extra_repr(self) -> str:
        return f"height_scale_m={self.height_scale_m:g}"
