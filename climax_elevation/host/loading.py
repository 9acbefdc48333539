"""Loaders that go on in the middle of an epoch, and say what is wrong with a file in one sentence."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)


class Stretch(NamedTuple):
    """What of an epoch is still to be read.

    Attributes:
        passed: Samples that each worker of an earlier loader has handed out; (): none.
        turn: The worker whose batch comes next.
    """

    passed: tuple[int, ...] = ()
    turn: int = 0

    def of_worker(self, index: int, workers: int) -> tuple[int, int]:
        """Which of the earlier workers this one goes on for, and how many samples that had handed out.

        A loader begins with its worker 0, so that this goes on for the one whose turn it is.
        """
        if not self.passed:
            return index, 0
        earlier = (index + self.turn) % workers
        return earlier, self.passed[earlier]


def after(batches: int, lengths: Sequence[int], batch_size: int) -> Stretch:
    """What is left once a loader has handed out so many batches, which its workers make in turns.

    Args:
        batches: Number of batches.
        lengths: Samples of each worker.
        batch_size: Samples a batch; a worker's last one may have fewer.
    """
    left = [-(-length // batch_size) for length in lengths]
    made, turn = [0] * len(left), 0
    for _ in range(min(batches, sum(left))):
        while not left[turn]:
            turn = (turn + 1) % len(left)
        left[turn] -= 1
        made[turn] += 1
        turn = (turn + 1) % len(left)
    return Stretch(tuple(min(m * batch_size, n) for m, n in zip(made, lengths, strict=True)), turn)


class Loader(DataLoader):
    """DataLoader whose workers' InputError is the sentence that it is without workers."""

    def __iter__(self) -> Any:
        return _sentences(super().__iter__())


class ResumableLoader(Loader):
    """Reads in another order each time it is iterated, and goes on where a checkpoint was.

    Lightning keeps its state in checkpoints, and gives it back where an epoch was not at its end.

    Args:
        dataset: A `climax_elevation.host.shards.ForecastDataset`.
        trained: Number of batches of this epoch that were trained on; None: all that were handed out, which are
            more where batches are fetched ahead.
        options: DataLoader's.
    """

    dataset: Any

    def __init__(self, dataset: Any, *, trained: Callable[[], int] | None = None, **options: Any) -> None:
        super().__init__(dataset, **options)
        self._trained = trained
        self._handed_out = 0
        self._resumed: tuple[int, Stretch] | None = None

    def __iter__(self) -> Any:
        # before the workers start, which take a copy of the data set along; epoch 1 is the first
        self._handed_out = 0
        if self._resumed is None:
            self.dataset.epoch += 1
            return self._counted(super().__iter__())
        self.dataset.epoch, self.dataset.stretch = self._resumed
        self._resumed = None
        try:
            return self._counted(super().__iter__())
        finally:
            self.dataset.stretch = Stretch()

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the batches of it that were read, and all that their order depends on."""
        batches = self._handed_out if self._trained is None else self._trained()
        return {"epoch": self.dataset.epoch, "batches": batches, "read": self._read()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the epoch of `state_dict`, after its batches, at the next iteration."""
        now, batches, then = self._read(), state_dict["batches"], state_dict["read"]
        other = [f"{name} {then.get(name)}, and now {now[name]}" for name in now if then.get(name) != now[name]]
        if other:
            a_step = [read["processes"] * read["batch_size"] for read in (then, now)]
            batches = round(batches * a_step[0] / a_step[1])
            if self.dataset.rank == 0:
                logger.warning(
                    "the checkpoint is of the middle of an epoch that was read otherwise (%s): the rest of that epoch "
                    "has some pairs twice, and lacks others",
                    "; ".join(other),
                )
        lengths = self.dataset.lengths(self.num_workers)
        self._resumed = state_dict["epoch"], after(batches, lengths, self.batch_size or 1)

    def _read(self) -> dict[str, Any]:
        dataset = self.dataset
        shards = repr([(shard.path.name, shard.pairs(dataset.predict_range)) for shard in dataset.shards])
        return {
            "seed": dataset.seed,
            "processes": dataset.world_size,
            "workers": max(1, self.num_workers),
            "batch_size": self.batch_size,
            "buffer_size": dataset.buffer_size,
            "shards": hashlib.sha256(shards.encode()).hexdigest()[:12],
        }


def _sentences(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except InputError as error:
        # what a worker raised comes with its traceback in the place of its message
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error
