"""Approach 1: rising ground costs attention, strong wind lowers the cost. Two learnable scalars."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from climax_elevation.bias.base import ElevationBias, Features
from climax_elevation.errors import InputError
from climax_elevation.registry import register_bias

if TYPE_CHECKING:
    from climax_elevation.terrain import Terrain

DIRECTIONS = ("key_above", "query_above", "both")


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
        InputError: If an argument is not of its kind or out of its range.

    Source: elevation_attention_summary.md, approach 1. Departure: no clamp, which would stop alpha's
    gradient at alpha <= 0 and on high terrain; `direction` is added.
    """

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
        if direction not in DIRECTIONS:
            raise InputError(f"unknown direction {direction!r}; choose one of {_listed(DIRECTIONS)}")
        if not isinstance(wind, bool):
            raise InputError(f"wind is true or false, not {wind!r}")
        self.height_scale_m = _number("height_scale_m", height_scale_m)
        if self.height_scale_m <= 0:
            raise InputError(f"height_scale_m is a height in metres above 0, not {height_scale_m!r}")
        self.wind_threshold_m_s = _number("wind_threshold_m_s", wind_threshold_m_s)
        self.wind = wind
        self.direction = direction
        self.needs = frozenset({"speed"}) if wind else frozenset()
        self.elevation_alpha = nn.Parameter(torch.tensor(_number("alpha_init", alpha_init)))
        if wind:
            self.wind_beta = nn.Parameter(torch.tensor(_number("beta_init", beta_init)))

    def inputs(self, terrain: Terrain) -> tuple[Tensor, ...]:
        if not self.wind:
            return (terrain.elevation_m,)
        if terrain.speed is None:
            raise InputError("the physics bias needs wind, and this terrain has none: give it, or set wind=False")
        return terrain.elevation_m, terrain.speed

    def features(self, elevation: Tensor, speed: Tensor | None = None) -> Features:  # type: ignore[override]
        """Per token: z / H, and w - threshold where wind modulates.

        Args:
            elevation: Patch-mean elevation z, `[B or 1, L]`, metres, not standardised.
            speed: Patch-mean wind speed w, `[B or 1, L]`, m/s; required with `wind`, refused without.
        """
        if self.wind and speed is None:
            raise InputError("the physics bias modulates by wind, and got no speed: give it, or set wind=False")
        if not self.wind and speed is not None:
            raise InputError("the physics bias was built with wind=False, and got a speed: leave it out")
        if elevation.dim() != 2:
            raise InputError(f"elevation is [batch or 1, tokens] in metres, not {list(elevation.shape)}")
        dtype = self.value_dtype()
        height = elevation.to(dtype) / self.height_scale_m
        if speed is None:
            return (height,)
        if speed.dim() != 2 or speed.shape[1] != elevation.shape[1]:
            raise InputError(
                f"speed is [batch or 1, {elevation.shape[1]} tokens] in m/s, as elevation is, not {list(speed.shape)}"
            )
        return height, speed.to(dtype) - self.wind_threshold_m_s

    def pairwise(self, query: Features, key: Features) -> Tensor:
        rise = key[0][:, None, :] - query[0][:, :, None]
        bias = -self.elevation_alpha.to(rise.dtype) * self._penalised(rise)
        if self.wind:
            excess = (query[1][:, :, None] + key[1][:, None, :]) / 2
            bias = bias * (1 - self.wind_beta.to(rise.dtype) * torch.sigmoid(excess))
        return bias[:, None]

    def _penalised(self, rise: Tensor) -> Tensor:
        if self.direction == "key_above":
            return rise.relu()
        if self.direction == "query_above":
            return (-rise).relu()
        return rise.abs()

    def extra_repr(self) -> str:
        return (
            f"wind={self.wind}, direction={self.direction!r}, height_scale_m={self.height_scale_m:g}, "
            f"wind_threshold_m_s={self.wind_threshold_m_s:g}"
        )


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} is a finite number, not {value!r}")
    return float(value)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
