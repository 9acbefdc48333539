"""Transformer blocks with a terrain bias, made from the host's own submodules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.models.vision_transformer import Attention, Block  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from climax_elevation.attention import biased_attention, check_engine, choose_engine
from climax_elevation.attention.kept import KeptBias
from climax_elevation.bias import ElevationBias, PhysicsBias, RelativePositionBias3D
from climax_elevation.bias.base import Tensors, leaves, take_tokens
from climax_elevation.checks import count, true_or_false
from climax_elevation.errors import InputError
from climax_elevation.terrain.fields import Terrain, downsample_elevation, downsample_wind
from climax_elevation.terrain.plausible import check_finite, check_metres

BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}


class BiasedAttention(nn.Module):
    """Multi-head self-attention with a terrain bias; every other part is taken over from `host`.

    Keys are timm's `Attention`'s, and `bias.*`.
    """

    qkv: nn.Module
    attn_drop: nn.Dropout
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, host: nn.Module, bias: ElevationBias, engine: str = "auto") -> None:
        super().__init__()
        check_engine(engine)
        for name, part in host.named_children():
            self.add_module(name, part)
        self.num_heads: int = host.num_heads  # type: ignore[assignment]
        self.scale: float = host.scale  # type: ignore[assignment]
        self.bias = bias
        self.engine = engine
        self.kept: KeptBias | None = None  # see `keep_bias`

    def train(self, mode: bool = True) -> BiasedAttention:
        """As every module's; nothing is kept of the bias from here on."""
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor, bias_inputs: Tensors) -> Tensor:
        """softmax(q k^T * scale + b) v of tokens `[B, L, D]`; `bias_inputs` are `bias.forward`'s arguments."""
        q, k, v = self.project(x)
        x = self._attend(q, k, v, bias_inputs, self.attn_drop.p if self.training else 0.0)
        x = self._part("norm", x.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(x))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens `[B, L, D]`, each `[B, heads, L, D / heads]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self._part("q_norm", q).to(v.dtype), self._part("k_norm", k).to(v.dtype), v

    def engine_for(self, tokens: int) -> str:
        """The engine that is going to be used, and for what."""
        weight = cast(Tensor, self.qkv.weight)
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        dropout_p = self.attn_drop.p if self.training else 0.0
        name = choose_engine(self.engine, self.bias, tokens=tokens, device=device, dtype=dtype, dropout_p=dropout_p)
        return f"{name} ({tokens} tokens, {str(dtype).removeprefix('torch.')} on {device})"

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias_inputs: Tensors, dropout_p: float) -> Tensor:
        return biased_attention(
            q,
            k,
            v,
            self.bias,
            bias_inputs,
            scale=self.scale,
            dropout_p=dropout_p,
            engine=self.engine,
            kept=self.kept,
        )

    def _part(self, name: str, x: Tensor) -> Tensor:
        """Apply a part that older versions of timm do not have."""
        part = self._modules.get(name)
        return x if part is None else part(x)


def keep_bias(model: nn.Module) -> None:
    """Compute each bias of a model once, for inference over one ground, and use it again from then on.

    What attention gives is the same, bit for bit. Whenever inputs, parameters or settings of a bias differ from those
    of the call before, it is computed anew: where wind modulates, nothing is gained unless it stays the same too.
    Each block holds heads or 1 x L x L numbers (256 MB of 8192 tokens in float32, where heads share a bias), until
    `model.train()`, which ends this.

    Args:
        model: In evaluation, with blocks made by `attach`, or one of the blocks of this package.

    Raises:
        InputError: If it is in training, or has no terrain bias.
    """
    if model.training:
        raise InputError("a bias is kept for inference, and the model is in training: call model.eval() first")
    attentions = [module for module in model.modules() if isinstance(module, BiasedAttention)]
    if not attentions:
        raise InputError(f"this {type(model).__name__} has no terrain bias to keep: attach one first")
    for attention in attentions:
        attention.kept = KeptBias()


class Attention3D(BiasedAttention):
    """timm's `Attention` with `RelativePositionBias3D`.

    Keys are timm's `Attention`'s and `bias.mlp.0`, `bias.mlp.2`. In a model it runs inside a whole block
    (`attach`), with norm, residual and MLP.

    Args:
        dim, num_heads, qkv_bias, attn_drop, proj_drop: As timm's `Attention`.
        hidden_dim, coords, log_spaced, zero_init: As `RelativePositionBias3D`.
        engine: As `biased_attention`.

    Source: elevation_attention_summary.md, approach 2.
    """

    bias: RelativePositionBias3D

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        hidden_dim: int = 64,
        coords: str = "normalized",
        log_spaced: bool = False,
        zero_init: bool = False,
        engine: str = "auto",
    ) -> None:
        bias = RelativePositionBias3D(num_heads, hidden_dim, coords=coords, log_spaced=log_spaced, zero_init=zero_init)
        host = Attention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        super().__init__(host, bias, engine)

    @classmethod
    def adopt(cls, host: nn.Module, bias: RelativePositionBias3D, engine: str) -> Attention3D:
        """Make one from a host's attention, drawing no random number."""
        attention = cls.__new__(cls)
        BiasedAttention.__init__(attention, host, bias, engine)
        return attention

    @property
    def rel_pos_bias_3d(self) -> RelativePositionBias3D:
        """The bias, by its published name."""
        return self.bias

    def forward(self, x: Tensor, coords_3d: Tensor | Tensors | None = None) -> Tensor:
        """Tokens `[B, L, dim]` to the same shape.

        Args:
            x: `[B, L, dim]`.
            coords_3d: `[B or 1, L, 3]`, as `RelativePositionBias3D` takes them; None: no bias.

        Raises:
            InputError: If coordinates have not that shape, are not finite or, where physical, not in metres.
        """
        if isinstance(coords_3d, Tensor):
            check_finite(coords_3d, "coords_3d", "three a token")
            if self.bias.coords == "physical" and coords_3d.shape[-1] == 3:
                check_metres(coords_3d[..., 2], "elevation in coords_3d", flat=False, remedy="take coords='normalized'")
            coords_3d = (coords_3d,)
        return super().forward(x, coords_3d)  # type: ignore[arg-type]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias_inputs: Tensors | None, dropout_p: float) -> Tensor:
        if bias_inputs is None:
            return scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=self.scale)
        return super()._attend(q, k, v, bias_inputs, dropout_p)


class HandedIn:
    """What a block of a model that hands on no terrain is given instead, while `terrain_given` lasts.

    It is not copied with a model, nor saved.

    Args:
        grid: Rows and columns of the patches that are the block's tokens; None: tokens are places that are no grid.
        terrain_is_flat: Ground within 10 m of zero is meant, and is not a standardised channel.
    """

    def __init__(self, grid: tuple[int, int] | None, terrain_is_flat: bool) -> None:
        self.grid, self.terrain_is_flat = grid, terrain_is_flat
        self.bias_inputs: Tensors | None = None
        self.tokens = 0

    def __reduce__(self) -> tuple[type[HandedIn], tuple[tuple[int, int] | None, bool]]:
        return HandedIn, (self.grid, self.terrain_is_flat)

    def inputs(self, tokens: int) -> Tensors:
        """Of the bias, for a block of so many tokens."""
        if self.bias_inputs is None:
            raise InputError(
                "no terrain was handed in: call the model inside `with terrain_given(model, terrain):`, and its "
                "backward too where activations are checkpointed"
            )
        if tokens != self.tokens and self.grid is None:
            raise InputError(
                f"a block got {tokens} tokens, and the terrain that was handed in has {self.tokens} places"
            )
        if tokens != self.tokens and self.grid is not None:
            rows, columns = self.grid
            raise InputError(
                f"a block got {tokens} tokens, and the grid of {rows} x {columns} has {rows * columns} patches: tokens "
                "are all patches in row-major order and nothing else, no class token, register or dropped patch"
            )
        return self.bias_inputs

    def check(self, terrain: Terrain) -> None:
        """Raise InputError unless `terrain` is of the block's tokens."""
        if terrain.points != (self.grid is None):
            made, came = ("points", "a grid") if self.grid is None else ("a grid", "points (Terrain.of_points)")
            raise InputError(
                f"the model was made terrain-aware for tokens that are {made}, and the terrain is of {came}"
            )
        if self.grid is not None and (terrain.patch_ids is not None or tuple(terrain.grid) != self.grid):
            part = "" if terrain.patch_ids is None else f"{len(terrain.patch_ids)} patches of "
            raise InputError(
                f"the model's patches are all those of a grid of {self.grid[0]} x {self.grid[1]}, and the terrain is "
                f"of {part}{terrain.grid[0]} x {terrain.grid[1]}"
            )


class TerrainBlock(nn.Module):
    """A pre-norm transformer block whose attention is biased by terrain.

        x = x + drop_path(layer_scale(attention(norm(x), bias)))
        x = x + drop_path(layer_scale(mlp(norm(x))))

    Args:
        host: A timm `Block`, whose submodules are taken over: same objects, same keys.
        bias: What is added to the attention logits.
        engine: How; see `biased_attention`.
    """

    norm1: nn.Module
    attn: BiasedAttention
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module
    handed_in: HandedIn | None = None  # None: the host hands terrain to its blocks itself

    def __init__(self, host: nn.Module, bias: ElevationBias, engine: str = "auto") -> None:
        super().__init__()
        check_host_block(host)
        self.host = (host,)  # in a tuple, lest it be registered as a part
        for name, part in host.named_children():
            self.add_module(name, _attention(part, bias, engine) if name == "attn" else part)

    def release(self) -> nn.Module:
        """The host block, with the parts that this block has now, in its mode."""
        (host,) = self.host
        for name, part in self.named_children():
            if name != "attn":
                host.add_module(name, part)
        attention = cast(nn.Module, host.attn)
        for name, part in self.attn.named_children():
            if name != "bias":
                attention.add_module(name, part)
        return host.train(self.training)

    def engine_for(self, tokens: int) -> str:
        """As its attention's."""
        return self.attn.engine_for(tokens)

    def terrain_inputs(self, terrain: Terrain, order: Tensor | None = None) -> dict[str, Any]:
        """What `forward` wants of `terrain`, as keyword arguments; with an order, in that."""
        inputs = self.attn.bias.inputs(terrain)
        if order is None:
            return {"bias_inputs": inputs}
        return {"bias_inputs": self.attn.bias.reordered(inputs, order), "order": order}

    def forward(
        self,
        x: Tensor,
        bias_inputs: Tensors | None = None,
        order: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Tokens `[B, L, D]` to the same shape.

        Args:
            x: Tokens in raster order.
            bias_inputs: The arguments of `attn.bias`, in `order`; None: what `terrain_given` handed in.
            order: The token that comes to each place, `[B, L]`; undone at the end. None: as they are.
            positions: What x holds of position embedding, `[1, L, D]`, to be left in raster order.

        Raises:
            InputError: If neither is there, or has fewer digits than float32.
        """
        if bias_inputs is None:
            if self.handed_in is None:
                raise InputError("a block with a terrain bias needs bias_inputs, of terrain_inputs(terrain)")
            bias_inputs = self.handed_in.inputs(x.shape[1])
        _check_precision(bias_inputs)
        if order is not None:
            x = take_tokens(x, order) if positions is None else take_tokens(x - positions, order) + positions
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), bias_inputs)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x if order is None else take_tokens(x, order.argsort(dim=1))


def _attention(host: nn.Module, bias: ElevationBias, engine: str) -> BiasedAttention:
    if isinstance(bias, RelativePositionBias3D):
        return Attention3D.adopt(host, bias, engine)
    return BiasedAttention(host, bias, engine)


class PhysicsGuidedBlockCorrected(TerrainBlock):
    """A timm block with `PhysicsBias` in its attention.

    Keys are timm's `Block`'s, `attn.bias.elevation_alpha` and, with wind, `attn.bias.wind_beta`.

    Args:
        dim, num_heads, mlp_ratio, qkv_bias, drop, drop_path, norm_layer: As timm's `Block`.
        alpha_init, beta_init, height_scale_m, wind_threshold_m_s, wind, direction: As `PhysicsBias`.
        engine: As `biased_attention`.
        patch_size: Side of a patch of the fields that `forward` is given, pixels; None: their sizes tell.
        terrain_is_flat: Ground within 10 m of zero, in part below it, is meant, and is not a standardised channel.

    Source: elevation_attention_summary.md, approach 1.
    """

    patch_size: int | None = None
    terrain_is_flat: bool = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        *,
        alpha_init: float = 1.0,
        beta_init: float = 0.3,
        height_scale_m: float = 1000.0,
        wind_threshold_m_s: float = 5.0,
        wind: bool = True,
        direction: str = "key_above",
        engine: str = "auto",
        patch_size: int | None = None,
        terrain_is_flat: bool = False,
    ) -> None:
        patch_size = None if patch_size is None else count("patch_size", patch_size)
        true_or_false("terrain_is_flat", terrain_is_flat)
        bias = PhysicsBias(
            alpha_init=alpha_init,
            beta_init=beta_init,
            height_scale_m=height_scale_m,
            wind_threshold_m_s=wind_threshold_m_s,
            wind=wind,
            direction=direction,
        )
        host = timm_block(
            dim,
            num_heads,
            mlp_ratio,
            qkv_bias=qkv_bias,
            drop=drop,
            drop_path=drop_path,
            norm_layer=norm_layer,
        )
        super().__init__(host, bias, engine)
        self.patch_size, self.terrain_is_flat = patch_size, terrain_is_flat

    @classmethod
    def adopt(cls, host: nn.Module, bias: PhysicsBias, engine: str) -> PhysicsGuidedBlockCorrected:
        """Make one from a host's block, drawing no random number."""
        block = cls.__new__(cls)
        TerrainBlock.__init__(block, host, bias, engine)
        return block

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        elevation_patches: Tensor | None = None,
        u_wind: Tensor | None = None,
        v_wind: Tensor | None = None,
        *,
        bias_inputs: Tensors | None = None,
        order: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Tokens to tokens, over terrain.

        Args:
            x: `[B, L, dim]`.
            elevation_patches: Patch-mean elevation, `[B or 1, L]`, or the field, `[B or 1, H, W]`; metres.
            u_wind, v_wind: Fields of the wind, `[B or 1, H, W]`, whose speed is averaged over each patch as
                `attach` does; or patch means, `[B or 1, L]`, whose own speed is taken, and which is lower. m/s;
                required with `wind`, refused without.
            bias_inputs: Elevation and speed as `PhysicsBias.inputs` gives them, instead of the three above; where
                there is none of the four, what `terrain_given` handed in.
            order, positions: As `TerrainBlock`.

        Raises:
            InputError: If what the bias needs is missing, of another shape, not finite or plainly not in metres;
                never plain attention. Numbers on a GPU, and those of compiled graphs, are taken on trust.
        """
        handed_in = self.handed_in is not None and elevation_patches is u_wind is v_wind is None
        if bias_inputs is None and not handed_in:
            _check_places(x, elevation_patches=elevation_patches, u_wind=u_wind, v_wind=v_wind)
            bias_inputs = self._bias_inputs(x.shape[1], elevation_patches, u_wind, v_wind)
        elif not (elevation_patches is u_wind is v_wind is None):
            raise InputError("the block takes elevation and wind, or bias_inputs, not both")
        return super().forward(x, bias_inputs, order, positions)

    def _bias_inputs(
        self, tokens: int, elevation: Tensor | None, u: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor, ...]:
        if elevation is None:
            raise InputError(
                "the block needs elevation_patches, [batch or 1, tokens] or a field [batch or 1, height, width] in "
                "metres, and got None"
            )
        check_finite(elevation, "elevation_patches", "m, and 0 over sea")
        elevation = elevation.to(torch.promote_types(elevation.dtype, torch.float32))
        if elevation.dim() == 3:
            elevation = downsample_elevation(elevation, self._patch_size(elevation, tokens))
        remedy = "build the block with terrain_is_flat=True"
        check_metres(elevation, "elevation_patches", flat=self.terrain_is_flat, remedy=remedy)
        if not cast(PhysicsBias, self.attn.bias).wind:
            if u is not None or v is not None:
                raise InputError("the block was built with wind=False, and got wind: leave it out")
            return (elevation,)
        if u is None or v is None:
            raise InputError(
                "the block needs u_wind and v_wind, [batch or 1, tokens] or fields [batch or 1, height, width] in "
                "m/s, and got None; give them, or build it with wind=False"
            )
        return elevation, self._speed(tokens, u, v)

    def _speed(self, tokens: int, u: Tensor, v: Tensor) -> Tensor:
        """Of patches, from fields or from patch means."""
        if u.shape != v.shape:
            raise InputError(f"u_wind and v_wind are of one shape, not {list(u.shape)} and {list(v.shape)}")
        check_finite(u, "u_wind", "m/s")
        check_finite(v, "v_wind", "m/s")
        u, v = (wind.to(torch.promote_types(wind.dtype, torch.float32)) for wind in (u, v))
        return downsample_wind(u, v, self._patch_size(u, tokens))[2] if u.dim() == 3 else torch.hypot(u, v)

    def _patch_size(self, field: Tensor, tokens: int) -> int:
        """The side of a square patch of a field of which there are so many."""
        height, width = field.shape[1:]
        side = round((height * width / tokens) ** 0.5) if self.patch_size is None else self.patch_size
        if side < 1 or height % side or width % side or (height // side) * (width // side) != tokens:
            what = "square patches" if self.patch_size is None else f"patches of {side} x {side}"
            raise InputError(
                f"a field of {height} x {width} pixels is not {tokens} {what}, one for each token: give the field that "
                "the tokens were made from, or patch means [batch or 1, tokens]"
            )
        return side


def _check_places(x: Tensor, **given: Tensor | None) -> None:
    """Raise InputError unless tokens are numbers, and what is given with them is on their device."""
    if not x.is_floating_point() or x.device.type == "meta":
        raise InputError(f"tokens x are floating-point numbers on a device that has some, not {x.dtype} on {x.device}")
    for name, values in given.items():
        if values is not None and values.device != x.device:
            raise InputError(f"{name} is on {values.device}, and the tokens are on {x.device}: move it there")


def _check_precision(bias_inputs: Tensors) -> None:
    """Raise InputError for half precision, in which a mountain of 4000 m is known to 16 m and a place to 25 km."""
    for values in leaves(bias_inputs):
        if values.is_floating_point() and values.dtype.itemsize < 4:
            raise InputError(
                f"terrain came to a block as {values.dtype}, which rounds it by metres: hand it on in float32; under "
                "FSDP2 take torch.autocast in the place of a MixedPrecisionPolicy with param_dtype"
            )


def timm_block(dim: int, num_heads: int, mlp_ratio: float, *, drop: float, **options: Any) -> nn.Module:
    """timm's `Block`, whose `drop` is called `proj_drop` from 0.9 on."""
    options["drop" if "drop" in inspect.signature(Block).parameters else "proj_drop"] = drop
    return Block(dim, num_heads, mlp_ratio, **options)


def check_host_block(block: nn.Module) -> None:
    """Raise InputError unless `block` is built as timm's `Block`, so that taking it over loses nothing."""
    parts = dict(block.named_children())
    if set(parts) != BLOCK_PARTS:
        raise InputError(
            f"a block is built as timm's Block, of {', '.join(sorted(BLOCK_PARTS))}; {type(block).__name__} has "
            f"{', '.join(sorted(parts))}"
        )
    attention = {name for name, _ in parts["attn"].named_children()}
    if not {"qkv", "attn_drop", "proj", "proj_drop"} <= attention <= ATTENTION_PARTS:
        raise InputError(
            f"a block's attention is built as timm's Attention, of {', '.join(sorted(ATTENTION_PARTS))}; "
            f"{type(parts['attn']).__name__} has {', '.join(sorted(attention))}"
        )
    for part, timms in ((block, Block), (parts["attn"], Attention)):
        if type(part).forward is not timms.forward:
            raise InputError(
                f"{type(part).__name__} has a forward of its own, which a block with a terrain bias would not compute: "
                f"build the model with timm's {timms.__name__}"
            )
