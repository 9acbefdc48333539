"""What an engine of attention is, and what one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from climax_elevation.bias.base import ElevationBias, Tensors


class Request(NamedTuple):
    """By what "auto" chooses.

    Attributes:
        bias: To be added to the logits.
        tokens: Length of the sequence.
        device: "cpu", "cuda" or another of torch's.
        dtype: Of queries, keys and values.
        dropout_p: Of attention weights.
    """

    bias: ElevationBias
    tokens: int
    device: str
    dtype: torch.dtype
    dropout_p: float


@dataclass(frozen=True)
class Engine:
    """A way to compute attention with a bias. Each module in `attention.engines` has one, as ENGINE.

    Attributes:
        attend: softmax(scale * q k^T + b) v, of `(q, k, v, bias, inputs, scale, dropout_p)`.
        rank: Its place among those that "auto" chooses from, the highest of which is taken; 0: never by itself.
        values: b over one ground, of `(bias, inputs)`, as this engine computes it, so that it may be kept; None: it
            takes no values.
    """

    attend: Callable[[Tensor, Tensor, Tensor, ElevationBias, Tensors, float, float], Tensor]
    rank: Callable[[Request], int] = lambda _: 0
    values: Callable[[ElevationBias, Tensors], Tensor] | None = None


def whole(bias: ElevationBias, inputs: Tensors) -> Tensor:
    """The dense bias, as its definition has it."""
    return bias(*inputs)
