"""The part of a network over token pairs that comes after a first layer applied to tokens.

    b[h, i, j] = sum_u W[h, u] relu(q[i, u] + k[j, u]) + c[h]

Among some queries and some keys a unit u is often on one side of its relu throughout, as the ends of the ranges
of q and k tell. Where it is 0 it costs nothing; where it is q + k, its part of b is a sum of one number a query
and one a key. The rest is computed for some queries at a time, in a buffer that is kept and written to again
and again, so that it stays in the processor's cache, and anew for the gradient:

    g[i, j, u] = (sum_h W[h, u] db[h, i, j]) [q[i, u] + k[j, u] > 0]
    dq[i] = sum_j g[i, j]        dk[j] = sum_i g[i, j]
    dW[h, u] = sum_ij db[h, i, j] relu(...)      dc[h] = sum_ij db[h, i, j]
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from climax_elevation.slices import slices

HIDDEN_HELD = 1 << 19  # numbers of the hidden layer that are held: 2 MB
ROWS = 256  # queries for which units are told apart

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
        with torch.no_grad():
            return *_backward(grad, *ctx.saved_tensors), grad.sum(dim=(0, 2, 3))


@torch.library.custom_op("climax_elevation::pair_network", mutates_args=())
def _forward(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    values = query.new_empty(len(query), len(weight), query.shape[1], key.shape[1])
    for q, k, out in zip(query, key, values, strict=True):
        for rows in slices(0, len(q), ROWS):
            linear, mixed = _kinds(q[rows], k)
            of_query, of_key = (_units(side, linear) @ _units(weight, linear).T for side in (q[rows], k))
            torch.add((of_query + bias).T[:, :, None], of_key.T[:, None], out=out[:, rows])
            q_mixed, k_mixed, weight_mixed = (_units(t, mixed) for t in (q, k, weight))
            for some in _blocks(rows, k_mixed):
                hidden = _hidden(q_mixed[some], k_mixed)
                out[:, some].flatten(1).addmm_(weight_mixed, hidden.flatten(0, 1).T)
    return values


@_forward.register_fake
def _(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return query.new_empty(len(query), len(weight), query.shape[1], key.shape[1])


@torch.library.custom_op("climax_elevation::pair_network_backward", mutates_args=())
def _backward(grad: Tensor, query: Tensor, key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key))
    of_weight = torch.zeros_like(weight)
    for db, q, k, dq, dk in zip(grad, query, key, of_query, of_key, strict=True):
        for rows in slices(0, len(q), ROWS):
            linear, mixed = _kinds(q[rows], k)
            over_keys, over_queries = db[:, rows].sum(dim=2), db[:, rows].sum(dim=1)
            of_weight[:, linear] += over_keys @ _units(q[rows], linear) + over_queries @ _units(k, linear)
            dq[rows, linear] = over_keys.T @ _units(weight, linear)
            dk[:, linear] += over_queries.T @ _units(weight, linear)
            q_mixed, k_mixed, weight_mixed = (_units(t, mixed) for t in (q, k, weight))
            dk_mixed, of_weight_mixed = torch.zeros_like(k_mixed), torch.zeros_like(weight_mixed)
            for some in _blocks(rows, k_mixed):
                hidden, of_pairs = _hidden(q_mixed[some], k_mixed), db[:, some].flatten(1)
                of_weight_mixed.addmm_(of_pairs, hidden.flatten(0, 1))
                g = _buffer("gradient", hidden.shape, hidden)
                torch.mm(of_pairs.T, weight_mixed, out=g.flatten(0, 1))
                torch.ops.aten.threshold_backward.grad_input(g, hidden, 0, grad_input=g)
                dq[some, mixed] = g.sum(dim=1)
                dk_mixed += g.sum(dim=0)
            dk[:, mixed] += dk_mixed
            of_weight[:, mixed] += of_weight_mixed
    return of_query, of_key, of_weight


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=contiguous),
        torch.empty_like(key, memory_format=contiguous),
        torch.empty_like(weight),
    )


def _kinds(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The units that are q + k for all these pairs, and those that may be so for some."""
    (low_query, high_query), (low_key, high_key) = query.aminmax(dim=0), key.aminmax(dim=0)
    always = low_query + low_key > 0
    never = high_query + high_key <= 0
    return always.nonzero()[:, 0], (~always & ~never).nonzero()[:, 0]  # what is not a number is neither


def _units(values: Tensor, which: Tensor) -> Tensor:
    return values.index_select(1, which)


def _blocks(rows: slice, key: Tensor) -> Iterator[slice]:
    """Some queries at a time."""
    yield from slices(rows.start, rows.stop, max(1, HIDDEN_HELD // max(1, key.numel())))


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
