"""The part of a network over token pairs that comes after a first layer applied to tokens.

    b[h, i, j] = sum_u W[h, u] relu(q[i, u] + k[j, u]) + c[h]

The hidden layer is `hidden_dim` numbers a pair. It is computed for some queries at a time, in a buffer that
is kept and written to again and again, so that it stays in the processor's cache, and anew for the gradient:

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

HIDDEN_HELD = 1 << 19  # numbers of the hidden layer that are held: 2 MB

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
    for sample, rows in _blocks(query, key):
        hidden = _hidden(query[sample, rows], key[sample])
        torch.addmm(bias[:, None], weight, hidden.flatten(0, 1).T, out=values[sample, :, rows].flatten(1))
    return values


@_forward.register_fake
def _(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return query.new_empty(len(query), len(weight), query.shape[1], key.shape[1])


@torch.library.custom_op("climax_elevation::pair_network_backward", mutates_args=())
def _backward(grad: Tensor, query: Tensor, key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key))
    of_weight = torch.zeros_like(weight)
    for sample, rows in _blocks(query, key):
        hidden, db = _hidden(query[sample, rows], key[sample]), grad[sample, :, rows].flatten(1)
        of_weight.addmm_(db, hidden.flatten(0, 1))
        g = _buffer("gradient", hidden.shape, hidden)
        torch.mm(db.T, weight, out=g.flatten(0, 1))
        torch.ops.aten.threshold_backward.grad_input(g, hidden, 0, grad_input=g)
        of_query[sample, rows] = g.sum(dim=1)
        of_key[sample] += g.sum(dim=0)
    return of_query, of_key, of_weight


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=contiguous),
        torch.empty_like(key, memory_format=contiguous),
        torch.empty_like(weight),
    )


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[int, slice]]:
    """Some queries of a sample at a time."""
    at_once = max(1, HIDDEN_HELD // (key.shape[1] * key.shape[2]))
    for sample in range(len(query)):
        for row in range(0, query.shape[1], at_once):
            yield sample, slice(row, min(row + at_once, query.shape[1]))


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
        buffers[place] = torch.empty(numbers, dtype=like.dtype, device=like.device)
    return buffers[place][:numbers].view(size)
