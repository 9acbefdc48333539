"""Biases by name: the plugin's own, a user's, and other packages' through entry points."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from climax_elevation.errors import InputError

if TYPE_CHECKING:
    from climax_elevation.bias.base import ElevationBias

ENTRY_POINT_GROUP = "climax_elevation.biases"

BiasClass = TypeVar("BiasClass", bound="type[ElevationBias]")
_biases: dict[str, type[ElevationBias]] = {}


def register_bias(name: str) -> Callable[[BiasClass], BiasClass]:
    """Class decorator: make an `ElevationBias` known as `name`.

    Raises:
        InputError: If the name is taken, or is not made of letters, digits and underscores.
    """

    def register(bias_class: BiasClass) -> BiasClass:
        if not name.isidentifier():
            raise InputError(f"a bias's name is made of letters, digits and underscores, not {name!r}")
        if name in _biases:
            raise InputError(
                f"a bias named {name!r} is registered already ({_biases[name].__module__}."
                f"{_biases[name].__qualname__}); choose another name"
            )
        _biases[name] = bias_class
        bias_class.registered_name = name
        return bias_class

    return register


def available_biases() -> tuple[str, ...]:
    """Names of all registered biases, sorted."""
    _load_entry_points()
    return tuple(sorted(_biases))


def bias_class(name: str) -> type[ElevationBias]:
    """The class registered as `name`.

    Raises:
        InputError: If there is none; the message lists those there are.
    """
    names = available_biases()
    if name not in _biases:
        raise InputError(f"unknown bias {name!r}; available: {', '.join(repr(known) for known in names)}")
    return _biases[name]


@cache
def _load_entry_points() -> None:
    """Register what other packages declare, once; the plugin's own biases register when it is imported."""
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = entry_point.load()
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"the bias {entry_point.name!r} of {entry_point.value!r} cannot be loaded ({error}): mend or remove "
                "the package that declares it"
            ) from error
        if _biases.get(entry_point.name) is not loaded:  # its module may have registered it itself
            register_bias(entry_point.name)(loaded)
