"""A tile of the bias at a time: never more of it in memory, forward or backward.

Forward, a strip of queries attends to a chunk of keys through torch's fused kernel, with the bias of those
pairs alone as its mask; chunks are merged by their logsumexp. Backward, the probabilities of a tile come
back from the saved logsumexp l, and five matrix products give the gradients:

    p = exp(s q k^T + b - l)        dv += p^T do
    ds = p (do v^T - delta)         delta = rowsum(do * out)
    dq += s ds k                    dk += s ds^T q          db = ds, summed over samples and heads that share it

db goes straight into the bias's own parameters and features: by the bias's own `pullback` where it has one,
else by differentiating that tile of `pairwise` again. The order of tiles is fixed, so a run repeats exactly.
Half precision is computed in float32.

What is written to is contiguous, samples and heads in one dimension: only then does torch hand a batch of
products to the BLAS as one.

Both directions are custom operators, which torch.compile passes over without a break.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from climax_elevation.attention.threads import at_once, shares
from climax_elevation.attention.tiles import SIDE, Gradient, Tiles, twin
from climax_elevation.bias.base import ElevationBias, Tensors, leaves, living, map_tensors
from climax_elevation.errors import InputError
from climax_elevation.slices import slices

BUFFER_HELD = 1 << 18  # numbers of a buffer of probabilities: 1 MB, some heads at once
MASK_HELD = 1 << 21  # numbers of the mask that the fused kernel is given: 8 MB
CHUNK = 2048  # keys that such a mask is for, at the least where all heads share it


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: ElevationBias,
    inputs: Tensors,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """softmax(scale * q k^T + b) v, with one tile of b in memory at a time."""
    if dropout_p > 0:
        raise InputError("the engine 'tiled' has no attention dropout: choose 'sdpa', or set it to 0")
    with torch.autocast(q.device.type, enabled=False):
        features = bias.features(*inputs)
        wide = torch.promote_types(q.dtype, torch.float32)
        wide_q, wide_k, wide_v = q.to(wide), k.to(wide), v.to(wide)
        nesting = repr(map_tensors(lambda _: 0, features))  # type: ignore[arg-type, return-value]
        parameters = list(bias.parameters())
        out, _ = _forward(wide_q, wide_k, wide_v, list(leaves(features)), parameters, nesting, bias.handle, scale)
        return out.to(v.dtype)


@torch.library.custom_op(
    "climax_elevation::tiled_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] features, Tensor[] parameters, str nesting, int handle, "
    "float scale) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    nesting: str,
    handle: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, logsumexp = torch.empty_like(v), q.new_empty(q.shape[:3])
    for samples, own in _terrains(q.shape[0], features):
        tiles = Tiles(living[handle], _nested(nesting, own))
        given, results = ([t[samples] for t in some] for some in ((q, k, v), (out, logsumexp)))
        parts = shares(q.shape[2], SIDE, q.device)
        at_once([partial(_attend_tiled, tiles, rows, given, results, scale) for rows in parts])
    return out, logsumexp


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), q.new_empty(q.shape[:3])


def _attend_tiled(tiles: Tiles, part: slice, given: Sequence[Tensor], results: Sequence[Tensor], scale: float) -> None:
    """Attention of a part of the queries, of samples that share a bias; its logsumexp is the second result."""
    q, k, v = given
    out, logsumexp = results
    strip = max(SIDE, MASK_HELD // (tiles.heads * CHUNK))  # long ones, where it can be: the kernel is faster then
    chunk = min(k.shape[2], max(tiles.width, MASK_HELD // (tiles.heads * strip)))
    buffer = q.new_empty(tiles.heads * min(strip, part.stop - part.start) * chunk)
    for rows in slices(part.start, part.stop, strip):
        merged: tuple[Tensor, Tensor] | None = None
        for keys in slices(0, k.shape[2], chunk):
            found = _attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], _mask(tiles, rows, keys, buffer), scale)
            merged = found if merged is None else _merge(merged, found)
        assert merged is not None
        out[:, :, rows], logsumexp[:, :, rows] = merged


def _mask(tiles: Tiles, rows: slice, keys: slice, buffer: Tensor) -> Tensor:
    """The bias of these pairs, `[1, heads or 1, rows, keys]`, contiguous: older kernels ignore strides."""
    size = (1, tiles.heads, rows.stop - rows.start, keys.stop - keys.start)
    mask = buffer[: math.prod(size)].view(size)
    for some in slices(rows.start, rows.stop, SIDE):
        for columns in slices(keys.start, keys.stop, tiles.width):
            mask[0, :, _within(rows, some), _within(keys, columns)] = tiles.values(some, columns)
    return mask


def _within(whole: slice, part: slice) -> slice:
    """A part of a slice, counted from its start."""
    return slice(part.start - whole.start, part.stop - whole.start)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of some queries to some keys, and its logsumexp."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    logits = scale * (q @ k.transpose(-2, -1)) + mask
    return logits.softmax(dim=-1) @ v, logits.logsumexp(dim=-1)


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys together."""
    logsumexp = torch.logaddexp(one[1], other[1])
    share, rest = ((part[1] - logsumexp).exp_()[..., None] for part in (one, other))
    return one[0] * share + other[0] * rest, logsumexp


