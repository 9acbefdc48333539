"""What stands between ClimaX, written for the versions of 2022, and the ones that are installed."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Substitution:
    """A name that a library took away, and what to write instead.

    Attributes:
        files: Which files of the package, as a glob.
        old: Regular expression of what no longer works, with nothing around it: a file in which it does
            not occur needs no change.
        new: What takes its place.
        needed: Whether the installed version asks for it.
    """

    files: str
    old: str
    new: str
    needed: Callable[[], bool]


def bridge(package: Path) -> None:
    """Rewrite, in a temporary copy of ClimaX, what the installed versions no longer take."""
    for substitution in SUBSTITUTIONS:
        if not substitution.needed():
            continue
        for file in package.glob(substitution.files):
            text = file.read_bytes().decode()
            bridged = re.sub(substitution.old, substitution.new, text)
            if bridged != text:
                file.write_bytes(bridged.encode())


def _timm_layers_moved() -> bool:
    return importlib.util.find_spec("timm.layers") is not None


def _block_renamed_drop() -> bool:
    from timm.models.vision_transformer import Block

    return "drop" not in inspect.signature(Block).parameters


def _numpy_lost_float() -> bool:
    return tuple(map(int, np.__version__.split(".")[:2])) >= (1, 24)


def _no_torchdata() -> bool:
    # later versions of torchdata exist without its datapipes
    try:
        return importlib.util.find_spec("torchdata.datapipes") is None
    except ModuleNotFoundError:
        return True


def _cli_lost(name: str) -> Callable[[], bool]:
    def lost() -> bool:
        from pytorch_lightning.cli import LightningCLI

        return name not in inspect.signature(LightningCLI.__init__).parameters

    return lost


def _always() -> bool:
    return True


def _torch_loads_weights_only() -> bool:
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


def _xarray_lost_drop() -> bool:
    import xarray

    return not hasattr(xarray.Dataset, "drop")


SUBSTITUTIONS = (
    Substitution("**/*.py", r"\btimm\.models\.layers(\.helpers)?\b", "timm.layers", _timm_layers_moved),
    Substitution("**/arch.py", r"(?<=[\s(,])drop=", "proj_drop=", _block_renamed_drop),
    Substitution("**/*.py", r"\bnp\.float\b", "float", _numpy_lost_float),
    Substitution("**/*.py", r"\btorchdata\.datapipes\b", "torch.utils.data.datapipes", _no_torchdata),
    Substitution(
        "*/train.py",
        r"\bsave_config_overwrite=True",
        'save_config_kwargs={"overwrite": True}',
        _cli_lost("save_config_overwrite"),
    ),
    Substitution("*/train.py", r"\bauto_registry=\w+,?", "", _cli_lost("auto_registry")),
    # every jsonargparse that is supported has exit_on_error in its place
    Substitution("*/train.py", r',\s*"error_handler": None', "", _always),
    # upstream's checkpoints hold their hyperparameters too, and come from whom the user names
    Substitution(
        "*/module.py",
        r"\btorch\.load\((?!(?s:.{0,200})weights_only)",
        "torch.load(weights_only=False, f=",
        _torch_loads_weights_only,
    ),
    Substitution("**/*.py", r"\.drop\(\['quantile'\]\)", ".drop_vars(['quantile'])", _xarray_lost_drop),
)
