"""A temporary copy of ClimaX that runs on what is installed; the user's own stays as it is."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from climax_elevation.upstream.locate import Source
from climax_elevation.upstream.patching import State, patched_contents

logger = logging.getLogger(__name__)


@contextmanager
def overlay(source: Source, *, patched: bool) -> Iterator[Path]:
    """Copy ClimaX to a temporary folder and make it fit the installed versions.

    Args:
        source: From `find_climax`.
        patched: Whether it gets the series "terrain" too, besides "today".

    Yields:
        The folder to put on `sys.path`; it is removed at the end.

    Raises:
        InputError: If the patches do not fit, or git is missing.
    """
    whole = source.state is State.PATCHED
    contents = {} if whole else patched_contents(source.package, "all" if patched else "today")
    if contents and patched and source.state is State.MODIFIED:
        logger.warning("%s; the patches fit all the same and are used in a temporary copy", source.examination.sentence)
    with tempfile.TemporaryDirectory(prefix="climax-elevation-") as temporary:
        folder = Path(temporary) / "src"
        package = folder / "climax"
        shutil.copytree(source.package, package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        for name, content in contents.items():
            (package / name).write_bytes(content)
        yield folder


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Make the package `climax` of `folder` the one that is imported, and forget it afterwards."""
    hidden = _forget()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        _forget()
        sys.modules.update(hidden)


def _forget() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "climax"}
