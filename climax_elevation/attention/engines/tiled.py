"""A tile of the bias at a time: never more of it in memory, forward or backward.

Forward, softmax goes over the keys tile by tile, under the largest logit so far. Backward, the probabilities of a
tile come back from the saved logsumexp l, and five matrix products give the gradients:

    p = exp(s q k^T + b - l)        dv += p^T do
    ds = p (do v^T - delta)         delta = rowsum(do * out)
    dq += s ds k                    dk += s ds^T q          db = ds, summed over samples and heads that share it

db goes straight into the bias's own parameters and features: by the bias's own `pullback` where it has one,
else by differentiating that tile of `pairwise` again. What of a bias is of exact low rank is no part of b, but columns
of q and k (`attention.columns`). The order of tiles is fixed, so a run repeats exactly. Half precision is computed in
float32.

The engine is a function of its arguments alone: of q, k, v, features, the bias's parameters and buffers, and of what
else the bias is. Called plainly, that is the bias itself, as it was when it was called. In compiled and exported
programs both directions are custom operators, which torch.compile passes over without a break; they take the bias as
data (`bias.as_data`), all of it by tiles.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from climax_elevation.attention.bias_tiles import SIDE, Gradient, Tiles
from climax_elevation.attention.columns import apart, with_columns
from climax_elevation.attention.engine import Engine, Request
from climax_elevation.attention.partial_softmax import attend, differentiate
from climax_elevation.bias.as_data import described, given_values, tensors_of, why_no_data, with_tensors
from climax_elevation.bias.base import ElevationBias, Tensors, leaves, map_tensors
from climax_elevation.compiled import packed
from climax_elevation.compiled.slices import slices
from climax_elevation.compiled.threads import at_once, shares
from climax_elevation.errors import InputError
from climax_elevation.transforms import each_in_turn, tracing

CHOSEN_FROM = {"cpu": 256}  # tokens; measured
CHOSEN_ELSEWHERE_FROM = 4096  # not measured: from here on a mask is too large to hold


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
        wide = torch.promote_types(q.dtype, torch.float32)
        wide_q, wide_k, wide_v = (t.to(wide) for t in (q, k, v))
        if not tracing(q):
            factors, bias, inputs = apart(bias, inputs, wide_q)
            if factors is not None:
                (wide_q, wide_k), scale = with_columns(wide_q, wide_k, factors, scale), 1.0
        features = bias.features(*inputs)
        nesting = repr(map_tensors(lambda _: 0, features))  # type: ignore[arg-type, return-value]
        own, flat = tensors_of(bias), list(leaves(features))
        if tracing(q):
            out, _ = _operator(wide_q, wide_k, wide_v, flat, list(own.values()), nesting, described(bias), scale)
        else:
            given = _Given(with_tensors(bias, {}), tuple(own), nesting, len(flat), scale)
            out, _ = _Tiled.apply(given, wide_q, wide_k, wide_v, *flat, *own.values())
        return out.to(v.dtype)


def values_by_tiles(bias: ElevationBias, inputs: Tensors) -> Tensor:
    """The dense bias over one ground, `[1, heads or 1, L, L]`, in the very tiles of attention.

    Args:
        bias: Whose values are wanted.
        inputs: The arguments of its `forward`, `[1, L, ...]`.
    """
    with torch.autocast(next(leaves(inputs)).device.type, enabled=False):
        features = bias.features(*inputs)
        tiles, some = Tiles(bias, features), next(leaves(features))
        tokens = some.shape[1]
        values = some.new_empty((1, tiles.heads, tokens, tokens), dtype=tiles.dtype)
        at_once([partial(_fill, tiles, part, values) for part in shares(tokens, SIDE, values.device)])
        return values


def _fill(tiles: Tiles, part: slice, values: Tensor) -> None:
    memory = tiles.memory(values)
    for rows in slices(part.start, part.stop, SIDE):
        for columns in slices(0, values.shape[-1], tiles.width):
            values[0, :, rows, columns] = tiles.values(rows, columns, memory)


class _Given(NamedTuple):
    """What attention depends on besides tensors.

    Attributes:
        bias: With its settings; its parameters and buffers come beside it.
        names: Of those.
        nesting: Of its features.
        features: How many they are.
        scale: Of products of queries and keys.
    """

    bias: ElevationBias
    names: tuple[str, ...]
    nesting: str
    features: int
    scale: float

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], ElevationBias]:
        """Features, and the bias with its own tensors, of what came in one row."""
        features, own = tensors[: self.features], tensors[self.features :]
        return features, with_tensors(self.bias, dict(zip(self.names, own, strict=True)))


class _Tiled(torch.autograd.Function):
    """`_forward`, as torch.autograd and torch.func differentiate it."""

    @staticmethod
    def forward(given: _Given, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return _forward(q, k, v, *given.split(tensors), given.nesting, given.scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        given, *tensors = inputs
        ctx.given = given
        ctx.save_for_backward(*output, *tensors)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        wanted = tuple(ctx.needs_input_grad[4:])
        of_qkv_and_wanted = _TiledBackward.apply(ctx.given, wanted, grad, *ctx.saved_tensors)
        others = iter(of_qkv_and_wanted[3:])
        return None, *of_qkv_and_wanted[:3], *(next(others) if is_wanted else None for is_wanted in wanted)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return each_in_turn(_Tiled, info, in_dims, inputs)


class _TiledBackward(torch.autograd.Function):
    """`_backward`, of which there is no derivative."""

    @staticmethod
    def forward(
        given: _Given,
        wanted: tuple[bool, ...],
        grad: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        features, bias = given.split(tensors)
        of_features = [index for index in range(given.features) if wanted[index]]
        learned = [name for name, is_wanted in zip(given.names, wanted[given.features :], strict=True) if is_wanted]
        known = (grad, q, k, v, out, logsumexp)
        return tuple(_backward(known, features, bias, of_features, learned, given.nesting, given.scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise InputError("the engine 'tiled' has no second derivative: choose 'dense' where one is wanted")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return each_in_turn(_TiledBackward, info, in_dims, inputs)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, features: Sequence[Tensor], bias: ElevationBias, nesting: str, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention, and the logsumexp of each row of logits."""
    out, logsumexp = torch.empty_like(v, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3])
    q, k, v = map(packed, (q, k, v))
    heads, parts = _shares(q)
    for samples, own in _terrains(q.shape[0], features):
        tiles = Tiles(bias, _nested(nesting, own))
        given, results = ([t[samples] for t in some] for some in ((q, k, v), (out, logsumexp)))
        at_once([partial(_attend, tiles, some, rows, given, results, scale) for some in heads for rows in parts])
    return out, logsumexp


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


