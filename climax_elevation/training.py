"""What a Lightning run owes the terrain: units from its data module, and how its scalars are trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from climax_elevation.bias import ElevationBias
from climax_elevation.checks import positive
from climax_elevation.errors import InputError
from climax_elevation.pretrained import describe
from climax_elevation.seam import TerrainSeam
from climax_elevation.watch import settle

logger = logging.getLogger(__name__)

NUMBERS = ("step", "mu_product", "eta", "mu")  # that optimisers keep of a parameter, whatever its shape


class TerrainCallback(Callback):
    """Gives a terrain-aware ClimaX what it cannot know: in which units its input was standardised.

    From the data module it takes the mean and standard deviation of the orography and wind channels
    (`transforms.mean`, `transforms.std` and `hparams.variables`, or the same by source when several are
    mixed) and the grid (`get_lat_lon()`). It moves the biases' parameters to the optimiser's group
    without weight decay, and says at the end how far each scalar moved. Where the flag is off it does
    nothing of this. Into every checkpoint it writes what the network is, so that its weights can be mapped
    by name.

    Args:
        lr_factor: The biases' parameters learn at the run's learning rate times this, all along its schedule.

    Raises:
        InputError: If lr_factor is not above 0, if sources that are mixed standardise a channel differently
            that the bias reads, if what the data module says disagrees with the config or the checkpoint,
            or if an optimiser has no group without weight decay, or no learning rates of its groups.
    """

    def __init__(self, lr_factor: float = 1.0) -> None:
        self.lr_factor = positive("lr_factor", lr_factor, "times the learning rate")
        self._started: dict[str, float] = {}
        self._own_rates: list[OwnRate] = []
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is not None:
            read_datamodule(pl_module, datamodule)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before the optimiser's state is restored, which has to find the same groups again
        parameters = bias_parameters(pl_module)
        for optimizer in trainer.optimizers:
            exempt_from_decay(optimizer, list(parameters.values()))
            self._hooks.append(read_older_scalars(optimizer, list(parameters.values())))
            if self.lr_factor != 1 and parameters:
                self._own_rates.append(OwnRate(optimizer, list(parameters.values()), self.lr_factor))
        self._started = _scalars(parameters)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # perhaps in the middle of a step, and a checkpoint may still be written
        self._let_go()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        describe(checkpoint, getattr(pl_module, "net", None))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        settle()  # what is still on its way of the last batches: a bad one is not the end of an epoch

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        settle()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        settle()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        settle()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()
        now = _scalars(bias_parameters(pl_module))
        for name, start in self._started.items():
            logger.info("terrain: %s moved from %.6g to %.6g", name, start, now[name])

    def _let_go(self) -> None:
        """Leave the optimisers as they were found."""
        for own_rate in self._own_rates:
            own_rate.remove()
        for hook in self._hooks:
            hook.remove()
        self._own_rates.clear()
        self._hooks.clear()


class OwnRate:
    """Some parameters learn at `factor` times the learning rate of their optimiser's groups.

    They form groups of their own while the optimiser steps, and only then: schedules, which know the groups
    that there were when they were made, and checkpoints never see these.

    Args:
        optimizer: Takes the learning rate of each step from its groups.
        parameters: Those that are not its own are ignored.
        factor: Above 0.

    Raises:
        InputError: If the optimiser is L-BFGS, which has one learning rate for all.
    """

    def __init__(self, optimizer: Optimizer, parameters: list[nn.Parameter], factor: float) -> None:
        if isinstance(optimizer, LBFGS):
            raise InputError("L-BFGS has one learning rate for all parameters: leave out lr_factor")
        self.optimizer = optimizer
        self.factor = factor
        self._ids = {id(parameter) for parameter in parameters}
        self._whole: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._split()),
            optimizer.register_step_post_hook(lambda *_: self._join()),
        ]

    def remove(self) -> None:
        """Leave the optimiser as it was found."""
        self._join()
        for hook in self._hooks:
            hook.remove()

    def _split(self) -> None:
        self._whole = [(group, group["params"]) for group in self.optimizer.param_groups]
        groups = []
        for group, parameters in self._whole:
            own = [parameter for parameter in parameters if id(parameter) in self._ids]
            if own:
                groups.append({**group, "params": own, "lr": group["lr"] * self.factor})
                group["params"] = [parameter for parameter in parameters if id(parameter) not in self._ids]
            if group["params"]:
                groups.append(group)
        self.optimizer.param_groups[:] = groups

    def _join(self) -> None:
        if not self._whole:
            return
        for group, parameters in self._whole:
            group["params"] = parameters
        self.optimizer.param_groups[:] = [group for group, _ in self._whole]
        self._whole = []


def read_older_scalars(optimizer: Optimizer, parameters: list[nn.Parameter]) -> RemovableHandle:
    """From now on what an optimiser loads of `parameters` of shape (1,) gets that shape, where it has none."""

    def give_dimension(optimizer: Optimizer) -> None:
        for parameter in parameters:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if name not in NUMBERS and isinstance(value, Tensor) and value.shape == () and parameter.shape == (1,):
                    state[name] = value.reshape(1)

    return optimizer.register_load_state_dict_post_hook(give_dimension)


def exempt_from_decay(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Move `parameters` to the group of `optimizer` that has no weight decay.

    A group of their own would be unknown to the schedules made for the groups that there are.

    Raises:
        InputError: If one of them is decayed and there is no group without decay at its learning rate.
    """
    ids = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        decayed = [parameter for parameter in group["params"] if id(parameter) in ids]
        if not decayed or not group["weight_decay"]:
            continue
        spared = [other for other in optimizer.param_groups if not other["weight_decay"] and other["lr"] == group["lr"]]
        if not spared:
            raise InputError(
                f"terrain scalars must not be decayed, and {type(optimizer).__name__} has no parameter group with "
                "weight_decay 0 at their learning rate: give it one, or set weight_decay 0"
            )
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        spared[0]["params"].extend(decayed)


