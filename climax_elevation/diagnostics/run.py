"""A finished run of `train`, opened again from its folder: its model with its weights, and its data."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import LightningModule

from climax_elevation.checkpoints import check_weights, read_checkpoint
from climax_elevation.checks import one_of
from climax_elevation.diagnostics.interventions import PARTS, effects
from climax_elevation.diagnostics.strength import assess
from climax_elevation.errors import InputError
from climax_elevation.training import read_datamodule
from climax_elevation.upstream.config import CLIMAX_CLASS, REGIONAL_CLASS, STAND_IN_CLASS
from climax_elevation.upstream.lightning import configuration_errors
from climax_elevation.upstream.locate import find_climax
from climax_elevation.upstream.overlay import importable, overlay

UPSTREAM = {
    CLIMAX_CLASS: ("climax.global_forecast.train", "GlobalForecast"),
    REGIONAL_CLASS: ("climax.regional_forecast.train", "RegionalForecast"),
}
"""By the network: the training script, and how the names of its two classes begin."""


@dataclass(frozen=True)
class Run:
    """A trained model and its data.

    Attributes:
        module: The Lightning module, with the checkpoint's weights, in evaluation mode.
        datamodule: The run's, set up.
        checkpoint: Where the weights are from.
    """

    module: LightningModule
    datamodule: Any
    checkpoint: Path


@contextmanager
def open_run(
    folder: str | Path, *, checkpoint: Path | None = None, root_dir: Path | None = None, climax: Path | None = None
) -> Iterator[Run]:
    """Open a run of global or regional forecasting.

    Args:
        folder: Holds the run's config.yaml and its checkpoints, both at any depth.
        checkpoint: Which one; None: the only one that is not last.ckpt, or else that.
        root_dir: Folder of the shards, if they are not where the run had them.
        climax: A copy of ClimaX, as `find_climax` takes it, for a run of ClimaX itself.

    Raises:
        InputError: If the folder holds no such run or several, data or ClimaX are missing, or the
            checkpoint is of another model.
    """
    folder = Path(folder)
    config = read_config(folder, root_dir)
    checkpoint = choose_checkpoint(folder, checkpoint)
    with host_classes(config, climax) as (module_class, datamodule_class):
        built = configured({"model": module_class, "data": datamodule_class}, config)
        module, datamodule = built.model, built.data
        load_weights(module, checkpoint)
        if hasattr(datamodule, "set_patch_size"):  # as upstream's script for regions does
            datamodule.set_patch_size(module.get_patch_size())
        datamodule.setup("fit")
        datamodule.setup("test")
        read_datamodule(module, datamodule)
        module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        yield Run(module, datamodule, checkpoint)


def examine(run: Run, part: str) -> str:
    """Whether the bias of a run is alive, and what interventions change on a part of its data, to print."""
    loader = getattr(run.datamodule, f"{one_of('part', part, PARTS)}_dataloader")
    report = assess(run.module, next(iter(loader())))
    return f"{run.checkpoint}\n\n{report}\n\n{effects(run.module, run.datamodule, part, progress=True)}"


def read_config(folder: Path, root_dir: Path | None) -> dict[str, Any]:
    """The run's `model` and `data`, without interpolations, to be built again where it may be another machine.

    Args:
        folder: Holds the run's config.yaml, at any depth.
        root_dir: Folder of the data, if it is not where the run had it.

    Raises:
        InputError: If there is no config.yaml or several, or it is not of a run.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not the folder of a run")
    files = sorted(folder.rglob("config.yaml"))
    if len(files) != 1:
        folders = ", ".join(str(file.parent) for file in files)
        found = f"has {len(files)} of them: name one of their folders, {folders}" if files else "has none"
        raise InputError(
            f"a run's folder has one config.yaml, as climax-elevation train writes it, and {folder} {found}"
        )
    try:
        config = OmegaConf.load(files[0])
        if not isinstance(config, DictConfig) or "model" not in config or "data" not in config:
            raise InputError(f"{files[0]} is no configuration of a run: it has the keys model and data")
        read: dict[str, Any] = {key: OmegaConf.to_container(config[key], resolve=True) for key in ("model", "data")}
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{files[0]}: {' '.join(str(error).split())}") from error
    if root_dir is not None:
        read["data"]["root_dir"] = str(root_dir)
    if "pretrained_path" in read["model"]:
        read["model"]["pretrained_path"] = ""  # the checkpoint has what was made of those weights
    net = read["model"].get("net")
    bias_args = (net.get("init_args") or {}).get("bias_args") if isinstance(net, dict) else None
    if bias_args:
        bias_args["engine"] = "auto"  # what the run asked for may not work on this machine
    return read


