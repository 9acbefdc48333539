"""The structure functions of optimal interpolation: what is near, and equally high, is alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from climax_elevation.bias.base import Tensors
from climax_elevation.bias.build import side_by_side
from climax_elevation.bias.patch_lengths import PatchLengths
from climax_elevation.bias.physics import check_elevation
from climax_elevation.bias.registry import register_bias
from climax_elevation.checks import true_or_false
from climax_elevation.errors import InputError
from climax_elevation.terrain.places import positions
from climax_elevation.terrain.sphere import EARTH_RADIUS_M, upright

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

HEIGHTS_M = (300.0, 600.0, 150.0, 1e4)  # V of the heads at the start; with the last, height costs next to nothing


@register_bias("structure")
class StructureBias(PatchLengths):
    """As attention weights, a Gaussian of distance times one of the difference in height.

        b[h, i, j] = -d(i, j)^2 / (2 L_h^2) - (z_i - z_j)^2 / (2 V_h^2)

    d is the straight distance between the places: the chord through the Earth, or the distance on the plane of
    `grid_spacing_m`. z is patch-mean elevation in metres. V_h = exp(log_height_h) metres is learned, and so is
    L_h = exp(log_length_h) p; p, the distance between neighbouring patches of the grid that was trained on, is kept in
    the checkpoint (`patch_rad`), so that on another grid L is as many kilometres long.

    By themselves these weights are those of a kernel smoother, exp(b) being the correlation that optimal interpolation
    takes between the errors at two places. The bias is of rank 5, on the sphere (3 for distance, 2 for height) as on a
    plane (3 and 2): what the query alone decides is the same for all keys.

    The heads start with V of 300, 600, 150 m and practically without height (10 km), in turn, and with L from one patch
    for the first to a quarter of the grid's longer side for the last; one head alone has an L in the middle.

    Args:
        num_heads: Heads of the attention.
        grid: Rows and columns of patches.
        vertical: Whether height counts. Without it there is no `log_height`.

    Raises:
        InputError: If an argument is not of its kind.

    Source: Barnes (1973) as in gridpp's BarnesStructure, whose h and v are L and V. Departure: learned, by each head.
    """

    who = "the structure bias"

    def __init__(self, num_heads: int, grid: tuple[int, int], *, vertical: bool = True) -> None:
        super().__init__(grid)
        self.vertical = true_or_false("vertical", vertical)
        head = torch.arange(num_heads)
        share = head / (num_heads - 1) if num_heads > 1 else torch.full((1,), 0.5)
        self.log_length = nn.Parameter((self.greatest**share).log())
        if vertical:
            self.log_height = nn.Parameter(torch.tensor(HEIGHTS_M)[head % len(HEIGHTS_M)].log())

    @property
    def lengths_m(self) -> Tensor:
        """L of each head, metres, `[heads]`."""
        return self.log_length.detach().exp() * self.patch_rad * EARTH_RADIUS_M

    @property
    def heights_m(self) -> Tensor:
        """V of each head, metres, `[heads]`; where `vertical` is true."""
        return self.log_height.detach().exp()

    def inputs(self, terrain: Terrain) -> Tensors:
        """Places in Earth radii, `[1, L, 3]`, or `[1, L, 2]` on a plane; with `vertical`, metres `[B or 1, L]`."""
        self.ready_for(terrain)
        return (positions(terrain), terrain.elevation_m) if self.vertical else (positions(terrain),)

    def features(self, position: Tensor, elevation: Tensor | None = None) -> Tensors:
        """Per token where it is, and how high, each counted from the mean of all tokens.

        Args:
            position: Earth radii, `[B or 1, L, 3]`; on a plane `[B or 1, L, 2]`.
            elevation: Patch-mean elevation z, `[B or 1, L]`, metres, not standardised; required with `vertical`.

        Returns:
            For place and height, `[B or 1, L, 3 or 2]` and `[B or 1, L, 1]`.
        """
        dtype = self.value_dtype()
        return tuple((values - centre).to(dtype) for values, centre in self._coordinates(position, elevation))

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

    def _coordinates(self, position: Tensor, elevation: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Of each term, what it is a difference of, and its mean: in float64, which keeps neighbours apart."""
        self.check_ready()
        if position.dim() != 3 or position.shape[2] not in (2, 3):
            raise InputError(f"position is [batch or 1, tokens, 3], or 2 on a plane, not {list(position.shape)}")
        if (elevation is not None) != self.vertical:
            remedy = "give elevation" if self.vertical else "leave elevation out"
            raise InputError(f"{self.who} was built with vertical={self.vertical}: {remedy}")
        terms = [position.double()]
        if elevation is not None:
            check_elevation(elevation)
            terms.append(elevation.double()[..., None])
        return [(values, values.mean(dim=1, keepdim=True)) for values in terms]

    def _weights(self) -> list[Tensor]:
        """1 / L^2, per square Earth radius, and 1 / V^2, per square metre: `[heads]` each, float64."""
        weights = [(-2 * self.log_length.double()).exp() / self.patch_rad.double() ** 2]
        if self.vertical:
            weights.append((-2 * self.log_height.double()).exp())
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
