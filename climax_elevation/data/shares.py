"""Who reads which samples: every one once an epoch, and every process as many batches as the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

Drawn = TypeVar("Drawn")


class Share(NamedTuple):
    """What each process is given of a part of the data.

    Attributes:
        part: "train", "val" or "test", or "train of" one of several sources.
        shards: Files of the part; 0 where samples are not read from such.
        samples: Pairs in them.
        left_out: Pairs that no process reads in an epoch.
        fewest: Pairs of the process that has the fewest.
        batches: Batches of that process.
        most: Batches that another process may have; 0: all have equally many.
        drawn: Whether each process draws by itself which shards it reads.
    """

    part: str
    shards: int
    samples: int
    left_out: int
    fewest: int
    batches: int
    most: int = 0
    drawn: bool = False


class Part(NamedTuple):
    """What one worker of one process reads of an epoch's samples.

    Attributes:
        start, stop: From which sample, and before which it ends.
        split: Whether the last sample is a batch of its own, though it would have fitted into the one before.
    """

    start: int
    stop: int
    split: bool


def batches_a_process(total: int, batch_size: int, processes: int) -> int:
    """Batches of each process, where all have equally many: the steps of an epoch.

        n = ceil(ceil(total / processes) / batch_size)

    Batches of one cannot be made equally many of what processes do not divide: n = floor(total / processes).
    """
    return total // processes if batch_size == 1 else -(-total // (processes * batch_size))


def stretch(total: int, batch_size: int, process: int, processes: int, worker: int, workers: int) -> Part:
    """The part of a worker.

    Samples are cut into one stretch a process, as long as the others or one longer, and stretches into batches, of
    which every worker has a row. A process whose stretch is one shorter may need one batch less than the others; it
    then takes its last sample alone, so that none waits for another. With a batch size of 1 nothing can be split, and
    `total % processes` samples are left out.

    Args:
        total: Samples of an epoch, as many as there are processes or more.
        batch_size: Largest batch.
        process, processes: Rank, and world size.
        worker, workers: Number of the worker in its process; (0, 1) where there are none.
    """
    if batch_size == 1:
        total -= total % processes
    first, end = (total * edge // processes for edge in (process, process + 1))
    batches = batches_a_process(total, batch_size, processes)
    low, high = (batches * edge // workers for edge in (worker, worker + 1))
    # so many whole batches, but one sample is left for each that is still to come
    start, stop = (first + min(edge * batch_size, end - first - (batches - edge)) for edge in (low, high))
    return Part(start, stop, low < high and stop - start <= (high - low - 1) * batch_size)


def split(samples: Iterator[Drawn], alone: bool) -> Iterator[Drawn | None]:
    """`samples`; where the last is to be a batch of its own, with None before it, which fills the batch before."""
    if not alone:
        yield from samples
        return
    last = next(samples)
    for sample in samples:
        yield last
        last = sample
    yield None
    yield last
