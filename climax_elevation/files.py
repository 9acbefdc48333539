"""Files of numbers: written whole or not at all, and read, or named in a sentence."""

import csv
import errno
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from climax_elevation.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk or a quota that is full."""
PREPARE = "prepare data into its folder, or mend data.root_dir"
Arrays = Mapping[str, NDArray[np.floating]]
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Shape and type of arrays by name."""


def save_npz(path: Path, arrays: Arrays) -> None:
    """Write `arrays` to `path`, whole or not at all."""
    _save(path, lambda file: np.savez(file, **dict(arrays)))  # type: ignore[arg-type]


def save_npy(path: Path, array: NDArray[np.floating]) -> None:
    """Write `array` to `path`, whole or not at all."""
    _save(path, lambda file: np.save(file, array))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    _save(path, lambda file: file.write(text.encode()))


def load_npz(path: Path, remedy: str, names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of a file.

    Args:
        path: A .npz file.
        remedy: What to do where it cannot be read.
        names: Those that are wanted, if they are there; None: all.

    Raises:
        InputError: If it is missing or damaged, no .npz file, or holds what is no number.
    """
    with reading(path, remedy):
        found = np.load(_existing(path, remedy))
        if isinstance(found, np.ndarray):
            raise ValueError("one array without a name")
        with found as archive:
            wanted = archive.files if names is None else [name for name in names if name in archive.files]
            return {name: _numbers(archive[name]) for name in wanted}


def npz_shapes(path: Path, remedy: str, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of some arrays of a .npz, from their headers alone; errors as `load_npz` has them, and where one lacks."""
    return {name: shape for name, (shape, _) in npz_layout(path, remedy, names).items()}


def npz_layout(path: Path, remedy: str, names: Sequence[str] | None = None) -> Layout:
    """Shapes and types of some arrays of a .npz, or of all, as `npz_shapes` has the shapes."""
    with reading(path, remedy), zipfile.ZipFile(_existing(path, remedy)) as archive:
        present = [name.removesuffix(".npy") for name in archive.namelist()]
        wanted = present if names is None else names
        check_names(path, present, wanted)
        found = {}
        for name in wanted:
            with archive.open(f"{name}.npy") as file:
                shape, _, kind = npy_header(file)
                found[name] = shape, kind
        return found


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape of an array, whether its columns follow one another, and its type; the file is then at its numbers."""
    major = np.lib.format.read_magic(file)[0]
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    return read(file)


def check_names(path: Path, present: Sequence[str], needed: Sequence[str]) -> None:
    """Raise InputError unless all names that are needed are there."""
    missing = [name for name in needed if name not in present]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(present))}")


def load_npy(path: Path, remedy: str) -> NDArray[Any]:
    """The array of a file; arguments and errors as `load_npz` has them."""
    with reading(path, remedy):
        found = np.load(_existing(path, remedy))
        if not isinstance(found, np.ndarray):
            raise ValueError("an archive of arrays")
        return _numbers(found)


def load_scalars(path: Path, remedy: str, names: Iterable[str] | None = None) -> dict[str, float]:
    """One number a variable: the shard format has arrays of shape (1,). Arguments and errors as `load_npz` has them."""
    arrays = load_npz(path, remedy, names)
    for name, values in arrays.items():
        if values.size != 1:
            raise InputError(f"{path} has one number a variable, and of {name!r} {values.size}: {remedy}")
    return {name: float(values.item()) for name, values in arrays.items()}


def check_finite(arrays: Mapping[str, NDArray[Any]], path: Path, remedy: str) -> None:
    """Raise InputError unless all numbers are finite."""
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise InputError(f"{path} has values of {name!r} that are not finite: {remedy}")


def check_degrees(lat: NDArray[Any], lon: NDArray[Any], source: str | Path) -> None:
    """Raise InputError unless they are latitudes and longitudes."""
    for name, values, (lowest, highest) in (("latitudes", lat, (-90, 90)), ("longitudes", lon, (-360, 720))):
        if values.ndim == 0 or values.size == 0 or not np.isfinite(values).all():
            raise InputError(f"{name} from {source} are finite numbers, not {_shown(values)}: {PREPARE}")
        if values.min() < lowest or values.max() > highest:
            raise InputError(
                f"{name} from {source} are within [{lowest}, {highest}] degrees, not {values.min():g} to "
                f"{values.max():g}: {PREPARE}"
            )
        if values.ndim == 1 and len(np.unique(values)) < len(values):
            raise InputError(f"{name} from {source} are there once each, and some come again: {PREPARE}")


def _shown(values: NDArray[Any]) -> str:
    bad = values[~np.isfinite(values)] if values.size else values
    return f"{bad.flat[0]}" if bad.size else f"of shape {list(values.shape)}"


def _existing(path: Path, remedy: str) -> Path:
    if not path.is_file():
        raise InputError(f"{path} is missing: {remedy}")
    return path


def _numbers(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind not in "fiub":
        raise ValueError(f"it holds no numbers, but {values.dtype}")
    return values


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Makes one sentence of whatever numpy and its archives raise."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, BadZipFile, zlib.error) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged ({said}): {remedy}") from error


@contextmanager
def reading_table(path: Path) -> Iterator[None]:
    """Makes one sentence of what a table (CSV) that is none, or is damaged, raises."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise InputError(f"{path} is no table, or damaged ({error}): name another, or have it written again") from error


def _save(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its folder, not in it: ClimaX reads every file of train/, val/ and test/.
    beside = path.parent.parent / f".{path.parent.name}-{path.name}.partial"
    with whole(path, beside) as partial, open(partial, "wb") as file:
        write(file)


def check_folder(name: str, path: str | Path) -> None:
    """Raise InputError unless a folder is there, or can be made, and written to; nothing is left of the trial."""
    if "://" in str(path):
        return
    wanted = Path(path).absolute()
    there = next(folder for folder in (wanted, *wanted.parents) if os.path.lexists(folder))
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".climax-elevation-"):
            pass
    except OSError as error:
        raise InputError(f"{name} {path} cannot be written to ({there}: {error.strerror}): name another") from error


def check_own(folder: Path, marks: Iterable[str], what: str) -> None:
    """Raise InputError unless a folder is new or empty, or has one of the files or folders that mark it as `what`."""
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / mark).exists() for mark in marks):
        raise InputError(f"{folder} holds other data, and not {what}: name another folder")


@contextmanager
def whole(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Where to write what becomes `path` at the end of the block: whole, or not at all.

    Args:
        path: Its place, in a folder that is there.
        partial: Where it grows, on the same disk; None: beside it, under a name of this process's own.
    """
    partial = partial or path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, taken: str) -> Iterator[None]:
    """Make a folder, and keep other runs out of it as long as this one lasts, where the system can.

    The lock is on the folder itself, so that nothing is left of it, whatever ends the run.

    Args:
        folder: Where this run writes; it and those above it that it made, and left empty, go again.
        taken: What to say where another run is there.

    Raises:
        InputError: If it cannot be made, or another run is there.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made ({error.strerror}): name another") from error
    with _locked(folder, taken):
        try:
            yield
        finally:
            for each in made:
                if not any(each.iterdir()):
                    each.rmdir()


@contextmanager
def _locked(folder: Path, taken: str) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(taken) from None
        except OSError as error:  # some network file systems have no locks
            logger.info("%s cannot be locked (%s): see to it that no other run writes there", folder, error.strerror)
        yield
    finally:
        os.close(held)
