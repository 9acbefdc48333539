"""The two series of patches, and git, which applies them."""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from climax_elevation.errors import InputError

SERIES = ("today", "terrain")  # in this order where both are applied; terrain fits unmodified ClimaX too
ABSENT = "0" * 40  # git's blob id of a file that is not there

Contents = dict[str, bytes | None]  # by name in a checkout; None: there is no such file

# the patches are made with --full-index
_CHANGED_FILE = re.compile(rb"^diff --git a/(\S+) b/\1\n(?:new file mode \d+\n)?index ([0-9a-f]{40})\.\.", re.MULTILINE)


@dataclass(frozen=True)
class Patch:
    """One patch.

    Attributes:
        name: Series and file name.
        series: One of `SERIES`.
        content: Of the file.
        files: The files that it changes, by name in a checkout, with their blob ids before it.
    """

    name: str
    series: str
    content: bytes
    files: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        files = {name.decode(): blob.decode() for name, blob in _CHANGED_FILE.findall(self.content)}
        object.__setattr__(self, "files", files)


class DoesNotApply(Exception):
    """A patch does not fit."""


def read_patches() -> list[Patch]:
    """The patches, in order."""
    try:
        folder = importlib.resources.files("climax_elevation.patches")
    except ModuleNotFoundError:  # not installed, but run from a checkout
        folder = Path(__file__).parents[2] / "patches"
    patches = []
    for series in SERIES:
        found = {entry.name: entry for entry in (folder / series).iterdir() if entry.name.endswith(".patch")}
        if not found:
            raise FileNotFoundError(f"no *.patch in {folder / series}")
        patches += [Patch(f"{series}/{name}", series, found[name].read_bytes()) for name in sorted(found)]
    return patches


def git_executable() -> str:
    """The path of git.

    Raises:
        InputError: If there is none.
    """
    found = shutil.which("git")
    if found is None:
        raise InputError("patching ClimaX needs the program git, which is not on the PATH: install it")
    return found


def git_apply(contents: Contents, patch: Patch, *, reverse: bool = False) -> Contents:
    """Apply what a patch says of these files, in a folder of their own.

    Raises:
        DoesNotApply: If it does not fit one of them.
        InputError: If git is missing.
    """
    git = git_executable()
    with tempfile.TemporaryDirectory(prefix="climax-elevation-") as temporary:
        # resolved, since git compares ceilings with real paths
        root = Path(temporary).resolve()
        work = root / "work"
        work.mkdir()
        for name, content in contents.items():
            if content is not None:
                file = work / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        file = root / "patch"
        file.write_bytes(patch.content)
        command = [git, "-c", "core.autocrlf=false", "apply", "--unidiff-zero", "--whitespace=nowarn"]
        command += [f"--include={name}" for name in contents] + ["--reverse"] * reverse + [str(file)]
        run = subprocess.run(command, cwd=work, env=_environment(root), capture_output=True, text=True, check=False)
        if run.returncode:
            raise DoesNotApply(f"{patch.name} does not apply: {run.stderr.strip()}")
        return {name: (work / name).read_bytes() if (work / name).is_file() else None for name in contents}


def blob_id(content: bytes | None) -> str:
    """What git calls a content."""
    if content is None:
        return ABSENT
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _environment(ceiling: Path) -> dict[str, str]:
    """Inside a repository git would skip, silently, what the repository does not have; and users configure git."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return own | {
        "GIT_CEILING_DIRECTORIES": str(ceiling),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "LC_ALL": "C",
    }
