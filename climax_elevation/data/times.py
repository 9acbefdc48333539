"""The time axis: what ClimaX expects of it, the split into partitions, and the shards."""

import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import suppress
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

logger = logging.getLogger(__name__)

_DATE = re.compile(r"\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01])(T([01]\d|2[0-3])(:[0-5]\d(:[0-5]\d)?)?)?)?)?")
"""A date of any calendar: the 30th of February is one where every month has 30 days."""

COMFORTABLE = 20
"""Pairs of a shard, times predict_range: a twentieth more is stored than there is."""
LEAST = 10
"""Steps of a shard, times predict_range, however large that is."""
MORE = 4
MOST_SHARDS = 800
"""Of a partition, where nobody asks for more: one for each GPU of the largest run on paper."""
SHARD_BYTES = 2**28


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
    """Steps `start` to `stop` (exclusive) of the source, and the file they go to, relative to OUT.

    Attributes:
        file: Its name, with its partition.
        start, stop: Its steps.
        repeats: How many of its first steps the shard before it has too; None where it goes on after none.
    """

    file: str
    start: int
    stop: int
    repeats: int | None = None

    @property
    def own(self) -> int:
        """Number of its steps that no shard before it has."""
        return self.stop - self.start - (self.repeats or 0)


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


def moment(text: str) -> np.datetime64 | None:
    """A year or date of UTC, to the second; None: it is none, or no day of the usual calendar."""
    date = written_date(re.sub(r"(?<=:\d\d)\.0+", "", text))
    with suppress(ValueError):
        return None if date is None else np.datetime64(date, "s")
    return None


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
    """Cut each partition at its gaps, and what is between into shards, as `cut` does.

    Args:
        axis: The source's times.
        parts: Steps of each partition.
        shard_steps, predict_range, step_bytes, processes: As `cut` has them.

    Returns:
        The shards in order of time.

    Raises:
        InputError: If a partition or `shard_steps` is too short for `predict_range`, or a partition for `processes`.
    """
    shards = []
    for partition, steps in parts.items():
        pieces = _pieces(steps, axis.gaps)
        stretches = cut(
            partition,
            pieces,
            shard_steps=shard_steps,
            predict_range=predict_range,
            step_bytes=step_bytes,
            processes=processes,
        )
        for index, (start, stop, repeats) in enumerate(stretches):
            stamp = axis.stamps[start][:13].replace(":", "")
            shards.append(Shard(f"{partition}/{index:05d}_{stamp}.npz", start, stop, repeats))
    return shards


