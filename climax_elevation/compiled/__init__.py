"""The loops in C++ that engines and biases have on CPUs, compiled when they are first wanted.

As Triton's kernels and torch.compile's are: for the processor at hand, into a folder of caches, once. Without a
compiler everything works all the same, by torch's own operations, which take longer.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCES = ("attention.cpp", "pair_network.cpp", "physics.cpp")
HEADERS = ("wide.h",)
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared")
PROCESSORS = ("-march=native", "-mcpu=native")  # GCC's word for it, and Clang's on some processors
TYPES = {torch.float32: "float", torch.float64: "double"}
TORCH_LIBRARY = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
SWITCH = "CLIMAX_ELEVATION_COMPILED"


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


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where there are none, which is said once."""
    try:
        return load()
    except NotCompiled as reason:
        logger.warning("attention on the CPU is slower than it could be: %s", reason)
        return None


def load() -> ctypes.CDLL:
    """Compile the loops, unless that was done before, and load them.

    Raises:
        NotCompiled: If there is no compiler, it fails, or the environment says not to.
    """
    if os.environ.get(SWITCH) == "0":
        raise NotCompiled(f"{SWITCH} is 0: unset it to have its loops compiled")
    compiler, blas = _compiler(), _blas()
    try:
        place = _folder() / f"loops-{_fingerprint(compiler)}.so"
        if not place.exists():
            _compile(compiler, place)
        found = ctypes.CDLL(str(place))
    except OSError as error:  # a full disk, or a folder whose programs may not be run
        raise NotCompiled(f"{error}: set XDG_CACHE_HOME to a folder for what is compiled") from error
    found.use_blas(*blas)
    return found


def _blas() -> tuple[ctypes.c_void_p, ...]:
    """Where torch's own matrix products begin, of float and of double; each thread has as many threads as torch's."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / TORCH_LIBRARY))
    try:
        return tuple(ctypes.cast(getattr(library, f"{letter}gemm_"), ctypes.c_void_p) for letter in "sd")
    except AttributeError as error:
        raise NotCompiled("this torch has no BLAS that can be called: install one from PyPI or conda-forge") from error


def _compiler() -> list[str]:
    wanted = os.environ.get("CXX", "").strip()
    for name, *arguments in (shlex.split(wanted),) if wanted else ([name] for name in COMPILERS):
        found = shutil.which(name)
        if found:
            return [found, *arguments]
    looked_for = f"CXX, {wanted!r}, is not there" if wanted else f"none of {', '.join(COMPILERS)} is there"
    raise NotCompiled(f"no C++ compiler: {looked_for}; install GCC or Clang")


def _folder() -> Path:
    """A folder of caches that can be written to; the processes of a user share it."""
    try:
        kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "climax_elevation"
        kept.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where a user has no home
        return _own_folder()
    return kept if os.access(kept, os.W_OK) else _own_folder()


@lru_cache(maxsize=1)
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="climax_elevation_"))


def _fingerprint(compiler: list[str]) -> str:
    """Of all that the result depends on: sources, compiler, and a processor that others may share a home with."""
    here = Path(__file__).parent
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    parts = [*((here / name).read_text() for name in (*HEADERS, *SOURCES)), *FLAGS, *compiler, version, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(compiler: list[str], place: Path) -> None:
    here = Path(__file__).parent
    for processor in PROCESSORS:
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / place.name
            command = [*compiler, *FLAGS, processor, *(str(here / name) for name in SOURCES), "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode == 0:
                made.replace(place)  # at once: another process sees all of it or nothing
                return
    said = (run.stderr.strip() or f"exit status {run.returncode}").splitlines()[0]
    raise NotCompiled(f"{' '.join(compiler)} fails: {said}; try another, as CXX")