def read_datamodule(module: nn.Module, datamodule: Any) -> None:
    """Give the terrain readers of `module` the statistics and the grid of a ClimaX data module."""
    for part in module.modules():
        if isinstance(part, TerrainSeam):
            _read(part, datamodule)


def check_datamodule(module: nn.Module, datamodule: Any) -> None:
    """`read_datamodule`, and InputError unless the data have all that the terrain is read from."""
    read_datamodule(module, datamodule)
    variables = variables_of(datamodule)
    for part in module.modules():
        if isinstance(part, TerrainSeam):
            for names in variables.values() if isinstance(variables, dict) else [variables]:
                part.check_channels(names)


def bias_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The biases' parameters, by their name in the model."""
    return {
        f"{place}.{name}": parameter
        for place, part in module.named_modules()
        if isinstance(part, ElevationBias)
        for name, parameter in part.named_parameters()
    }


def _scalars(parameters: dict[str, nn.Parameter]) -> dict[str, float]:
    return {name: parameter.item() for name, parameter in parameters.items() if parameter.numel() == 1}


def _read(reader: TerrainSeam, datamodule: Any) -> None:
    source = f"the data module {type(datamodule).__name__}"
    folder = datamodule.hparams.get("root_dir") if hasattr(datamodule, "hparams") else None
    if folder is not None and Path(folder).is_dir():
        reader.cache_dir = Path(folder)
    transforms, variables = getattr(datamodule, "transforms", None), variables_of(datamodule)
    if isinstance(transforms, dict):
        _read_mixed_sources(reader, transforms, variables, source)
    elif transforms is not None:
        reader.set_statistics(_by_name(variables, transforms.mean), _by_name(variables, transforms.std), source)
    if hasattr(datamodule, "get_lat_lon"):
        lat, lon = datamodule.get_lat_lon()
        reader.set_grid(np.asarray(lat), np.asarray(lon), source)


def _read_mixed_sources(reader: TerrainSeam, transforms: dict[str, Any], variables: Any, source: str) -> None:
    """Several sources share one model: they have to agree on every channel that the terrain is read from."""
    wanted = {reader.elevation_variable, *(reader.wind_variables or ()), reader.land_variable}
    seen: dict[str, tuple[float, float, str]] = {}
    for key, transform in transforms.items():
        for name, mean, std in zip(variables[key], transform.mean, transform.std, strict=True):
            if name not in wanted:
                continue
            mean, std = float(mean), float(std)
            if name in seen and not np.allclose((mean, std), seen[name][:2], rtol=1e-5):
                raise InputError(
                    f"{source} mixes {seen[name][2]!r} and {key!r}, which standardise {name!r} differently: give "
                    "bias_args.elevation_file and wind: false, or train on one source"
                )
            seen[name] = (mean, std, key)
    reader.set_statistics(
        {name: mean for name, (mean, _, _) in seen.items()}, {name: std for name, (_, std, _) in seen.items()}, source
    )


def variables_of(datamodule: Any) -> Any:
    """Names of the channels that a ClimaX data module reads; where several sources are mixed, of each by its name."""
    hparams = datamodule.hparams
    return hparams.dict_in_variables if "dict_in_variables" in hparams else hparams.get("variables")


def _by_name(variables: Any, values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in zip(variables, values, strict=True)}
