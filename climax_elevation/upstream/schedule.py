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


def count_shares(datamodule: Any, processes: int, nodes: int = 1) -> list[Share]:
    """What each process is given of each part; []: the data module is none that this knows.

    Args:
        datamodule: The plugin's own, or one of upstream's.
        processes: All of the run.
        nodes: Their machines, of which pretraining gives each a source of data.
    """
    if hasattr(datamodule, "shares"):
        return datamodule.shares(processes)
    if hasattr(datamodule, "dict_lister_trains"):
        return list(_of_pretraining(datamodule, processes // nodes))
    if all(hasattr(datamodule, f"dataset_{part}") for part in PARTITIONS):
        return [_of_projection(datamodule, part, processes) for part in PARTITIONS]
    if not all(hasattr(datamodule, f"lister_{part}") for part in PARTITIONS):
        return []
    settings = datamodule.hparams
    readers = processes, settings["num_workers"], settings["batch_size"]
    return [
        _of_upstream(
            part, _pairs(paths, settings["variables"], settings["predict_range"]), *readers, drawn=part == "train"
        )
        for part, paths in ((part, getattr(datamodule, f"lister_{part}")) for part in PARTITIONS)
    ]


def _of_projection(datamodule: Any, part: str, processes: int) -> Share:
    """Of climate projection, whose samples Lightning shares out, some of them twice where processes do not divide."""
    samples = len(getattr(datamodule, f"dataset_{part}"))
    each = ceil(samples / processes)
    return Share(part, 0, samples, 0, each, ceil(each / datamodule.hparams["batch_size"]))


def _of_pretraining(datamodule: Any, processes: int) -> Iterator[Share]:
    """Of each source, which the processes of one node read; a batch that is not full is left out."""
    settings = datamodule.hparams
    for name, paths in datamodule.dict_lister_trains.items():
        ends = (int(settings[f"dict_{end}_idx"][name] * len(paths)) for end in ("start", "end"))
        pairs = _pairs(
            paths[slice(*ends)], settings["dict_in_variables"][name], settings["dict_max_predict_ranges"][name]
        )
        part = "train" if len(datamodule.dict_lister_trains) == 1 else f"train of {name}"
        readers = processes, settings["num_workers"], settings["batch_size"]
        yield _of_upstream(part, pairs, *readers, drawn=True, whole_batches=True)


def _of_upstream(
    part: str,
    pairs: list[int],
    processes: int,
    workers: int,
    batch_size: int,
    *,
    drawn: bool,
    whole_batches: bool = False,
) -> Share:
    """Upstream's reader gives workers whole shards, equally many, and without workers all shards to every process.

    Which ones each process has of training, it draws anew each epoch from random numbers of its own.

    Args:
        part: Its name.
        pairs: Of each shard, in the reader's order.
        processes, workers: That share them.
        batch_size: Of a worker's batches.
        drawn: Whether shards are in another order for each process.
        whole_batches: Whether a batch that is not full is left out.
    """

    def batches(samples: int) -> int:
        return samples // batch_size if whole_batches else ceil(samples / batch_size)

    if not workers:
        return Share(part, len(pairs), sum(pairs), 0, sum(pairs), batches(sum(pairs)))
    each = len(pairs) // (processes * workers)
    read = each * processes * workers
    if not drawn:
        by_worker = [sum(pairs[at : at + each]) for at in range(0, read, each or 1)]
        by_process = [by_worker[at : at + workers] for at in range(0, len(by_worker), workers)] or [[0]]
        counts = [sum(map(batches, shares)) for shares in by_process]
        fewest, least = min(map(sum, by_process)), min(counts)
        return Share(part, len(pairs), sum(pairs), sum(pairs[read:]), fewest, least, _unless_equal(max(counts), least))
    ordered = sorted(pairs)
    fewest, largest = (sum(some) for some in (ordered[: each * workers], ordered[len(pairs) - each * workers :]))
    least, most = batches(fewest), batches(largest)
    if workers > 1:
        # a worker's last batch may be smaller: how many there are depends on which shards it has
        alike = ordered[:1] == ordered[-1:]
        least, most = (workers * batches(each * ordered[0]),) * 2 if alike else (least, most + workers - 1)
        if whole_batches and not alike:
            least, most = max(0, least - workers + 1), most - workers + 1
    left_out = sum(ordered[: len(pairs) - read])
    return Share(part, len(pairs), sum(pairs), left_out, fewest, least, _unless_equal(most, least), processes > 1)


def _unless_equal(most: int, least: int) -> int:
    return 0 if most == least else most


def _pairs(paths: Sequence[str | Path], variables: Sequence[str], predict_range: int) -> list[int]:
    # of one header a shard: every process looks at all shards
    shards = (Path(path) for path in paths if "climatology" not in str(path))
    shapes = (npz_shapes(path, "prepare it again", variables[:1]) for path in shards)
    return [max(0, shape[variables[0]][0] - predict_range) for shape in shapes]


def check_shares(shares: Sequence[Share], processes: int, workers: int, *, sharing: bool = False) -> None:
    """Raise InputError unless every process has something to read of every part.

    Args:
        shares: Of each part.
        processes, workers: That share them.
        sharing: Whether the plugin's reader can take the place of the one that there is.
    """
    for share in shares:
        readers = processes * max(1, workers)
        if not share.fewest and share.shards >= readers:
            raise InputError(
                f"{share.part} has {share.shards} shards, and a process would be given none that is longer than "
                "data.predict_range, and so no pair: make longer shards, or lower it"
            )
        if share.samples < processes:
            raise InputError(
                f"{share.part} has {share.samples} samples, and {processes} processes would share them: use fewer "
                "processes, or give it more time"
            )
        if not share.fewest:
            raise InputError(
                f"{share.part} has {share.shards} shards, and {processes} processes of {max(1, workers)} readers each "
                f"take whole ones: make {readers} or more (climax-elevation prepare --processes {readers}), "
                f"{'read with --reader plugin, ' if sharing else ''}or use fewer processes or workers"
            )


def check_equal(trainer: Trainer, shares: Sequence[Share], processes: int, workers: int, *, sharing: bool) -> None:
    """Raise InputError where a process may wait for ever for another, which has no further batch of training."""
    for share in shares:
        fewest, most = (_limited(trainer.limit_train_batches, count) for count in (share.batches, share.most))
        ends_before = 0 < trainer.max_steps * trainer.accumulate_grad_batches <= fewest
        if not share.part.startswith("train") or not share.most or fewest == most or ends_before:
            continue
        other = "read with --reader plugin, or " if sharing else ""
        raise InputError(
            f"{share.part}: its shards differ in length, so that ClimaX's reader may give one process {fewest} batches "
            f"of an epoch, and another up to {most}, which would wait for it for ever: {other}cut them alike "
            f"(climax-elevation prepare PREPARED OUT --processes {processes * max(1, workers)})"
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
        if processes > 1 and share.fewest == share.samples and share.shards:
            rest = "; every process reads all of them, which data.num_workers: 1 mends"
        if share.drawn:
            rest += "; each process draws its shards by itself, some of them twice an epoch and others not at all"
        yield (
            f"{share.part}: {share.samples} samples{f' in {share.shards} shards' if share.shards else ''}, "
            f"{share.fewest} a process, {share.batches} batches{rest}"
        )
    if not shares:
        return
    an_epoch = steps_an_epoch(trainer, shares[0].batches)
    steps = steps_of_run(trainer, an_epoch)
    if steps is not None and an_epoch:
        samples = steps * trainer.accumulate_grad_batches * batch_size * processes
        yield f"{an_epoch} steps an epoch, {steps} in all, {steps / an_epoch:.3g} epochs: up to {samples} samples seen"
