"""What a run is going to do, counted before anything starts: nobody trains on nothing, and validation comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from climax_elevation.data.format import PARTITIONS
from climax_elevation.data.shares import Share
from climax_elevation.errors import InputError
from climax_elevation.files import npz_shapes


def count_shares(datamodule: Any, processes: int) -> list[Share]:
    """What each process is given of each part; []: the data module is none that this knows.

    Args:
        datamodule: The plugin's own, or one of upstream's for global or regional forecasting.
        processes: All of the run.
    """
    if hasattr(datamodule, "shares"):
        return datamodule.shares(processes)
    if not all(hasattr(datamodule, f"lister_{part}") for part in PARTITIONS):
        return []
    return [_of_upstream(datamodule, part, processes) for part in PARTITIONS]


def _of_upstream(datamodule: Any, part: str, processes: int) -> Share:
    """Upstream's reader gives workers whole shards, equally many, and without workers all shards to every process."""
    paths = [path for path in getattr(datamodule, f"lister_{part}") if "climatology" not in str(path)]
    variable, predict_range = datamodule.hparams["variables"][0], datamodule.hparams["predict_range"]
    pairs = sorted(_pairs(Path(path), variable, predict_range) for path in paths)
    workers, batch_size = datamodule.hparams["num_workers"], datamodule.hparams["batch_size"]
    if not workers:
        return Share(part, len(paths), sum(pairs), 0, sum(pairs), ceil(sum(pairs) / batch_size))
    each = len(paths) // (processes * workers)
    left_out = sum(pairs[: len(paths) - each * processes * workers])
    fewest = pairs[: each * workers]
    batches = sum(ceil(sum(fewest[worker::workers]) / batch_size) for worker in range(workers))
    return Share(part, len(paths), sum(pairs), left_out, sum(fewest), batches)


def _pairs(path: Path, variable: str, predict_range: int) -> int:
    # of one header a shard: every process looks at all shards
    return max(0, npz_shapes(path, "prepare it again", [variable])[variable][0] - predict_range)


def check_shares(shares: Sequence[Share], processes: int, workers: int) -> None:
    """Raise InputError unless every process has something to read of every part."""
    for share in shares:
        if not share.fewest:
            readers = processes * max(1, workers)
            if share.shards >= readers:
                raise InputError(
                    f"{share.part} has {share.shards} shards, and a process would be given none that is longer than "
                    "data.predict_range, and so no pair: make longer shards, or lower it"
                )
            raise InputError(
                f"{share.part} has {share.shards} shards, and {processes} processes of {max(1, workers)} readers each "
                f"take whole ones: make {readers} or more (climax-elevation prepare --processes {processes}), or use "
                "fewer processes or workers"
            )


def steps_an_epoch(trainer: Trainer, batches: int) -> int:
    """Optimiser steps of an epoch, of so many batches, as the trainer limits and accumulates them."""
    return ceil(_limited(trainer.limit_train_batches, batches) / trainer.accumulate_grad_batches)


def _limited(limit: float | None, batches: int) -> int:
    if limit is None:
        return batches
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)


def steps_of_run(trainer: Trainer, an_epoch: int) -> int | None:
    """Optimiser steps until the run ends by itself; None: it does not."""
    by_epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs * an_epoch
    by_steps = None if trainer.max_steps in (None, -1) else trainer.max_steps
    known = [steps for steps in (by_epochs, by_steps) if steps is not None]
    return min(known) if known else None


def check_validation(trainer: Trainer, batches: int, *, counted: bool = True) -> None:
    """Raise InputError where checkpoints or stopping wait for a validation that never comes.

    Args:
        trainer: Of the run.
        batches: Of an epoch's training, of a process.
        counted: Whether the loader of these batches knows how many they are, as upstream's do not.
    """
    waiting = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint | EarlyStopping) and str(callback.monitor or "").startswith("val")
    ]
    steps = steps_of_run(trainer, steps_an_epoch(trainer, batches))
    if not waiting or steps is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    seen = _limited(trainer.limit_train_batches, batches)
    every = trainer.val_check_interval
    wanted = every if isinstance(every, int) else max(1, int(every * seen))
    epochs = trainer.check_val_every_n_epoch
    if isinstance(every, float) and epochs is not None:
        wanted += (epochs - 1) * seen
    made = steps * trainer.accumulate_grad_batches
    name = f"{type(waiting[0]).__name__} waits for {waiting[0].monitor!r}"
    if not _limited(trainer.limit_val_batches, 1 if trainer.limit_val_batches else 0):
        raise InputError(f"{name}, and limit_val_batches is 0: validate, or monitor something else")
    limit = trainer.limit_train_batches
    if not counted and isinstance(limit, int) and every == 1.0 and epochs is not None and limit > batches:
        raise InputError(
            f"{name}, which Lightning begins after trainer.limit_train_batches, {limit}, and an epoch has {batches} "
            "batches a process: lower it, or leave it out"
        )
    if isinstance(every, int) and epochs is not None and every > seen:
        raise InputError(
            f"{name}, and trainer.val_check_interval is {every} batches, of which an epoch has {seen}: lower it"
        )
    if made < wanted:
        raise InputError(
            f"{name}, and the run ends after {made} batches a process, before its first validation, after {wanted}: "
            "train for longer (max_steps, max_epochs), or validate earlier (trainer.val_check_interval)"
        )


def announced(trainer: Trainer, shares: Sequence[Share], processes: int, batch_size: int) -> Iterator[str]:
    """Lines that say who reads how much, and how far the run goes."""
    for share in shares:
        rest = f"; {share.left_out} are left out of an epoch" if share.left_out else ""
        if processes > 1 and share.fewest == share.samples:
            rest = "; every process reads all of them, which data.num_workers: 1 mends"
        yield (
            f"{share.part}: {share.samples} samples in {share.shards} shards, {share.fewest} a process, "
            f"{share.batches} batches{rest}"
        )
    if not shares:
        return
    an_epoch = steps_an_epoch(trainer, shares[0].batches)
    steps = steps_of_run(trainer, an_epoch)
    if steps is not None and an_epoch:
        samples = steps * trainer.accumulate_grad_batches * batch_size * processes
        yield f"{an_epoch} steps an epoch, {steps} in all, {steps / an_epoch:.3g} epochs: up to {samples} samples seen"
