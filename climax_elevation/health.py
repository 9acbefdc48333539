"""A run whose numbers are not finite says so, and ends before it spoils what it has reached."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from climax_elevation.checkpoints import check_weights, newest, not_finite
from climax_elevation.errors import InputError, SickRun
from climax_elevation.files import load_npz
from climax_elevation.watch import Judge, judged, settle

logger = logging.getLogger(__name__)

GO_ON = "or write allow_nan: true to go on all the same"
ERRORS = ("w_mse", "w_rmse")  # that are finite where predictions are; a correlation has none with what does not vary


class Place(NamedTuple):
    """Where a run is.

    Attributes:
        part: Of the data: train, val or test.
        step: Optimiser steps that were made.
        epoch, batch: From 0.
    """

    part: str
    step: int
    epoch: int
    batch: int

    def __str__(self) -> str:
        if self.part == "train":
            return f"step {self.step} (epoch {self.epoch}, batch {self.batch})"
        return f"batch {self.batch} of {self.part}, after step {self.step}"


class StopNotFinite(Callback):
    """Ends a run whose batches, loss, scores or weights have a NaN or an infinity, with a sentence.

    A batch is judged by the sum of each of its channels, before the model sees it; the loss before its gradient is
    taken. On a GPU no one waits for these numbers: they are judged about a step later (see
    `climax_elevation.watch`). All are waited for, and weights are looked at, before a checkpoint is written, so that
    the last one is good.

    Raises:
        SickRun: Names the variable and the shard, or the weight, the step, and the last checkpoint.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._batch = Judge(f"{__name__}.batch", self._decide_batch)
        self._loss = Judge(f"{__name__}.loss", self._decide_loss)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        check_weights(checkpoint.get("state_dict", {}), f"checkpoint {trainer.ckpt_path}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._look(trainer, batch, "train", batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._look(trainer, batch, "val", batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._look(trainer, batch, "test", batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        batch = trainer.fit_loop.batch_idx
        numbers = loss.detach().float().reshape(1)
        judged(numbers, numbers, self._loss, *Place("train", trainer.global_step, trainer.current_epoch, batch))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        settle()
        bad = not_finite(pl_module.named_parameters())
        if bad is not None:
            raise SickRun(f"{self._weights(bad)} after step {trainer.global_step}: {self._cure()}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        settle()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        settle()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        settle()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge_scores(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge_scores(trainer)

    def _judge_scores(self, trainer: Trainer) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.partition("/")[2].startswith(ERRORS) and not math.isfinite(value):
                bad = not_finite(trainer.lightning_module.named_parameters())
                why = f"predictions are not, though {_data(trainer)} is" if bad is None else self._weights(bad)
                raise SickRun(
                    f"{name} is {float(value)} after step {trainer.global_step}, and has to be finite: {why}; "
                    f"{self._cure()}"
                )

    def _look(self, trainer: Trainer, batch: Any, part: str, batch_idx: int) -> None:
        channels = list(_channels(batch))
        if channels:
            numbers = torch.cat([total for _, total in channels])
            place = Place(part, trainer.global_step, trainer.current_epoch, batch_idx)
            judged(numbers, numbers, self._batch, *place, *(name for name, _ in channels))

    def _decide_batch(self, numbers: list[float], part: str, step: int, epoch: int, batch: int, *names: str) -> None:
        bad = [name for name, number in zip(names, numbers, strict=True) if not math.isfinite(number)]
        if not bad:
            return
        trainer, place = self._trainer, Place(part, step, epoch, batch)
        assert trainer is not None
        shard = _shard(trainer, part, bad)
        raise SickRun(
            f"{' and '.join(dict.fromkeys(map(repr, bad)))} of {_data(trainer)} has values that are not finite, in "
            f"{place}: {shard}; fill them, {GO_ON}{self._last()}"
        )

    def _decide_loss(self, numbers: list[float], part: str, step: int, epoch: int, batch: int) -> None:
        if math.isfinite(numbers[0]):
            return
        trainer = self._trainer
        assert trainer is not None
        bad = not_finite(trainer.lightning_module.named_parameters())
        why = "its batch and the weights are" if bad is None else self._weights(bad)
        raise SickRun(
            f"the loss is {numbers[0]} in {Place(part, step, epoch, batch)}, and has to be finite: {why}; "
            f"{self._cure()}"
        )

    def _weights(self, name: str) -> str:
        return f"weights have become NaN or infinite ({name})"

    def _cure(self) -> str:
        return (
            f"lower model.lr, write trainer.gradient_clip_val: 1.0, or choose another trainer.precision, {GO_ON}"
            f"{self._last()}"
        )

    def _last(self) -> str:
        """Which checkpoint there is to go on from."""
        assert self._trainer is not None
        found = newest(
            path
            for callback in self._trainer.checkpoint_callbacks
            for path in (getattr(callback, "last_model_path", ""), getattr(callback, "best_model_path", ""))
            if path
        )
        return f"; the last checkpoint is {found}" if found else "; there is no checkpoint yet"


def check_statistics(datamodule: Any) -> None:
    """Raise InputError unless all that a ClimaX data module standardises by is finite, and deviations above 0.

    Args:
        datamodule: Has `transforms` and `output_transforms`, or `dataset_train` with its own, of mean and std; and may
            have climatologies, which are to be finite too.
    """
    for part in ("val", "test"):
        climatology = getattr(datamodule, f"{part}_clim", None)
        if isinstance(climatology, Tensor) and not bool(climatology.isfinite().all()):
            path = Path(datamodule.hparams["root_dir"]) / part / "climatology.npz"
            raise InputError(f"{path} has values that are not finite: prepare the data again")
    for transform, names, source in _transforms(datamodule):
        for kind in ("mean", "std"):
            for name, value in zip(names, np.ravel(np.asarray(getattr(transform, kind))), strict=False):
                if not math.isfinite(value) or (kind == "std" and not value > 0):
                    what, wanted = ("mean", "finite") if kind == "mean" else ("standard deviation", "above 0")
                    raise InputError(
                        f"the {what} of {name!r} from {source} is a number that is {wanted}, not {value}: prepare the "
                        "data again, or leave the variable out"
                    )


def _transforms(datamodule: Any) -> Iterator[tuple[Any, Sequence[str], str]]:
    """What standardises, by name of channel, and where its numbers are from."""
    hparams = getattr(datamodule, "hparams", {})
    for attribute, inputs in (("transforms", True), ("output_transforms", False)):
        found = getattr(datamodule, attribute, None)
        if isinstance(found, dict):  # several sources
            names = hparams[f"dict_{'in' if inputs else 'out'}_variables"]
            for key, transform in found.items():
                yield transform, names[key], str(hparams["dict_root_dirs"][key])
        elif found is not None:
            names = hparams["variables"] if inputs else hparams["out_variables"] or hparams["variables"]
            yield found, [names] if isinstance(names, str) else names, str(hparams["root_dir"])
    dataset = getattr(datamodule, "dataset_train", None)
    if dataset is not None:
        yield dataset.inp_transform, hparams["variables"], str(hparams["root_dir"])
        yield dataset.out_transform, hparams["out_variables"], str(hparams["root_dir"])


def _channels(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Input and target of a ClimaX batch: names of the channels, one after another, each with its sum, `[1]`."""
    if not isinstance(batch, Sequence) or len(batch) < 5:
        return
    for fields, names in ((batch[0], batch[3]), (batch[1], batch[4])):
        if not isinstance(fields, Tensor) or fields.dim() < 3 or not fields.is_floating_point():
            continue
        others = [axis for axis in range(fields.dim()) if axis != fields.dim() - 3]
        sums = fields.detach().sum(dim=others, dtype=torch.float32)
        listed = [names] if isinstance(names, str) else list(names)
        if len(listed) != len(sums):
            listed = [f"channel {index}" for index in range(len(sums))]
        yield from zip(listed, sums.split(1), strict=True)


def _data(trainer: Trainer) -> str:
    folders = _folders(trainer)
    return ", ".join(map(str, folders)) if folders else "the data"


def _folders(trainer: Trainer) -> list[Path]:
    hparams = getattr(getattr(trainer, "datamodule", None), "hparams", {})
    found = hparams.get("dict_root_dirs") or {"": hparams.get("root_dir")}
    return [Path(folder) for folder in found.values() if folder]


def _shard(trainer: Trainer, part: str, names: Sequence[str]) -> str:
    """The first shard with such a value, and its first time step."""
    for folder in _folders(trainer):
        for path in sorted((folder / part).glob("*.npz")):
            if "climatology" in path.name:
                continue
            try:
                arrays = load_npz(path, "", names)
            except InputError:  # the reader says so, if it ever comes to that shard
                continue
            for name, values in arrays.items():
                bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
                if bad.any():
                    return f"{path} has the first, {name!r} at time step {int(bad.argmax())}"
    return "no shard has such values, so statistics or transforms make them"