@torch.library.custom_op(
    "climax_elevation::tiled_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor[] features, "
    "Tensor[] parameters, int[] wanted, str nesting, int handle, float scale) -> Tensor[]",
)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    wanted: Sequence[int],
    nesting: str,
    handle: int,
    scale: float,
) -> list[Tensor]:
    bias = living[handle]
    of_features = {index: torch.zeros_like(features[index]) for index in wanted}
    of_parameters = {name: torch.zeros_like(parameter) for name, parameter in bias.named_parameters()}
    negative_logsumexp, negative_delta = -logsumexp, torch.empty_like(logsumexp)
    for rows in slices(0, q.shape[2], SIDE):  # lest the product of all be held
        negative_delta[:, :, rows] = -(grad[:, :, rows] * out[:, :, rows]).sum(dim=-1)
    negative_logsumexp, negative_delta = negative_logsumexp[..., None], negative_delta[..., None]
    of_qkv = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    for samples, own in _terrains(q.shape[0], features):
        given = [t[samples] for t in (q, k, v, grad, negative_logsumexp, negative_delta)]
        for gradient in _gradients(bias, _nested(nesting, own), wanted, given, [t[samples] for t in of_qkv], scale):
            for name, part in gradient.parameters.items():
                of_parameters[name] += part
            for index, total in of_features.items():
                found = gradient.features[index]
                assert found is not None
                total[samples if len(total) > 1 else slice(None)] += found
    return [*of_qkv, *of_features.values(), *of_parameters.values()]


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    wanted: Sequence[int],
    *_: Any,
) -> list[Tensor]:
    likes = [q, k, v, *(features[index] for index in wanted), *parameters]
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


class _Strip(NamedTuple):
    """Some queries of some samples and heads, `[n, rows, ...]`, and the gradient that they gather."""

    q: Tensor
    grad: Tensor
    negative_logsumexp: Tensor
    negative_delta: Tensor
    dq: Tensor


class _Keys(NamedTuple):
    """Some keys of some samples and heads, `[n, columns, d]`, and the gradients that they gather."""

    k: Tensor
    v: Tensor
    dk: Tensor
    dv: Tensor


class _Buffers:
    """Where the probabilities of a tile are, and ds; both transposed too."""

    def __init__(self, like: Tensor) -> None:
        self._held = like.new_empty(2, max(BUFFER_HELD, SIDE * SIDE))
        self._views: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def __call__(self, *size: int) -> tuple[Tensor, ...]:
        if size not in self._views:
            p, ds = (buffer[: math.prod(size)].view(size) for buffer in self._held)
            self._views[size] = p, p.transpose(1, 2), ds, ds.transpose(1, 2)
        return self._views[size]


def _gradients(
    bias: ElevationBias,
    features: Tensors,
    wanted: Sequence[int],
    given: Sequence[Tensor],
    of_qkv: Sequence[Tensor],
    scale: float,
) -> list[Gradient]:
    """Add the gradients of samples that share a bias to those of q, k and v; the bias's come in parts.

    `given` are q, k, v, the gradient of what came out, and -logsumexp and -delta. Each thread keeps its keys and
    goes around the queries, one step behind the next: no two of them ever add to the same.
    """
    parts = shares(given[0].shape[2], SIDE, given[0].device)
    tiles = [Tiles(twin(bias), features) for _ in parts]
    gradients = [Gradient(own.bias, list(leaves(features)), wanted) for own in tiles]
    for step in range(len(parts)):
        rows = parts[step:] + parts[:step]
        work = zip(tiles, gradients, rows, parts, strict=True)
        at_once([partial(_add_part, *own, given, of_qkv, scale) for own in work])
    return gradients


