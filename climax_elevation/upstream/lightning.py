"""Lightning's command line, as upstream's training scripts call it, with errors as sentences."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import pickle
import re
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import Trainer
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.utilities import rank_zero_only

from climax_elevation.checkpoints import check_weights, damage, read_checkpoint, write_whole
from climax_elevation.crew import EndTogether
from climax_elevation.errors import InputError
from climax_elevation.files import check_folder
from climax_elevation.health import StopNotFinite, check_statistics
from climax_elevation.training import TerrainCallback, check_datamodule
from climax_elevation.upstream.config import BIAS_ARGS, with_entries
from climax_elevation.upstream.plan import stop_at_plan
from climax_elevation.upstream.resuming import GoOn, best_checkpoint
from climax_elevation.upstream.schedule import announced, check_equal, check_shares, check_validation, count_shares
from climax_elevation.upstream.settings import check_settings
from climax_elevation.upstream.unused import look_for_unused

logger = logging.getLogger(__name__)

OWN, LIGHTNING = "climax_elevation", ("pytorch_lightning", "lightning_fabric")
# what the parser says, and how it is said here
NOISE = {
    r"- Expected a path but \S+ either not accessible or invalid - ": "",
    r" ?\(?Exception raised from .*": "",  # and where in torch
    r"Not a valid subclass of (\w+).*": r"Expected a \1",
}
UNION = (
    r"^(.*?)Does not validate against any of the Union subtypes Subtypes: .*? Errors: (.*?)"
    r"(?: Given value type: .*? Given value: (.*))?$"
)
KINDS = {
    **{"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "NoneType": "null"},
    **{"list": "list", "collections.abc.Sequence": "list", "collections.abc.Iterable": "list", "dict": "mapping"},
}
PHRASES: dict[str, Any] = {
    r'Parser key "([\w.]+)":': r"\1:",
    r"Problem with given class_path '([\w.]+)':": r"\1:",
    r"(, or )?Expected (an? )?(typing\.Literal)?": lambda found: f"{found[1] or 'expected '}",
    r"\. Got value: ": ", got ",
    "Option '(\\w+)' is not accepted": r"there is no option '\1'",
}
OVERFLOW = "value cannot be converted to type"
KEYWORDS = ("best", "last", "hpc")  # that Lightning takes for a checkpoint's path


def say(message: str, *values: object) -> None:
    """Log once, not once a process."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        logger.info(message, *values)


