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

from climax_elevation.checks import one_of
from climax_elevation.diagnostics.interventions import PARTS, effects
from climax_elevation.diagnostics.strength import assess
from climax_elevation.errors import InputError
from climax_elevation.training import read_datamodule
from climax_elevation.upstream.config import CLIMAX_CLASS, STAND_IN_CLASS
from climax_elevation.upstream.lightning import configuration_errors
from climax_elevation.upstream.locate import find_climax
from climax_elevation.upstream.overlay import importable, overlay


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
    """Open a run of global forecasting.

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
    config = _read_config(folder)
    checkpoint = _checkpoint(folder, checkpoint)
    if root_dir is not None:
        config["data"]["root_dir"] = str(root_dir)
    if "pretrained_path" in config["model"]:
        config["model"]["pretrained_path"] = ""  # the checkpoint has what was made of those weights
    with _classes(config, climax) as (module_class, datamodule_class):
        module, datamodule = _build(module_class, datamodule_class, config)
        _load(module, checkpoint)
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


def _read_config(folder: Path) -> dict[str, Any]:
    """The run's `model` and `data`, without interpolations."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not the folder of a run")
    files = sorted(folder.rglob("config.yaml"))
    if len(files) != 1:
        found = f"has {len(files)} of them: name one of their folders" if files else "has none"
        raise InputError(
            f"a run's folder has one config.yaml, as climax-elevation train writes it, and {folder} {found}"
        )
    try:
        config = OmegaConf.load(files[0])
        if not isinstance(config, DictConfig) or "model" not in config or "data" not in config:
            raise InputError(f"{files[0]} is no configuration of a run: it has the keys model and data")
        return {key: OmegaConf.to_container(config[key], resolve=True) for key in ("model", "data")}
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{files[0]}: {' '.join(str(error).split())}") from error


def _checkpoint(folder: Path, given: Path | None) -> Path:
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
def _classes(config: dict[str, Any], climax: Path | None) -> Iterator[tuple[type, type]]:
    """The module's and the data module's class, of the host that the run had."""
    net = config["model"].get("net")
    host = net.get("class_path") if isinstance(net, dict) else None
    if host == STAND_IN_CLASS and climax is not None:
        raise InputError(f"the run is one of the stand-in host, and {climax} would not be used: leave out --climax")
    if host == STAND_IN_CLASS:
        from climax_elevation.host.module import GlobalForecastModule
        from climax_elevation.host.shards import GlobalForecastDataModule

        yield GlobalForecastModule, GlobalForecastDataModule
    elif host == CLIMAX_CLASS:
        with overlay(find_climax(climax), patched=True) as source, importable(source):
            script: Any = importlib.import_module("climax.global_forecast.train")
            yield script.GlobalForecastModule, script.GlobalForecastDataModule
    else:
        raise InputError(f"runs of global_forecast can be opened, of {CLIMAX_CLASS} or {STAND_IN_CLASS}, not of {host}")


def _build(module_class: type, datamodule_class: type, config: dict[str, Any]) -> tuple[LightningModule, Any]:
    from pytorch_lightning.cli import LightningArgumentParser

    bias_args = config["model"]["net"].get("init_args", {}).get("bias_args")
    if bias_args:
        bias_args["engine"] = "auto"  # what the run asked for may not work on this machine
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(module_class, "model")
    parser.add_lightning_class_args(datamodule_class, "data")
    with configuration_errors():
        built = parser.instantiate_classes(parser.parse_object(config))
    return built.model, built.data


def _load(module: LightningModule, checkpoint: Path) -> None:
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # of other files torch reads what it can, and then raises anything
        said = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{checkpoint} is no checkpoint of tensors alone: {said[0]}") from error
    try:
        module.load_state_dict(saved["state_dict"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{checkpoint} is no checkpoint of Lightning's: it has no state_dict") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{checkpoint} does not fit the run's configuration: {reason}") from error
