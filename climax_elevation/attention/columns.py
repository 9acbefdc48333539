"""Biases of exact low rank, as more columns of queries and keys: then no engine has to compute them pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from climax_elevation.bias.base import ElevationBias, Gradients, Pullback, Tensors
from climax_elevation.bias.build import SumBias


def with_columns(q: Tensor, k: Tensor, factors: tuple[Tensor, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product is scale * q k^T + f g^T.

    Args:
        q, k: `[B, H, L, d]`.
        factors: f and g, `[B or 1, H or 1, L, r]`.
        scale: Of their product.

    Returns:
        `[B, H, L, d + r]` each.
    """
    f, g = (factor.to(q.dtype).expand(*q.shape[:3], -1) for factor in factors)
    return torch.cat([scale * q, f], dim=-1), torch.cat([k, g], dim=-1)


class Apart(NamedTuple):
    """A bias as the sum of two.

    Attributes:
        factors: Of the parts that have some, as `ElevationBias.factors` has them; None where no part has.
        rest: The sum of the others; zeros where there are none.
        inputs: Of those.
    """

    factors: tuple[Tensor, Tensor] | None
    rest: ElevationBias
    inputs: Tensors


def has_columns(bias: ElevationBias) -> bool:
    """Whether `apart` finds factors."""
    return bias.has_factors or (type(bias) is SumBias and any(part.has_factors for part in bias.parts))


def apart(bias: ElevationBias, inputs: Tensors, like: Tensor) -> Apart:
    """What of a bias is of exact low rank, and what is not.

    Args:
        bias: Any.
        inputs: The arguments of its `forward`.
        like: Queries, `[B, H, L, d]`.
    """
    if bias.has_factors:
        return Apart(bias.factors(*inputs), NOTHING, (like.new_zeros(1, like.shape[2]),))
    if not has_columns(bias):
        return Apart(None, bias, inputs)
    assert isinstance(bias, SumBias)
    given = dict(zip(dict(bias.named_parts()), inputs, strict=True))
    low, others = (
        {name: part for name, part in bias.named_parts() if part.has_factors is wanted} for wanted in (True, False)
    )
    factors = SumBias(low).factors(*(given[name] for name in low))
    return Apart(factors, SumBias(others), tuple(given[name] for name in others))


class NoBias(ElevationBias):
    """b[i, j] = 0, of any tensor `[B or 1, L]`."""

    def features(self, token: Tensor) -> Tensors:
        return (token,)

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        return query[0].new_zeros(len(query[0]), 1, query[0].shape[1], key[0].shape[1])

    def pullback(
        self, query: Tensors, key: Tensors, wanted: Sequence[int], out: Tensor | None = None
    ) -> tuple[Tensor, Pullback]:
        zeros = self.pairwise(query, key) if out is None else out.zero_()
        nothing: list[Tensor | None] = [None] * len(wanted)
        gradients: Gradients = {}, nothing, nothing
        return zeros, lambda _: gradients


NOTHING = NoBias()
