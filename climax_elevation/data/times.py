"""The time axis: what ClimaX expects of it, the split into partitions, and the shards."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from math import ceil, gcd
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from climax_elevation.data.format import PARTITIONS
from climax_elevation.errors import InputError

_DATE = re.compile(r"\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01])(T([01]\d|2[0-3])(:[0-5]\d(:[0-5]\d)?)?)?)?)?")
"""A date of any calendar: the 30th of February is one where every month has 30 days."""


@dataclass(frozen=True)
class TimeAxis:
    """Strictly increasing times, evenly spaced but for gaps.

    Attributes:
        stamps: ISO 8601, to the second; their alphabetical order is their order in time.
        hours_per_step: Distance of two steps; the mean where a step is a month, a quarter or a year.
        gaps: Steps before which time is missing: no shard goes on across one.
        calendar_months: Months of a step, where a step is that; 0 where all steps are equally long.
    """

    stamps: tuple[str, ...]
    hours_per_step: float
    gaps: tuple[int, ...] = ()
    calendar_months: int = 0


@dataclass(frozen=True)
class Shard:
    """Steps `start` to `stop` (exclusive) of the source, and the file they go to, relative to OUT."""

    file: str
    start: int
    stop: int


def is_date(value: Any) -> bool:
    """Whether a coordinate's value is a date, of any calendar."""
    return isinstance(value, np.datetime64) or hasattr(value, "isoformat")


