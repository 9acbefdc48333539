"""A stand-in for ClimaX, so that everything here runs where ClimaX is not installed. It is not ClimaX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import PatchEmbed  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional

from climax_elevation.block import timm_block
from climax_elevation.checks import share
from climax_elevation.errors import InputError

if TYPE_CHECKING:
    from climax_elevation.seam import TerrainSeam

WEIGHT_STD = 0.02
LONGEST_WAVE = 10000.0

Metric = Callable[..., dict[str, Tensor]]


class StandInClimaX(nn.Module):
    """A stand-in for `climax.arch.ClimaX`; never ClimaX itself.

    Written from the ClimaX paper, with upstream's parameter names and arguments, so that a checkpoint or
    a configuration of one fits the other. It computes the same function, which committed outputs of
    unmodified upstream prove; the random numbers of a fresh model differ.

        token[v, l]  = patch_embedding_v(x_v)[l] + var_embed[v]
        token[l]     = cross_attention(var_query, token[:, l]) + pos_embed[l] + lead_time_embed(lead_time)
        predictions  = unpatchify(head(norm(blocks(token))))

    Args:
        default_vars: Names of all variables the model knows, V of them.
        img_size: Height H and width W of the input, pixels.
        patch_size: Side p of a patch, pixels; divides H and W.
        embed_dim: Width D of a token; a multiple of 4 and of num_heads.
        depth: Number of transformer blocks.
        decoder_depth: Number of hidden layers of the prediction head.
        num_heads: Number of attention heads.
        mlp_ratio: Width of a block's MLP over D.
        drop_path: Stochastic depth of the last block; it grows linearly from 0 at the first.
        drop_rate: Dropout of tokens and of the blocks' projections.
        parallel_patch_embed: One grouped convolution for all variables, instead of one convolution each;
            the same function, with other parameter names.
        use_physics_mask: Whether terrain biases the attention.
        bias_type: Name of the bias; read if use_physics_mask.
        bias_args: Arguments of `climax_elevation.attach`; read if use_physics_mask.

    Raises:
        InputError: If sizes do not divide as stated, a variable is named twice, or drop_path or drop_rate is no share.

    Source: arXiv 2301.10343, section 3; names and details as in microsoft/ClimaX at 6d5d354.
    """

    terrain: TerrainSeam

    def __init__(
        self,
        default_vars: Sequence[str],
        img_size: Sequence[int] = (32, 64),
        patch_size: int = 2,
        embed_dim: int = 1024,
        depth: int = 8,
        decoder_depth: int = 2,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        drop_rate: float = 0.1,
        parallel_patch_embed: bool = False,
        use_physics_mask: bool = False,
        bias_type: str = "physics",
        bias_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(default_vars, img_size, patch_size, embed_dim, num_heads)
        share("drop_path", drop_path)
        share("drop_rate", drop_rate)
        self.default_vars = list(default_vars)
        self.img_size = list(img_size)
        self.patch_size = patch_size
        self.parallel_patch_embed = parallel_patch_embed
        self.use_physics_mask = use_physics_mask
        self.grid = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        count = len(self.default_vars)

        embedding = ParallelPatchEmbedding if parallel_patch_embed else SerialPatchEmbedding
        self.token_embeds = embedding(count, self.img_size, patch_size, embed_dim)
        self.var_embed = nn.Parameter(sinusoids(torch.arange(count), embed_dim).float()[None])
        self.var_query = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.var_agg = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.pos_embed = nn.Parameter(grid_sinusoids(self.grid, embed_dim).float()[None])
        self.lead_time_embed = nn.Linear(1, embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            timm_block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=True,
                drop=drop_rate,
                drop_path=rate,
                norm_layer=nn.LayerNorm,
            )
            for rate in torch.linspace(0, drop_path, depth).tolist()
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = _head(embed_dim, decoder_depth, count * patch_size**2)
        self.apply(_initialize)

        if use_physics_mask:
            from climax_elevation.attachment import attach

            attach(self, bias_type, **(bias_args or {}))

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        lead_times: Tensor,
        variables: Sequence[str],
        out_variables: Sequence[str],
        metric: Sequence[Metric] | None,
        lat: Any,
    ) -> tuple[list[dict[str, Tensor]] | None, Tensor]:
        """Predict, and score the prediction.

        Args:
            x: Standardised input, `[B, len(variables), H, W]`.
            y: Standardised target, `[B, len(out_variables), H, W]`; not read without metric.
            lead_times: Hours / 100, `[B]`.
            variables: Names of x's channels.
            out_variables: Names of the predicted channels.
            metric: Training losses, called as `m(predictions, y, out_variables, lat)`; None: no loss.
            lat: Latitudes of the H rows, degrees; passed on.

        Returns:
            The metrics' results, or None; and the predictions, `[B, len(out_variables), H, W]`.

        Raises:
            InputError: If a name is not in default_vars, or x does not fit names and sizes.
        """
        chosen = self._indices(out_variables)
        predictions = self._unpatchify(self.head(self.forward_encoder(x, lead_times, variables)))[:, chosen]
        if metric is None:
            return None, predictions
        return [m(predictions, y, out_variables, lat) for m in metric], predictions

    def evaluate(
        self,
        x: Tensor,
        y: Tensor,
        lead_times: Tensor,
        variables: Sequence[str],
        out_variables: Sequence[str],
        transform: Callable[[Tensor], Tensor],
        metrics: Sequence[Metric],
        lat: Any,
        clim: Tensor,
        log_postfix: str,
    ) -> list[dict[str, Tensor]]:
        """Predict, and score in physical units: see `climax_elevation.host.metrics` for the arguments."""
        _, predictions = self.forward(x, y, lead_times, variables, out_variables, metric=None, lat=lat)
        return [m(predictions, y, transform, out_variables, lat, clim, log_postfix) for m in metrics]

    def forward_encoder(self, x: Tensor, lead_times: Tensor, variables: Sequence[str]) -> Tensor:
        """Tokens `[B, L, D]` of an input `[B, V, H, W]`; the other arguments are those of `forward`."""
        terrain = self.terrain.for_blocks(self.blocks, x, lead_times, variables) if self.use_physics_mask else {}
        x = self._tokens(x, lead_times, variables)
        for i, blk in enumerate(self.blocks):
            x = blk(x, **terrain.get(i, {}))
        return self.norm(x)

    def _tokens(self, x: Tensor, lead_times: Tensor, variables: Sequence[str]) -> Tensor:
        chosen = self._indices(variables)
        if x.dim() != 4 or x.shape[1] != len(chosen) or list(x.shape[2:]) != self.img_size:
            raise InputError(
                f"the input is [batch, {len(chosen)} variables, {self.img_size[0]}, {self.img_size[1]}], "
                f"not {list(x.shape)}"
            )
        x = self.token_embeds(x, chosen) + self.var_embed[:, chosen, None]
        x = self._aggregate(x) + self.pos_embed + self.lead_time_embed(lead_times[:, None])[:, None]
        return self.pos_drop(x)

    def _aggregate(self, x: Tensor) -> Tensor:
        """One token a place from one a variable and place: `[B, V, L, D]` to `[B, L, D]`."""
        batch = x.shape[0]
        places = x.transpose(1, 2).flatten(0, 1)
        query = self.var_query.expand(places.shape[0], -1, -1)
        mixed, _ = self.var_agg(query, places, places, need_weights=False)
        return mixed.squeeze(1).unflatten(0, (batch, -1))

    def _unpatchify(self, x: Tensor) -> Tensor:
        """`[B, L, p * p * V]` to `[B, V, H, W]`."""
        pixels = x.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, self.grid)
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _indices(self, variables: Sequence[str]) -> list[int]:
        unknown = [name for name in variables if name not in self.default_vars]
        if unknown:
            raise InputError(
                f"the model does not know {', '.join(unknown)}: its default_vars are {', '.join(self.default_vars)}"
            )
        return [self.default_vars.index(name) for name in variables]


class SerialPatchEmbedding(nn.ModuleList):
    """One convolution a variable: `[B, V, H, W]` to `[B, V, L, D]`."""

    def __init__(self, count: int, img_size: Sequence[int], patch_size: int, embed_dim: int) -> None:
        super().__init__(PatchEmbed((img_size[0], img_size[1]), patch_size, 1, embed_dim) for _ in range(count))
        for embedding in self:
            nn.init.trunc_normal_(embedding.proj.weight, std=WEIGHT_STD)  # type: ignore[union-attr, arg-type]

    def forward(self, x: Tensor, chosen: Sequence[int]) -> Tensor:
        """Embed the channels of x by the embeddings `chosen`, one each."""
        return torch.stack([self[index](x[:, i : i + 1]) for i, index in enumerate(chosen)], dim=1)


class ParallelPatchEmbedding(nn.Module):
    """All variables in one grouped convolution: `[B, V, H, W]` to `[B, V, L, D]`."""

    def __init__(self, count: int, img_size: Sequence[int], patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj_weights = nn.Parameter(torch.empty(count, embed_dim, 1, patch_size, patch_size))
        self.proj_biases = nn.Parameter(torch.empty(count, embed_dim))
        nn.init.trunc_normal_(self.proj_weights, std=WEIGHT_STD)
        # as torch initialises a convolution that sees patch_size^2 pixels
        nn.init.uniform_(self.proj_biases, -1 / patch_size, 1 / patch_size)

    def forward(self, x: Tensor, chosen: Sequence[int]) -> Tensor:
        """Embed the channels of x by the embeddings `chosen`, one each."""
        kernels, offsets = self.proj_weights[chosen].flatten(0, 1), self.proj_biases[chosen].flatten()
        grid = functional.conv2d(x, kernels, offsets, stride=self.patch_size, groups=len(chosen))
        return grid.flatten(2).unflatten(1, (len(chosen), -1)).transpose(2, 3)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of positions at wavelengths from 2 pi to 10000 * 2 pi.

        e[n, k] = sin(n / 10000^(2k / width)),    e[n, k + width / 2] = cos(of the same)

    Args:
        positions: `[N]`.
        width: Even.

    Returns:
        `[N, width]`, float64.
    """
    half = width // 2
    frequencies = LONGEST_WAVE ** (-torch.arange(half, dtype=torch.float64) / half)
    phases = positions.double()[:, None] * frequencies
    return torch.cat([phases.sin(), phases.cos()], dim=1)


