"""Approach 2: a small network reads where a key lies from its query, up and down included."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from climax_elevation.bias.base import ElevationBias, Gradients, Pullback, Tensors
from climax_elevation.bias.pair_network import pair_gradients, pair_network, pair_values
from climax_elevation.bias.registry import register_bias
from climax_elevation.checks import count, one_of, true_or_false
from climax_elevation.errors import InputError
from climax_elevation.terrain.fields import downsample_elevation
from climax_elevation.terrain.plausible import check_finite
from climax_elevation.terrain.sphere import EARTH_RADIUS_M, checked_latitudes, shorter_turn

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

COORDS = ("normalized", "physical")
EPSILON = 1e-6  # keeps a coordinate that is the same everywhere at 0
RADIUS_1000_KM = EARTH_RADIUS_M / 1e6
METRES_A_KM = 1000.0


@register_bias("relative_3d")
class RelativePositionBias3D(ElevationBias):
    """A network of one hidden layer over relative positions, one output a head.

        b[h, i, j] = MLP_h(r_ij),     MLP: 3 -> hidden_dim -> heads, with relu between

    `coords="normalized"`, as published, with c = (x, y, z) and x, y, z in [0, 1] over the grid:

        r_ij = (c_i - c_j) / (max_ij |c_i - c_j| + 1e-6)          (an axis at a time, a sample at a time)

    `coords="physical"`, with c = (longitude, latitude, elevation) in degrees and metres: the offsets in
    thousands of km eastward and northward and in km upward, over the dateline the shorter way, so that
    what is learned on one grid means the same on another:

        r_ij = (R cos((phi_i + phi_j) / 2) wrap(lambda_i - lambda_j),  R (phi_i - phi_j),  z_i - z_j)

    with `log_spaced`, sign(r) log(1 + |r|) in its place: near patches are told apart better than far ones.

    The bias of the last layer is the same for all keys, which softmax ignores; it is there as published.

    Args:
        num_heads: Heads of the attention.
        hidden_dim: Width of the hidden layer.
        coords: "normalized" or "physical".
        log_spaced: Logarithmic offsets; with physical coordinates.
        zero_init: Start with a last layer of zeros: the attention is plain until it has learned, and the
            last layer's gradients are not zero.

    Raises:
        InputError: If an argument is not of its kind or does not fit the others.

    Source: elevation_attention_summary.md, approach 2. Log spacing as in Swin Transformer V2,
    arXiv 2111.09883. Departure: the largest difference is max(c) - min(c), so tokens are scaled and not
    pairs; the first layer, being linear, is applied to tokens as well.
    """

    reads = frozenset()
    acts_with = MappingProxyType({"log_spaced": {"coords": "physical"}})
    differentiated = frozenset({"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"})

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int = 64,
        *,
        coords: str = "normalized",
        log_spaced: bool = False,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.coords = one_of("coords", coords, COORDS)
        self.log_spaced = true_or_false("log_spaced", log_spaced)
        self.numbers_a_pair = hidden_dim if coords == "physical" else num_heads
        self.needs = frozenset({"lat", "lon"}) if coords == "physical" else frozenset()
        first, last = nn.Linear(3, count("hidden_dim", hidden_dim)), nn.Linear(hidden_dim, num_heads)
        if true_or_false("zero_init", zero_init):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(first, nn.ReLU(), last)

    def inputs(self, terrain: Terrain) -> Tensors:
        if self.coords == "normalized":
            terrain.require_grid("the relative_3d bias in normalized coordinates")
            return (_grid_coords(terrain.elevation_m, terrain.grid, terrain.ids),)
        terrain.require(self.needs, "the relative_3d bias in physical coordinates")
        places = torch.stack([terrain.lon, terrain.lat], dim=-1)  # type: ignore[list-item]
        return (torch.cat([places.expand(len(terrain.elevation_m), -1, -1), terrain.elevation_m[..., None]], dim=-1),)

    def features(self, coords: Tensor) -> Tensors:
        """Per token: the first layer's output, as a query and as a key has it, or the coordinates (physical).

        Args:
            coords: `[B, L, 3]`: x, y and z in any unit each (normalised), or longitude and latitude in
                degrees and elevation in metres (physical).
        """
        if coords.dim() != 3 or coords.shape[2] != 3:
            raise InputError(f"coordinates are [batch or 1, tokens, 3], not {list(coords.shape)}")
        coords = coords.to(self.value_dtype())
        if self.coords == "physical":
            return (checked_latitudes(coords, coords[..., 1]),)
        low, high = coords.aminmax(dim=1, keepdim=True)
        weight, bias = self._layer(0)
        linear = ((coords - low) / (high - low + EPSILON)) @ weight.T
        return linear + bias, -linear

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        if self.coords == "normalized":
            return pair_network(query[0], key[1], *self._layer(2))
        weight, bias = self._layer(0)
        hidden = (self._offsets(query[0][:, :, None], key[0][:, None]) @ weight.T + bias).relu()
        weight, bias = self._layer(2)
        # one product for all pairs, heads first as attention wants them
        values = torch.addmm(bias[:, None], weight, hidden.flatten(0, 2).T)
        return values.unflatten(1, hidden.shape[:3]).transpose(0, 1)

    def pullback(
        self, query: Tensors, key: Tensors, wanted: Sequence[int], out: Tensor | None = None
    ) -> tuple[Tensor, Pullback] | None:
        """The gradient of `pair_network`; that of the first layer is the features'."""
        if self.coords != "normalized":
            return None
        weight, bias = (parameter.detach() for parameter in self._layer(2))
        q, k = query[0].detach(), key[1].detach()

        def gradients(db: Tensor) -> Gradients:
            of_q, of_k, *learned = pair_gradients(db, q, k, weight)
            own = zip(self.mlp[2].named_parameters(), learned, strict=True)
            of_parameters = {f"mlp.2.{name}": found.to(parameter.dtype) for (name, parameter), found in own}
            of_query, of_key = [of_q, None], [None, of_k]
            return of_parameters, [of_query[index] for index in wanted], [of_key[index] for index in wanted]

        return pair_values(q, k, weight, bias, out), gradients

    def _offsets(self, q: Tensor, k: Tensor) -> Tensor:
        """Eastward and northward offset in 1000 km, upward in km, `[..., 3]`."""
        turn = shorter_turn(q[..., 0] - k[..., 0])
        between = torch.deg2rad((q[..., 1] + k[..., 1]) / 2)
        east = RADIUS_1000_KM * between.cos() * torch.deg2rad(turn)
        north = RADIUS_1000_KM * torch.deg2rad(q[..., 1] - k[..., 1])
        offsets = torch.stack([east, north, (q[..., 2] - k[..., 2]) / METRES_A_KM], dim=-1)
        return offsets.sign() * offsets.abs().log1p() if self.log_spaced else offsets

    def _layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer, in the type of the values."""
        layer = cast(nn.Linear, self.mlp[index])
        return layer.weight.to(self.value_dtype()), layer.bias.to(self.value_dtype())

    def extra_repr(self) -> str:
        return f"coords={self.coords!r}, log_spaced={self.log_spaced}"


def compute_patch_coords_3d(
    elevation_field: Tensor, img_size: tuple[int, int] = (128, 256), patch_size: int = 2
) -> Tensor:
    """Normalised coordinates of the patches, what `RelativePositionBias3D` and `Attention3D` take.

    Args:
        elevation_field: `[B, H, W]`, metres (any unit serves: it is scaled).
        img_size: H and W, pixels.
        patch_size: Side of a patch, pixels; divides both.

    Returns:
        `[B, L, 3]`: column / columns and row / rows of each patch, in [0, 1), and its mean elevation
        scaled to [0, 1] over the patches of its sample (0 where all are level).

    Raises:
        InputError: If the field is not of img_size, is not finite, or patches do not tile it.
    """
    check_finite(elevation_field, "elevation_field", "in any one unit")
    height, width = img_size
    if elevation_field.dim() != 3 or tuple(elevation_field.shape[1:]) != (height, width):
        raise InputError(f"an elevation field is [batch, {height}, {width}], not {list(elevation_field.shape)}")
    elevation = downsample_elevation(elevation_field, patch_size)
    grid = (height // patch_size, width // patch_size)
    return _grid_coords(elevation, grid, torch.arange(grid[0] * grid[1], device=elevation.device))


def _grid_coords(elevation: Tensor, grid: tuple[int, int], ids: Tensor) -> Tensor:
    rows, columns = grid
    x = (ids % columns).to(elevation.dtype) / columns
    y = (ids // columns).to(elevation.dtype) / rows
    low, high = elevation.aminmax(dim=1, keepdim=True)
    z = (elevation - low) / (high - low + EPSILON)
    return torch.stack([x.expand_as(z), y.expand_as(z), z], dim=-1)
