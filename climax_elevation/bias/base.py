"""What every terrain bias is: a function of token pairs, added to attention logits before softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from climax_elevation.terrain import Terrain

Tensors: TypeAlias = tuple[Any, ...]
"""Tensors, in tuples that may be nested: a sum of biases has a tuple a part."""

Gradients: TypeAlias = tuple[dict[str, Tensor], list[Tensor | None], list[Tensor | None]]
"""Of parameters, by name, and of some features of queries and of keys; None is for zeros."""

Pullback: TypeAlias = Callable[[Tensor], Gradients]

_handles = count()
living: WeakValueDictionary[int, ElevationBias] = WeakValueDictionary()


class ElevationBias(nn.Module):
    """An additive, real-valued attention bias b[i, j]; query i reads key j.

        attention = softmax(q k^T / sqrt(d) + b) v

    A subclass says what it takes from a `Terrain` (`needs`, `inputs`), what can be done once a token
    (`features`) and how two tokens compare (`pairwise`). Every attention engine works from these.
    The values are float32, or the module's own type where that is wider.
    """

    needs: frozenset[str] = frozenset()
    """Optional fields of `Terrain` without which `inputs` cannot be made, such as `"speed"`."""

    numbers_a_pair: int = 8
    """About how many numbers `pairwise` holds for each pair at once, by which engines choose their tiles."""

    handle: int
    """A number by which operators, which take no modules, find this one in `living`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "pairwise" in vars(cls) and "pullback" not in vars(cls):
            cls.pullback = ElevationBias.pullback  # type: ignore[method-assign]  # the inherited one is of another pairwise

    def __init__(self) -> None:
        super().__init__()
        self._take_handle()

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, which needs a handle of its own
        super().__setstate__(state)
        self._take_handle()

    def _take_handle(self) -> None:
        self.handle = next(_handles)
        living[self.handle] = self

    def prepare(self, terrain: Terrain, cache_dir: Path | None = None) -> None:
        """Check, and compute, what depends on the grid and its ground alone: once, before the first `inputs`.

        Args:
            terrain: Of all patches of the grid, also where a model looks at a region of them.
            cache_dir: Where what is long to compute may be kept; None: nowhere.
        """

    def inputs(self, terrain: Terrain) -> Tensors:
        """The arguments of `forward`, taken from `terrain`: tensors `[B or 1, L, ...]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define inputs(terrain)")

    def features(self, *inputs: Any) -> Tensors:
        """Whatever can be done once a token: tensors `[B or 1, L, ...]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define features(*inputs)")

    def tile(self, features: Tensors, rows: slice, columns: slice) -> tuple[Tensors, Tensors]:
        """The features of some queries and of some keys, from those of all tokens."""
        return map_tensors(lambda t: t[:, rows], features), map_tensors(lambda t: t[:, columns], features)

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        """Bias of every query with every key, `[B or 1, heads or 1, Lq, Lk]`, from the features of both."""
        raise NotImplementedError(f"{type(self).__name__} does not define pairwise(query, key)")

    def pullback(
        self, query: Tensors, key: Tensors, wanted: Sequence[int], out: Tensor | None = None
    ) -> tuple[Tensor, Pullback] | None:
        """`pairwise`, and what turns the gradient of its values into those of the parameters and of features.

        None, unless a subclass differentiates by hand: then engines do it by machine, which takes longer.

        Args:
            query, key: As of `pairwise`.
            wanted: Which of the features, counted as `leaves` does, have a gradient.
            out: Where the values may be written, rather than to memory that is new.
        """
        return None

    @property
    def has_factors(self) -> bool:
        """Whether `factors` gives some."""
        return type(self).factors is not ElevationBias.factors

    def factors(self, *inputs: Any) -> tuple[Tensor, Tensor] | None:
        """Exact low rank where there is one: `(f, g)`, each `[B or 1, heads or 1, L, r]`.

        b[i, j] = f[i] . g[j] + (anything that depends on i alone, which softmax ignores)
        """
        return None

    def forward(self, *inputs: Any) -> Tensor:
        """The dense bias `[B or 1, heads or 1, L, L]`: the definition every engine is tested against."""
        with torch.autocast(next(leaves(inputs)).device.type, enabled=False):
            features = self.features(*inputs)
            return self.pairwise(features, features)

    def reordered(self, inputs: Tensors, order: Tensor) -> Tensors:
        """The same inputs with the tokens in another order.

        Args:
            inputs: As `self.inputs` gave them.
            order: The token that comes to each place, `[B, L]`.
        """
        return map_tensors(lambda values: take_tokens(values, order), inputs)

    def value_dtype(self) -> torch.dtype:
        """float32, or the parameters' own type where that is wider."""
        dtype = torch.float32
        for parameter in self.parameters():
            dtype = torch.promote_types(dtype, parameter.dtype)
        return dtype


def leaves(tensors: Tensors) -> Iterator[Tensor]:
    """All tensors of a nested tuple, in order."""
    for item in tensors:
        if isinstance(item, tuple):
            yield from leaves(item)
        else:
            yield item


def map_tensors(function: Callable[[Tensor], Tensor], tensors: Tensors) -> Tensors:
    """`function` of every tensor, in the same nesting."""
    return tuple(map_tensors(function, item) if isinstance(item, tuple) else function(item) for item in tensors)


def take_tokens(values: Tensor, order: Tensor) -> Tensor:
    """values[b, order[b, n]] for `[B or 1, L, ...]` values and a `[B, L]` order."""
    batch = torch.arange(len(order), device=order.device)[:, None]
    return values.expand(len(order), *values.shape[1:])[batch, order]
