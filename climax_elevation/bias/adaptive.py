"""An earlier variant: fixed physics and one learnable scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from climax_elevation.bias.base import ElevationBias, Tensors, scalar
from climax_elevation.bias.physics import check_elevation, check_speed
from climax_elevation.bias.registry import register_bias
from climax_elevation.checks import finite, positive

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

BARRIER = 0.5  # logits per height_scale_m of rise, before the scale
WIND_SHARE = 0.3  # of the barrier, removed by strong wind


@register_bias("adaptive")
class AdaptiveBias(ElevationBias):
    """A fixed barrier, lowered by the weaker of the two winds, times one learnable scale.

        b[i, j] = -s * 0.5 max(0, (z_j - z_i) / H) * (1 - 0.3 sigmoid(min(w_i, w_j) - threshold))

    z is patch-mean elevation in metres, w patch-mean wind speed in m/s.

    Args:
        scale_init: Start of s, `adaptive_scale`.
        height_scale_m: H, metres, > 0.
        wind_threshold_m_s: Speed of the weaker wind at which half of the 0.3 acts, m/s.

    Raises:
        InputError: If an argument is not of its kind or out of its range.

    Source: the mask that elevation_attention_summary.md calls outdated (`simple_adaptive_mask`).
    Departure: heights and winds in metres and m/s, and no clamp.
    """

    needs = frozenset({"speed"})
    reads = frozenset()

    def __init__(
        self, *, scale_init: float = 0.2, height_scale_m: float = 1000.0, wind_threshold_m_s: float = 5.0
    ) -> None:
        super().__init__()
        self.height_scale_m = positive("height_scale_m", height_scale_m, "metres")
        self.wind_threshold_m_s = finite("wind_threshold_m_s", wind_threshold_m_s)
        self.adaptive_scale = scalar("scale_init", scale_init)

    def inputs(self, terrain: Terrain) -> Tensors:
        terrain.require(self.needs, "the adaptive bias")
        return (terrain.elevation_m, terrain.speed)

    def features(self, elevation: Tensor, speed: Tensor) -> Tensors:
        """Per token: z / H and w - threshold, of metres and m/s, each `[B or 1, L]`."""
        check_elevation(elevation)
        check_speed(speed, elevation, True, "the adaptive bias")
        dtype = self.value_dtype()
        return elevation.to(dtype) / self.height_scale_m, speed.to(dtype) - self.wind_threshold_m_s

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        rise = key[0][:, None, :] - query[0][:, :, None]
        weaker = torch.minimum(query[1][:, :, None], key[1][:, None, :])
        fixed = -BARRIER * rise.relu() * (1 - WIND_SHARE * torch.sigmoid(weaker))
        return (self.adaptive_scale.to(rise.dtype) * fixed)[:, None]

    def extra_repr(self) -> str:
        return f"height_scale_m={self.height_scale_m:g}, wind_threshold_m_s={self.wind_threshold_m_s:g}"
