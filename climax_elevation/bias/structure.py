"""The structure functions of optimal interpolation: what is near, and equally high, is alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from climax_elevation.bias.base import Tensors
from climax_elevation.bias.build import side_by_side
from climax_elevation.bias.patch_lengths import PatchLengths
from climax_elevation.bias.registry import register_bias
from climax_elevation.checks import true_or_false
from climax_elevation.errors import InputError
from climax_elevation.terrain.places import positions
from climax_elevation.terrain.sphere import EARTH_RADIUS_M, upright

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

LAND_SHARE = 0.5  # S at the start: a logit of -2 between land and sea
HEIGHTS_M = (300.0, 600.0, 150.0, 1e4)  # V of the heads at the start; with the last, height costs next to nothing


@register_bias("structure")
class StructureBias(PatchLengths):
    """As attention weights, a Gaussian of distance times one of the difference in height.

        b[h, i, j] = -d(i, j)^2 / (2 L_h^2) - (z_i - z_j)^2 / (2 V_h^2) - (s_i - s_j)^2 / (2 S_h^2)

    the last of which only with `land`. d is the straight distance between the places: the chord through the Earth, or
    the distance on the plane of `grid_spacing_m`. z is patch-mean elevation in metres, s the share of land.
    V_h = exp(log_height_h) metres is learned, and so is L_h = exp(log_length_h) p; p, the distance between neighbouring
    patches of the grid that was trained on, is kept in the checkpoint (`patch_rad`), so that on another grid L is as
    many kilometres long.

    By themselves these weights are those of a kernel smoother, exp(b) being the correlation that optimal interpolation
    takes between the errors at two places. The bias is of rank 3 for distance, on the sphere as on a plane, and 2 for
    each other term: what the query alone decides is the same for all keys.

    The heads start with V of 300, 600, 150 m and practically without height (10 km), in turn, and with L from one patch
    for the first to a quarter of the grid's longer side for the last; one head alone has an L in the middle.

    Args:
        num_heads: Heads of the attention.
        grid: Rows and columns of patches.
        vertical: Whether height counts. Without it there is no `log_height`.
        land: Whether the share of land, s, counts: S_h = exp(log_land_h) is learned, from 0.5.

    Raises:
        InputError: If an argument is not of its kind.

    Source: Barnes (1973) as in gridpp's BarnesStructure, whose h, v and w are L, V and S. Departure: each
    head learns its own.
    """

    who = "the structure bias"
    reads = frozenset({"spacing_m"})

    def __init__(self, num_heads: int, grid: tuple[int, int], *, vertical: bool = True, land: bool = False) -> None:
        super().__init__(grid)
        self.vertical = true_or_false("vertical", vertical)
        self.land = true_or_false("land", land)
        self.needs = frozenset({"land"}) if land else frozenset()
        head = torch.arange(num_heads)
        share = head / (num_heads - 1) if num_heads > 1 else torch.full((1,), 0.5)
        self.log_length = nn.Parameter((self.greatest**share).log())
        if vertical:
            self.log_height = nn.Parameter(torch.tensor(HEIGHTS_M)[head % len(HEIGHTS_M)].log())
        if land:
            self.log_land = nn.Parameter(torch.full((num_heads,), LAND_SHARE).log())

    @property
    def lengths_m(self) -> Tensor:
        """L of each head, metres, `[heads]`."""
        return self.log_length.detach().exp() * self.patch_rad * EARTH_RADIUS_M

    @property
    def heights_m(self) -> Tensor:
        """V of each head, metres, `[heads]`; where `vertical` is true."""
        return self.log_height.detach().exp()

    def inputs(self, terrain: Terrain) -> Tensors:
        """Places in Earth radii, `[1, L, 3]`, or `[1, L, 2]` on a plane; metres, shares of land, `[B or 1, L]` each."""
        self.ready_for(terrain)
        given = [positions(terrain)]
        if self.vertical:
            given.append(terrain.elevation_m)
        if self.land:
            given.append(terrain.land)  # type: ignore[arg-type]
        return tuple(given)

    def features(self, position: Tensor, *others: Tensor) -> Tensors:
        """Per token what the bias is a difference of, each counted from the mean of all tokens.

        Args:
            position: Earth radii, `[B or 1, L, 3]`; on a plane `[B or 1, L, 2]`.
            others: With `vertical` patch-mean elevation z, `[B or 1, L]`, metres, not standardised; then, with `land`,
                the share of land, `[B or 1, L]`.

        Returns:
            `[B or 1, L, 3 or 2]`, and `[B or 1, L, 1]` for each of the others.
        """
        dtype = self.value_dtype()
        return tuple((values - centre).to(dtype) for values, centre in self._coordinates(position, *others))

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        bias: Tensor | float = 0.0
        for weight, own, other in zip(self._weights(), query, key, strict=True):
            squares = (own[:, :, None] - other[:, None]).square().sum(-1)
            bias = bias - (weight / 2).to(squares.dtype)[:, None, None] * squares[:, None]
        return bias  # type: ignore[return-value]

    def factors(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.value_dtype()
        pairs = [
            _factors(values, centre, weight)
            for (values, centre), weight in zip(self._coordinates(*inputs), self._weights(), strict=True)
        ]
        return side_by_side([f.to(dtype) for f, _ in pairs]), side_by_side([g.to(dtype) for _, g in pairs])

    def _coordinates(self, position: Tensor, *others: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each term, what it is a difference of, and its mean: in float64, which keeps neighbours apart."""
        self.check_ready()
        if position.dim() != 3 or position.shape[2] not in (2, 3):
            raise InputError(f"position is [batch or 1, tokens, 3], or 2 on a plane, not {list(position.shape)}")
        wanted = ["elevation"] * self.vertical + ["the share of land"] * self.land
        if len(others) != len(wanted):
            raise InputError(
                f"{self.who} with vertical={self.vertical} and land={self.land} takes position"
                f"{''.join(f' and {name}' for name in wanted)}, not {len(others) + 1} tensors"
            )
        for name, values in zip(wanted, others, strict=True):
            if values.dim() != 2:
                raise InputError(f"{name} is [batch or 1, tokens], not {list(values.shape)}")
        terms = [position.double(), *(values.double()[..., None] for values in others)]
        return [(values, values.mean(dim=1, keepdim=True)) for values in terms]

    def _weights(self) -> list[Tensor]:
        """1 / L^2, per square Earth radius, 1 / V^2, per square metre, and 1 / S^2: `[heads]` each, float64."""
        weights = [(-2 * self.log_length.double()).exp() / self.patch_rad.double() ** 2]
        if self.vertical:
            weights.append((-2 * self.log_height.double()).exp())
        if self.land:
            weights.append((-2 * self.log_land.double()).exp())
        return weights


def _factors(values: Tensor, centre: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """f and g of -weight |x_i - x_j|^2 / 2, `[B or 1, heads, L, r]` and `[B or 1, 1, L, r]`, with y = x - centre.

    On the sphere |x| = 1, and it is weight x_i . y_j, but for what i alone decides. Elsewhere it is
    weight (y_i . y_j - |y_j|^2 / 2).
    """
    place, weight = (values - centre)[:, None], weight[:, None, None]
    if values.shape[2] == 3:
        axes = upright(values)[:, None]
        return weight * (values[:, None] @ axes), place @ axes
    f = torch.cat([weight * place, -weight.expand(len(place), -1, place.shape[2], 1)], dim=-1)
    return f, torch.cat([place, place.square().sum(-1, keepdim=True) / 2], dim=-1)
