"""A barrier is what stands between two places, not how high they lie."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor

from climax_elevation.bias.base import ElevationBias, Tensors, scalar, take_tokens
from climax_elevation.bias.paths import STEPS_A_METRE, PathExcess, path_excess
from climax_elevation.bias.physics import DIRECTIONS, check_elevation, check_speed, penalised, wind_modulation
from climax_elevation.bias.registry import register_bias
from climax_elevation.checks import finite, one_of, positive, true_or_false
from climax_elevation.errors import InputError
from climax_elevation.watch import judge, judged

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

FORMS = ("height", "froude")
GROUND_MAY_MOVE_M = 1.0  # rounding of a standardised channel, and no more


@register_bias("ridge")
class RidgeBias(ElevationBias):
    """Penalise attention across the highest ground on the straight path between two patches.

        b[i, j] = -alpha * max(0, P_ij - z_start) / H * m[i, j]
        m[i, j] = 1 - beta * sigmoid((w_i + w_j) / 2 - threshold)       (with `wind`; otherwise 1)

    P_ij is the highest patch-mean elevation on the path between i and j, both ends included, so P_ij = P_ji;
    z_start is z_i with `direction="key_above"`, the barrier as the query sees it; z_j with `"query_above"`,
    the climb of what comes from the key; with `"both"` the two are added, which is symmetric. Where no ground
    between is higher than the ends, this is `physics`.

    `form="froude"`: what is below the dividing streamline is blocked, and what has the speed to is not. The
    flow passes over where the Froude number w / (N h) exceeds 1; of a barrier of height h there remains

        h - w / N,   not below 0,      w = (w_i + w_j) / 2

    in the place of P - z_start, and there is no beta.

    The paths are static geometry (`climax_elevation.bias.paths`): computed once a grid, kept beside the data
    and out of checkpoints, to half a metre.

    Args:
        alpha_init: Start of `elevation_alpha`, logits per `height_scale_m` of barrier.
        beta_init: Start of `wind_beta`, the share of the penalty that strong wind removes.
        height_scale_m: H, metres, > 0.
        wind_threshold_m_s: Mean speed at which half of beta acts, m/s.
        wind: Whether wind modulates. Without it there is no `wind_beta`.
        direction: "key_above", "query_above" or "both".
        form: "height" or "froude".
        buoyancy_frequency_per_s: N, Brunt-Vaisala frequency, 1/s, > 0.

    Raises:
        InputError: If an argument is not of its kind, out of its range, or does not fit the others.

    Source: the path barrier is after PM2.5-GNN, arXiv 2002.12898; the dividing streamline after Snyder et
    al., J. Fluid Mech. 152 (1985).
    """

    reads = frozenset()
    acts_with = MappingProxyType(
        {
            "beta_init": {"wind": True, "form": "height"},
            "wind_threshold_m_s": {"wind": True, "form": "height"},
            "buoyancy_frequency_per_s": {"form": "froude"},
        }
    )
    unread = ElevationBias.unread | {"_paths"}  # `inputs` hands them on

    def __init__(
        self,
        *,
        alpha_init: float = 1.0,
        beta_init: float = 0.3,
        height_scale_m: float = 1000.0,
        wind_threshold_m_s: float = 5.0,
        wind: bool = True,
        direction: str = "key_above",
        form: str = "height",
        buoyancy_frequency_per_s: float = 0.01,
    ) -> None:
        super().__init__()
        self.direction = one_of("direction", direction, DIRECTIONS)
        self.form = one_of("form", form, FORMS)
        self.wind = true_or_false("wind", wind)
        if form == "froude" and not wind:
            raise InputError("form='froude' compares wind with height: set wind=True, or form='height'")
        self.height_scale_m = positive("height_scale_m", height_scale_m, "metres")
        self.wind_threshold_m_s = finite("wind_threshold_m_s", wind_threshold_m_s)
        self.buoyancy_frequency_per_s = positive("buoyancy_frequency_per_s", buoyancy_frequency_per_s, "1/s")
        self.needs = frozenset({"speed"}) if wind else frozenset()
        self.elevation_alpha = scalar("alpha_init", alpha_init)
        if wind and form == "height":
            self.wind_beta = scalar("beta_init", beta_init)
        self._paths: PathExcess | None = None

    def prepare(self, terrain: Terrain, cache_dir: Path | None = None) -> None:
        """Find the highest ground on all paths, unless it is kept in `cache_dir`."""
        self._paths = path_excess(terrain, cache_dir)

    def inputs(self, terrain: Terrain) -> Tensors:
        terrain.require_grid("the ridge bias")
        terrain.require(self.needs, "the ridge bias")
        if self._paths is None:
            self.prepare(terrain)
        self._paths = self._paths.to(terrain.elevation_m.device)  # type: ignore[union-attr]
        excess, ground = self._paths.half_metres, self._paths.elevation_m
        if terrain.patch_ids is not None:
            ids = terrain.patch_ids
            excess, ground = excess[ids[:, None], ids], ground[:, ids]
        apart = (terrain.elevation_m - ground).abs().max()
        inputs = (judged(terrain.elevation_m, apart[None], _check_ground), excess[None])
        return (*inputs, terrain.speed) if self.wind else inputs

    def reordered(self, inputs: Tensors, order: Tensor) -> Tensors:
        elevation, excess, *speed = (take_tokens(values, order) for values in inputs)
        # a path has two ends: its rows are in order now, and its columns follow
        return elevation, take_tokens(excess.transpose(1, 2), order).transpose(1, 2), *speed

    def features(self, elevation: Tensor, excess: Tensor, speed: Tensor | None = None) -> Tensors:
        """Per token: z / H, the token's row of `excess`, and w - threshold (or w / (N H)) with wind.

        Args:
            elevation: Patch-mean elevation z, `[B or 1, L]`, metres, not standardised.
            excess: P_ij - max(z_i, z_j) of all pairs, `[B or 1, L, L]`, half metres.
            speed: Patch-mean wind speed w, `[B or 1, L]`, m/s; required with `wind`, refused without.
        """
        check_elevation(elevation)
        check_speed(speed, elevation, self.wind, "the ridge bias")
        if excess.dim() != 3 or excess.shape[1:] != (elevation.shape[1], elevation.shape[1]):
            tokens = elevation.shape[1]
            raise InputError(f"excess is [batch or 1, {tokens}, {tokens}], as elevation is, not {list(excess.shape)}")
        dtype = self.value_dtype()
        height = elevation.to(dtype) / self.height_scale_m
        if speed is None:
            return height, excess
        if self.form == "height":
            return height, excess, speed.to(dtype) - self.wind_threshold_m_s
        return height, excess, speed.to(dtype) / (self.buoyancy_frequency_per_s * self.height_scale_m)

    def tile(self, features: Tensors, rows: slice, columns: slice) -> tuple[Tensors, Tensors]:
        height, excess, *speed = features
        query = (height[:, rows], excess[:, rows, columns], *(w[:, rows] for w in speed))
        # the path is the query's: of a key's row of excess nothing is read
        return query, (height[:, columns], excess[:, columns, :0], *(w[:, columns] for w in speed))

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        rise = key[0][:, None, :] - query[0][:, :, None]
        excess = query[1].to(rise.dtype) / (STEPS_A_METRE * self.height_scale_m)
        starts = ("key_above", "query_above") if self.direction == "both" else (self.direction,)
        barriers = [penalised(rise, start) + excess for start in starts]
        if self.form == "froude":
            passed = (query[2][:, :, None] + key[2][:, None, :]) / 2
            barriers = [(barrier - passed).relu() for barrier in barriers]
        bias = -self.elevation_alpha.to(rise.dtype) * sum(barriers[1:], start=barriers[0])
        if self.wind and self.form == "height":
            bias = bias * wind_modulation(self.wind_beta, query[2], key[2])
        return bias[:, None]

    def extra_repr(self) -> str:
        return (
            f"form={self.form!r}, wind={self.wind}, direction={self.direction!r}, "
            f"height_scale_m={self.height_scale_m:g}"
        )


@judge
def _check_ground(numbers: list[float]) -> None:
    (apart,) = numbers
    if not apart <= GROUND_MAY_MOVE_M:
        raise InputError(
            f"the ridge bias knows the paths of another ground, up to {apart:.0f} m from this one: give one ground "
            "for all samples (elevation_file), or call prepare(terrain) for the new one"
        )
