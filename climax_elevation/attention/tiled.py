"""A tile of the bias at a time: never more of it in memory, forward or backward.

Forward, softmax goes over the keys tile by tile, under the largest logit so far. Backward, the probabilities of a
tile come back from the saved logsumexp l, and five matrix products give the gradients:

    p = exp(s q k^T + b - l)        dv += p^T do
    ds = p (do v^T - delta)         delta = rowsum(do * out)
    dq += s ds k                    dk += s ds^T q          db = ds, summed over samples and heads that share it

db goes straight into the bias's own parameters and features: by the bias's own `pullback` where it has one,
else by differentiating that tile of `pairwise` again. The order of tiles is fixed, so a run repeats exactly.
Half precision is computed in float32.

Both directions are custom operators, which torch.compile passes over without a break.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from climax_elevation.attention.tile import attend, differentiate
from climax_elevation.attention.tiles import SIDE, Gradient, Tiles, twin
from climax_elevation.bias.base import ElevationBias, Tensors, leaves, living, map_tensors
from climax_elevation.compiled import packed
from climax_elevation.errors import InputError
from climax_elevation.slices import slices
from climax_elevation.threads import at_once, shares


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
        wide_q, wide_k, wide_v = (t.to(wide) for t in (q, k, v))
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
    out, logsumexp = torch.empty_like(v, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3])
    q, k, v = map(packed, (q, k, v))
    heads, parts = _shares(q)
    for samples, own in _terrains(q.shape[0], features):
        tiles = Tiles(living[handle], _nested(nesting, own))
        given, results = ([t[samples] for t in some] for some in ((q, k, v), (out, logsumexp)))
        at_once([partial(_attend, tiles, some, rows, given, results, scale) for some in heads for rows in parts])
    return out, logsumexp


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3])


def _shares(q: Tensor) -> tuple[list[slice], list[slice]]:
    """Parts of the heads, and of the tokens: these first, since each part of the heads computes the bias anew."""
    tokens = shares(q.shape[2], SIDE, q.device)
    return shares(q.shape[1], 1, q.device, len(tokens)), tokens


def _attend(
    tiles: Tiles,
    heads: slice,
    part: slice,
    given: Sequence[Tensor],
    results: Sequence[Tensor],
    scale: float,
) -> None:
    """Attention of a part of heads and queries, of samples that share a bias; its logsumexp is the second result."""
    q, k, v = (t[:, heads] for t in given)
    own = tiles.of(heads)
    memory = tiles.memory(q)
    for rows in slices(part.start, part.stop, SIDE):
        out, logsumexp = (result[:, heads, rows] for result in results)
        highest, sums = logsumexp.fill_(-math.inf), torch.zeros_like(logsumexp)
        out.zero_()
        for columns in slices(0, k.shape[2], tiles.width):
            b = tiles.values(rows, columns, memory).to(q.dtype).contiguous()
            attend(q[:, :, rows], k[:, :, columns], v[:, :, columns], b[own], (highest, sums, out), scale)
        out /= sums[..., None]
        logsumexp += sums.log()


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
    grad, q, k, v = map(packed, (grad, q, k, v))
    of_features = {index: torch.zeros_like(features[index]) for index in wanted}
    of_parameters = {name: torch.zeros_like(parameter) for name, parameter in bias.named_parameters()}
    delta = torch.empty_like(logsumexp)
    of_qkv = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    heads, parts = _shares(q)
    at_once([partial(_begin, some, part, (grad, out), (delta, *of_qkv)) for some in heads for part in parts])
    for samples, own in _terrains(q.shape[0], features):
        given = [t[samples] for t in (q, k, v, grad, logsumexp, delta)]
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


def _begin(heads: slice, part: slice, given: Sequence[Tensor], begun: Sequence[Tensor]) -> None:
    """delta of some tokens in some heads, and zeros for their gradients: by the threads that go on with them.

    Torch's own threads, which would else do it, wait busily for more, on the cores that these want.
    """
    delta, *sums = begun
    for rows in slices(part.start, part.stop, SIDE):  # lest the product of all be held
        grad, out = (t[:, heads, rows] for t in given)
        delta[:, heads, rows] = (grad * out).sum(dim=-1)
    for total in sums:
        total[:, heads, part] = 0


def _gradients(
    bias: ElevationBias,
    features: Tensors,
    wanted: Sequence[int],
    given: Sequence[Tensor],
    of_qkv: Sequence[Tensor],
    scale: float,
) -> list[Gradient]:
    """Add the gradients of samples that share a bias to those of q, k and v; the bias's come in parts.

    `given` are q, k, v, the gradient of what came out, logsumexp and delta. Each thread keeps its heads and keys and
    goes around the queries, one step behind the next: no two of them ever add to the same.
    """
    heads, parts = _shares(given[0])
    tiles = [Tiles(twin(bias), features) for _ in heads for _ in parts]
    gradients = [Gradient(own.bias, list(leaves(features)), wanted) for own in tiles]
    for step in range(len(parts)):
        pairs = zip(parts[step:] + parts[:step], parts, strict=True)
        places = [(some, *pair) for some, pair in product(heads, pairs)]
        work = zip(tiles, gradients, places, strict=True)
        at_once([partial(_add_part, *own, given, of_qkv, scale) for own in work])
    return gradients


def _add_part(
    tiles: Tiles,
    gradient: Gradient,
    place: tuple[slice, slice, slice],
    given: Sequence[Tensor],
    of_qkv: Sequence[Tensor],
    scale: float,
) -> None:
    """Add the gradients of a part of the heads, of the queries, with a part of the keys."""
    heads, queries, keys = place
    q, k, v, *of_queries = (t[:, heads] for t in given)
    dq, dk, dv = (t[:, heads] for t in of_qkv)
    own = tiles.of(heads)
    memory = tiles.memory(q)
    of_bias = torch.empty_like(memory, dtype=q.dtype)
    for columns in slices(keys.start, keys.stop, tiles.width):
        of_keys = [t[:, :, columns] for t in (k, v, dk, dv)]
        for rows in slices(queries.start, queries.stop, SIDE):
            values, derivative = tiles.differentiable(rows, columns, memory, gradient)
            b = values.to(q.dtype).contiguous()
            db = of_bias[: b.numel()].view(b.shape).zero_()
            some_q, some_dq, *others = (t[:, :, rows] for t in (q, dq, *of_queries))
            differentiate((some_q, *of_keys[:2], *others), b[own], (some_dq, *of_keys[2:]), db[own], scale)
            gradient.add(derivative(db.to(values.dtype)), rows, columns)
            del values, b, derivative  # before the next tile's are made


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
