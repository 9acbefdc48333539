"""Configurations of Lightning 1.8, which ClimaX's YAML files are, made fit for today's Trainer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

CLIMAX_CLASS = "climax.arch.ClimaX"
REGIONAL_CLASS = "climax.regional_forecast.arch.RegionalClimaX"
STAND_IN_CLASS = "climax_elevation.host.StandInClimaX"
CALLBACK = "climax_elevation.training.TerrainCallback"
RESUME = "resume_from_checkpoint"
BIAS_ARGS = "model.net.init_args.bias_args"
OF_BIAS = re.compile(r"--model\.net\.(?:init_args\.)?bias_args(?:\.(.+))?")


@dataclass(frozen=True)
class Retired:
    """A key of the Trainer that is gone.

    Attributes:
        instead: What to write, where the value meant something; `{}` stands for the value.
        idle: Values that had no effect, None apart.
    """

    instead: str
    idle: tuple[Any, ...] = ()


NOT_NEEDED = "leave it out"

RETIRED = {
    "gpus": Retired("write trainer.accelerator: gpu and trainer.devices: {}"),
    "num_processes": Retired("write trainer.accelerator: cpu and trainer.devices: {}", (1,)),
    "tpu_cores": Retired("write trainer.accelerator: tpu and trainer.devices: {}"),
    "ipus": Retired("leave it out: IPUs are not supported any more", (0,)),
    "auto_select_gpus": Retired("write trainer.devices: auto, or the indices of the devices", (False,)),
    "amp_backend": Retired("choose mixed precision with trainer.precision: 16-mixed", ("native",)),
    "amp_level": Retired("choose mixed precision with trainer.precision: 16-mixed"),
    "track_grad_norm": Retired("log gradient norms from a callback", (-1,)),
    "auto_lr_find": Retired("set model.lr", (False,)),
    "auto_scale_batch_size": Retired("set data.batch_size", (False,)),
    "replace_sampler_ddp": Retired("write trainer.use_distributed_sampler: {}", (True,)),
    "move_metrics_to_cpu": Retired(NOT_NEEDED, (False,)),
    "multiple_trainloader_mode": Retired(NOT_NEEDED, ("max_size_cycle",)),
    "weights_save_path": Retired("write dirpath: {} in the init_args of ModelCheckpoint"),
    "checkpoint_callback": Retired("write trainer.enable_checkpointing: {}", (True,)),
    "progress_bar_refresh_rate": Retired("set refresh_rate of the callback TQDMProgressBar or RichProgressBar", (1,)),
    "process_position": Retired("set process_position of the callback TQDMProgressBar", (0,)),
    "weights_summary": Retired("use the callback ModelSummary", ("top",)),
    "flush_logs_every_n_steps": Retired("set it on the logger"),
    "log_gpu_memory": Retired("use the callback DeviceStatsMonitor"),
    "terminate_on_nan": Retired("write trainer.detect_anomaly: {}", (False,)),
    "stochastic_weight_avg": Retired("use the callback StochasticWeightAveraging", (False,)),
    "prepare_data_per_node": Retired(NOT_NEEDED, (True,)),
    "reload_dataloaders_every_epoch": Retired("write trainer.reload_dataloaders_every_n_epochs: 1", (False,)),
}


@dataclass(frozen=True)
class Modernized:
    """Arguments that today's Lightning takes.

    Attributes:
        arguments: The same, with rewritten files where a file had to change.
        resume: Checkpoint to go on from, or None; interpolations of the configuration are not resolved.
        bias_args: By name, with dots for a part of a sum, what is to change of the configuration's; likewise.
    """

    arguments: list[str]
    resume: str | None
    bias_args: dict[str, Any] = field(default_factory=dict)


def modernize(arguments: Sequence[str], folder: Path, *, stand_in: bool = False) -> Modernized:
    """Take retired keys of the Trainer out of command-line arguments and of the YAML files that they name.

    A key without effect is dropped, and the log says so; `trainer.resume_from_checkpoint` is returned.
    Files that need no change are passed on as they are. Options for entries of `bias_args` are returned too, since the
    parser takes their values for texts where a network takes a plain `dict`, and has no place for parts of a sum.

    Args:
        arguments: Of upstream's training script: `--config FILE`, `--trainer.max_epochs=5` and so on.
        folder: An existing folder for rewritten files.
        stand_in: Whether to put the stand-in host where the configuration names ClimaX.

    Raises:
        InputError: If a retired key has an effect (the sentence says what to write), or a file is no YAML.
    """
    reader = _Reader(folder, stand_in)
    kept = [argument for option in _options(arguments) for argument in reader.option(option)]
    if not any("TerrainCallback" in text for text in (*reader.texts, *arguments)):
        kept.append(f"--trainer.callbacks+={CALLBACK}")
    return Modernized(kept, reader.resume, reader.bias_args)


def with_entries(given: Mapping[str, Any] | None, entries: Mapping[str, Any]) -> dict[str, Any]:
    """`bias_args` with some entries changed, by name, with dots for a part of a sum.

    Raises:
        InputError: If what is to have an entry is no dictionary.
    """
    changed = dict(given or {})
    for name, value in entries.items():
        part, dot, rest = name.partition(".")
        own = changed.get(part)
        if dot and own is not None and not isinstance(own, Mapping):
            raise InputError(
                f"{BIAS_ARGS}.{name} is set, and {part} is {own!r}, not a dictionary: leave one of them out"
            )
        changed[part] = with_entries(own, {rest: value}) if dot else value
    return changed


@dataclass(frozen=True)
class _Option:
    """`--name=value`, `--name value`, or whatever else, as it was written."""

    name: str
    value: str | None
    written: tuple[str, ...]

    def with_value(self, value: str) -> tuple[str, ...]:
        return (f"{self.name}={value}",) if len(self.written) == 1 else (self.name, value)


def _options(arguments: Sequence[str]) -> Iterator[_Option]:
    position = 0
    while position < len(arguments):
        written = arguments[position]
        position += 1
        name, equals, value = written.partition("=")
        if equals or not name.startswith("-"):
            yield _Option(name, value if equals else None, (written,))
        elif position < len(arguments) and not arguments[position].startswith(("--", "-c")):
            yield _Option(name, arguments[position], (written, arguments[position]))
            position += 1
        else:
            yield _Option(name, None, (written,))


class _Reader:
    """Goes through the options in order, so that the last word on a key counts."""

    def __init__(self, folder: Path, stand_in: bool) -> None:
        self.folder = folder
        self.stand_in = stand_in
        self.resume: str | None = None
        self.texts: list[str] = []
        self.bias_args: dict[str, Any] = {}

    def option(self, option: _Option) -> tuple[str, ...]:
        """The arguments to pass on for an option."""
        key = option.name.removeprefix("--trainer.")
        if option.name in ("--config", "-c") and option.value is not None:
            return option.with_value(self.file(option.value))
        if key != option.name and (key in RETIRED or key == RESUME):
            if option.value is None:
                raise InputError(f"{option.name} needs a value, and Lightning no longer has it: leave it out")
            self.retire(key, _parsed(option.value), option.name)
            return ()
        of_bias = OF_BIAS.fullmatch(option.name)
        if of_bias and of_bias[1]:
            if option.value is None:
                raise InputError(f"{option.name} needs a value")
            self.bias_args.pop(of_bias[1], None)  # the last word counts
            self.bias_args[of_bias[1]] = _parsed(option.value)
            return ()
        if of_bias or option.name in ("--model", "--model.net", "--model.net.init_args"):
            self.bias_args.clear()
        if self.stand_in and option.value == CLIMAX_CLASS and option.name in ("--model.net", "--model.net.class_path"):
            _log_stand_in(option.name)
            return option.with_value(STAND_IN_CLASS)
        return option.written

    def file(self, name: str) -> str:
        """The path of a file that says the same without retired keys: its own, if it had none."""
        path = Path(name)
        if not path.is_file():
            raise InputError(f"--config {name} does not exist")
        try:
            config = OmegaConf.load(path)
        except OSError:  # as OmegaConf calls a single value
            raise InputError(
                f"{name} holds no configuration: it should have the keys trainer, model and data"
            ) from None
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise InputError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(config, DictConfig):
            raise InputError(f"{name} holds no configuration: it should have the keys trainer, model and data")
        self.texts.append(OmegaConf.to_yaml(config))
        if "bias_args" in (_child(_child(_child(config, "model"), "net"), "init_args") or {}):
            self.bias_args.clear()
        if not self._edit(config, name):
            return name
        for part, value in _plain(config).items():
            # a part in a file of its own is looked for beside the file that names it
            if isinstance(value, str) and (path.parent / value).is_file():
                config[part] = str((path.parent / value).resolve())
        rewritten = self.folder / f"{len(self.texts)}-{path.name}"
        OmegaConf.save(config, rewritten, resolve=False)
        return str(rewritten)

    def _edit(self, config: DictConfig, name: str) -> bool:
        """Whether anything had to change."""
        changed = False
        trainer = _child(config, "trainer")
        if trainer is not None:
            # interpolations stay what they are: the command line may override what they refer to
            for key, value in _plain(trainer).items():
                if key in RETIRED or key == RESUME:
                    self.retire(str(key), value, f"trainer.{key} in {name}")
                    del trainer[key]
                    changed = True
        net = _child(_child(config, "model"), "net")
        if self.stand_in and net is not None and net.get("class_path") == CLIMAX_CLASS:
            _log_stand_in(f"model.net.class_path in {name}")
            net.class_path = STAND_IN_CLASS
            changed = True
        return changed

    def retire(self, key: str, value: Any, where: str) -> None:
        """Drop a key that had no effect, remember the checkpoint to resume from, and refuse any other."""
        if key == RESUME:
            self.resume = None if value is None else str(value)
            logger.info("%s: %s", where, f"resuming from {value}" if value else "not resuming, left out")
            return
        retired = RETIRED[key]
        if value is not None and not any(type(value) is type(idle) and value == idle for idle in retired.idle):
            instead = retired.instead.format(str(value).lower() if isinstance(value, bool) else value)
            if key == "gpus" and value in (0, "0"):
                instead = "write trainer.accelerator: cpu"
            raise InputError(f"{where} is {value!r}, and Lightning 2 no longer has this key: {instead}")
        logger.info("%s: Lightning 2 no longer has this key, and %s had no effect: left out", where, value)


def _child(config: DictConfig | None, key: str) -> DictConfig | None:
    """A part of a configuration, unless it is absent or an interpolation."""
    child = None if config is None else config._get_node(key)
    return child if isinstance(child, DictConfig) else None


def _parsed(value: str) -> Any:
    return _plain(OmegaConf.from_dotlist([f"value={value}"]))["value"]


def _plain(config: DictConfig) -> dict[Any, Any]:
    """A copy whose interpolations are left as they are written."""
    return cast(dict[Any, Any], OmegaConf.to_container(config, resolve=False))


def _log_stand_in(where: str) -> None:
    logger.info("%s: %s becomes %s, the stand-in host", where, CLIMAX_CLASS, STAND_IN_CLASS)
