"""The time axis: what ClimaX expects of it, the split into partitions, and the shards."""

import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np
import xarray as xr

from climax_elevation.data.format import PARTITIONS
from climax_elevation.errors import InputError

_DATE = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d(:\d\d)?)?)?)?)?")


@dataclass(frozen=True)
class TimeAxis:
    """Strictly increasing, evenly spaced times.

    Attributes:
        stamps: ISO 8601, to the second; their alphabetical order is their order in time.
        hours_per_step: Mean distance of two steps.
    """

    stamps: tuple[str, ...]
    hours_per_step: float


@dataclass(frozen=True)
class Shard:
    """Steps `start` to `stop` (exclusive) of the source, and the file they go to, relative to OUT."""

    file: str
    start: int
    stop: int


def read_times(time: xr.DataArray) -> TimeAxis:
    """Check the source's times, of any calendar.

    Raises:
        InputError: If they are not dates, not sorted, not unique or not evenly spaced. Calendar
            months (also quarters and years) count as evenly spaced.
    """
    values = time.to_numpy()
    if np.issubdtype(values.dtype, np.datetime64):
        stamps = tuple(str(stamp) for stamp in np.datetime_as_string(values, unit="s"))
    elif len(values) and hasattr(values[0], "isoformat"):  # a calendar without leap years, say
        stamps = tuple(value.isoformat() for value in values)
    else:
        raise InputError(f"the time coordinate holds {values.dtype} and not dates: give it CF units and a calendar")
    if len(stamps) < 2:
        raise InputError(f"a forecast needs at least two time steps, the source has {len(stamps)}")
    for before, after in pairwise(stamps):
        if after == before:
            raise InputError(f"the time {after} comes twice: remove the duplicate from the source")
        if after < before:
            raise InputError(f"times are not sorted, {after} comes after {before}: sort the source by time")
    seconds = np.diff(values).astype("timedelta64[s]").astype(np.int64)
    _check_even(stamps, seconds)
    return TimeAxis(stamps, float(seconds.mean()) / 3600)


def _check_even(stamps: tuple[str, ...], seconds: np.ndarray) -> None:
    months = np.diff([12 * int(stamp[:4]) + int(stamp[5:7]) for stamp in stamps])
    if (seconds == seconds[0]).all() or (months[0] > 0 and (months == months[0]).all()):
        return
    odd = int(np.flatnonzero(seconds != seconds[0])[0])
    raise InputError(
        f"ClimaX counts time steps, so they must be evenly spaced: the first is {seconds[0] / 3600:g} h, "
        f"but from {stamps[odd]} to {stamps[odd + 1]} it is {seconds[odd] / 3600:g} h; "
        "fill the gap or cut the source there"
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


def _date(text: str) -> str:
    try:
        if not _DATE.fullmatch(text):
            raise ValueError
        np.datetime64(text)
    except ValueError:
        raise InputError(f"{text!r} is not a year or an ISO date such as 2000 or 2000-06-01") from None
    return text


def plan_shards(
    axis: TimeAxis, parts: dict[str, range], *, shard_steps: int | None, predict_range: int, step_bytes: int
) -> list[Shard]:
    """Cut each partition into shards of nearly equal length, each longer than `predict_range`.

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

    Returns:
        The shards in order of time.

    Raises:
        InputError: If a partition or `shard_steps` is too short for `predict_range`.
    """
    if shard_steps is None:
        comfortable = max(ceil(len(parts["train"]) / 8), 20 * predict_range)
        shard_steps = max(min(comfortable, 2**28 // step_bytes), predict_range + 1)
    elif shard_steps <= predict_range:
        raise InputError(f"a shard must be longer than predict_range {predict_range}: shard_steps is {shard_steps}")
    shards = []
    for partition, steps in parts.items():
        if len(steps) <= predict_range:
            raise InputError(
                f"{partition} has {len(steps)} time steps, too few for predict_range {predict_range}: "
                "give it more time with val_from and test_from, or a longer source"
            )
        count = min(ceil(len(steps) / shard_steps), len(steps) // (predict_range + 1))
        bounds = [steps.start + len(steps) * index // count for index in range(count + 1)]
        for index, (start, stop) in enumerate(pairwise(bounds)):
            stamp = axis.stamps[start][:13].replace(":", "")
            shards.append(Shard(f"{partition}/{index:05d}_{stamp}.npz", start, stop))
    return shards
