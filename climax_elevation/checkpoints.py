"""Lightning's checkpoints: written whole or not at all, and read, or named in a sentence."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO
from pytorch_lightning.strategies import Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from climax_elevation.errors import InputError, SickRun
from climax_elevation.files import whole

NOT_SET_IS_NAN = "terrain."  # buffers of the reader that nothing was learned for


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's own format, in files that are there whole or not at all.

    A checkpoint is written beside its place, to the disk, and only then takes the place of an older one. (Lightning's
    own goes by way of the system's temporary folder, and a full disk leaves a part of it in the place of the older.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            SickRun: If it cannot be written; what was there before is there still.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        save_whole(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; InputError where it is not a whole one."""
        if "://" in str(path):
            given = {} if weights_only is None else {"weights_only": weights_only}  # Lightning 2.5 does not take it
            return super().load_checkpoint(path, map_location, **given)
        return read_checkpoint(path, map_location=map_location, weights_only=weights_only)


def write_whole(strategy: Strategy) -> None:
    """Make a strategy write its checkpoints whole or not at all, unless another way to write them was chosen."""
    holder: Any = strategy
    found: Any = strategy.checkpoint_io  # Lightning's own, where none was chosen
    while isinstance(found, _WrappingCheckpointIO):  # such as one that writes in a thread
        holder, found = found, found.checkpoint_io
    if type(found) is TorchCheckpointIO:
        holder._checkpoint_io = WholeCheckpointIO()


def save_whole(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file, whole or not at all.

    Args:
        path: Its place; folders are made.
        write: Writes to the open file that it is given.

    Raises:
        SickRun: If it cannot be written; what was there before is there still, and nothing else is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial, open(partial, "wb") as file:
            write(file)
        _to_disk(path.parent)
    except (OSError, RuntimeError) as error:
        reason = _reason(error)
        kept = "; the one that was there before is kept" if path.exists() else ""
        raise SickRun(f"{path} cannot be written ({reason}), and nothing of it is left{kept}: make room") from error


def _reason(error: BaseException) -> str:
    """What the system said, which torch's writer hides behind a RuntimeError of its own."""
    of_system: BaseException | None = error
    while of_system is not None and not isinstance(of_system, OSError):
        of_system = of_system.__context__
    return (of_system.strerror if of_system is not None else None) or _first_line(error)


def _to_disk(folder: Path) -> None:
    """What a folder holds is kept through a power failure, where the system can."""
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(held)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(held)


def read_checkpoint(
    path: str | Path, *, map_location: Any | None = "cpu", weights_only: bool | None = True, what: str = "checkpoint"
) -> dict[str, Any]:
    """What a Lightning checkpoint holds.

    Args:
        path: A file.
        map_location, weights_only: As `torch.load` takes them.
        what: It is called in messages.

    Raises:
        InputError: If it is missing, cut short or damaged, or no Lightning checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{what} {path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
    broken = damage(path)
    if broken is not None:
        raise InputError(f"{what} {path} is {broken}: take another one, or a copy that is whole")
    try:
        found = torch.load(path, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{what} {path} is no checkpoint of tensors alone ({_first_line(error)}): save one that holds its "
            "state_dict and nothing else"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, ModuleNotFoundError) as error:
        raise InputError(f"{what} {path} is damaged ({_first_line(error)}): take another one") from error
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), Mapping):
        raise InputError(f"{what} {path} is not a Lightning checkpoint: it has no state_dict")
    return found


def damage(path: Path) -> str | None:
    """In what way a file is not a whole checkpoint, by its beginning and its end alone; None: it may be whole."""
    with open(path, "rb") as file:
        beginning = file.read(4)
    if not beginning:
        return "empty"
    if beginning != b"PK\x03\x04":  # not what torch >= 1.6 writes
        return (
            None if beginning.startswith(b"\x80") or zipfile.is_zipfile(path) else "no checkpoint, by its first bytes"
        )
    try:
        zipfile.ZipFile(path).close()  # its list of contents comes last
    except (zipfile.BadZipFile, OSError):
        return f"cut short, after {path.stat().st_size} bytes"
    return None


def not_finite(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first of the weights that has a NaN or an infinity; None: all are finite."""
    for name, values in weights:
        if NOT_SET_IS_NAN in name or not (values.is_floating_point() or values.is_complex()) or values.is_meta:
            continue
        own = values.to_local() if isinstance(values, DTensor) else values  # of several processes each has a part
        if not bool(own.detach().isfinite().all()):
            return name
    return None


def check_weights(weights: Mapping[str, Any], source: str) -> None:
    """Raise InputError unless all weights are finite."""
    bad = not_finite((name, values) for name, values in weights.items() if isinstance(values, Tensor))
    if bad is not None:
        raise InputError(f"{source} has weights that are not finite, the first of them {bad}: take another one")


def newest(paths: Iterable[str | Path]) -> Path | None:
    """Of the files that are there, the one written last."""
    there = [path for path in map(Path, paths) if path.is_file()]
    return max(there, key=lambda path: path.stat().st_mtime) if there else None


def _first_line(error: BaseException) -> str:
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
