"""GRIB through cfgrib: one data set a variable, no file left beside the source, and none of ecCodes' own lines."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xarray as xr

from climax_elevation.data.optional import require
from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

MAGIC = b"GRIB"
SUFFIXES = (".grib", ".grb", ".grib2", ".grb2", ".gb2")

_SAID_ABOVE = 2**26  # bytes, above which it takes a while
_CHUNKS = {"time": 64, "step": 64}  # read block by block, never at once
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, AssertionError)


def open_grib(path: Path) -> list[xr.Dataset]:
    """The variables of a file, lazily; several of one name where its levels or times differ.

    Raises:
        InputError: If it is damaged, or no GRIB.
    """
    require("cfgrib", "grib", "reading GRIB")
    from cfgrib.xarray_store import open_variable_datasets

    size = path.stat().st_size
    if size > _SAID_ABOVE:
        logger.info("%s: reading the header of every message (%.1f GiB)", path, size / 2**30)
    with tempfile.TemporaryDirectory(prefix="climax-elevation-") as folder, _silent():
        # The index is made once and read once a variable: without a place for it, the file is scanned as often.
        keys = {"indexpath": f"{folder}/{{short_hash}}.idx", "squeeze": False, "errors": "raise"}
        try:
            return open_variable_datasets(str(path), backend_kwargs=keys, chunks=_CHUNKS)
        except Exception as error:
            if not (is_grib_error(error) or isinstance(error, _UNREADABLE)):
                raise
            said = str(error).strip().split("\n")[0] or type(error).__name__
            raise InputError(f"cannot open {path} as GRIB ({said}): download or write it again") from error


def is_grib_error(error: Exception) -> bool:
    """Whether ecCodes raised it, which need not be installed."""
    return any(kind.__module__.startswith("gribapi") for kind in type(error).__mro__)


@contextmanager
def _silent() -> Iterator[None]:
    """Without what ecCodes' C library and cfgrib write to standard error themselves."""
    loggers = [logging.getLogger(name) for name in ("cfgrib", "eccodes", "gribapi")]
    levels = [one.level for one in loggers]
    kept = os.dup(2)
    try:
        for one in loggers:
            one.setLevel(logging.CRITICAL + 1)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