def cut(
    partition: str,
    pieces: Sequence[range],
    *,
    shard_steps: int | None,
    predict_range: int,
    step_bytes: int,
    processes: int = 1,
) -> list[tuple[int, int, int | None]]:
    """Cut what lies between gaps into shards that hold all its pairs, each nearly as many as the others.

    ClimaX's reader pairs a step with the one `predict_range` later in the same shard. So each shard begins with the
    `predict_range` steps that the one before it ends with, and no boundary takes a pair. A piece that is not longer
    than `predict_range` has none, and is left out.

    Args:
        partition: Its name.
        pieces: Steps without a gap.
        shard_steps: Longest shard. None: as many shards as have `COMFORTABLE` times `predict_range` pairs, up to
            `MOST_SHARDS`, in a number that 8, or else 4 or 2, divides; but more where one would be larger than
            `SHARD_BYTES` and longer than `LEAST` times `predict_range`.
        predict_range: Steps between input and target.
        step_bytes: Size of one step in a shard.
        processes: Divides the number of shards, so that readers which take whole ones leave none of them out. Above 1
            all shards of training are equally long, so that such readers make equally many batches: of some pairs two
            shards next to each other have both. Where a piece is too short for that, up to `MORE` times as many are
            made; and the log says so if that is not enough.

    Returns:
        First step, end and `repeats` of each shard, in order.

    Raises:
        InputError: If pieces or `shard_steps` are too short for `predict_range`, or pieces for `processes`.
    """
    if shard_steps is not None and shard_steps <= predict_range:
        raise InputError(f"a shard must be longer than predict_range {predict_range}: shard_steps is {shard_steps}")
    usable = [piece for piece in pieces if len(piece) > predict_range]
    if not usable:
        pieces_have = f", in {len(pieces)} pieces without a gap" if len(pieces) > 1 else ""
        raise InputError(
            f"{partition} has {sum(map(len, pieces))} time steps{pieces_have}, too few for predict_range "
            f"{predict_range}: give it more time with val_from and test_from, or a longer source"
        )
    pairs = [len(piece) - predict_range for piece in usable]
    longest = shard_steps or max(SHARD_BYTES // step_bytes, LEAST * predict_range, predict_range + 1)
    counts = [ceil(number / (longest - predict_range)) for number in pairs]
    wanted = sum(counts)
    if shard_steps is None:
        wanted = max(wanted, min(MOST_SHARDS, sum(pairs) // (COMFORTABLE * predict_range)))
        wanted = _well_divisible(wanted, sum(counts))
    _share_out(counts, pairs, ceil(wanted / processes) * processes, processes, partition, predict_range)
    each = None
    has_to_be_alike = processes > 1 and partition == "train"
    alike = _alike(pairs, sum(counts), processes) if has_to_be_alike else None
    if alike is not None:
        each, counts = alike
    elif has_to_be_alike:
        logger.info(
            "%s: shards are not equally long, since one stretch of time between gaps has %d pairs only: several "
            "processes need a reader that shares out samples (train --reader plugin)",
            partition,
            min(pairs),
        )
    stretches: list[tuple[int, int, int | None]] = []
    for piece, number, count in zip(usable, pairs, counts, strict=True):
        starts = [number * index // count for index in range(count)]
        stops = [*starts[1:], number]
        if each is not None:
            starts = [(number - each) * index // max(1, count - 1) for index in range(count)]
            stops = [start + each for start in starts]
        before: int | None = None
        for start, stop in zip(starts, stops, strict=True):
            repeats = None if before is None else before - start
            before = stop + predict_range
            stretches.append((piece.start + start, piece.start + before, repeats))
    return stretches


def _well_divisible(wanted: int, least: int) -> int:
    """The largest number up to `wanted` that 8 divides, or else 4 or 2; where that is under `least`, above it."""
    if wanted >= 8:
        return max(wanted // 8, ceil(least / 8)) * 8
    return next((divisor for divisor in (4, 2) if max(least, divisor) == divisor <= wanted), wanted)


def _alike(pairs: Sequence[int], wanted: int, processes: int) -> tuple[int, list[int]] | None:
    """How many pairs each shard has, and how many there are of each piece, where all have equally many.

    Shards of a piece may have pairs in common, and each has one that the one before it does not have.

    Args:
        pairs: Of each piece.
        wanted: How many shards, a multiple of processes; or more, up to `MORE` times as many.
        processes: Divides their number.

    Returns:
        None: a piece has too few pairs for that.
    """
    for total in range(wanted, MORE * wanted + 1, processes):
        each = ceil(sum(pairs) / total)
        while sum(ceil(number / each) for number in pairs) > total:
            each += 1
        counts = [ceil(number / each) for number in pairs]
        room = [number - each + 1 - count for number, count in zip(pairs, counts, strict=True)]
        spare = total - sum(counts)
        if each > min(pairs) or spare > sum(room):
            continue
        for _ in range(spare):
            index = room.index(max(room))
            counts[index] += 1
            room[index] -= 1
        return each, counts
    return None


def _share_out(
    counts: list[int], pairs: Sequence[int], wanted: int, processes: int, partition: str, predict_range: int
) -> None:
    """Change the numbers of shards until their sum is `wanted`, the pieces of the largest shards first.

    Args:
        counts: Of shards of each piece, changed in place.
        pairs: Of each piece: no shard is without one.
        wanted: A multiple of `processes`; it is lowered to one where there are not so many pairs.
        processes, partition, predict_range: For the sentence.
    """
    if wanted > sum(pairs):
        wanted = sum(pairs) // processes * processes
    if wanted < len(pairs):  # a shard never crosses a gap
        gaps = f" in {len(pairs)} pieces without a gap" if len(pairs) > 1 else ""
        raise InputError(
            f"{partition} has {sum(pairs)} pairs of fields {predict_range} steps apart{gaps}, which make {len(pairs)} "
            f"to {sum(pairs)} shards, and no multiple of {processes}: use fewer processes, or give it more time with "
            "val_from and test_from"
        )
    change = 1 if sum(counts) < wanted else -1
    for _ in range(abs(wanted - sum(counts))):
        open_to = [i for i, count in enumerate(counts) if (count < pairs[i] if change > 0 else count > 1)]
        chosen = (max if change > 0 else min)(open_to, key=lambda index: pairs[index] / counts[index])
        counts[chosen] += change


def _pieces(steps: range, gaps: tuple[int, ...]) -> list[range]:
    """`steps` cut at the gaps that lie within."""
    within = gaps[bisect_right(gaps, steps.start) : bisect_left(gaps, steps.stop)]
    return [range(*ends) for ends in pairwise([steps.start, *within, steps.stop])]