def dates(time: xr.DataArray) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Times of any calendar, to the second, `[N]`, and the same as ISO 8601; InputError if they are no dates."""
    values = time.to_numpy()
    if np.issubdtype(values.dtype, np.datetime64):
        if np.isnat(values).any():
            raise InputError(
                f"the time coordinate has {int(np.isnat(values).sum())} missing values: leave those steps out"
            )
        values = (values.astype("datetime64[ms]") + np.timedelta64(500, "ms")).astype("datetime64[s]")
        stamps = tuple(str(stamp) for stamp in np.datetime_as_string(values, unit="s"))
    elif len(values) and is_date(values[0]):  # a calendar without leap years, say
        values = np.array([(value + timedelta(milliseconds=500)).replace(microsecond=0) for value in values])
        stamps = tuple(value.isoformat() for value in values)
    else:
        raise InputError(f"the time coordinate holds {values.dtype} and not dates: give it CF units and a calendar")
    return values, stamps


def read_times(time: xr.DataArray) -> TimeAxis:
    """Check the source's times, of any calendar, and find the gaps in them.

    A step is the commonest distance of two times, of equally common ones the shortest; any other is a gap.

    Raises:
        InputError: If they are not dates, not sorted, not unique, or a step is not a whole number of hours. Calendar
            months (also quarters and years) count as evenly spaced.
    """
    values, stamps = dates(time)
    if len(stamps) < 2:
        raise InputError(f"a forecast needs at least two time steps, the source has {len(stamps)}")
    for before, after in pairwise(stamps):
        if after == before:
            raise InputError(f"the time {after} comes twice: remove the duplicate from the source")
        if after < before:
            raise InputError(f"times are not sorted, {after} comes after {before}: sort the source by time")
    seconds = np.diff(values).astype("timedelta64[s]").astype(np.int64)
    months = np.diff([12 * int(stamp[:4]) + int(stamp[5:7]) for stamp in stamps])
    in_months = bool((months > 0).all()) and _commonest(months)[1] > _commonest(seconds)[1]
    step, _ = _commonest(months if in_months else seconds)
    gap = (months if in_months else seconds) != step
    if not in_months:
        _check_whole_hours(step)
    gaps = tuple(int(index) + 1 for index in np.flatnonzero(gap))
    return TimeAxis(stamps, float(seconds[~gap].mean()) / 3600, gaps, step if in_months else 0)


def _commonest(distances: np.ndarray) -> tuple[int, int]:
    """And how often it is there; the shortest of equally common ones."""
    found, counts = np.unique(distances, return_counts=True)
    return int(found[counts.argmax()]), int(counts.max())


def _check_whole_hours(seconds: int) -> None:
    if seconds % 3600 == 0:
        return
    every = 3600 // gcd(seconds, 3600)
    if seconds % 60:
        raise InputError(
            f"one step is {seconds} s, and ClimaX's hrs_each_step is a whole number of hours: write the times to the "
            "minute, or take fewer of them"
        )
    raise InputError(
        f"one step is {seconds / 3600:g} h ({seconds // 60} min), and ClimaX's hrs_each_step is whole hours: "
        f"take one step in {every}, {every * seconds // 3600} h apart, with the option every {every}"
    )


def split(axis: TimeAxis, val_from: str | None, test_from: str | None) -> dict[str, range]:
    """Steps of training, validation and test, in that order in time.

    Args:
        axis: The source's times.
        val_from: First year ("2000") or ISO date of validation; with `test_from`, or neither.
        test_from: First year or ISO date of test. Without both: 80, 10 and 10 per cent.

    Returns:
        A range of steps for each of `PARTITIONS`.

    Raises:
        InputError: If a date cannot be read or leaves a partition empty.
    """
    steps = len(axis.stamps)
    if val_from is None and test_from is None:
        # Whole numbers: 0.8 * n rounds differently for some n.
        bounds = [0, steps * 8 // 10, steps * 9 // 10, steps]
    elif val_from is None or test_from is None:
        raise InputError("val_from and test_from go together: give both, or neither for 80, 10 and 10 per cent")
    else:
        bounds = [0, *(bisect_left(axis.stamps, _date(text)) for text in (val_from, test_from)), steps]
        if not bounds[0] < bounds[1] < bounds[2] < bounds[3]:
            raise InputError(
                f"training, validation and test must follow one another in time: val_from {val_from} and "
                f"test_from {test_from} leave one of them empty, the source runs from {axis.stamps[0]} "
                f"to {axis.stamps[-1]}"
            )
    return {part: range(*ends) for part, ends in zip(PARTITIONS, pairwise(bounds), strict=True)}


def written_date(text: str) -> str | None:
    """A year or date as stamps begin with it, of UTC; None: it is none."""
    date = re.sub(r"(?<=:\d\d|T\d\d)(Z|\+00:?00)$", "", text.strip().replace(" ", "T"))
    return date if _DATE.fullmatch(date) else None


def _date(text: str) -> str:
    date = written_date(text)
    if date is None:
        raise InputError(f"{text!r} is not a year or an ISO date such as 2000 or 2000-06-01")
    return date


def plan_shards(
    axis: TimeAxis,
    parts: dict[str, range],
    *,
    shard_steps: int | None,
    predict_range: int,
    step_bytes: int,
    processes: int = 1,
) -> list[Shard]:
    """Cut each partition at its gaps, and what is between into shards of nearly equal length.

    Each is longer than `predict_range`; what lies between two gaps and is not is left out.

    ClimaX's reader pairs a step with the one `predict_range` later in the same shard, so every shard
    loses that many pairs, and a shard that is not longer yields nothing.

    Args:
        axis: The source's times.
        parts: Steps of each partition.
        shard_steps: Longest shard. None: an eighth of training, so that eight readers have work
            (ClimaX hands whole shards to workers and GPUs), but not under 20 times
            `predict_range`, and at most 256 MiB.
        predict_range: Steps between input and target.
        step_bytes: Size of one step in a shard.
        processes: Each partition gets a multiple of so many shards, so that readers which take whole ones leave none
            of them out.

    Returns:
        The shards in order of time.

    Raises:
        InputError: If a partition or `shard_steps` is too short for `predict_range`, or a partition for `processes`.
    """
    if shard_steps is None:
        comfortable = max(ceil(len(parts["train"]) / 8), 20 * predict_range)
        shard_steps = max(min(comfortable, 2**28 // step_bytes), predict_range + 1)
    elif shard_steps <= predict_range:
        raise InputError(f"a shard must be longer than predict_range {predict_range}: shard_steps is {shard_steps}")
    shards = []
    for partition, steps in parts.items():
        pieces = _pieces(steps, axis.gaps)
        usable = [piece for piece in pieces if len(piece) > predict_range]
        if not usable:
            pieces_have = f", in {len(pieces)} pieces without a gap" if len(pieces) > 1 else ""
            raise InputError(
                f"{partition} has {len(steps)} time steps{pieces_have}, too few for predict_range {predict_range}: "
                "give it more time with val_from and test_from, or a longer source"
            )
        index = 0
        counts = [min(ceil(len(piece) / shard_steps), len(piece) // (predict_range + 1)) for piece in usable]
        _share_out(counts, usable, predict_range, processes, partition)
        for piece, count in zip(usable, counts, strict=True):
            bounds = [piece.start + len(piece) * number // count for number in range(count + 1)]
            for start, stop in pairwise(bounds):
                stamp = axis.stamps[start][:13].replace(":", "")
                shards.append(Shard(f"{partition}/{index:05d}_{stamp}.npz", start, stop))
                index += 1
    return shards


def _share_out(counts: list[int], pieces: Sequence[range], predict_range: int, processes: int, partition: str) -> None:
    """Raise the numbers of shards, those of the longest shards first, until `processes` divides their sum."""
    most = [len(piece) // (predict_range + 1) for piece in pieces]
    wanted = ceil(sum(counts) / processes) * processes
    if wanted > sum(most):
        wanted = sum(most) // processes * processes
    if wanted < len(pieces):  # a shard never crosses a gap
        gaps = f" in {len(pieces)} pieces without a gap" if len(pieces) > 1 else ""
        raise InputError(
            f"{partition} has {sum(map(len, pieces))} time steps{gaps}, which make {len(pieces)} to {sum(most)} shards "
            f"longer than predict_range {predict_range}, and no multiple of {processes}: use fewer processes, or give "
            "it more time with val_from and test_from"
        )
    while sum(counts) != wanted:
        growing = sum(counts) < wanted
        lengths = [len(piece) / count for piece, count in zip(pieces, counts, strict=True)]
        open_to = [index for index, count in enumerate(counts) if (count < most[index] if growing else count > 1)]
        chosen = (max if growing else min)(open_to, key=lambda index: lengths[index])
        counts[chosen] += 1 if growing else -1


def _pieces(steps: range, gaps: tuple[int, ...]) -> list[range]:
    """`steps` cut at the gaps that lie within."""
    within = gaps[bisect_right(gaps, steps.start) : bisect_left(gaps, steps.stop)]
    return [range(*ends) for ends in pairwise([steps.start, *within, steps.stop])]
