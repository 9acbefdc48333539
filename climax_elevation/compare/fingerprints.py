"""The files that a run depends on, told apart by what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from climax_elevation.data.format import PARTITIONS
from climax_elevation.errors import InputError
from climax_elevation.files import whole

BESIDE_SHARDS = ("normalize_mean.npz", "normalize_std.npz", "lat.npy", "lon.npy", "lat2d.npy", "lon2d.npy")
CHUNK = 2**20
READERS = 4  # at a time: more wait for the disk
SETTLED_S = 2  # coarser than any file system's clock
SILENT_S = 2

Record = dict[str, dict[str, Any]]  # name: digest of the content, and the stamp under which it was seen


def data_files(root: str | Path) -> dict[str, Path]:
    """Statistics, coordinates, shards and climatologies of a folder of ClimaX's format."""
    root = Path(root)
    shards = [path for part in PARTITIONS for path in sorted((root / part).glob("*.npz"))]
    beside = [root / name for name in BESIDE_SHARDS if (root / name).is_file()]
    return {path.relative_to(root).as_posix(): path for path in (*beside, *shards)}


def bias_files(bias_args: Mapping[str, Any] | None) -> dict[str, Path]:
    """The files that a bias's arguments name; whoever reads them says which are missing."""
    named = bias_args or {}
    paths = [Path(str(named["elevation_file"]))] if named.get("elevation_file") else []
    if named.get("stats_dir"):
        paths += [Path(str(named["stats_dir"])) / name for name in BESIDE_SHARDS]
    return {str(path): path for path in paths if path.is_file()}


def examine(files: Mapping[str, Path], known: Record | None = None) -> Record:
    """Digests of files; one whose stamp is still the known one is not read again.

    Raises:
        InputError: If a file cannot be read.
    """
    stamps = {name: _stamp(path) for name, path in files.items()}
    known = {name: seen for name, seen in (known or {}).items() if seen["stamp"] and seen["stamp"] == stamps.get(name)}
    to_read = {name: path for name, path in files.items() if name not in known}
    total = sum(path.stat().st_size for path in to_read.values())
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="reading the data's files", delay=SILENT_S) as bar,
        ThreadPoolExecutor(READERS) as pool,
    ):
        digests = dict(zip(to_read, pool.map(partial(_digest, bar=bar), to_read.values()), strict=True))
    return {name: known.get(name) or {"digest": digests[name], "stamp": stamps[name]} for name in files}


def _stamp(path: Path) -> list[int] | None:
    """What changes whenever a file's content does; None where nothing is known to.

    The time of the last change (ctime) cannot be set, as that of the last modification can. Within its clock's
    resolution a second change would not show, so that a file that was just written is read again.
    """
    if os.name == "nt":  # where it is the time of creation
        return None
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if time.time() - status.st_ctime < SETTLED_S:
        return None
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _digest(path: Path, bar: tqdm) -> str:
    digest, chunk = hashlib.blake2b(digest_size=16), memoryview(bytearray(CHUNK))
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(chunk):
                digest.update(chunk[:size])
                bar.update(size)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read ({error.strerror}): make it readable, or leave it out")


def digests(record: Record) -> dict[str, str]:
    """What each file holds."""
    return {name: seen["digest"] for name, seen in record.items()}


def fingerprint(record: Record) -> str:
    """Of names and contents."""
    return hashlib.sha256(json.dumps(digests(record), sort_keys=True).encode()).hexdigest()[:16]


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which file is another than before, in words, and how many more; digests are given by name."""
    told = [
        f"{name} {'is new' if name not in before else 'is gone' if name not in now else 'has changed'}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    more = f", and {len(told) - 1} more" if len(told) > 1 else ""
    return f"{told[0]}{more}" if told else ""


def read_records(path: Path) -> dict[str, Record]:
    """What was found when a comparison last began, by kind of file; empty where there is nothing."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def write_records(path: Path, records: Mapping[str, Record]) -> None:
    """Keep it, whole or not at all."""
    with whole(path) as written:
        written.write_text(json.dumps(records, indent=1))
