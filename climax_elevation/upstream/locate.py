"""Where ClimaX is, if anywhere."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from climax_elevation.errors import InputError
from climax_elevation.upstream.patching import Examination, State, examine, package_folder

VARIABLE = "CLIMAX_SRC"


class ClimaXNotFound(InputError):
    """Nobody named a ClimaX, and none is installed."""


@dataclass(frozen=True)
class Source:
    """A copy of ClimaX.

    Attributes:
        package: The folder `climax`.
        origin: How it was found: "given", "CLIMAX_SRC" or "installed".
        examination: Whether it is patched, and what to say about it.
    """

    package: Path
    origin: str
    examination: Examination

    @property
    def state(self) -> State:
        """Whether it is patched."""
        return self.examination.state


def find_climax(path: Path | None = None) -> Source:
    """Find ClimaX: at `path`, else where the environment's CLIMAX_SRC points, else the installed one.

    Args:
        path: A checkout of microsoft/ClimaX, its `src`, or the folder that holds the package `climax`.

    Raises:
        InputError: If `path` or CLIMAX_SRC is no ClimaX.
        ClimaXNotFound: If neither is given and ClimaX is not installed.
    """
    if path is not None:
        return _source(package_folder(path), "given")
    if os.environ.get(VARIABLE):
        try:
            return _source(package_folder(Path(os.environ[VARIABLE])), VARIABLE)
        except InputError as error:
            raise InputError(f"{VARIABLE}: {error}") from None
    return _source(_installed(), "installed")


def _source(package: Path, origin: str) -> Source:
    return Source(package, origin, examine(package))


def _installed() -> Path:
    # a folder can be found without being imported, and importing ClimaX may fail on today's versions
    spec = importlib.util.find_spec("climax")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        if (folder / "arch.py").is_file():
            return folder.resolve()
    if spec is not None:
        where = f" in {folders[0]}" if folders else ""
        raise ClimaXNotFound(
            f"ClimaX is not installed: the package climax{where} is an unrelated command-line library from PyPI; "
            f"give a checkout of microsoft/ClimaX with --climax or {VARIABLE}"
        )
    raise ClimaXNotFound(
        f"ClimaX is not installed: give a checkout of microsoft/ClimaX with --climax or {VARIABLE}, or install "
        "climax-elevation[climax]"
    )
