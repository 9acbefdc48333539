"""Biases by name: the plugin's own, a user's, and other packages' through entry points."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, TypeVar

from climax_elevation.errors import InputError

if TYPE_CHECKING:
    from climax_elevation.bias.base import ElevationBias

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "climax_elevation.biases"

BiasClass = TypeVar("BiasClass", bound="type[ElevationBias]")
_biases: dict[str, type[ElevationBias]] = {}


def register_bias(name: str) -> Callable[[BiasClass], BiasClass]:
    """Class decorator: make an `ElevationBias` known as `name`.

    Raises:
        InputError: If the name is taken, or is not made of letters, digits and underscores, or what is decorated is
            no `ElevationBias`.
    """

    def register(bias_class: BiasClass) -> BiasClass:
        from climax_elevation.bias.base import ElevationBias

        if not (isinstance(bias_class, type) and issubclass(bias_class, ElevationBias)):
            raise InputError(f"a bias is a class that is made from climax_elevation.ElevationBias, not {bias_class!r}")
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
    """Names of all biases, sorted; one of another package that cannot be loaded is told of in the log, once."""
    names, broken = all_biases()
    for sentence in broken:
        _warn(sentence)
    return names


def all_biases() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of all biases, sorted, and a sentence for each of other packages that cannot be loaded."""
    failures = [_failure(entry_point) for entry_point in entry_points(group=ENTRY_POINT_GROUP)]
    return tuple(sorted(_biases)), tuple(filter(None, failures))


def bias_class(name: str) -> type[ElevationBias]:
    """The class registered as `name`; of other packages', only that one is loaded.

    Raises:
        InputError: If it cannot be loaded, or there is none; then the message lists those there are.
    """
    if name not in _biases:
        for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=name):
            failure = _failure(entry_point)
            if failure is not None:
                raise InputError(failure)
    if name not in _biases:
        names = available_biases()  # a package's module may register more than it declares
        if name not in _biases:
            raise InputError(f"unknown bias {name!r}; available: {', '.join(repr(known) for known in names)}")
    return _biases[name]


@cache
def _failure(entry_point: EntryPoint) -> str | None:
    """Register what another package declares, once; why it cannot be, or None."""
    declared, before = f"the bias {entry_point.name!r} of {entry_point.value!r}", dict(_biases)
    rivals = {other.value for other in entry_points(group=ENTRY_POINT_GROUP, name=entry_point.name)}
    rivals.discard(entry_point.value)
    if rivals:
        return f"{declared} is declared as {min(rivals)!r} too: remove one of the packages"
    try:
        loaded = entry_point.load()
        if _biases.get(entry_point.name) is not loaded:  # its module may have registered it itself
            register_bias(entry_point.name)(loaded)
    except (Exception, SystemExit) as error:  # another's module may raise anything
        for half_done in set(_biases) - set(before):
            del _biases[half_done]
        why = " ".join(f"{'' if isinstance(error, InputError) else f'{type(error).__name__}: '}{error}".split())
        return f"{declared} cannot be loaded ({why}): mend or remove the package that declares it"
    return None


@cache
def _warn(sentence: str) -> None:
    logger.warning(sentence)