def grid_sinusoids(grid: tuple[int, int], width: int) -> Tensor:
    """Sinusoids of the column, then of the row, of each patch in row-major order: `[L, width]`, float64."""
    rows, columns = grid
    of_column, of_row = sinusoids(torch.arange(columns), width // 2), sinusoids(torch.arange(rows), width // 2)
    return torch.cat([of_column.repeat(rows, 1), of_row.repeat_interleave(columns, 0)], dim=1)


def _head(embed_dim: int, decoder_depth: int, outputs: int) -> nn.Sequential:
    hidden = [layer for _ in range(decoder_depth) for layer in (nn.Linear(embed_dim, embed_dim), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(embed_dim, outputs))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=WEIGHT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_sizes(
    default_vars: Sequence[str], img_size: Sequence[int], patch_size: int, embed_dim: int, num_heads: int
) -> None:
    if isinstance(default_vars, str) or not default_vars or len(set(default_vars)) < len(default_vars):
        raise InputError(f"default_vars is a list of variables, none twice, not {default_vars!r}")
    if len(img_size) != 2 or patch_size < 1 or any(size < 1 or size % patch_size for size in img_size):
        raise InputError(
            f"img_size is a height and a width that patch_size {patch_size} divides, not {list(img_size)}; crop the "
            "data or choose another patch_size"
        )
    if num_heads < 1 or embed_dim < 1 or embed_dim % math.lcm(4, num_heads):
        raise InputError(f"embed_dim is a multiple of 4 and of num_heads {num_heads}, not {embed_dim}")
