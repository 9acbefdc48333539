"""Attention by the engine of a name, or by the best for what is asked."""

from __future__ import annotations

import importlib
import math
import pkgutil

import torch
from torch import Tensor

from climax_elevation.attention import engines
from climax_elevation.attention.engine import Engine, Request
from climax_elevation.attention.kept import KeptBias
from climax_elevation.bias.base import ElevationBias, Tensors, leaves
from climax_elevation.errors import InputError

ENGINES: dict[str, Engine] = {
    module.name: importlib.import_module(f"{engines.__name__}.{module.name}").ENGINE
    for module in pkgutil.iter_modules(engines.__path__)
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
) -> str:
    """The engine that `name` stands for; "auto" goes by what benchmarks/attention.py found, never by the clock.

    On GPUs nothing has been measured, so there it is torch's own attention as long as a mask can be held.

    Args:
        name: An engine, or "auto".
        bias: Whose exact factors, where it has some, make a mask needless.
        tokens: Length of the sequence.
        device: "cpu", "cuda" or another of torch's.
        dtype: Of queries, keys and values.
        dropout_p: Of attention weights, which only "sdpa" has among the fast ones.
    """
    check_engine(name)
    if name != "auto":
        return name
    request = Request(bias, tokens, device, dtype, dropout_p)
    return max(ENGINES, key=lambda engine: ENGINES[engine].rank(request))


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
    kept: KeptBias | None = None,
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
        kept: Where b may be kept from one call to the next; None: nowhere.

    Returns:
        `[B, H, L, d]` in v's type.

    Raises:
        InputError: For an unknown engine, or arguments out of their range, or whose shapes, types or devices do not
            match.
    """
    _check_qkv(q, k, v)
    for given in leaves(inputs):
        if given.shape[0] not in (1, q.shape[0]) or given.shape[1] != q.shape[2]:
            raise InputError(
                f"the bias's inputs are [{q.shape[0]} or 1, {q.shape[2]} tokens, ...], not {list(given.shape)}"
            )
        if given.device != q.device:
            raise InputError(f"the bias's inputs are on {q.device}, as q is, not on {given.device}")
    if not 0 <= dropout_p <= 1:
        raise InputError(f"dropout_p is a probability, from 0 to 1, not {dropout_p!r}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not math.isfinite(scale):
        raise InputError(f"scale is a finite number, not {scale!r}")
    chosen = ENGINES[
        choose_engine(engine, bias, tokens=q.shape[2], device=q.device.type, dtype=q.dtype, dropout_p=dropout_p)
    ]
    if kept is not None:
        bias, inputs = kept.given(bias, inputs, chosen)
    return chosen.attend(q, k, v, bias, inputs, scale, dropout_p)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise InputError(
            "q, k and v are [batch, heads, tokens, head width] of one shape, not "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if 0 in (*q.shape, v.shape[-1]):
        raise InputError(f"q, k and v have at least one sample, head, token and channel each, not {list(q.shape)}")
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise InputError(f"q, k and v are of one floating-point type, not {q.dtype}, {k.dtype} and {v.dtype}")
    if q.is_meta or q.device != k.device or q.device != v.device:
        raise InputError(
            f"q, k and v are on one device, and have values there, not on {q.device}, {k.device} and {v.device}"
        )