def choose_checkpoint(folder: Path, given: Path | None) -> Path:
    """The checkpoint that is given, or the only one of a run that is not its last, or else the last.

    Raises:
        InputError: If there is none, or what to take is not clear.
    """
    if given is not None:
        if not given.is_file():
            raise InputError(f"checkpoint {given} does not exist")
        return given
    found = sorted(folder.rglob("*.ckpt"))
    best = [path for path in found if not path.name.startswith("last")] or found
    if not best:
        raise InputError(f"{folder} has no checkpoint (*.ckpt): add ModelCheckpoint to trainer.callbacks")
    if len(best) > 1:
        raise InputError(f"{folder} has several checkpoints: name one of {', '.join(map(str, best))}")
    return best[0]


@contextmanager
def host_classes(config: dict[str, Any], climax: Path | None) -> Iterator[tuple[type, type]]:
    """The module's and the data module's class, of the host that the run had.

    Args:
        config: From `read_config`.
        climax: A copy of ClimaX, as `find_climax` takes it.

    Raises:
        InputError: If it is a run of something else, or ClimaX is missing.
    """
    net = config["model"].get("net")
    host = net.get("class_path") if isinstance(net, dict) else None
    if host == STAND_IN_CLASS and climax is not None:
        raise InputError(f"the run is one of the stand-in host, and {climax} would not be used: leave out --climax")
    if host == STAND_IN_CLASS:
        from climax_elevation.host.module import GlobalForecastModule
        from climax_elevation.host.shards import GlobalForecastDataModule

        yield GlobalForecastModule, GlobalForecastDataModule
    elif host in UPSTREAM and "variables" in config["data"]:
        script_name, prefix = UPSTREAM[host]
        with overlay(find_climax(climax), patched=True) as source, importable(source):
            script: Any = importlib.import_module(script_name)
            yield getattr(script, f"{prefix}Module"), getattr(script, f"{prefix}DataModule")
    else:
        raise InputError(
            f"runs of global_forecast and regional_forecast can be opened, of {', '.join(UPSTREAM)} or "
            f"{STAND_IN_CLASS}, not {'pretraining' if host in UPSTREAM else f'runs of {host}'}"
        )


def configured(classes: dict[str, type], config: dict[str, Any], *, build: bool = True) -> Any:
    """Parts of a configuration, checked and with defaults, by their keys.

    Args:
        classes: What is configured under each key.
        config: From `read_config`.
        build: Whether to make the objects, not only to read their settings.

    Raises:
        InputError: If the configuration is not one of these classes.
    """
    from pytorch_lightning.cli import LightningArgumentParser

    parser = LightningArgumentParser(exit_on_error=False)
    for key, configurable in classes.items():
        parser.add_lightning_class_args(configurable, key)
    with configuration_errors():
        parsed = parser.parse_object({key: config[key] for key in classes})
        return parser.instantiate_classes(parsed) if build else parsed


def load_weights(module: LightningModule, checkpoint: Path) -> None:
    """Give a module the weights of a checkpoint, which holds tensors alone.

    Raises:
        InputError: If it is no such file, or of another model, or has a weight that is not finite.
    """
    saved = read_checkpoint(checkpoint)
    check_weights(saved["state_dict"], f"checkpoint {checkpoint}")
    try:
        module.load_state_dict(saved["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{checkpoint} does not fit the run's configuration: {reason}") from error
