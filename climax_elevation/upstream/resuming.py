"""What a run goes on from: the checkpoint that a word stands for, and what no checkpoint can bring back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from climax_elevation.checkpoints import newest, read_checkpoint
from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

LOOP = "epoch_loop.batch_progress"
VALIDATION = "epoch_loop.val_loop.batch_progress"


class GoOn(Callback):
    """Lets a resumed run do what the interrupted one would have done next, and says what of that it cannot.

    Until its first validation there is no score, for which EarlyStopping asks at the end of a run too: it does without.
    """

    def __init__(self) -> None:
        self._strict: list[EarlyStopping] = []

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        fit = checkpoint.get("loops", {}).get("fit_loop")
        if fit is None or not trainer.training:
            return
        stopping: list[Any] = trainer.early_stopping_callbacks
        self._strict = [callback for callback in stopping if callback.strict]
        for callback in self._strict:
            callback.strict = False
        _validate_first(fit, trainer)
        _count_the_epoch_once(fit, trainer)
        if trainer.is_global_zero and not fit.get("state_dict", {}).get("combined_loader"):
            _say_what_is_not_resumed(fit)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in self._strict:
            callback.strict = True
        self._strict = []


def _validate_first(fit: dict[str, Any], trainer: Trainer) -> None:
    """Where validation comes next, begin with it.

    Lightning, as of 2.6, leaves it out after a checkpoint of the end of a batch, and counts an epoch that ended with
    that batch twice. It does begin with it where it was interrupted there, so that is what the checkpoint is made to
    say.
    """
    batches, validation = fit[LOOP], fit[VALIDATION]
    total, current = batches["total"], batches["current"]
    at_end_of_batch = total["ready"] == total["processed"] == total["completed"] + 1
    every = trainer.val_check_interval
    seen = total["ready"] if trainer.check_val_every_n_epoch is None else current["ready"]
    is_due = batches["is_last_batch"] or (isinstance(every, int) and seen % every == 0)
    if not at_end_of_batch or not is_due:
        return
    total["completed"] += 1
    current["completed"] += 1
    begun = validation["total"]
    begun["ready"] = begun["started"] = begun["processed"] + 1
    begun["completed"] = begun["processed"]


def _count_the_epoch_once(fit: dict[str, Any], trainer: Trainer) -> None:
    """Lightning, as of 2.6, ends an epoch that had ended once more where max_steps is set."""
    total, current = fit["epoch_progress"]["total"], fit["epoch_progress"]["current"]
    if trainer.max_steps != -1 and total["ready"] == total["processed"] == total["completed"] + 1:
        total["processed"] -= 1
        current["processed"] -= 1


def _say_what_is_not_resumed(fit: dict[str, Any]) -> None:
    epoch, batches = fit["epoch_progress"]["current"], fit[LOOP]["current"]["ready"]
    within = ""
    if epoch["ready"] != epoch["processed"]:
        within = (
            f"; its epoch {epoch['processed']} begins anew after {batches} batches, and is so much longer: a "
            "checkpoint of an epoch's end avoids that"
        )
    logger.warning(
        "the reader of this run keeps no place in checkpoints, and draws its order from random numbers: this run goes "
        "on with other batches than the one that stopped%s",
        within,
    )


def best_checkpoint(trainer: Trainer) -> str:
    """The checkpoint that the newest one in the folder of ModelCheckpoint names as the best so far.

    Raises:
        InputError: If there is none.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        folder = Path(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]
        last = newest(folder.glob("*.ckpt")) if folder.is_dir() else None
        if last is None:
            raise InputError(f"ckpt_path best: there is no checkpoint in {folder}: name a file")
        kept = read_checkpoint(last, weights_only=None).get("callbacks", {})
        named = [state["best_model_path"] for state in kept.values() if "best_model_path" in state]
        for path in (Path(name) for name in named if name):
            found = path if path.is_file() else folder / path.name  # the folder may have moved
            if found.is_file():
                return str(found)
        raise InputError(f"ckpt_path best: {last} names no best checkpoint that is there: name a file")
    raise InputError("ckpt_path best: trainer.callbacks has no ModelCheckpoint that keeps the best: name a file")
