"""A tile of the bias at a time: never more of it in memory, forward or backward.

Forward, a tile of queries attends to a chunk of keys through torch's fused kernel, with the bias of those
pairs alone as its mask; chunks are merged by their logsumexp. Backward, the probabilities of a tile come
back from the saved logsumexp l, and five matrix products give the gradients:

    p = exp(s q k^T + b - l)        dv += p^T do
    ds = p (do v^T - delta)         delta = rowsum(do * out)
    dq += s ds k                    dk += s ds^T q          db = ds, summed over samples and heads that share it

db goes straight into the bias's own parameters and features, by differentiating that tile of `pairwise`
again. The order of tiles is fixed, so a run repeats exactly. Half precision is computed in float32.

Both directions are custom operators, which torch.compile passes over without a break.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from climax_elevation.bias.base import ElevationBias, Tensors, leaves, living, map_tensors
from climax_elevation.errors import InputError

TILE_HELD = 1 << 21  # numbers that computing a tile of the bias holds: 8 MB, of the order of a processor's cache
BUFFER_HELD = 1 << 20  # numbers of one buffer of probabilities
MASK_HELD = 1 << 22  # numbers of the mask that the fused kernel is given

Derivative = Callable[[Tensor], tuple[dict[str, Tensor], list[Tensor], list[Tensor]]]


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


class _Tiles:
    """The bias of tiles of queries and keys, and its derivative."""

    def __init__(self, bias: ElevationBias, features: Tensors) -> None:
        self.bias, self.features = bias, features
        first = slice(0, 1)
        self.samples, self.heads = self.values(first, first).shape[:2]  # that it tells apart; 1 where all share it
        side = math.isqrt(TILE_HELD // (2 * self.samples * bias.numbers_a_pair))
        self.height = 1 << max(0, side.bit_length() - 1)  # a power of two, which divides the usual lengths
        self.width = 2 * self.height

    def values(self, rows: slice, columns: slice) -> Tensor:
        """b of the tile, `[B or 1, heads or 1, rows, columns]`."""
        return self.bias.pairwise(*self.bias.tile(self.features, rows, columns))

    def differentiable(self, rows: slice, columns: slice, gradient: _Gradient) -> tuple[Tensor, Derivative]:
        """b of the tile, and what gives the gradients of what `gradient` sums from that of b."""
        query, key = self.bias.tile(self.features, rows, columns)
        pairwise = _Pairwise(self.bias)

        def values(parameters: dict[str, Tensor], of_query: list[Tensor], of_key: list[Tensor]) -> Tensor:
            sides = (gradient.replaced(query, of_query), gradient.replaced(key, of_key))
            return functional_call(pairwise, parameters, sides)

        parameters = {f"bias.{name}": parameter.detach() for name, parameter in gradient.learned.items()}
        return vjp(values, parameters, gradient.wanted(query), gradient.wanted(key))  # type: ignore[return-value]


class _Pairwise(nn.Module):
    """`pairwise` as a module's forward, which is what `functional_call` replaces the parameters of."""

    def __init__(self, bias: ElevationBias) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, query: Tensors, key: Tensors) -> Tensor:
        return self.bias.pairwise(query, key)


