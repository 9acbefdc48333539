"""Forecasts fed back: what is forecast becomes the next input, and what is not is kept or read on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from climax_elevation.checks import one_of
from climax_elevation.errors import InputError
from climax_elevation.forecast.loaded import LoadedRun
from climax_elevation.forecast.states import STATIC, States, stamp

logger = logging.getLogger(__name__)

OTHERS = ("keep", "source")


def not_forecast(run: LoadedRun) -> list[str]:
    """Inputs that change in time and that the run does not forecast."""
    return [name for name in run.variables if name not in run.out_variables and name not in STATIC]


def check_others(run: LoadedRun, steps: int, others: str | None) -> None:
    """Ask what a second step is to be fed with, where that is not forecast, and say what it is.

    Args:
        run: What is forecast.
        steps: How often.
        others: One of `OTHERS`; None: nothing is said.

    Raises:
        InputError: If it has to be said.
    """
    if others is not None:
        one_of("others", others, OTHERS)
    if steps == 1:
        return
    missing = not_forecast(run)
    if missing and others is None:
        raise InputError(
            f"step 2 wants {', '.join(missing)}, which the run takes and does not forecast: keep what the start has "
            "(--others keep), or read it from the source at later times (--others source)"
        )
    static = [name for name in run.variables if name in STATIC]
    fed = [name for name in run.variables if name in run.out_variables]
    logger.info("fed back: %s; the same at all times: %s", ", ".join(fed) or "nothing", ", ".join(static) or "nothing")
    if not fed:
        raise InputError("nothing that the run forecasts is among its inputs: a second step would be the first again")
    if missing:
        how = "kept as at the start" if others == "keep" else "read from the source at each time"
        logger.info("not forecast, %s: %s", how, ", ".join(missing))


def roll_out(states: States, starts: Sequence[int], steps: int, others: str | None) -> Iterator[Tensor]:
    """Forecast from some times, again and again.

    Args:
        states: The source.
        starts: Indices of the times, B of them.
        steps: How often.
        others: "source": inputs that are not forecast are read from the source at each time; else they are kept.

    Yields:
        Standardised forecasts after each step, `[B, Vo, h, w]`.

    Raises:
        InputError: If the source lacks one of those times, or has values that cannot be true.
    """
    run = states.run
    x = torch.stack([_channel(states, name, starts) for name in run.variables], dim=1)
    rows, columns = run.pixels
    fed = [(run.variables.index(name), i) for i, name in enumerate(run.out_variables) if name in run.variables]
    for step in range(1, steps + 1):
        predicted = run.step(x).cpu()
        yield predicted
        if step == steps:
            return
        for channel, output in fed:
            x[:, channel, rows, columns] = predicted[:, output]
        if others == "source":
            later = [_index_after(states, start, step) for start in starts]
            for name in not_forecast(run):
                x[:, run.variables.index(name)] = _channel(states, name, later)


def check_times(states: States, starts: Sequence[int], steps: int) -> None:
    """Raise InputError unless the source has all times that `roll_out` with others "source" reads."""
    if not_forecast(states.run):
        for start in starts:
            for step in range(1, steps):
                _index_after(states, start, step)


def _channel(states: States, name: str, indices: Sequence[int]) -> Tensor:
    return states.run.standardise(states.read(name, indices)[:, None], [name])[:, 0]


def _index_after(states: States, start: int, step: int) -> int:
    time = states.after(start, step)
    index = states.index_of(time)
    if index is None:
        names = ", ".join(not_forecast(states.run))
        raise InputError(
            f"step {step + 1} from {states.stamps[start]} wants {names} at {stamp(time)}, which the source has not: "
            "give a source that goes on, or --others keep"
        )
    return index
