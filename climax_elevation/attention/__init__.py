"""Attention with a terrain bias: the engines, one file each, and the choice between them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from climax_elevation.attention.dense import dense_attention
from climax_elevation.attention.reuse import reused_bias
from climax_elevation.attention.sdpa import WIDE, sdpa_attention
from climax_elevation.attention.tiled import tiled_attention
from climax_elevation.attention.triton import supports, triton_attention
from climax_elevation.bias.base import ElevationBias, Tensors, leaves
from climax_elevation.errors import InputError

Engine = Callable[[Tensor, Tensor, Tensor, ElevationBias, Tensors, float, float], Tensor]

ENGINES: dict[str, Engine] = {
    "dense": dense_attention,
    "sdpa": sdpa_attention,
    "tiled": tiled_attention,
    "triton": triton_attention,
}

TILED_FROM = {
    "cpu": 256,  # tokens; measured
    "cuda": 4096,  # where "triton" has no kernel; not measured: from here on a mask is too large to hold
}


def check_engine(name: str) -> None:
    """Raise InputError unless `name` is an engine or "auto"."""
    if name not in (*ENGINES, "auto"):
        raise InputError(f"unknown engine {name!r}; available: 'auto', {', '.join(map(repr, ENGINES))}")


def choose_engine(
    name: str,
    bias: ElevationBias,
    *,
    tokens: int,
    device: str,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    head_widths: tuple[int, ...] = (),
) -> str:
    """The engine that `name` stands for; "auto" goes by what benchmarks/attention.py found, never by the clock.

    Args:
        name: An engine, or "auto".
        bias: Whose exact factors, where it has some, make a mask needless.
        tokens: Length of the sequence.
        device: "cpu" or "cuda"; other devices are taken for the latter.
        dtype: Of queries, keys and values.
        dropout_p: Of attention weights, which only "sdpa" has among the fast ones.
        head_widths: Of queries and values, where they are known.
    """
    check_engine(name)
    if name != "auto":
        return name
    if dropout_p > 0 or (bias.has_factors and dtype in WIDE):
        return "sdpa"
    if device == "cuda" and supports(bias, dtype, *head_widths):
        return "triton"
    return "tiled" if tokens >= TILED_FROM.get(device, TILED_FROM["cuda"]) else "sdpa"


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: ElevationBias,
    inputs: Tensors,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    engine: str = "auto",
) -> Tensor:
    """Attention with an additive bias, before softmax.

        softmax(scale * q k^T + b) v,    b = bias(*inputs)

    Args:
        q, k, v: Queries, keys and values, `[B, H, L, d]`.
        bias: Gives b, `[B or 1, H or 1, L, L]`; computed with autocast off, in float32 or wider.
        inputs: The arguments of `bias.forward`.
        scale: Factor of the logits; 1 / sqrt(d) where it is not given.
        dropout_p: Probability that an attention weight is dropped.
        engine: "dense" (plain operations, the reference), "sdpa" (torch's fused attention, with b as its mask or
            as columns), "tiled" (a tile of b in memory at a time), "triton" (fused, on GPUs) or "auto".

    Returns:
        `[B, H, L, d]` in v's type.

    Raises:
        InputError: For an unknown engine, or inputs whose shapes do not match.
    """
    if q.dim() != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise InputError(
            "q, k and v are [batch, heads, tokens, head width] of one shape, not "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    for given in leaves(inputs):
        if given.shape[0] not in (1, q.shape[0]) or given.shape[1] != q.shape[2]:
            raise InputError(
                f"the bias's inputs are [{q.shape[0]} or 1, {q.shape[2]} tokens, ...], not {list(given.shape)}"
            )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if engine == "auto" and dropout_p == 0 and not bias.has_factors:
        kept = reused_bias(bias, inputs, q.shape[1])
        if kept is not None:
            return scaled_dot_product_attention(q, k, v, attn_mask=kept.to(q.dtype), scale=scale)
    chosen = choose_engine(
        engine,
        bias,
        tokens=q.shape[2],
        device=q.device.type,
        dtype=q.dtype,
        dropout_p=dropout_p,
        head_widths=(q.shape[-1], v.shape[-1]),
    )
    return ENGINES[chosen](q, k, v, bias, inputs, scale, dropout_p)