class _Gradient:
    """Sums of gradients: of the parameters that learn, and of the features that want one."""

    def __init__(self, bias: ElevationBias, features: Sequence[Tensor], wanted: Sequence[int]) -> None:
        self.learned = {name: parameter for name, parameter in bias.named_parameters() if parameter.requires_grad}
        self.parameters = {name: torch.zeros_like(parameter) for name, parameter in self.learned.items()}
        self.features = [torch.zeros_like(f) if index in wanted else None for index, f in enumerate(features)]

    def wanted(self, side: Tensors) -> list[Tensor]:
        """Those of a tile's features that want a gradient."""
        return [tensor for tensor, total in zip(leaves(side), self.features, strict=True) if total is not None]

    def replaced(self, side: Tensors, by: Sequence[Tensor]) -> Tensors:
        """A tile's features, with those that want a gradient replaced."""
        following, totals = iter(by), iter(self.features)
        return map_tensors(lambda tensor: tensor if next(totals) is None else next(following), side)

    def add(self, found: tuple[dict[str, Tensor], list[Tensor], list[Tensor]], rows: slice, columns: slice) -> None:
        """Add a tile's gradients."""
        for name, total in self.parameters.items():
            total += found[0][f"bias.{name}"]
        wanted = [total for total in self.features if total is not None]
        for place, side in ((rows, found[1]), (columns, found[2])):
            for total, part in zip(wanted, side, strict=True):
                total[:, place] += part


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
    tiles = _Tiles(living[handle], _nested(nesting, features))
    tile = tiles.height * tiles.width * tiles.samples * tiles.heads
    at_once = tiles.width * max(1, MASK_HELD // tile)
    out, logsumexp = torch.empty_like(v), q.new_empty(q.shape[:3])
    for rows in _slices(0, q.shape[2], tiles.height):
        merged: tuple[Tensor, Tensor] | None = None
        for keys in _slices(0, q.shape[2], at_once):
            parts = [tiles.values(rows, columns) for columns in _slices(keys.start, keys.stop, tiles.width)]
            b = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
            part = _attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], b, scale)
            merged = part if merged is None else _merge(merged, part)
        assert merged is not None
        out[:, :, rows], logsumexp[:, :, rows] = merged
    return out, logsumexp


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), q.new_empty(q.shape[:3])


def _attend(q: Tensor, k: Tensor, v: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of some queries to some keys, and its logsumexp."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, attn_mask=b.to(q.dtype).contiguous(), scale=scale)  # older ones ignore its strides
    logits = scale * (q @ k.transpose(-2, -1)) + b
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
    tiles = _Tiles(living[handle], _nested(nesting, features))
    gradient = _Gradient(tiles.bias, features, wanted)
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    delta = (grad * out).sum(dim=-1)
    held = q.new_empty(2, max(BUFFER_HELD, tiles.height * tiles.width))
    for rows, columns in itertools.product(*(_slices(0, q.shape[2], side) for side in (tiles.height, tiles.width))):
        b, derivative = tiles.differentiable(rows, columns, gradient)
        db = torch.zeros_like(b)
        for sample, group in _groups(q.shape[0], q.shape[1], b.shape[2] * b.shape[3]):
            at, to = (sample, group, rows), (sample, group, columns)
            of = (min(sample, tiles.samples - 1), group if tiles.heads > 1 else slice(0, 1))
            size = (group.stop - group.start, b.shape[2], b.shape[3])
            p, ds = (buffer[: math.prod(size)].view(size) for buffer in held)
            torch.baddbmm(b[of].to(q.dtype).expand(size), q[at], k[to].transpose(1, 2), alpha=scale, out=p)
            p.sub_(logsumexp[at][..., None]).exp_()
            dv[to].baddbmm_(p.transpose(1, 2), grad[at])
            torch.bmm(grad[at], v[to].transpose(1, 2), out=ds)
            ds.sub_(delta[at][..., None]).mul_(p)
            dq[at].baddbmm_(ds, k[to], alpha=scale)
            dk[to].baddbmm_(ds.transpose(1, 2), q[at], alpha=scale)
            if tiles.heads > 1:
                db[of] += ds
            else:
                for of_head in ds:
                    db[of][0] += of_head
        gradient.add(derivative(db), rows, columns)
    of_parameters = [
        gradient.parameters.get(name, torch.zeros_like(parameter)) for name, parameter in tiles.bias.named_parameters()
    ]
    return [dq, dk, dv, *(total for total in gradient.features if total is not None), *of_parameters]


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


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


def _groups(batch: int, heads: int, numbers: int) -> Iterator[tuple[int, slice]]:
    """Samples one by one, and as many heads at once as a buffer holds tiles."""
    for sample in range(batch):
        for group in _slices(0, heads, max(1, BUFFER_HELD // numbers)):
            yield sample, group


def _nested(nesting: str, tensors: Sequence[Tensor]) -> Tensors:
    """The tensors in the nesting that `repr` wrote."""
    following = iter(tensors)
    return map_tensors(lambda _: next(following), ast.literal_eval(nesting))
