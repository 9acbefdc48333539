"""The part of a network over token pairs that comes after a first layer applied to tokens.

    b[h, i, j] = sum_u W[h, u] relu(q[i, u] + k[j, u]) + c[h]

The hidden layer is never held: in compiled loops it stays in registers, and else it is computed for some queries at
a time, in a buffer that is kept and written to again and again; and anew for the gradient:

    g[i, j, u] = (sum_h W[h, u] db[h, i, j]) [q[i, u] + k[j, u] > 0]
    dq[i] = sum_j g[i, j]        dk[j] = sum_i g[i, j]
    dW[h, u] = sum_ij db[h, i, j] relu(...)      dc[h] = sum_ij db[h, i, j]
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from climax_elevation import compiled
from climax_elevation.compiled.slices import slices
from climax_elevation.compiled.threads import at_once, shares
from climax_elevation.errors import InputError
from climax_elevation.transforms import each_in_turn

HIDDEN_HELD = 1 << 19  # numbers of the hidden layer that are held, without compiled loops: 2 MB
SIDE = 64  # queries of a thread, at the least, in compiled loops

_kept = threading.local()


def pair_network(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The equation above.

    Args:
        query, key: q `[N, Lq, U]` and k `[N, Lk, U]`.
        weight, bias: W `[H, U]` and c `[H]`.

    Returns:
        `[N, H, Lq, Lk]`.
    """
    return _PairNetwork.apply(query, key, weight, bias)


class _PairNetwork(torch.autograd.Function):  # of operators alone, torch.func cannot differentiate
    @staticmethod
    def forward(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _forward(query, key, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return _PairNetworkBackward.apply(grad, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return each_in_turn(_PairNetwork, info, in_dims, inputs)


class _PairNetworkBackward(torch.autograd.Function):  # of which there is no derivative
    @staticmethod
    def forward(grad: Tensor, query: Tensor, key: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(_backward(grad, query, key, weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise InputError("relative_3d has no second derivative in normalized coordinates: choose coords='physical'")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return each_in_turn(_PairNetworkBackward, info, in_dims, inputs)


@torch.library.custom_op(
    "climax_elevation::pair_network",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor weight, Tensor bias) -> Tensor",
)
def _forward(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return pair_values(query, key, weight, bias)


@_forward.register_fake
def _(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return query.new_empty(len(query), len(weight), query.shape[1], key.shape[1])


def pair_values(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """`pair_network`, for whoever differentiates by hand; written to `out` where it is given."""
    values = query.new_empty(len(query), len(weight), query.shape[1], key.shape[1]) if out is None else out
    if compiled.available(query, key, weight, bias):
        rest = [t.contiguous() for t in (key, weight, bias)]
        for q, k, own in zip(query.contiguous(), rest[0], values, strict=True):
            parts = shares(len(q), SIDE, q.device)
            at_once(
                [
                    partial(
                        compiled.call,
                        "pair_values",
                        q[some],
                        k,
                        *rest[1:],
                        own[None, :, some],
                        *_sizes(q[some], k, weight),
                    )
                    for some in parts
                ]
            )
        return values
    for q, k, own in zip(query, key, values, strict=True):
        for some in _blocks(q, k):
            torch.addmm(bias[:, None], weight, _hidden(q[some], k).flatten(0, 1).T, out=own[:, some].flatten(1))
    return values


@torch.library.custom_op(
    "climax_elevation::pair_network_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor weight) -> Tensor[]",
)
def _backward(grad: Tensor, query: Tensor, key: Tensor, weight: Tensor) -> list[Tensor]:
    return pair_gradients(grad, query, key, weight)


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, weight: Tensor) -> list[Tensor]:
    return [
        *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, weight)),
        weight.new_empty(len(weight)),
    ]


def pair_gradients(grad: Tensor, query: Tensor, key: Tensor, weight: Tensor) -> list[Tensor]:
    """dq, dk, dW and dc, from the gradient of the values, db."""
    of_query, of_key, of_weight = (
        torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, weight)
    )
    of_bias = weight.new_zeros(len(weight))
    if compiled.available(grad, query, key, weight):
        query, key, weight = (t.contiguous() for t in (query, key, weight))
        for db, q, k, dq, dk in zip(compiled.packed(grad), query, key, of_query, of_key, strict=True):
            parts = shares(len(q), SIDE, q.device)
            sums = [[torch.zeros_like(total) for total in (dk, of_weight, of_bias)] for _ in parts]
            work = zip(parts, sums, strict=True)
            at_once(
                [
                    partial(
                        compiled.call,
                        "pair_gradients",
                        *(db[None, :, some], q[some], k, weight, dq[some], *own),
                        *_sizes(q[some], k, weight),
                    )
                    for some, own in work
                ]
            )
            for own in sums:
                for total, part in zip((dk, of_weight, of_bias), own, strict=True):
                    total += part
        return [of_query, of_key, of_weight, of_bias]
    for db, q, k, dq, dk in zip(grad, query, key, of_query, of_key, strict=True):
        of_bias += db.sum(dim=(1, 2))
        for some in _blocks(q, k):
            hidden, of_pairs = _hidden(q[some], k), db[:, some].flatten(1)
            of_weight.addmm_(of_pairs, hidden.flatten(0, 1))
            g = _buffer("gradient", hidden.shape, hidden)
            torch.mm(of_pairs.T, weight, out=g.flatten(0, 1))
            torch.ops.aten.threshold_backward.grad_input(g, hidden, 0, grad_input=g)
            dq[some] = g.sum(dim=1)
            dk += g.sum(dim=0)
    return [of_query, of_key, of_weight, of_bias]


def _sizes(query: Tensor, key: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Heads, queries, keys and units, as the loops take them."""
    return len(weight), len(query), *key.shape


def _blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Some queries at a time."""
    yield from slices(0, len(query), max(1, HIDDEN_HELD // max(1, key.numel())))


def _hidden(query: Tensor, key: Tensor) -> Tensor:
    """relu(q + k), `[rows, Lk, U]`."""
    buffer = _buffer("hidden", (len(query), *key.shape), query)
    return torch.add(query[:, None], key[None], out=buffer).relu_()


def _buffer(name: str, size: tuple[int, ...], like: Tensor) -> Tensor:
    """What is kept under this name, in this size: memory that is new costs more than what is computed in it."""
    buffers: dict[Any, Tensor] = vars(_kept)
    place = (name, like.dtype, like.device)
    numbers = math.prod(size)
    if place not in buffers or buffers[place].numel() < numbers:
        with torch.inference_mode(False):  # else only inference could write to it
            buffers[place] = torch.empty(numbers, dtype=like.dtype, device=like.device)
    return buffers[place][:numbers].view(size)
