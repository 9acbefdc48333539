"""Approach 1: rising ground costs attention, strong wind lowers the cost. Two learnable scalars."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from climax_elevation import compiled
from climax_elevation.bias.base import ElevationBias, Gradients, Pullback, Tensors, scalar
from climax_elevation.bias.registry import register_bias
from climax_elevation.checks import finite, one_of, positive, true_or_false
from climax_elevation.errors import InputError

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

PENALISED = {"key_above": (1.0, 0.0), "query_above": (-1.0, 0.0), "both": (1.0, -1.0)}
"""By direction, two factors of a rise: the larger product is what is penalised."""
DIRECTIONS = tuple(PENALISED)


@register_bias("physics")
class PhysicsBias(ElevationBias):
    """Penalise attention across a difference in height.

        b[i, j] = -alpha * max(0, (z_j - z_i) / H) * m[i, j]
        m[i, j] = 1 - beta * sigmoid((w_i + w_j) / 2 - threshold)       (with `wind`; otherwise 1)

    z is patch-mean elevation in metres, w patch-mean wind speed in m/s, H `height_scale_m`. The
    published form, `direction="key_above"`, penalises a low query that reads a high key: information
    that would flow *downhill*. `"query_above"` penalises the opposite, max(0, z_i - z_j); `"both"`
    either, |z_j - z_i|.

    Args:
        alpha_init: Start of `elevation_alpha`, logits per `height_scale_m` of rise.
        beta_init: Start of `wind_beta`, the share of the penalty that strong wind removes.
        height_scale_m: H, metres, > 0.
        wind_threshold_m_s: Mean speed at which half of beta acts, m/s.
        wind: Whether wind modulates. Without it there is no `wind_beta`.
        direction: Which end of the pair is penalised for being above the other.

    Raises:
        InputError: If an argument is not of its kind, out of its range, or has no effect with the others.

    Source: elevation_attention_summary.md, approach 1. Departure: no clamp, which would stop alpha's
    gradient at alpha <= 0 and on high terrain; `direction` is added.
    """

    reads = frozenset()
    acts_with = MappingProxyType({"beta_init": {"wind": True}, "wind_threshold_m_s": {"wind": True}})
    differentiated = frozenset({"elevation_alpha", "wind_beta"})

    def __init__(
        self,
        *,
        alpha_init: float = 1.0,
        beta_init: float = 0.3,
        height_scale_m: float = 1000.0,
        wind_threshold_m_s: float = 5.0,
        wind: bool = True,
        direction: str = "key_above",
    ) -> None:
        super().__init__()
        self.direction = one_of("direction", direction, DIRECTIONS)
        self.wind = true_or_false("wind", wind)
        self.height_scale_m = positive("height_scale_m", height_scale_m, "metres")
        self.wind_threshold_m_s = finite("wind_threshold_m_s", wind_threshold_m_s)
        self.needs = frozenset({"speed"}) if wind else frozenset()
        self.elevation_alpha = scalar("alpha_init", alpha_init)
        if wind:
            self.wind_beta = scalar("beta_init", beta_init)

    def inputs(self, terrain: Terrain) -> Tensors:
        terrain.require(self.needs, "the physics bias")
        return (terrain.elevation_m, terrain.speed) if self.wind else (terrain.elevation_m,)

    def features(self, elevation: Tensor, speed: Tensor | None = None) -> Tensors:
        """Per token: z / H, and w - threshold where wind modulates.

        Args:
            elevation: Patch-mean elevation z, `[B or 1, L]`, metres, not standardised.
            speed: Patch-mean wind speed w, `[B or 1, L]`, m/s; required with `wind`, refused without.
        """
        check_elevation(elevation)
        check_speed(speed, elevation, self.wind, "the physics bias")
        dtype = self.value_dtype()
        height = elevation.to(dtype) / self.height_scale_m
        return (height,) if speed is None else (height, speed.to(dtype) - self.wind_threshold_m_s)

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        rise = key[0][:, None, :] - query[0][:, :, None]
        bias = -self.elevation_alpha.to(rise.dtype) * penalised(rise, self.direction)
        if self.wind:
            bias = bias * wind_modulation(self.wind_beta, query[1], key[1])
        return bias[:, None]

    def pullback(
        self, query: Tensors, key: Tensors, wanted: Sequence[int], out: Tensor | None = None
    ) -> tuple[Tensor, Pullback] | None:
        """b = -alpha (r - beta r s), so dalpha = -sum db (r - beta r s) and dbeta = alpha sum db r s."""
        if wanted:
            return None
        alpha, beta = self.elevation_alpha.detach(), self.wind_beta.detach() if self.wind else None
        if compiled.available(*query, *key) and len(query[0]) == len(query[-1]) == 1:
            return self._compiled(query, key, out, float(alpha), 0.0 if beta is None else float(beta))
        drop = penalised(key[0][:, None, :] - query[0][:, :, None], self.direction)
        eased = None if beta is None else drop * wind_share(query[1], key[1])
        cost = drop if eased is None or beta is None else drop - beta.to(drop.dtype) * eased

        def gradients(db: Tensor) -> Gradients:
            of_beta = None if eased is None else alpha * (db[:, 0] * eased).sum()
            return self._named(-(db[:, 0] * cost).sum(), of_beta)

        return (-alpha.to(drop.dtype) * cost)[:, None], gradients

    def _compiled(
        self, query: Tensors, key: Tensors, out: Tensor | None, alpha: float, beta: float
    ) -> tuple[Tensor, Pullback]:
        """`pullback` in loops that keep no more of a tile than its values."""
        tokens = [side[index].contiguous() for index in (0, -1) for side in (query, key)]
        sizes = (int(self.wind), query[0].shape[1], key[0].shape[1])
        b = query[0].new_empty(1, 1, *sizes[1:]) if out is None else out
        compiled.call("physics_values", *tokens, b, *PENALISED[self.direction], alpha, beta, *sizes)

        def gradients(db: Tensor) -> Gradients:
            sums = torch.zeros(2, dtype=torch.float64)
            compiled.call("physics_sums", *tokens, compiled.packed(db), sums, *PENALISED[self.direction], *sizes)
            of_r, of_rs = sums
            return self._named(beta * of_rs - of_r, alpha * of_rs if self.wind else None)

        return b, gradients

    def _named(self, of_alpha: Tensor, of_beta: Tensor | None) -> Gradients:
        found = {"elevation_alpha": _shaped(of_alpha, self.elevation_alpha)}
        if of_beta is not None:
            found["wind_beta"] = _shaped(of_beta, self.wind_beta)
        return found, [], []

    def extra_repr(self) -> str:
        return (
            f"wind={self.wind}, direction={self.direction!r}, height_scale_m={self.height_scale_m:g}, "
            f"wind_threshold_m_s={self.wind_threshold_m_s:g}"
        )


def _shaped(total: Tensor, parameter: Tensor) -> Tensor:
    """A gradient as its parameter is: `[1]`, or `[]` in what an older version exported."""
    return total.to(parameter.dtype).view_as(parameter)


def penalised(rise: Tensor, direction: str) -> Tensor:
    """The part of a rise z_j - z_i from query to key that `direction` penalises, >= 0, in its unit."""
    if direction == "key_above":
        return rise.relu()
    if direction == "query_above":
        return (-rise).relu()
    return rise.abs()


def wind_modulation(beta: Tensor, query_excess: Tensor, key_excess: Tensor) -> Tensor:
    """1 - beta sigmoid((e_i + e_j) / 2), `[B or 1, Lq, Lk]`, of speeds above the threshold, e, m/s."""
    share = wind_share(query_excess, key_excess)
    return 1 - beta.to(share.dtype) * share


def wind_share(query_excess: Tensor, key_excess: Tensor) -> Tensor:
    """sigmoid((e_i + e_j) / 2), the share of beta that acts."""
    return torch.sigmoid((query_excess[:, :, None] + key_excess[:, None, :]) / 2)


def check_elevation(elevation: Tensor) -> None:
    """Raise InputError unless `elevation` is `[B or 1, L]`."""
    if elevation.dim() != 2:
        raise InputError(f"elevation is [batch or 1, tokens] in metres, not {list(elevation.shape)}")


def check_speed(speed: Tensor | None, elevation: Tensor, wanted: bool, who: str) -> None:
    """Raise InputError unless `speed` is there if it is wanted, and of elevation's tokens."""
    if wanted and speed is None:
        raise InputError(f"{who} reads wind, and got no speed: give it, or set wind=False")
    if not wanted and speed is not None:
        raise InputError(f"{who} was built with wind=False, and got a speed: leave it out")
    if speed is not None and (speed.dim() != 2 or speed.shape[1] != elevation.shape[1]):
        raise InputError(
            f"speed is [batch or 1, {elevation.shape[1]} tokens] in m/s, as elevation is, not {list(speed.shape)}"
        )