def _backward(
    known: Sequence[Tensor],
    features: Sequence[Tensor],
    bias: ElevationBias,
    wanted: Sequence[int],
    learned: Sequence[str],
    nesting: str,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k and v, of the features at the indices `wanted`, and of the parameters `learned`.

    `known` are the gradient of what came out, q, k, v, what came out, and logsumexp.
    """
    grad, q, k, v = map(packed, known[:4])
    out, logsumexp = known[4:]
    of_features = {index: torch.zeros_like(features[index]) for index in wanted}
    own_parameters = dict(bias.named_parameters())
    of_parameters = {name: torch.zeros_like(own_parameters[name]) for name in learned}
    delta = torch.empty_like(logsumexp)
    of_qkv = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    heads, parts = _shares(q)
    at_once([partial(_begin, some, part, (grad, out), (delta, *of_qkv)) for some in heads for part in parts])
    for samples, own in _terrains(q.shape[0], features):
        given = [t[samples] for t in (q, k, v, grad, logsumexp, delta)]
        nested, sums = _nested(nesting, own), [t[samples] for t in of_qkv]
        for gradient in _gradients(bias, nested, learned, wanted, given, sums, scale):
            for name, part in gradient.parameters.items():
                of_parameters[name] += part
            for index, total in of_features.items():
                found = gradient.features[index]
                assert found is not None
                total[samples if len(total) > 1 else slice(None)] += found
    return [*of_qkv, *of_features.values(), *of_parameters.values()]


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
    learned: Sequence[str],
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
    tiles = [Tiles(with_tensors(bias, {}), features) for _ in heads for _ in parts]
    gradients = [Gradient(own.bias, list(leaves(features)), learned, wanted) for own in tiles]
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


def _nested(nesting: str, tensors: Sequence[Tensor]) -> Tensors:
    """The tensors in the nesting that `repr` wrote."""
    following = iter(tensors)
    return map_tensors(lambda _: next(following), ast.literal_eval(nesting))


@torch.library.custom_op(
    "climax_elevation::tiled_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] features, Tensor[] of_bias, str nesting, str bias, float scale) "
    "-> (Tensor, Tensor)",
)
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Sequence[Tensor],
    of_bias: Sequence[Tensor],
    nesting: str,
    bias: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, features, given_values(bias, of_bias), nesting, scale)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3])


@torch.library.custom_op(
    "climax_elevation::tiled_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor[] features, "
    "Tensor[] of_bias, int[] wanted, int[] learned, str nesting, str bias, float scale) -> Tensor[]",
)
def _operator_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    features: Sequence[Tensor],
    of_bias: Sequence[Tensor],
    wanted: Sequence[int],
    learned: Sequence[int],
    nesting: str,
    bias: str,
    scale: float,
) -> list[Tensor]:
    own = given_values(bias, of_bias)
    names = list(tensors_of(own))
    known = (grad, q, k, v, out, logsumexp)
    return _backward(known, features, own, wanted, [names[index] for index in learned], nesting, scale)


@_operator_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    features: Sequence[Tensor],
    of_bias: Sequence[Tensor],
    wanted: Sequence[int],
    learned: Sequence[int],
    *_: Any,
) -> list[Tensor]:
    likes = [q, k, v, *(features[index] for index in wanted), *(of_bias[index] for index in learned)]
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, features, of_bias, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, *features, *of_bias)
    ctx.count, ctx.rest = len(features), rest


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, out, logsumexp, *others = ctx.saved_tensors
    features, of_bias = others[: ctx.count], others[ctx.count :]
    wanted, learned = ([index for index, t in enumerate(some) if t.requires_grad] for some in (features, of_bias))
    found = _operator_backward(grad, q, k, v, out, logsumexp, features, of_bias, wanted, learned, *ctx.rest)
    return *found[:3], *_placed(found[3:], (features, wanted), (of_bias, learned)), None, None, None


def _placed(found: Sequence[Tensor], *sides: tuple[Sequence[Tensor], Sequence[int]]) -> Iterator[list[Tensor | None]]:
    """Gradients at their indices, None at the others, for each side in turn."""
    following = iter(found)
    for tensors, indices in sides:
        yield [next(following) if index in indices else None for index in range(len(tensors))]


_operator.register_autograd(_differentiate, setup_context=_save)


def _rank(request: Request) -> int:
    """Before "sdpa" from some length on; compiled programs want a bias that can be written down."""
    enough = request.tokens >= CHOSEN_FROM.get(request.device, CHOSEN_ELSEWHERE_FROM)
    refused = request.dropout_p > 0 or (torch.compiler.is_compiling() and bool(why_no_data(request.bias)))
    return 2 if enough and not refused else 0


ENGINE = Engine(tiled_attention, _rank, values_by_tiles)
