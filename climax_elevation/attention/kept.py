"""At inference over one ground: a bias that is computed once, where that is asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from climax_elevation.attention.columns import has_columns
from climax_elevation.attention.engine import Engine
from climax_elevation.bias.as_data import tensors_of
from climax_elevation.bias.base import ElevationBias, Tensors, leaves, literal
from climax_elevation.transforms import transforming


class GivenBias(ElevationBias):
    """A bias whose values `[1, heads or 1, L, L]` are its input."""

    def __init__(self, numbers_a_pair: int) -> None:
        super().__init__()
        self.numbers_a_pair = numbers_a_pair  # by which tiles are of the size that they had

    def features(self, values: Tensor) -> Tensors:
        return (values,)

    def tile(self, features: Tensors, rows: slice, columns: slice) -> tuple[Tensors, Tensors]:
        return (features[0][:, :, rows, columns],), ()

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        return query[0]


class _Computed(NamedTuple):
    """Values, and all that they were computed from."""

    settings: list[Any]
    tensors: list[Tensor]
    values: Tensor


class KeptBias:
    """The values of one bias over one ground, used again as long as all that they depend on is the same.

    They are computed as the engine computes them, and handed to the same engine: attention is, bit for bit, what it is
    without. What is kept is not copied with a model, nor saved.
    """

    def __init__(self) -> None:
        self._computed: _Computed | None = None

    def __reduce__(self) -> tuple[type[KeptBias], tuple[()]]:
        return KeptBias, ()

    def given(self, bias: ElevationBias, inputs: Tensors, engine: Engine) -> tuple[ElevationBias, Tensors]:
        """What to give the engine: the values, as a bias's; where nothing can be kept, the same bias and inputs.

        Nothing is kept where gradients are recorded, in compiled programs and under torch.func, of samples with
        different ground or wind, of biases that have exact factors, or a part that has, which need no matrix, and of
        biases with attributes that are no plain data, whose change would not be noticed.

        Args:
            bias: Whose values they are.
            inputs: The arguments of its `forward`.
            engine: That is going to be used.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or transforming() or has_columns(bias):
            return bias, inputs
        given = list(leaves(inputs))
        settings = _settings(bias)
        if engine.values is None or any(len(tensor) > 1 for tensor in given) or None in settings:
            return bias, inputs
        settings += [engine.attend, type(bias)]
        tensors = [*given, *tensors_of(bias).values()]
        known = self._computed
        if known is None or known.settings != settings or not _equal(known.tensors, tensors):
            self._computed = None  # before there are others
            values = engine.values(bias, inputs)
            self._computed = known = _Computed(settings, [tensor.clone() for tensor in tensors], values)
        return GivenBias(bias.numbers_a_pair), (known.values,)


def _settings(bias: nn.Module) -> list[Any]:
    """The attributes of the bias and its modules that are no tensors, written out; None for one that cannot be."""
    own = vars(nn.Module()).keys() | {"settings", "made_with"}
    return [
        value if value is None else (place, name, value)
        for place, module in bias.named_modules()
        for name, value in ((name, literal(value, lasting=True)) for name, value in vars(module).items())
        if name not in own and name not in getattr(module, "unread", ())
    ]


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(some, others, strict=True)
    )