class TrainingCLI(LightningCLI):
    """LightningCLI with given arguments, and with a checkpoint to go on from.

    `sys.argv` is neither read nor set: Lightning's launcher repeats it to start the other processes of a
    distributed run, and they are to come here again.

    Args:
        arguments: In the place of `sys.argv[1:]`.
        resume: Checkpoint that `fit` goes on from, or None; may refer to the configuration, as in
            `${trainer.default_root_dir}/last.ckpt`.
        bias_args: By name, with dots for a part of a sum, what is to change of the network's `bias_args`; likewise.
        options: LightningCLI's.
    """

    def __init__(
        self, *, arguments: list[str], resume: str | None, bias_args: Mapping[str, Any], **options: Any
    ) -> None:
        self._arguments = arguments
        self._resume = resume
        self._bias_args = bias_args
        with configuration_errors():
            super().__init__(**options)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs["exit_on_error"] = False
        try:
            # upstream's "omegaconf" resolves ${trainer.default_root_dir} before the command line overrides it
            return super().init_parser(**kwargs | {"parser_mode": "omegaconf+"})
        except ValueError:  # this jsonargparse has no such mode
            return super().init_parser(**kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(self._arguments)
        if self._bias_args:
            if BIAS_ARGS not in self.config:
                raise InputError(f"{BIAS_ARGS} is set, and model.net has no such argument: leave it out")
            self.config[BIAS_ARGS] = self._resolved(BIAS_ARGS, with_entries(self.config[BIAS_ARGS], self._bias_args))
        check_settings(self.config.as_dict())

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # as the series "today" gives it to upstream's scripts
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to go on from")
        parser.add_argument("--allow_nan", type=bool, default=False, help="go on where a loss is not finite")

    def before_instantiate_classes(self) -> None:
        self._allow_nan = self.config.allow_nan
        if not self._allow_nan:
            del self.config["allow_nan"]  # upstream's own scripts, which do not know it, take what is saved
        check_folder("trainer.default_root_dir", self.config.trainer.default_root_dir or ".")

    def instantiate_classes(self) -> None:
        pretrained = self.config.model.get("pretrained_path") or ""
        try:
            super().instantiate_classes()
        except InputError:
            raise
        except Exception:  # whatever upstream's module raises for a file that is none
            if pretrained and "://" not in pretrained:
                read_checkpoint(pretrained, weights_only=False, what="model.pretrained_path")
            raise
        check_statistics(self.datamodule)
        if not self._allow_nan:
            check_weights(dict(self.model.named_parameters()), pretrained or "the model")

    def after_instantiate_classes(self) -> None:
        write_whole(self.trainer.strategy)
        unread = look_for_unused(self.trainer.strategy, self.model, self.datamodule)
        if unread:
            say(
                "ddp looks for parameters without a use in each step, as Lightning 1.8's did: the network embeds %s, "
                "which not all data have",
                ", ".join(unread),
            )
        ours = [EndTogether(), GoOn(), *([] if self._allow_nan else [StopNotFinite()])]
        self.trainer.callbacks[:0] = ours  # type: ignore[attr-defined] # before those that save
        if self._resume is not None:
            self.config.ckpt_path = self._checkpoint("trainer.resume_from_checkpoint", self._resume)
        elif self.config.ckpt_path is not None:
            self.config.ckpt_path = self._checkpoint("ckpt_path", self.config.ckpt_path)
        if self.config.ckpt_path is not None:
            # a script without that series does not hand it on
            self.trainer.fit = functools.partial(self.trainer.fit, ckpt_path=self.config.ckpt_path)  # type: ignore[method-assign]
        self._check_folders()
        trainer: Any = self.trainer
        if any(isinstance(callback, TerrainCallback) for callback in trainer.callbacks):
            check_datamodule(self.model, self.datamodule)
        self._check_schedule()
        hours = getattr(self.datamodule.hparams, "hrs_each_step", 1)
        if hasattr(self.model, "set_pred_range"):  # upstream's, which names metrics by steps as if they were hours
            self.model.set_pred_range = _in_hours(self.model.set_pred_range, hours)
        if self.config.trainer.fast_dev_run:
            # upstream's scripts test the best checkpoint, and this saves none
            self.trainer.test = _without_checkpoint(self.trainer.test)  # type: ignore[method-assign]
        self.trainer.test = _with_whole_names(self.trainer.test, self.trainer)  # type: ignore[method-assign]

    def _check_schedule(self) -> None:
        """Before anything starts, that every process has something to do, and what comes of it."""
        trainer: Any = self.trainer
        processes = trainer.num_nodes * trainer.num_devices
        shares = count_shares(self.datamodule, processes, trainer.num_nodes)
        batch_size: Any = getattr(self.datamodule.hparams, "batch_size", 1)
        if shares:
            workers = getattr(self.datamodule.hparams, "num_workers", 0)
            sharing = hasattr(self.datamodule, "lister_train")
            check_shares(shares, processes, workers, sharing=sharing)
            if processes > 1:
                check_equal(trainer, shares, processes, workers, sharing=sharing)
            check_validation(trainer, shares[0].batches, counted=hasattr(self.datamodule, "shares"))
        stop_at_plan(trainer, self.model, self.datamodule, shares, processes)
        for line in announced(trainer, shares, processes, batch_size):
            say("%s", line)

    def _check_folders(self) -> None:
        """Before anything is written, that all can be."""
        trainer: Any = self.trainer
        for part in (*trainer.loggers, *trainer.callbacks):
            for name in ("save_dir", "dirpath"):
                folder = getattr(part, name, None)
                if isinstance(folder, str | os.PathLike):
                    check_folder(f"{name} of {type(part).__name__}", Path(folder))

    def _resolved(self, key: str, written: Any) -> Any:
        """What is written for a key, with what it refers to of the configuration."""
        config = OmegaConf.create(self.parser.dump(self.config, skip_none=False, skip_validation=True))
        OmegaConf.update(config, key, written, merge=False)
        found = OmegaConf.select(config, key)
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found

    def _checkpoint(self, key: str, written: str) -> str:
        path = str(self._resolved("ckpt_path", written))
        if path == "best":
            return best_checkpoint(self.trainer)
        if "://" in path or path in KEYWORDS or path.startswith("registry"):
            return path
        if not Path(path).exists():
            raise InputError(f"{key} {path} does not exist")
        broken = damage(Path(path)) if Path(path).is_file() else None
        if broken is not None:
            raise InputError(f"{key} {path} is {broken}: take another one, or a copy that is whole")
        parts = [Path(path, name) for name in (".metadata", "checkpoint")]  # of checkpoints in several files
        if not (any(part.exists() for part in parts) if Path(path).is_dir() else zipfile.is_zipfile(path)):
            raise InputError(f"{key} {path} is no checkpoint of Lightning's, or damaged: name another")
        return path


class PretrainingCLI(TrainingCLI):
    """TrainingCLI for upstream's pretraining, which takes one source of data a node and runs distributed only."""

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        # upstream's readers ask the environment for the number of nodes
        os.environ.setdefault("NODES", str(self.config.trainer.num_nodes))

    def after_instantiate_classes(self) -> None:
        super().after_instantiate_classes()
        if not isinstance(self.trainer.strategy, ParallelStrategy):
            raise InputError("pretraining is distributed, on one device too: write trainer.strategy: ddp")


@contextmanager
def configuration_errors() -> Iterator[None]:
    """Turn what a wrong configuration raises while it is read and its classes are built into InputError.

    What this package itself raises otherwise is a fault of its own, and stays.
    """
    try:
        yield
    except (InputError, MisconfigurationException):
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"configuration: {_line(error)}; install what it names, or leave it out") from error
    except NotImplementedError as error:
        raise InputError(f"ClimaX: {_line(error)}") from error
    except OmegaConfBaseException as error:
        hint = "; set it, or write ${oc.env:NAME,instead}" if "Environment variable" in str(error) else ""
        raise InputError(f"configuration: {error.full_key}: {_line(str(error).splitlines()[0])}{hint}") from error
    except KeyError as error:
        if _raised_in(error) == OWN:
            raise
        raise InputError(
            f"configuration: there is no {error}: have the data (normalize_mean.npz, normalize_std.npz) this variable?"
        ) from error
    except OSError as error:
        raise InputError(_of_system(error)) from error
    except Exception as error:  # of parsers, and of whatever classes a configuration names
        if _raised_in(error) == OWN and not isinstance(error, argparse.ArgumentError):
            raise
        raise InputError(f"configuration: {_line(error)}") from error


