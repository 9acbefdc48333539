"""The loops in C++ that engines and biases have on CPUs, compiled when they are first wanted.

As Triton's kernels and torch.compile's are: for the processor at hand, into a folder of caches, once. Without a
compiler everything works all the same, by torch's own operations, which take longer.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCES = ("attention.cpp", "pair_network.cpp", "physics.cpp")
HEADERS = ("wide.h",)
LOOPS = ("attend", "differentiate", "pair_values", "pair_gradients", "physics_values", "physics_sums")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared")
PROCESSORS = ("-march=native", "-mcpu=native")  # GCC's word for it, and Clang's on some processors
TYPES = {torch.float32: "float", torch.float64: "double"}
TORCH_LIBRARY = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
SWITCH = "CLIMAX_ELEVATION_COMPILED"
_loading = Lock()


class NotCompiled(Exception):
    """Why there are no compiled loops, in a sentence that says what to do."""


def available(*tensors: Tensor) -> bool:
    """Whether compiled loops can take these: on the CPU, in one type of `TYPES`."""
    first = tensors[0]
    fit = all(tensor.device.type == "cpu" and tensor.dtype == first.dtype for tensor in tensors)
    return fit and first.dtype in TYPES and library() is not None


class _View(ctypes.Structure):
    """`View` of wide.h: where a tensor begins, and its first three strides."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sample", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    )


def packed(tensor: Tensor) -> Tensor:
    """The same numbers, those of a row one after another, and no row within another: as a BLAS wants them."""
    if tensor.stride(-1) == 1 and (tensor.dim() == 1 or tensor.stride(-2) >= tensor.shape[-1]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def call(name: str, *arguments: Tensor | float | int) -> None:
    """Run a loop on tensors of one type, whose last dimension has no gaps; C++ writes to those that it computes."""
    found = library()
    assert found is not None
    kind = next(TYPES[argument.dtype] for argument in arguments if isinstance(argument, Tensor))
    getattr(found, f"{name}_{kind}")(*map(_for_c, arguments))


def _for_c(argument: Tensor | float | int) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.byref(_View(argument.data_ptr(), *argument.stride()[:3]))
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where there are none, which is said once."""
    with _loading:  # the first tiles come in several threads at once
        return _library()


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        return load()
    except NotCompiled as reason:
        logger.warning("attention on the CPU is slower than it could be: %s", reason)
        return None


def load() -> ctypes.CDLL:
    """Compile the loops, unless that was done before, and load them.

    Raises:
        NotCompiled: If there is no compiler, it fails, torch's BLAS is not found, or the environment says not to.
    """
    if os.environ.get(SWITCH) == "0":
        raise NotCompiled(f"{SWITCH} is 0: unset it to have its loops compiled")
    compiler, blas = _compiler(), _blas()
    try:
        found = ctypes.CDLL(str(_place(compiler)))
    except OSError as error:  # a full disk, or a folder whose programs may not be run
        raise NotCompiled(f"{error}: set XDG_CACHE_HOME to a folder for what is compiled") from error
    lacking = [name for name in _symbols() if not hasattr(found, name)]
    if lacking:
        raise NotCompiled(f"{' '.join(compiler)} makes a library without {lacking[0]}; try another, as CXX")
    found.use_blas(*blas)
    return found


def _place(compiler: list[str]) -> Path:
    """Where the loops lie, as they were found or after they were compiled."""
    key, folders = _fingerprint(compiler), [folder for folder in _folders() if _is_private(folder)]
    for kept in filter(None, (_kept(folder, key) for folder in folders)):
        return kept
    to_write = next((folder for folder in folders if os.access(folder, os.W_OK)), None)
    return _compile(compiler, to_write or _folder_of_this_process(), key)


def _symbols() -> list[str]:
    return ["use_blas", *(f"{loop}_{kind}" for loop in LOOPS for kind in TYPES.values())]


def _blas() -> tuple[ctypes.c_void_p, ...]:
    """Where torch's own matrix products begin, of float and of double; each thread has as many threads as torch's."""
    for path in _torch_libraries():
        try:
            library = ctypes.CDLL(path)
            return tuple(ctypes.cast(getattr(library, f"{letter}gemm_"), ctypes.c_void_p) for letter in "sd")
        except (OSError, AttributeError):  # not there, or of another BLAS's names
            continue
    raise NotCompiled("this torch has no BLAS that can be called: install one from PyPI or conda-forge")


def _torch_libraries() -> list[str]:
    """Where torch's operations on CPUs may lie: in its own folder, or where this process has them from."""
    try:
        mapped = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        mapped = []
    loaded = {line.split(maxsplit=5)[-1] for line in mapped if "/libtorch_cpu." in line}
    return [str(Path(torch.__file__).parent / "lib" / TORCH_LIBRARY), *sorted(loaded)]


def _compiler() -> list[str]:
    wanted = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(wanted)] if wanted else [[name] for name in COMPILERS]
    except ValueError as error:
        raise NotCompiled(f"CXX, {wanted!r}, is no command ({error}): mend or unset it") from error
    for name, *arguments in commands:
        found = shutil.which(name)
        if found:
            return [found, *arguments]
    looked_for = f"CXX, {wanted!r}, is not there" if wanted else f"none of {', '.join(COMPILERS)} is there"
    raise NotCompiled(f"no C++ compiler: {looked_for}; install GCC or Clang")


