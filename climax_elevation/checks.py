"""Arguments that are of their kind and in their range, or one sentence that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from climax_elevation.errors import InputError

LARGEST = 3.4028234663852886e38  # of float32, in which weights are
SMALLEST = 1.1754943508222875e-38  # above 0, of the same
MOST = 2**63 - 1


def finite(name: str, value: float) -> float:
    """`value` as a float; InputError unless it is a finite number, in float32 too."""
    known = not isinstance(value, bool) and isinstance(value, int | float)
    if not known or not abs(value) <= LARGEST:
        of_float32 = " of float32, up to 3.4e38" if known and LARGEST < abs(value) < float("inf") else ""
        raise InputError(f"{name} is a finite number{of_float32}, not {value!r}")
    return float(value)


def positive(name: str, value: float, unit: str) -> float:
    """`value` as a float; InputError unless it is a finite number above 0, in float32 too."""
    if not finite(name, value) >= SMALLEST:
        raise InputError(f"{name} is a number of {unit} above 0, not {value!r}")
    return float(value)


def not_below_zero(name: str, value: float) -> float:
    """`value` as a float; InputError unless it is a finite number of 0 or more."""
    if finite(name, value) < 0:
        raise InputError(f"{name} is 0 or more, not {value!r}")
    return float(value)


def share(name: str, value: float) -> float:
    """`value` as a float; InputError unless it is from 0 to below 1."""
    if not 0 <= finite(name, value) < 1:
        raise InputError(f"{name} is a share from 0 to below 1, not {value!r}")
    return float(value)


def learning_rate(name: str, value: float) -> float:
    """`value` as a float; InputError unless it is a finite number above 0."""
    if finite(name, value) <= 0:
        raise InputError(f"{name} is above 0, not {value!r}")
    return float(value)


def count(name: str, value: int) -> int:
    """`value`; InputError unless it is a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is a whole number of 1 or more, not {value!r}")
    if value > MOST:
        raise InputError(f"{name} is a whole number of 64 bits, up to {MOST}, not {value!r}")
    return value


def true_or_false(name: str, value: bool) -> bool:
    """`value`; InputError unless it is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is true or false, not {value!r}")
    return value


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """`value`; InputError unless it is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(map(repr, choices))}")
    return value


def text(name: str, value: str) -> str:
    """`value`; InputError unless it is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{name} is a text, and not empty, not {value!r}")
    return value


def acting(given: Mapping[str, Any], usual: Mapping[str, Any], acts_with: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError for an option that was set, and that nothing reads with the values of the others.

    Args:
        given: All options by name, each of its kind.
        usual: Their defaults; what is the default was not set.
        acts_with: For an option that does not always act, the values of others with which it does.
    """
    for name, wanted in acts_with.items():
        for other, value in wanted.items():
            if given[name] != usual[name] and given[other] != value:
                raise InputError(
                    f"{name} has an effect with {other}: {_as_yaml(value)} alone, and {other} is "
                    f"{_as_yaml(given[other])}: leave {name} out, or set {other}: {_as_yaml(value)}"
                )


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
