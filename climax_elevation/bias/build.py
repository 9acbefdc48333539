"""Sums of biases, and making a bias from its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from climax_elevation.bias.base import ElevationBias, Tensors
from climax_elevation.bias.registry import bias_class
from climax_elevation.errors import InputError

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

HOST_ARGUMENTS = ("num_heads", "grid")  # what the host decides, not the user


class SumBias(ElevationBias):
    """Several biases at once: b = b_1 + b_2 + ..., each with its own parameters.

    Args:
        parts: By name, which becomes a part of the parameters' keys.
    """

    def __init__(self, parts: Mapping[str, ElevationBias]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._names = tuple(parts)

    @property
    def parts(self) -> tuple[ElevationBias, ...]:
        """The biases, in the order in which they were named."""
        return tuple(getattr(self, name) for name in self._names)

    def named_parts(self) -> tuple[tuple[str, ElevationBias], ...]:
        """The biases by name, in the order in which they were named."""
        return tuple(zip(self._names, self.parts, strict=True))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def reads(self) -> frozenset[str] | None:  # type: ignore[override]
        known = [part.reads for part in self.parts if part.reads is not None]
        return frozenset().union(*known) if len(known) == len(self.parts) else None

    def prepare(self, terrain: Terrain, cache_dir: Path | None = None) -> None:
        for part in self.parts:
            part.prepare(terrain, cache_dir)

    def inputs(self, terrain: Terrain) -> Tensors:
        return tuple(part.inputs(terrain) for part in self.parts)

    def reordered(self, inputs: Tensors, order: Tensor) -> Tensors:
        return tuple(part.reordered(given, order) for part, given in zip(self.parts, inputs, strict=True))

    def features(self, *inputs: Tensors) -> Tensors:
        return tuple(part.features(*given) for part, given in zip(self.parts, inputs, strict=True))

    @property
    def numbers_a_pair(self) -> int:  # type: ignore[override]
        return max(part.numbers_a_pair for part in self.parts)

    def tile(self, features: Tensors, rows: slice, columns: slice) -> tuple[Tensors, Tensors]:
        sides = [part.tile(own, rows, columns) for part, own in zip(self.parts, features, strict=True)]
        return tuple(query for query, _ in sides), tuple(key for _, key in sides)

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        first, *others = (part.pairwise(q, k) for part, q, k in zip(self.parts, query, key, strict=True))
        return sum(others, start=first)

    @property
    def has_factors(self) -> bool:
        return super().has_factors and all(part.has_factors for part in self.parts)

    def factors(self, *inputs: Tensors) -> tuple[Tensor, Tensor] | None:
        """All parts' factors side by side, where all have some."""
        pairs = [part.factors(*given) for part, given in zip(self.parts, inputs, strict=True)]
        known = [pair for pair in pairs if pair is not None]
        if len(known) < len(pairs):
            return None
        return side_by_side([f for f, _ in known]), side_by_side([g for _, g in known])


def side_by_side(factors: list[Tensor]) -> Tensor:
    """Factors `[B or 1, heads or 1, L, r]` of a sum's parts, as those of the sum."""
    leading = torch.broadcast_shapes(*(factor.shape[:3] for factor in factors))
    return torch.cat([factor.expand(*leading, -1) for factor in factors], dim=-1)


def build_bias(name: str, *, num_heads: int, grid: tuple[int, int] | None = None, **args: Any) -> ElevationBias:
    """Make the bias registered as `name`, or a sum of several.

    Args:
        name: One of `available_biases()`, or two or more of them with "+" between.
        num_heads: The host block's heads; passed on when the bias's constructor names it.
        grid: Rows and columns of the host's patches; likewise.
        args: The bias's own arguments; for a sum, a dictionary of arguments for each part.

    Raises:
        InputError: For an unknown name or argument; the message lists the valid ones.
    """
    check_arguments(name, args)
    if "+" in name:
        parts = _part_names(name)
        return SumBias(
            {part: build_bias(part, num_heads=num_heads, grid=grid, **(args.get(part) or {})) for part in parts}
        )
    from_host = {"num_heads": num_heads, "grid": grid}
    for argument in HOST_ARGUMENTS:
        if argument in inspect.signature(bias_class(name)).parameters:
            if from_host[argument] is None:
                raise InputError(
                    f"the bias {name!r} needs {argument}: give build_bias(..., {argument}=(rows, columns))"
                )
            args[argument] = from_host[argument]
    return bias_class(name)(**args)


def bias_arguments(name: str) -> tuple[str, ...]:
    """The keyword arguments of bias `name`, without those that the host decides; for a sum, its parts' names."""
    if "+" in name:
        return _part_names(name)
    parameters = inspect.signature(bias_class(name)).parameters
    return tuple(argument for argument in parameters if argument not in HOST_ARGUMENTS)


def check_arguments(name: str, args: Mapping[str, Any], shared: Iterable[str] = ()) -> None:
    """Raise InputError unless `args` are arguments of bias `name`, or among `shared`.

    Args:
        name: A bias's name, or several with "+" between.
        args: By name; for a sum, a dictionary for each part that has any.
        shared: Further names that are valid beside them.
    """
    valid = (*shared, *bias_arguments(name))
    for argument in args:
        if argument not in valid:
            place = f"; for a part of a sum, under its name: {{{_part_names(name)[0]}: {{...}}}}" if "+" in name else ""
            raise InputError(
                f"unknown argument {argument!r} for bias {name!r}; valid: {', '.join(valid) or 'none'}{place}"
            )
    if "+" in name:
        for part in _part_names(name):
            own = args.get(part)
            if own is not None and not isinstance(own, Mapping):
                raise InputError(f"the arguments of {part!r} in {name!r} are a dictionary, not {own!r}")
            check_arguments(part, own or {})


def _part_names(name: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in name.split("+"))
    for part in parts:
        bias_class(part)
    if len(set(parts)) < len(parts):
        raise InputError(f"a sum names each bias once, not {name!r}")
    return parts