def _add_part(
    tiles: Tiles,
    gradient: Gradient,
    queries: slice,
    keys: slice,
    given: Sequence[Tensor],
    of_qkv: Sequence[Tensor],
    scale: float,
) -> None:
    """Add the gradients of a part of the queries with a part of the keys."""
    q, k, v, grad, negative_logsumexp, negative_delta = given
    dq, dk, dv = of_qkv
    buffers = _Buffers(q)
    side = min(SIDE, tiles.width)
    groups = _groups(q.shape[0], q.shape[1], tiles.heads, max(1, BUFFER_HELD // (SIDE * side)))
    for columns in slices(keys.start, keys.stop, tiles.width):
        parts = list(slices(columns.start, columns.stop, side))
        held = [_joined((k, v, dk, dv), part) for part in parts]
        split = [list(map(_Keys._make, zip(*_split(joined, groups), strict=True))) for joined in held]
        for rows in slices(queries.start, queries.stop, SIDE):
            strip = _joined((q, grad, negative_logsumexp, negative_delta, dq), rows)
            strips = list(map(_Strip._make, zip(*_split(strip, groups), strict=True)))
            b, derivative = tiles.differentiable(rows, columns, gradient)
            db = torch.zeros_like(b)
            for part, some in zip(parts, split, strict=True):
                at = _within(columns, part)
                for group, one, other in zip(groups, strips, some, strict=True):
                    _add_tile(one, other, b[group.of, :, at], db[group.of, :, at], buffers, scale)
            gradient.add(derivative(db), rows, columns)
            dq[:, :, rows] = strip[-1].unflatten(0, q.shape[:2])
            del b, db, derivative  # before the next tile's are made
        for part, joined in zip(parts, held, strict=True):
            dk[:, :, part], dv[:, :, part] = (t.unflatten(0, k.shape[:2]) for t in joined[2:])


def _joined(values: Sequence[Tensor], part: slice) -> list[Tensor]:
    """Contiguous copies of some tokens of each `[B, H, L, ...]`, `[B * H, tokens, ...]`."""
    return [t[:, :, part].clone(memory_format=torch.contiguous_format).flatten(0, 1) for t in values]


def _split(values: Sequence[Tensor], groups: Sequence[_Group]) -> list[tuple[Tensor, ...]]:
    """Each `[B * H, ...]` in its groups."""
    return [t.split([group.size for group in groups]) for t in values]


def _add_tile(strip: _Strip, keys: _Keys, b: Tensor, db: Tensor, buffers: _Buffers, scale: float) -> None:
    """Add the gradients of some queries with some keys."""
    q, grad, k, v = strip.q, strip.grad, keys.k, keys.v
    p, p_transposed, ds, ds_transposed = buffers(len(q), q.shape[1], k.shape[1])
    torch.add(b, strip.negative_logsumexp, out=p)
    p.baddbmm_(q, k.mT, alpha=scale).exp_()
    keys.dv.baddbmm_(p_transposed, grad)
    torch.bmm(grad, v.mT, out=ds)
    ds.add_(strip.negative_delta).mul_(p)
    strip.dq.baddbmm_(ds, k, alpha=scale)
    keys.dk.baddbmm_(ds_transposed, q, alpha=scale)
    db.add_(ds if len(db) > 1 else ds.sum(dim=0))


class _Group(NamedTuple):
    """Some of the samples' heads."""

    size: int
    of: slice
    """The heads of the bias that are theirs."""


def _groups(batch: int, heads: int, told_apart: int, at_once: int) -> list[_Group]:
    """As many of the samples' heads at once as a buffer holds; where a bias tells heads apart, of one sample."""
    if told_apart == 1:
        return [_Group(part.stop - part.start, slice(0, 1)) for part in slices(0, batch * heads, at_once)]
    return [_Group(part.stop - part.start, part) for part in slices(0, heads, at_once)] * batch


def _terrains(batch: int, features: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """The samples that share a bias, and its features: all at once, or one by one."""
    if all(len(feature) == 1 for feature in features):
        yield slice(0, batch), list(features)
        return
    for sample in range(batch):
        one = slice(sample, sample + 1)
        yield one, [feature if len(feature) == 1 else feature[one] for feature in features]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, features, parameters, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, *features, *parameters)
    ctx.counts, ctx.rest = (len(features), len(parameters)), rest
    ctx.bias = living.get(rest[1])  # lest it go before the gradient comes


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, out, logsumexp, *others = ctx.saved_tensors
    features, parameters = others[: ctx.counts[0]], others[ctx.counts[0] :]
    wanted = [index for index, feature in enumerate(features) if feature.requires_grad]
    found = _backward(grad, q, k, v, out, logsumexp, features, parameters, wanted, *ctx.rest)
    of_features: list[Tensor | None] = [None] * len(features)
    for index, total in zip(wanted, found[3:], strict=False):
        of_features[index] = total
    return *found[:3], of_features, found[3 + len(wanted) :], None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _nested(nesting: str, tensors: Sequence[Tensor]) -> Tensors:
    """The tensors in the nesting that `repr` wrote."""
    following = iter(tensors)
    return map_tensors(lambda _: next(following), ast.literal_eval(nesting))
