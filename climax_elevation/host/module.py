"""ClimaX's training of global forecasts, for where its own training script is not installed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from climax_elevation.checks import learning_rate, not_below_zero
from climax_elevation.errors import InputError
from climax_elevation.host.metrics import lat_weighted_acc, lat_weighted_mse, lat_weighted_mse_val, lat_weighted_rmse
from climax_elevation.host.shards import Normalize
from climax_elevation.pretrained import load_pretrained

logger = logging.getLogger(__name__)

NOT_DECAYED = ("var_embed", "pos_embed", "attn.bias.")

Batch = tuple[Tensor, Tensor, Tensor, list[str], list[str]]


class GlobalForecastModule(LightningModule):
    """Trains and scores a network with ClimaX's loss, metrics, optimiser and schedule.

    Constructor and logged names are upstream's: "train/loss", "val/w_rmse", "test/acc",
    "val/w_rmse_VARIABLE_POSTFIX" and so on. POSTFIX is the lead time, see `postfix`; upstream's takes
    data.predict_range for hours, whatever hrs_each_step is. Latitudes, statistics and climatologies come
    from the trainer's data module. Under `seed_everything`, each step's dropout depends on seed, epoch, step
    and rank alone: a resumed run repeats what an uninterrupted one does.

    Args:
        net: `climax_elevation.host.StandInClimaX`, or a model with its methods.
        pretrained_path: Lightning checkpoint, file or URL, whose weights the network starts from; "": none.
        lr: Learning rate after warm-up.
        beta_1, beta_2: AdamW's.
        weight_decay: AdamW's; embeddings and terrain biases have none.
        warmup_epochs: Length of warm-up, in optimiser steps (the name is upstream's).
        max_epochs: Steps at which the learning rate reaches eta_min.
        warmup_start_lr: Learning rate of the first step.
        eta_min: Lowest learning rate of the cosine.

    Raises:
        InputError: If lr is not above 0, or weight_decay, warmup_start_lr or eta_min below 0, or one of them not
            finite; if max_epochs is not above warmup_epochs; or if pretrained_path is unusable.
    """

    def __init__(
        self,
        net: nn.Module,
        pretrained_path: str = "",
        lr: float = 5e-4,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        weight_decay: float = 1e-5,
        warmup_epochs: int = 10000,
        max_epochs: int = 200000,
        warmup_start_lr: float = 1e-8,
        eta_min: float = 1e-8,
    ) -> None:
        super().__init__()
        learning_rate("model.lr", lr)
        not_below_zero("model.weight_decay", weight_decay)
        not_below_zero("model.warmup_start_lr", warmup_start_lr)
        not_below_zero("model.eta_min", eta_min)
        if not 0 <= warmup_epochs < max_epochs:
            raise InputError(
                f"model.warmup_epochs is from 0 to model.max_epochs ({max_epochs}, both in steps), not {warmup_epochs}"
            )
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net = net
        if pretrained_path:
            load_pretrained(self, pretrained_path)

    def setup(self, stage: str) -> None:
        """Take from the trainer's data module what losses and metrics need."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise InputError("GlobalForecastModule reads latitudes and statistics from a data module: give one")
        self.lat, self.lon = data.get_lat_lon()
        self.denormalize = Normalize(data.output_transforms.mean, data.output_transforms.std).inverse()
        self.climatologies = {"val": data.val_clim, "test": data.test_clim}
        self.log_postfix = postfix(data.hparams.predict_range * data.hparams.get("hrs_each_step", 1))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make this step's random numbers independent of what ran before it."""
        seed = os.environ.get("PL_GLOBAL_SEED")
        if seed is not None:
            key = [int(seed), self.current_epoch, batch_idx, self.global_rank]
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The latitude-weighted mean squared error of a batch."""
        x, y, lead_times, variables, out_variables = batch
        losses, _ = self.net.forward(x, y, lead_times, variables, out_variables, [lat_weighted_mse], lat=self.lat)
        for name, value in losses[0].items():
            self.log(f"train/{name}", value, on_step=True, on_epoch=False, prog_bar=True, batch_size=len(x))
        return losses[0]["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Scores of a batch, logged as val/..."""
        self._score(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Scores of a batch, logged as test/..."""
        self._score(batch, "test")

    def _score(self, batch: Batch, part: str) -> None:
        x, y, lead_times, variables, out_variables = batch
        scores = self.net.evaluate(  # type: ignore[operator]
            x,
            y,
            lead_times,
            variables,
            out_variables,
            transform=self.denormalize,
            metrics=[lat_weighted_mse_val, lat_weighted_rmse, lat_weighted_acc],
            lat=self.lat,
            clim=self.climatologies[part],
            log_postfix=self.log_postfix,
        )
        for score in scores:
            named = {f"{part}/{name}": value for name, value in score.items()}
            self.log_dict(named, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(x))

    def configure_optimizers(self) -> Any:
        """AdamW, and the schedule of `warmup_cosine`, every step."""
        settings = self.hparams
        kept: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            (kept if any(part in name for part in NOT_DECAYED) else decayed).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": kept, "weight_decay": 0.0}],
            lr=settings["lr"],
            betas=(settings["beta_1"], settings["beta_2"]),
        )
        schedule = warmup_cosine(
            optimizer,
            settings["warmup_epochs"],
            settings["max_epochs"],
            settings["warmup_start_lr"],
            settings["eta_min"],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1}}


def postfix(hours: int) -> str:
    """End of a metric's name, "6_hours" or "3_days": whole days from 24 hours on, hours where they are none."""
    return f"{hours // 24}_days" if hours >= 24 and hours % 24 == 0 else f"{hours}_hours"


def warmup_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, max_steps: int, start_lr: float, eta_min: float
) -> LambdaLR:
    """Linear warm-up, then a cosine, of the learning rate: ClimaX's schedule, in closed form.

        lr(n) = start + n (base - start) / (W - 1)                          for n < W
        lr(n) = eta_min + (base - eta_min) (1 + cos(pi (n - W) / (M - W))) / 2  for n >= W

    Warm-up is one step early: lr(W - 1) is base already, and so is lr(W). After M the cosine rises again.

    Args:
        optimizer: Its groups' learning rates are `base`, > 0.
        warmup_steps: W.
        max_steps: M, > W.
        start_lr: Learning rate of step 0, where W > 0.
        eta_min: Learning rate of step M.
    """

    def factor(base: float, step: int) -> float:
        if step < warmup_steps:
            return (start_lr + step * (base - start_lr) / max(1, warmup_steps - 1)) / base
        angle = math.pi * (step - warmup_steps) / (max_steps - warmup_steps)
        return (eta_min + (base - eta_min) * (1 + math.cos(angle)) / 2) / base

    factors: list[Callable[[int], float]] = [partial(factor, group["lr"]) for group in optimizer.param_groups]
    return LambdaLR(optimizer, factors)
