"""What every terrain bias is: a function of token pairs, added to attention logits before softmax."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from climax_elevation.checks import acting, finite
from climax_elevation.errors import InputError

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

Tensors: TypeAlias = tuple[Any, ...]
"""Tensors, in tuples that may be nested: a sum of biases has a tuple a part."""

Gradients: TypeAlias = tuple[dict[str, Tensor], list[Tensor | None], list[Tensor | None]]
"""Of parameters, by name, and of some features of queries and of keys; None is for zeros."""

Pullback: TypeAlias = Callable[[Tensor], Gradients]

FAST = {"pullback": ("pairwise",), "factors": ("features", "pairwise")}
"""What engines may use instead of the plain methods, and what it has to agree with."""


class ElevationBias(nn.Module):
    """An additive, real-valued attention bias b[i, j]; query i reads key j.

        attention = softmax(q k^T / sqrt(d) + b) v

    A subclass says what it takes from a `Terrain` (`needs`, `inputs`), what can be done once a token
    (`features`) and how two tokens compare (`pairwise`). Every attention engine works from these.
    The values are float32, or the module's own type where that is wider.
    """

    needs: frozenset[str] = frozenset()
    """Optional fields of `Terrain` without which `inputs` cannot be made, such as `"speed"`."""

    reads: frozenset[str] | None = None
    """Optional fields of `Terrain` that `inputs` looks at besides `needs`, where they are there; None: any."""

    acts_with: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    """For an argument of the constructor that does not always act, the values of others with which it does."""

    numbers_a_pair: int = 8
    """About how many numbers `pairwise` holds for each pair at once, by which engines choose their tiles."""

    differentiated: frozenset[str] = frozenset()
    """Names of the parameters that `pullback` knows: where there are others, engines differentiate by machine."""

    unread: frozenset[str] = frozenset({"needs", "reads", "numbers_a_pair"})
    """Attributes that `features` and `pairwise` do not read; all others that are set are their settings."""

    registered_name: str | None = None
    """By which `register_bias` made exactly this class known."""

    settings: tuple[tuple[str, str | None], ...] = ()
    """Attributes that are neither parameters, buffers and modules nor `unread`: name and value, as `literal` has it."""

    made_with: Mapping[str, str | None] = MappingProxyType({})
    """The constructor's arguments, likewise."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__ and name not in self.unread and name != "training":
            known = {**dict(self.settings), name: literal(value, lasting=True)}
            self.__dict__["settings"] = tuple(known.items())

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.registered_name = None
        if "__init__" in vars(cls):
            cls.__init__ = _remembered(cls.__init__, vars(cls).get("acts_with", {}))  # type: ignore[method-assign]
        if cls.forward is not ElevationBias.forward:
            raise InputError(
                f"{cls.__name__} overrides forward, which engines do not call: override features and pairwise"
            )
        for fast, plain in FAST.items():
            if any(_definer(cls, name) < _definer(cls, fast) for name in plain):  # it is of another function
                setattr(cls, fast, getattr(ElevationBias, fast))

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

        None, unless a subclass differentiates by hand: then engines do it by machine, which takes longer. A subclass
        with a `pairwise` of its own does not inherit it.

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

        A subclass with `features` or a `pairwise` of its own does not inherit them.
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {f"{prefix}{name}": parameter for name, parameter in self.named_parameters(recurse=False)}
        incoming = like_parameters(state_dict, own)
        super()._load_from_state_dict(incoming, prefix, *rest)


def scalar(name: str, value: float) -> nn.Parameter:
    """A number that is learned, `[1]`: FSDP2 takes no parameter without a dimension.

    Raises:
        InputError: If `value`, which is called `name`, is no finite number.
    """
    return nn.Parameter(torch.tensor([finite(name, value)]))


def like_parameters(saved: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """`saved` tensors by name; a number without a dimension, as older and published checkpoints have it, gets one.

    Args:
        saved: By name; left as it is.
        parameters: That they are for, by the same names. Where one is `[1]`, a saved `[]` is made so.
    """
    found = dict(saved)
    for name, parameter in parameters.items():
        tensor = found.get(name)
        if isinstance(tensor, Tensor) and tensor.shape == () and parameter.shape == (1,):
            found[name] = _placed(tensor.reshape(1), parameter)
    return found


def _placed(tensor: Tensor, parameter: Any) -> Tensor:
    """On the processes where a parameter is, if FSDP2 has spread it over several."""
    if not hasattr(parameter, "device_mesh") or hasattr(tensor, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def literal(value: Any, lasting: bool = False) -> str | None:
    """The value as a Python literal, if it is plain data: numbers, words, and tuples, lists and dictionaries of such.

    Args:
        value: Anything.
        lasting: Only what cannot be changed in its place, as a list can.
    """
    return repr(value) if _is_plain(value, lasting) else None


def _is_plain(value: Any, lasting: bool) -> bool:
    if isinstance(value, dict | list) and not lasting:
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return all(_is_plain(item, lasting) for item in items)
    if isinstance(value, tuple):
        return all(_is_plain(item, lasting) for item in value)
    return type(value) in (bool, int, str, type(None)) or (type(value) is float and math.isfinite(value))


def _remembered(init: Callable[..., None], acts_with: Mapping[str, Mapping[str, Any]]) -> Callable[..., None]:
    """A constructor that keeps its arguments, from which the same bias is made elsewhere, and wants each to act."""
    signature = inspect.signature(init)
    usual = {name: parameter.default for name, parameter in signature.parameters.items()}

    @functools.wraps(init)
    def keeping(self: ElevationBias, *args: Any, **kwargs: Any) -> None:
        if "made_with" not in self.__dict__:  # else a subclass's constructor has kept its own
            bound = signature.bind(self, *args, **kwargs)
            own = list(bound.arguments.items())[1:]
            self.__dict__["made_with"] = {name: literal(value) for name, value in own}
        init(self, *args, **kwargs)
        if acts_with:  # once each is of its kind
            acting(usual | signature.bind(self, *args, **kwargs).arguments, usual, acts_with)

    return keeping


def _definer(cls: type, name: str) -> int:
    """How far up in the order of inheritance a method is defined; 0: by the class itself."""
    return next(place for place, base in enumerate(cls.__mro__) if name in vars(base))


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
