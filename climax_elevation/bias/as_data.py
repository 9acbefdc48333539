"""A bias as data and tensors, which is all that an operator of torch, or an exported program, can be given.

What a bias computes from features depends on its class, on its constructor's arguments, on its settings, and on its
parameters and buffers. The first three are written down as a text; from it the same bias is made, without values,
wherever the operator runs, and kept there. The last are tensors, which the operator is given.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from climax_elevation.bias.base import ElevationBias
from climax_elevation.bias.build import SumBias
from climax_elevation.bias.registry import bias_class
from climax_elevation.errors import InputError

SUM = "+"


def tensors_of(bias: ElevationBias) -> dict[str, Tensor]:
    """Its parameters, and then its buffers, by name."""
    return {**dict(bias.named_parameters()), **dict(bias.named_buffers())}


def why_no_data(bias: ElevationBias) -> str:
    """Why `described` refuses this bias, or nothing."""
    if type(bias) is SumBias:
        return next(filter(None, map(why_no_data, bias.parts)), "")
    if type(bias).registered_name is None:
        return f"{type(bias).__name__} is not registered: decorate it with @register_bias"
    for name, value in (*bias.made_with.items(), *_all_settings(bias)):
        if value is None:
            return (
                f"{name!r} of {type(bias).__name__} is no number, word or tuple of such: make it a buffer, or name it "
                "in `unread` if features and pairwise do not read it"
            )
    return ""


def described(bias: ElevationBias) -> str:
    """All that its function of features depends on besides its tensors, as a Python literal.

    Raises:
        InputError: If the class is not registered, or a setting is no plain data.
    """
    reason = why_no_data(bias)
    if reason:
        raise InputError(f"compiled and exported programs know a bias by its name and settings, and {reason}")
    return f"({_written(bias)}, {tuple(tensors_of(bias))!r})"


def given_values(description: str, tensors: Sequence[Tensor]) -> ElevationBias:
    """The bias that was described, with these parameters and buffers.

    Raises:
        InputError: If here its name is unknown, or stands for something else.
    """
    empty, names = _made(description)
    return with_tensors(empty, dict(zip(names, tensors, strict=True)))


def with_tensors(bias: ElevationBias, tensors: Mapping[str, Tensor]) -> ElevationBias:
    """The same bias with other parameters and buffers, in modules of its own: `bias` stays as it is."""
    other = _twin(bias)
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = other.get_submodule(path)
        place = module._parameters if leaf in module._parameters else module._buffers
        place[leaf] = tensor  # type: ignore[assignment]
    return other  # type: ignore[return-value]


def _twin(module: nn.Module) -> nn.Module:
    other = object.__new__(type(module))  # a parametrised module refuses to be copied
    other.__dict__ = module.__dict__.copy()
    other._parameters, other._buffers = module._parameters.copy(), module._buffers.copy()
    other._modules = {name: child and _twin(child) for name, child in module._modules.items()}
    return other


def _written(bias: ElevationBias) -> str:
    """Name, constructor's arguments, and the settings of the bias and of its parts; of a sum, what its parts have."""
    if type(bias) is SumBias:
        parts = ", ".join([f"({name!r}, {_written(part)})" for name, part in bias.named_parts()])
        return f"({SUM!r}, [{parts}])"
    arguments = ", ".join([f"{name!r}: {value}" for name, value in bias.made_with.items()])
    return f"({type(bias).registered_name!r}, {{{arguments}}}, {_settings(bias)})"


def _settings(bias: ElevationBias) -> str:
    own = ", ".join([f"({name!r}, {value})" for name, value in bias.settings])
    parts = ", ".join([f"({name!r}, {_settings(part)})" for name, part in _parts(bias)])
    return f"([{own}], [{parts}])"


def _all_settings(bias: ElevationBias) -> list[tuple[str, str | None]]:
    return [*bias.settings, *(setting for _, part in _parts(bias) for setting in _all_settings(part))]


def _parts(bias: ElevationBias) -> list[tuple[str, ElevationBias]]:
    return [(name, part) for name, part in bias.named_children() if isinstance(part, ElevationBias)]


@lru_cache(maxsize=64)
def _made(description: str) -> tuple[ElevationBias, tuple[str, ...]]:
    written, names = ast.literal_eval(description)
    with torch.random.fork_rng(devices=[]):  # the values that it draws are not used
        bias = _read(written)
    found = tuple(tensors_of(bias))
    if found != names:
        raise InputError(
            f"the program was made with a bias that has {', '.join(names)}, and here it has {', '.join(found)}: "
            "use the version of the package that it was made with"
        )
    return bias.requires_grad_(False), names


def _read(written: tuple[Any, ...]) -> ElevationBias:
    if written[0] == SUM:
        return SumBias({name: _read(part) for name, part in written[1]})
    name, arguments, settings = written
    bias = bias_class(name)(**arguments)
    _set(bias, settings)
    return bias


def _set(bias: ElevationBias, settings: tuple[Any, ...]) -> None:
    own, parts = settings
    for name, value in own:
        setattr(bias, name, value)
    for name, of_part in parts:
        _set(bias.get_submodule(name), of_part)  # type: ignore[arg-type]
