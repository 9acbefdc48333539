"""Where the air comes from: each patch looks upwind, as far as the air travels in the lead time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from climax_elevation.bias.base import Tensors
from climax_elevation.bias.patch_lengths import PatchLengths
from climax_elevation.bias.registry import register_bias
from climax_elevation.checks import positive
from climax_elevation.errors import InputError
from climax_elevation.terrain.places import positions
from climax_elevation.terrain.sphere import EARTH_RADIUS_M, east_and_north, upright
from climax_elevation.watch import judge, judged

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

SECONDS_AN_HOUR = 3600.0


@register_bias("advection")
class AdvectionBias(PatchLengths):
    """A kernel around the place that the air over the query has left.

        b[h, i, j] = kappa_h (X_j . D[h, i] - 1) = -kappa_h |X_j - D[h, i]|^2 / 2

    X are the patch centres as unit vectors, and D[h, i] the point that is reached from X_i by going back
    along the local wind, on a great circle, for a fraction f_h of the lead time t:

        D[h, i] = cos(a) X_i - sin(a) w_i / |w_i|,      a = f_h |w_i| t / R

    exp(b) is the von Mises-Fisher kernel of concentration kappa_h, that is of width 1 / sqrt(kappa_h)
    radians. kappa_h = exp(log_kappa_h) / p^2 is learned, and so is f_h; p, the angle between neighbouring
    patches of the grid that was trained on, is kept in the checkpoint (`patch_rad`), so that on another grid
    the kernel is as many kilometres wide. The bias is of rank 3: what D alone decides is the same for all keys.

    On a plane (`grid_spacing_m` of `attach`) X and D are positions over R, and only the second form holds.

    The heads start with fractions from 0 to 1 and widths from one patch to a quarter of the grid's
    longer side: every fraction with every width, as far as there are heads.

    Args:
        num_heads: Heads of the attention.
        grid: Rows and columns of patches.
        width_scale: Factor of all widths at the start.

    Raises:
        InputError: If an argument is not of its kind; with `inputs`, if the wind goes half around the Earth
            within the lead time, as a monthly mean seems to: then it says nothing about where the air was.
    """

    who = "the advection bias"
    reads = frozenset({"spacing_m"})

    def __init__(self, num_heads: int, grid: tuple[int, int], *, width_scale: float = 1.0) -> None:
        super().__init__(grid)
        widths = max(1, math.isqrt(num_heads))
        fractions = -(-num_heads // widths)
        head = torch.arange(num_heads)
        # one head alone looks all the way back, with a kernel of middle width
        share = (head % widths) / (widths - 1) if widths > 1 else torch.full((num_heads,), 0.5)
        back = (head // widths) / (fractions - 1) if fractions > 1 else torch.ones(num_heads)
        width = positive("width_scale", width_scale, "widths") * self.greatest**share
        self.log_kappa = nn.Parameter(-2 * width.log())
        self.fraction = nn.Parameter(back.float())
        self.needs = frozenset({"u", "v", "lead_hours"})

    def prepare(self, terrain: Terrain, cache_dir: Path | None = None) -> None:
        """Take the angle between patches, unless a checkpoint brought that of its own grid."""
        terrain.require_grid(self.who)
        super().prepare(terrain, cache_dir)

    def inputs(self, terrain: Terrain) -> Tensors:
        """X and the travel w t / R of each patch, in Earth radii: `[1, L, 3]` and `[B, L, 3]`; 2 on a plane."""
        terrain.require_grid(self.who)
        self.ready_for(terrain)
        wind = torch.stack([terrain.u, terrain.v], dim=-1).double()  # type: ignore[list-item]
        radii_per_m_s = terrain.lead_hours.double() * (SECONDS_AN_HOUR / EARTH_RADIUS_M)  # type: ignore[union-attr]
        travel = wind * radii_per_m_s[:, None, None]
        travel = judged(travel, travel.norm(dim=-1).max()[None], _check_travel)
        if terrain.spacing_m is not None:
            return positions(terrain), travel
        east, north = east_and_north(terrain.lat.double(), terrain.lon.double())  # type: ignore[union-attr]
        return positions(terrain), travel[..., :1] * east + travel[..., 1:] * north

    def features(self, position: Tensor, travel: Tensor) -> Tensors:
        """Per token the pull f, the row's constant, and the place g: b[h, i, j] = f[i, h] . g[j] + constant[i, h].

        Args:
            position: X, `[B or 1, L, 3]`; on a plane x and y over R, `[B or 1, L, 2]`.
            travel: w t / R, tangent to the sphere or in the plane, `[B or 1, L, 3 or 2]`.

        Returns:
            f `[B or 1, L, heads, 3]`, the constant `[B or 1, L, heads]`, and g `[B or 1, L, 3]`.
        """
        if position.dim() != 3 or position.shape[2] not in (2, 3) or travel.shape[1:] != position.shape[1:]:
            raise InputError(
                "position and travel are [batch or 1, tokens, 3], or 2 on a plane, not "
                f"{list(position.shape)} and {list(travel.shape)}"
            )
        self.check_ready()
        # in float64 and from the tokens' centre, lest float32 round away what tells neighbours apart
        position, travel = position.double(), travel.double()
        kappa = self.log_kappa.double().exp() / self.patch_rad.double() ** 2
        kernel = _on_the_sphere if position.shape[2] == 3 else _on_a_plane
        pull, constant, place = kernel(position, travel[:, :, None] * self.fraction.double()[:, None], kappa[:, None])
        dtype = self.value_dtype()
        return pull.to(dtype), constant.to(dtype), place.to(dtype)

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        pull, constant, place = *query[:2], key[2]
        return pull.transpose(1, 2) @ place[:, None].transpose(2, 3) + constant.transpose(1, 2)[..., None]

    def factors(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        pull, _, place = self.features(*inputs)
        return pull.transpose(1, 2), place[:, None]


def _on_the_sphere(position: Tensor, back: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """kappa (X . D - 1) = kappa D . (X - c) + kappa (D . c - 1), with any c."""
    angle = back.norm(dim=-1, keepdim=True)
    departure = angle.cos() * position[:, :, None] - torch.sinc(angle / math.pi) * back
    centre = position.mean(dim=1, keepdim=True)
    constant = kappa[:, 0] * ((departure * centre[:, :, None]).sum(-1) - 1)
    axes = upright(position)
    return kappa * (departure @ axes[:, None]), constant, (position - centre) @ axes


def _on_a_plane(position: Tensor, back: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-kappa |X - D|^2 / 2 = kappa D . X - kappa |X|^2 / 2 - kappa |D|^2 / 2, counted from the centre."""
    place = position - position.mean(dim=1, keepdim=True)
    departure = place[:, :, None] - back
    pull = torch.cat([kappa * departure, -kappa.expand(*departure.shape[:-1], 1)], dim=-1)
    constant = -kappa[:, 0] * departure.square().sum(-1) / 2
    return pull, constant, torch.cat([place, place.square().sum(-1, keepdim=True) / 2], dim=-1)


@judge
def _check_travel(numbers: list[float]) -> None:
    (farthest,) = numbers
    if not farthest <= math.pi:
        raise InputError(
            f"wind times lead time reaches {farthest * EARTH_RADIUS_M / 1e3:.0f} km, past half way around the Earth "
            "(20015 km), where advection means nothing: is the wind a mean over the lead time, such as a month's? "
            "Choose another bias, or a shorter lead time"
        )
