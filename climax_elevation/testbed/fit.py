"""One training of a small network on prepared data: what the demonstration and comparisons share."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from climax_elevation.bias import ElevationBias
from climax_elevation.checks import count, positive, share, true_or_false
from climax_elevation.errors import InputError
from climax_elevation.host import StandInClimaX
from climax_elevation.host.module import GlobalForecastModule
from climax_elevation.host.shards import GlobalForecastDataModule
from climax_elevation.training import TerrainCallback

WARM_UP_SHARE = 10  # of the steps, one in so many
FULL_SHUFFLE = 10000  # pairs that the next one is drawn from: more than small data sets have


@dataclass(frozen=True)
class DataSettings:
    """Which shards, and what is forecast from what.

    Args:
        root_dir: Folder of ClimaX's shards.
        variables: Input channels.
        out_variables: Target channels.
        predict_range: Steps from input to target.
        hrs_each_step: Hours of a step.
    """

    root_dir: str
    variables: tuple[str, ...]
    out_variables: tuple[str, ...]
    predict_range: int = 1
    hrs_each_step: int = 1

    def module(self, batch_size: int) -> GlobalForecastDataModule:
        """The data module; its order is that of the seed in force."""
        return GlobalForecastDataModule(
            self.root_dir,
            list(self.variables),
            buffer_size=FULL_SHUFFLE,
            out_variables=list(self.out_variables),
            predict_range=self.predict_range,
            hrs_each_step=self.hrs_each_step,
            batch_size=batch_size,
        )


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of the network, by ClimaX's names.

    Args:
        patch_size, embed_dim, depth, decoder_depth, num_heads, mlp_ratio, drop_path, drop_rate: ClimaX's.
        rescale_weights: See `rescale_weights`.
    """

    patch_size: int = 4
    embed_dim: int = 64
    depth: int = 1
    decoder_depth: int = 1
    num_heads: int = 4
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    drop_rate: float = 0.0
    rescale_weights: bool = True

    def __post_init__(self) -> None:
        for name in ("patch_size", "embed_dim", "depth", "decoder_depth", "num_heads"):
            count(f"model.{name}", getattr(self, name))
        positive("model.mlp_ratio", self.mlp_ratio, "widths")
        for name in ("drop_path", "drop_rate"):
            share(f"model.{name}", getattr(self, name))
        true_or_false("model.rescale_weights", self.rescale_weights)


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained.

    Args:
        steps: Optimiser steps; the learning rate rises over the first tenth and then falls as a cosine.
        batch_size: Pairs a step.
        lr: Learning rate after warm-up.
        weight_decay: AdamW's; embeddings and terrain biases have none.
        validations: How often the validation part is scored, evenly spread.
        lr_factor: The biases' parameters learn at lr times this.
    """

    steps: int = 800
    batch_size: int = 16
    lr: float = 6e-3
    weight_decay: float = 1e-5
    validations: int = 10
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validations"):
            count(f"training.{name}", getattr(self, name))
        if self.steps < self.validations:
            raise InputError(
                f"training.steps is at least training.validations ({self.validations}), not {self.steps}: "
                "train longer, or validate less often"
            )
        positive("training.lr", self.lr, "learning rate")
        positive("training.lr_factor", self.lr_factor, "times the learning rate")
        if not self.weight_decay >= 0:
            raise InputError(f"training.weight_decay is 0 or more, not {self.weight_decay}")


def build_network(
    settings: ModelSettings,
    variables: Sequence[str],
    img_size: Sequence[int],
    *,
    seed: int,
    bias_type: str | None = None,
    bias_args: dict[str, Any] | None = None,
    host: Callable[..., nn.Module] = StandInClimaX,
) -> nn.Module:
    """A fresh network; the host's weights depend on the seed alone, not on the bias.

    Args:
        settings: Sizes.
        variables: Channels it knows.
        img_size: Height and width, pixels.
        seed: Of the weights.
        bias_type: As `climax_elevation.attach` takes it; None: no bias.
        bias_args: As `climax_elevation.attach` takes them.
        host: `StandInClimaX`, or a patched `climax.arch.ClimaX`.

    Raises:
        InputError: If sizes do not fit each other, or the bias does not fit the network.
    """
    torch.manual_seed(seed)
    net = host(**network_arguments(settings, variables, img_size, bias_type, bias_args))
    if settings.rescale_weights:
        rescale_weights(net)
    return net


def network_arguments(
    settings: ModelSettings,
    variables: Sequence[str],
    img_size: Sequence[int],
    bias_type: str | None = None,
    bias_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The arguments of ClimaX's constructor."""
    sizes = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name != "rescale_weights"}
    return {
        "default_vars": list(variables),
        "img_size": list(img_size),
        **sizes,
        "use_physics_mask": bias_type is not None,
        "bias_type": bias_type or "",
        "bias_args": bias_args,
    }


