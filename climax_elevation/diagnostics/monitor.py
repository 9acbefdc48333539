"""A record of the biases over a training."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from climax_elevation.checks import count
from climax_elevation.diagnostics.strength import Seen, Strength, measure, terrain_blocks, watch
from climax_elevation.errors import InputError
from climax_elevation.files import reading_table

FILE = "bias.csv"


class Row(NamedTuple):
    """One number of the record.

    Attributes:
        step: Optimiser steps before it.
        block: The block's index.
        parameter: Name of a bias's parameter, or "" for what is of the bias as a whole.
        head: Index of a head, or None for what all heads share.
        quantity: "value" and "gradient" of a number, "norm" and "gradient_norm" of an array; a field of `Strength`.
        value: Of the quantity.
    """

    step: int
    block: int
    parameter: str
    head: int | None
    quantity: str
    value: float


class BiasMonitor(Callback):
    """Records every so many steps what the biases are and do, in bias.csv in the run's folder.

    A row is a number: step, block, parameter, head, quantity, value (see `Row`). What is recorded at a step
    is of before that step: parameters, their gradients (before clipping), and the `Strength` of each bias on
    the step's first batch. At the end the parameters are recorded once more. A resumed run goes on in the
    same file from where its checkpoint was. Scalars, and `share` and `moved` averaged over heads, go to the
    run's logger too. No random number is drawn and nothing of the training changes. The process of rank 0
    records.

    Args:
        every_n_steps: Optimiser steps between two records.
        dirpath: Folder of the file; None: the logger's, or default_root_dir without one.

    Raises:
        InputError: If every_n_steps is not a whole number of 1 or more.
    """

    def __init__(self, every_n_steps: int = 50, dirpath: str | None = None) -> None:
        self.every_n_steps = count("every_n_steps", every_n_steps)
        self.dirpath = dirpath
        self._watching = ExitStack()
        self._found: dict[int, Strength] = {}
        self._recorded = -1
        self._on = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._on = trainer.is_global_zero and bool(_biases(pl_module))
        if self._on:
            self.path = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir) / FILE
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _keep_before(self.path, trainer.global_step)
            self._recorded = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        due = trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._recorded
        if self._on and due and not self._found:
            self._watching.enter_context(watch(pl_module, self._see))

    def _see(self, index: int, seen: Seen) -> None:
        self._found[index] = measure(seen)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._found:
            return
        step = self._recorded = trainer.global_step
        rows = [*_of_parameters(pl_module, step, gradients=True), *_of_strengths(self._found, step)]
        _append(self.path, rows)
        self._found = {}
        if trainer.loggers:
            for name, value in _to_log(rows).items():
                pl_module.log(name, value, on_step=True, on_epoch=False, rank_zero_only=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._watching.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._watching.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._on:
            _append(self.path, list(_of_parameters(pl_module, trainer.global_step, gradients=False)))


def read_record(path: str | Path) -> list[Row]:
    """The rows of a bias.csv, without what an interrupted run left of its last one.

    Raises:
        InputError: If there is no such file, or it is another.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: add climax_elevation.diagnostics.BiasMonitor to trainer.callbacks")
    with reading_table(path), path.open(newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if tuple(header) != Row._fields:
        raise InputError(f"{path} is no record of BiasMonitor, whose columns are {', '.join(Row._fields)}")
    whole = path.read_bytes().endswith(b"\n")
    with reading_table(path):
        return [_row(row) for row in (rows if whole else rows[:-1])]


def _row(written: list[str]) -> Row:
    step, block, parameter, head, quantity, value = written
    return Row(int(step), int(block), parameter, int(head) if head else None, quantity, float(value))


def _keep_before(path: Path, step: int) -> None:
    """Write the file anew with what it has of before `step`: whole or not at all."""
    kept = [row for row in read_record(path) if row.step < step] if step and path.is_file() else []
    beside = path.with_name(f"{path.name}.part")
    with beside.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(Row._fields)
        csv.writer(file, lineterminator="\n").writerows(kept)
    os.replace(beside, path)


def _append(path: Path, rows: list[Row]) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _biases(module: LightningModule) -> dict[int, Any]:
    try:
        return {index: block.attn.bias for index, block in terrain_blocks(module).items()}
    except InputError:  # the flag is off
        return {}


def _of_parameters(module: LightningModule, step: int, *, gradients: bool) -> Iterator[Row]:
    heads = {index: block.attn.num_heads for index, block in terrain_blocks(module).items()}
    for index, bias in _biases(module).items():
        for name, parameter in bias.named_parameters():
            yield from _of_one(step, index, name, parameter.detach(), heads[index], ("value", "norm"))
            if gradients and parameter.grad is not None:
                yield from _of_one(step, index, name, parameter.grad, heads[index], ("gradient", "gradient_norm"))


def _of_one(step: int, index: int, name: str, values: Tensor, heads: int, quantity: tuple[str, str]) -> Iterator[Row]:
    if values.numel() == 1:
        yield Row(step, index, name, None, quantity[0], values.item())
    elif values.shape == (heads,):
        for head, value in enumerate(values.tolist()):
            yield Row(step, index, name, head, quantity[0], value)
    else:
        yield Row(step, index, name, None, quantity[1], values.norm().item())


def _of_strengths(found: dict[int, Strength], step: int) -> Iterator[Row]:
    for index, strength in found.items():
        for quantity, values in asdict(strength).items():
            for head, value in enumerate(values):
                yield Row(step, index, "", head, quantity, value)


def _to_log(rows: list[Row]) -> dict[str, float]:
    """Scalars by name, and means over heads of how much the bias does."""
    scalars = {
        f"bias/{row.block}/{row.parameter}{'' if row.quantity == 'value' else '_gradient'}": row.value
        for row in rows
        if row.head is None and row.quantity in ("value", "gradient")
    }
    for block in {row.block for row in rows}:
        for quantity in ("share", "moved"):
            values = [row.value for row in rows if (row.block, row.quantity) == (block, quantity)]
            scalars[f"bias/{block}/{quantity}"] = sum(values) / len(values)
    return scalars
