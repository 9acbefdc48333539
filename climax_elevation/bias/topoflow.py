"""The bias of TopoFlow: relative positions in a table, and rising ground."""

from __future__ import annotations

from climax_elevation.bias.build import SumBias
from climax_elevation.bias.physics import PhysicsBias
from climax_elevation.bias.registry import register_bias
from climax_elevation.bias.relative_2d import RelativePositionBias2D


@register_bias("topoflow")
class TopoFlowBias(SumBias):
    """`relative_2d` plus `physics` without wind, with alpha from 2.0.

        b[h, i, j] = table[bucket(x_j - x_i), bucket(y_j - y_i), h] - alpha max(0, (z_j - z_i) / H)

    Args:
        num_heads: Heads of the attention.
        num_buckets, max_distance: As `RelativePositionBias2D`.
        alpha_init, height_scale_m, direction: As `PhysicsBias`.

    Raises:
        InputError: If an argument is not of its kind or out of its range.

    Source: TopoFlow, arXiv 2602.16821. Departure: heights in metres, and no clamp to [-10, 0].
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        alpha_init: float = 2.0,
        height_scale_m: float = 1000.0,
        direction: str = "key_above",
    ) -> None:
        physics = PhysicsBias(alpha_init=alpha_init, height_scale_m=height_scale_m, wind=False, direction=direction)
        table = RelativePositionBias2D(num_heads, num_buckets=num_buckets, max_distance=max_distance)
        super().__init__({"relative_2d": table, "physics": physics})