def rescale_weights(net: nn.Module) -> None:
    """Scale fresh weights of the host to a standard deviation of 1 / sqrt(inputs); the biases keep theirs.

    ClimaX's 0.02 suits 1024 inputs and long training; with 64 the input would reach the output so thinned
    that a little training learns only the mean.
    """
    own = {id(p) for part in net.modules() if isinstance(part, ElevationBias) for p in part.parameters()}
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("weight") and weight.dim() > 1 and id(weight) not in own:
                weight.mul_(weight[0].numel() ** -0.5 / weight.std())


def bias_scalars(net: nn.Module) -> dict[str, float]:
    """The biases' parameters that are one number each, by their name without `attn.bias`."""
    return {
        f"{place}.{name}".replace(".attn.bias", ""): parameter.item()
        for place, part in net.named_modules()
        if isinstance(part, ElevationBias)
        for name, parameter in part.named_parameters()
        if parameter.numel() == 1
    }


@dataclass(frozen=True)
class Fitted:
    """A finished training.

    Attributes:
        trainer, module, data: As they were trained.
        curve: Training steps, and validation's w_rmse there (see `climax_elevation.host.metrics`).
        seconds_a_step: Median over training, reading of data excluded.
        scalars: Each of `bias_scalars`, before and after training.
    """

    trainer: Trainer
    module: GlobalForecastModule
    data: GlobalForecastDataModule
    curve: list[tuple[int, float]]
    seconds_a_step: float
    scalars: dict[str, tuple[float, float]]


def fit(
    net: nn.Module,
    data: DataSettings,
    training: TrainingSettings,
    *,
    seed: int,
    on_step: Callable[[float | None], None],
    device: int | None = None,
    keep_best: bool = False,
) -> Fitted:
    """Train `net` on the training part, and score the validation part in between.

    Args:
        net: Fresh, from `build_network`.
        data, training: Settings.
        seed: Of the data's order and of dropout.
        on_step: Called after every step, with the latest validation error or None.
        device: Index of a GPU; None: the CPU.
        keep_best: Leave the network with the weights that had validation's least w_mse, not the last ones.

    Returns:
        What came out; `net` itself is trained.
    """
    watch, best = _Watch(on_step), _KeepBest()
    start = bias_scalars(net)
    with quiet():
        seed_everything(seed)
        module = GlobalForecastModule(
            net,
            lr=training.lr,
            weight_decay=training.weight_decay,
            warmup_epochs=training.steps // WARM_UP_SHARE,
            max_epochs=training.steps,
        )
        source = data.module(training.batch_size)
        trainer = Trainer(
            accelerator="cpu" if device is None else "gpu",
            devices=1 if device is None else [device],
            max_steps=training.steps,
            max_epochs=-1,
            val_check_interval=training.steps // training.validations,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[watch, TerrainCallback(training.lr_factor), *([best] if keep_best else [])],
        )
        trainer.fit(module, datamodule=source)
    end = bias_scalars(net)
    scalars = {key: (start[key], end[key]) for key in end}
    return Fitted(trainer, module, source, watch.curve, median(watch.seconds), scalars)


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning says nothing: it advises more workers for reading, which cost more here than they save."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")]
    loggers.append(logging.getLogger("lightning_fabric"))
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors are not worth sharing: threads wait for each other, by far the most where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Numbers below 1e-38 are 0: the tails of a Gaussian are full of them, and processors take long over each."""
    was_on = bool(torch.tensor(2e-308, dtype=torch.float64) / 16 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)


class _Watch(Callback):
    """The error over training, and the time a step."""

    def __init__(self, on_step: Callable[[float | None], None]) -> None:
        self.on_step = on_step
        self.curve: list[tuple[int, float]] = []
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = _now(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(_now(pl_module) - self._started)
        self.on_step(self.curve[-1][1] if self.curve else None)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.curve.append((trainer.global_step, float(trainer.callback_metrics["val/w_rmse"])))


class _KeepBest(Callback):
    """Holds the weights of the least validation error, and puts them back at the end."""

    def __init__(self) -> None:
        self._least = float("inf")
        self._weights: dict[str, Tensor] | None = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        error = float(trainer.callback_metrics["val/w_mse"])
        if error < self._least:
            self._least, self._weights = error, deepcopy(pl_module.state_dict())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._weights is not None:
            pl_module.load_state_dict(self._weights)


def _now(module: LightningModule) -> float:
    """The clock, after what a GPU still has to do."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()
