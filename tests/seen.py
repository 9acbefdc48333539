"""A callback for tests that start processes: which time steps of tiny_data each of them read, and when."""

import json
from pathlib import Path

from pytorch_lightning import Callback


class Seen(Callback):
    """Writes OUT/seen-RANK.json at the end: part, epoch, and the first pixel's time steps, a batch."""

    def __init__(self):
        self.batches = []

    def _add(self, part, trainer, batch):
        if trainer.sanity_checking:
            return
        scale = trainer.datamodule.transforms
        mean, std = float(scale.mean[1]), float(scale.std[1])
        steps = [round(value * std + mean - 280) for value in batch[0][:, 1, 0, 0].double().tolist()]
        self.batches.append([part, trainer.current_epoch, steps])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._add("train", trainer, batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._add("val", trainer, batch)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._add("test", trainer, batch)

    def teardown(self, trainer, pl_module, stage):
        out = Path(trainer.default_root_dir)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"seen-{trainer.global_rank}.json").write_text(json.dumps(self.batches))
