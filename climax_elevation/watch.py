"""Numbers of every batch, judged without waiting for them.

A program for a GPU runs ahead of it, and looking at a number would make it wait. So what is to be judged is reduced to
a few numbers on the device, copied from there behind whatever it is doing, and judged once they have arrived: on CPUs
at once, elsewhere at the next look, about a step later. In compiled and exported programs a custom operator does it.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from climax_elevation.errors import InputError
from climax_elevation.transforms import tracing, transforming


class Judge(NamedTuple):
    """A function of a list of numbers and of what the call gave besides; raises InputError where they are refused.

    Attributes:
        name: By which compiled programs know it.
        decide: The function.
    """

    name: str
    decide: Callable[..., None]


_judges: dict[str, Judge] = {}


class _Arriving(NamedTuple):
    """Numbers on their way from a device."""

    numbers: Tensor
    has_arrived: Callable[[], bool]
    judge: Judge
    context: tuple[Any, ...]


_arriving: deque[_Arriving] = deque()


def judge(function: Callable[..., None]) -> Judge:
    """Make a function at a module's top level a `Judge`."""
    name = f"{function.__module__}.{function.__qualname__}"
    return _judges.setdefault(name, Judge(name, function))


def judged(values: Tensor, numbers: Tensor, by: Judge, *context: str | int) -> Tensor:
    """`values`, whose `numbers` are judged: `by.decide(numbers.tolist(), *context)`.

    Args:
        values: What is gone on with; in a compiled program the judgement hangs on it.
        numbers: A few numbers `[n]`, computed from what is judged.
        by: Raises InputError where they are refused.
        context: What else it is told, for messages; plain data.

    Raises:
        InputError: Now, or where numbers are not on the CPU, for those of an earlier call.
    """
    if transforming():
        return values
    if tracing(values):
        return _operator(values, numbers.detach(), by.name, repr(context))
    _look(numbers.detach(), by, context)
    return values


def settle() -> None:
    """Wait for all numbers that are still on their way, and judge them."""
    while _arriving:
        if not _arriving[0].has_arrived():
            torch.cuda.synchronize()
        _decide_first()


def _look(numbers: Tensor, by: Judge, context: tuple[Any, ...]) -> None:
    if numbers.is_meta or (numbers.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if _on_host(numbers):
        by.decide(numbers.tolist(), *context)
        return
    _arriving.append(_Arriving(*_sent(numbers), by, context))
    while _arriving and _arriving[0].has_arrived():
        _decide_first()


def _decide_first() -> None:
    first = _arriving.popleft()
    try:
        first.judge.decide(first.numbers.tolist(), *first.context)
    except InputError:
        _arriving.clear()  # the rest is of the run that ends here, and must not end the next one
        raise


def _on_host(numbers: Tensor) -> bool:
    return numbers.device.type == "cpu"


def _sent(numbers: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """A copy on the host that the device fills when it comes to it, and whether it has."""
    if numbers.device.type != "cuda":
        return numbers.cpu(), lambda: True
    here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    here.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return here, event.query


@torch.library.custom_op(
    "climax_elevation::judged",
    mutates_args=(),
    schema="(Tensor values, Tensor numbers, str by, str context) -> Tensor",
)
def _operator(values: Tensor, numbers: Tensor, by: str, context: str) -> Tensor:
    _look(numbers, _judges[by], ast.literal_eval(context))
    return values.clone()


@_operator.register_fake
def _(values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values)


_operator.register_autograd(lambda _, gradient: (gradient, None, None, None))