@contextmanager
def training_errors() -> Iterator[None]:
    """Make sentences of what Lightning and upstream raise, later on, for a configuration that they do not take."""
    try:
        yield
    except InputError:
        raise
    except MisconfigurationException as error:
        # ClimaX's YAML files ask for a GPU
        hint = "; choose another with --trainer.accelerator" if "backend found" in str(error) else ""
        raise InputError(f"Lightning: {_line(error)}{hint}") from error
    except OSError as error:
        raise InputError(_of_system(error)) from error
    except pickle.UnpicklingError as error:
        raise InputError("the checkpoint cannot be read: it is none of Lightning's, or it is damaged") from error
    except RuntimeError as error:
        if "loading state_dict" in str(error):
            raise InputError(
                f"the checkpoint is of another model, perhaps with other terrain settings: {_line(error)}"
            ) from error
        if OVERFLOW in str(error):  # of what an optimiser makes of its settings
            raise InputError(
                "a step of the optimiser is larger than the type of the weights can hold: lower model.lr, "
                "model.weight_decay or lr_factor of TerrainCallback"
            ) from error
        if _raised_in(error) not in LIGHTNING:
            raise
        raise InputError(f"Lightning: {_line(error)}") from error
    except (ValueError, TypeError) as error:
        if _raised_in(error) not in LIGHTNING:
            raise
        raise InputError(f"Lightning: {_line(error)}") from error


def _raised_in(error: BaseException) -> str:
    """The package whose code raised an error."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].partition(".")[0]


def _of_system(error: OSError) -> str:
    """What the system refused."""
    if isinstance(error, FileNotFoundError):
        return f"{error.filename or _line(error)} does not exist"
    reason = error.strerror or _line(error)
    return f"{error.filename}: {reason}; name another" if error.filename else _line(error)


def _in_hours(set_range: Callable[[int], None], hours_a_step: int) -> Callable[[int], None]:
    return lambda steps: set_range(steps * hours_a_step)


def _without_checkpoint(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    def run(*positional: Any, **named: Any) -> Any:
        return test(*positional, **named | {"ckpt_path": None})

    return run


def _with_whole_names(test: Callable[..., Any], trainer: Trainer) -> Callable[..., Any]:
    """Lightning's own table cuts names to half of what it takes for the terminal's width: 80 where there is none."""

    @functools.wraps(test)
    def run(*positional: Any, **named: Any) -> Any:
        kept: Any = trainer.checkpoint_callback
        if named.get("ckpt_path") == "best" and kept is not None and not kept.best_model_path:
            # the run went on, in an epoch that began anew, for less than it took to the first validation
            say("no validation came before the end, so no checkpoint is the best: the weights of the end are tested")
            named["ckpt_path"] = None
        results = test(*positional, **{"verbose": False} | named)
        if trainer.is_global_zero and "verbose" not in named:
            print(scores_table(results))
        return results

    return run


def scores_table(results: Sequence[Mapping[str, float]]) -> str:
    """A line a score: its whole name, and its values, one a set of data."""
    names = sorted({name for scores in results for name in scores})
    width = max(map(len, names), default=0)
    cells = ([f"{scores[name]:12.6g}" if name in scores else " " * 12 for scores in results] for name in names)
    return "\n".join(f"{name:{width}} {' '.join(row)}" for name, row in zip(names, cells, strict=True))


def _line(error: object) -> str:
    """One line of an error's text; of the long ones of the parser, what was expected of which key, and what came."""
    text = " ".join(str(error).split()) or type(error).__name__
    for noise, instead in NOISE.items():
        text = re.sub(noise, instead, text)
    union = re.search(UNION, text)
    if union:
        key, listed, given = union.groups()
        reasons = list(dict.fromkeys(reason for reason in re.split(r"(?:^|\s)- ", listed) if reason))
        telling = [reason for reason in reasons if not reason.startswith(("Expected", "Import path"))]
        kinds = ", or ".join(reason for reason in reasons if reason.startswith("Expected"))
        text = key + (telling[0] if telling else kinds + ("" if given is None else f". Got value: {given}"))
    text = re.sub(r"<class '([\w.]+)'>", lambda found: KINDS.get(found[1], found[1]), text)
    for written, instead in PHRASES.items():
        text = re.sub(written, instead, text)
    return text