def _folders() -> Iterator[Path]:
    """Where a user's processes keep what is compiled: among caches, or else among temporary files."""
    with suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "climax_elevation"
    with suppress(OSError):  # nowhere to write at all
        yield Path(tempfile.gettempdir()) / f"climax_elevation-{_user()}"


def _is_private(folder: Path) -> bool:
    """Whether this user alone can put something into a folder, since what lies there is run; makes a missing one."""
    try:
        for place in (*reversed(folder.parents), folder):
            if not place.exists():
                place.mkdir(mode=0o700, exist_ok=True)
        folder = folder.resolve(strict=True)
        for place in (folder, *folder.parents):
            own_entries = place != folder and place.stat().st_mode & stat.S_ISVTX  # as /tmp: each has its own
            if not _is_own(place.stat(), writable=bool(own_entries)):
                logger.info("compiled loops are not kept in %s: other users can write to %s", folder, place)
                return False
    except OSError:
        return False
    return True


def _is_own(status: os.stat_result, *, writable: bool = False) -> bool:
    """Whether a file is of this user or of one who could change Python itself; and not writable by others."""
    if not hasattr(os, "geteuid"):
        return True
    trusted = (_user(), 0, os.stat("/").st_uid)
    return status.st_uid in trusted and (writable or not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


@lru_cache(maxsize=1)
def _folder_of_this_process() -> Path:
    folder = tempfile.mkdtemp(prefix="climax_elevation_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _fingerprint(compiler: list[str]) -> str:
    """Of all that the result depends on: sources, compiler, and a processor that others may share a home with."""
    here = Path(__file__).parent
    version = _run([*compiler, "--version"]).stdout
    parts = [*((here / name).read_text() for name in (*HEADERS, *SOURCES)), *FLAGS, *compiler, version, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise NotCompiled(f"{command[0]} cannot be run ({error.strerror}); try another compiler, as CXX") from error


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _kept(folder: Path, key: str) -> Path | None:
    """What was compiled before: a file of this user's, whose name tells that it is whole."""
    for place in folder.glob(f"loops-{key}-*.so"):
        status = place.lstat()
        if stat.S_ISREG(status.st_mode) and _is_own(status) and place.name == _name(key, place.read_bytes()):
            return place
    return None


def _name(key: str, content: bytes) -> str:
    return f"loops-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _compile(compiler: list[str], folder: Path, key: str) -> Path:
    here = Path(__file__).parent
    for processor in PROCESSORS:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / "loops.so"
            run = _run([*compiler, *FLAGS, processor, *(str(here / name) for name in SOURCES), "-o", str(made)])
            if run.returncode == 0 and made.is_file():
                made.chmod(0o700)
                place = folder / _name(key, made.read_bytes())
                made.replace(place)  # at once: another process sees all of it or nothing
                return place
    said = (run.stderr.strip() or f"exit status {run.returncode}").splitlines()[0]
    raise NotCompiled(f"{' '.join(compiler)} fails: {said}; try another, as CXX")
