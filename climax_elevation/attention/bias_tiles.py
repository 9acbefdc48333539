"""The bias of tiles of queries and keys, for engines that never hold all of it, and its derivative."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from climax_elevation.bias.base import ElevationBias, Gradients, Pullback, Tensors, leaves, map_tensors

SIDE = 512  # queries of a tile
WIDTH = 512  # keys of a tile, at the most
TILE_HELD = 1 << 21  # numbers that computing a tile of the bias holds: 8 MB


class Tiles:
    """The bias of one sample, a tile of queries and keys at a time.

    Args:
        bias: Whose `pairwise` gives the tiles.
        features: Of one sample, `[1, L, ...]`.
    """

    def __init__(self, bias: ElevationBias, features: Tensors) -> None:
        self.bias, self.features = bias, features
        first = slice(0, 1)
        value = bias.pairwise(*bias.tile(features, first, first))[0]
        self.heads, self.dtype = value.shape[0], value.dtype  # those that it tells apart; 1 where all share it
        pairs = max(1, TILE_HELD // (SIDE * bias.numbers_a_pair))
        self.width = min(WIDTH, 1 << (pairs.bit_length() - 1))  # a power of two, which divides the usual lengths

    def of(self, heads: slice) -> slice:
        """Where the values for some heads are: all share the same, or each has its own."""
        return heads if self.heads > 1 else slice(None)

    def memory(self, like: Tensor) -> Tensor:
        """For the values of any tile: what is new with every tile costs more than what is computed in it."""
        return like.new_empty(self.heads * SIDE * self.width, dtype=self.dtype)

    def values(self, rows: slice, columns: slice, memory: Tensor) -> Tensor:
        """b of the tile, `[heads or 1, rows, columns]`, perhaps in that memory."""
        sides = self.bias.tile(self.features, rows, columns)
        by_hand = self.bias.pullback(*sides, (), self._place(rows, columns, memory))
        return (self.bias.pairwise(*sides) if by_hand is None else by_hand[0])[0]

    def differentiable(
        self, rows: slice, columns: slice, memory: Tensor, gradient: Gradient
    ) -> tuple[Tensor, Pullback]:
        """b of the tile, and what gives the gradients of what `gradient` sums from that of b."""
        query, key = self.bias.tile(self.features, rows, columns)
        by_hand = None
        if gradient.known:
            by_hand = self.bias.pullback(query, key, gradient.indices, self._place(rows, columns, memory))
        if by_hand is None:
            return self._by_machine(query, key, gradient)
        b, pullback = by_hand
        return b[0], lambda db: pullback(db[None])

    def _place(self, rows: slice, columns: slice, memory: Tensor) -> Tensor:
        size = (1, self.heads, rows.stop - rows.start, columns.stop - columns.start)
        return memory[: math.prod(size)].view(size)

    def _by_machine(self, query: Tensors, key: Tensors, gradient: Gradient) -> tuple[Tensor, Pullback]:
        pairwise = _Pairwise(self.bias)

        def values(learned: dict[str, Tensor], of_query: list[Tensor], of_key: list[Tensor]) -> Tensor:
            parameters = {f"bias.{name}": parameter for name, parameter in learned.items()}
            sides = (gradient.replaced(query, of_query), gradient.replaced(key, of_key))
            return functional_call(pairwise, parameters, sides)[0]

        parameters = {name: parameter.detach() for name, parameter in gradient.learned.items()}
        return vjp(values, parameters, gradient.wanted(query), gradient.wanted(key))  # type: ignore[return-value]


class _Pairwise(nn.Module):
    """`pairwise` as a module's forward, which is what `functional_call` replaces the parameters of."""

    def __init__(self, bias: ElevationBias) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, query: Tensors, key: Tensors) -> Tensor:
        return self.bias.pairwise(query, key)


class Gradient:
    """Sums of gradients: of the parameters that learn, and of the features that want one.

    Args:
        bias: Whose parameters they are.
        features: Of one sample, `[1, L, ...]`.
        learned: Names of the parameters whose gradient is wanted.
        wanted: Indices of those features whose gradient is wanted.
    """

    def __init__(
        self, bias: ElevationBias, features: Sequence[Tensor], learned: Sequence[str], wanted: Sequence[int]
    ) -> None:
        everything = dict(bias.named_parameters())
        self.known = everything.keys() <= bias.differentiated  # by the bias's `pullback`
        self.learned = {name: everything[name] for name in learned}
        self.parameters = {name: torch.zeros_like(parameter) for name, parameter in self.learned.items()}
        self.indices = wanted
        self.features = [torch.zeros_like(f) if index in wanted else None for index, f in enumerate(features)]

    def wanted(self, side: Tensors) -> list[Tensor]:
        """Those of a tile's features that want a gradient."""
        return [tensor for tensor, total in zip(leaves(side), self.features, strict=True) if total is not None]

    def replaced(self, side: Tensors, by: Sequence[Tensor]) -> Tensors:
        """A tile's features, with those that want a gradient replaced."""
        following, totals = iter(by), iter(self.features)
        return map_tensors(lambda tensor: tensor if next(totals) is None else next(following), side)

    def add(self, found: Gradients, rows: slice, columns: slice) -> None:
        """Add a tile's gradients."""
        for name, part in found[0].items():
            if name in self.parameters:
                self.parameters[name] += part
        wanted = [total for total in self.features if total is not None]
        for place, side in ((rows, found[1]), (columns, found[2])):
            for total, of_side in zip(wanted, side, strict=True):
                if of_side is not None:
                    total[:, place] += of_side
