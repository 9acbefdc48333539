"""Prepared shards cut anew, without their source: for other processes, or for a longer lead time."""

import hashlib
import io
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from climax_elevation.data import configuration
from climax_elevation.data.format import PARTITIONS, check_space, is_shard, shard_paths
from climax_elevation.data.record import COMPLETE, RECORD, RECUT, Prepared, read_record
from climax_elevation.data.times import cut
from climax_elevation.errors import InputError
from climax_elevation.files import (
    FULL,
    Layout,
    alone,
    check_names,
    npy_header,
    npz_layout,
    reading,
    save_npz,
    write_text,
)

logger = logging.getLogger(__name__)

CLIMAX_NAME = re.compile(r"(\d{4}|\d{6,12}-\d{6,12})_(0|[1-9]\d*)")
"""Of a shard by ClimaX's own scripts: a year, or the name of a file of CMIP6, and the shard's number in it."""
REMEDY = "prepare it again, or copy it again"


@dataclass(frozen=True)
class _File:
    """A shard that is there.

    Attributes:
        path: Where.
        steps: Number of them.
        repeats: How many of its first steps the shard before it has too; None where it goes on after none.
        stamps: Of its steps; () where they are not known.
    """

    path: Path
    steps: int
    repeats: int | None
    stamps: tuple[str, ...] = ()

    @property
    def own(self) -> int:
        return self.steps - (self.repeats or 0)


@dataclass(frozen=True)
class _Shard:
    """One to write: its first `start` steps of a piece are passed over."""

    file: str
    piece: int
    start: int
    stop: int
    repeats: int | None
    stamps: tuple[str, ...]


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds shards in ClimaX's format, whoever wrote them."""
    return any(shard_paths(folder / part) for part in PARTITIONS)


def recut(
    source: str | Path,
    out: str | Path,
    *,
    processes: int = 1,
    shard_steps: int | None = None,
    predict_range: int | None = None,
) -> Prepared:
    """Write the shards of a prepared folder anew, with all their pairs, and those across their boundaries.

    Values stay what they are, bit for bit, and so do statistics, coordinates, climatologies and whatever else lies in
    the folder; no pair goes across a gap in time or from one partition to another. Which shards go on after which,
    `prepare.json` says; without it the names of ClimaX's own scripts do within a year, and any other shard is cut by
    itself. OUT appears whole or not at all; one new shard is in memory at a time.

    Args:
        source: A folder in ClimaX's format.
        out: Folder to write: new or empty, or one that the same command has written, which stays as it is.
        processes, shard_steps: As `prepare` has them.
        predict_range: Steps between input and target. None: as prepared.

    Raises:
        InputError: If the source is not whole, or not of one kind, if OUT holds anything else, for a number of shards
            that cannot be, and for a full disk.
    """
    source, out = Path(source).resolve(), Path(out).resolve()
    if source == out or source in out.parents or out in source.parents:
        raise InputError(f"{out} and {source}, which is cut anew, lie in one another: choose another folder")
    record = read_record(source)
    listed = [] if record is None else record.get("shards")
    is_list = isinstance(listed, list) and all(isinstance(shard, dict) and "file" in shard for shard in listed)
    if (record is None and (source / RECORD).exists()) or not is_list:
        raise InputError(f"{source / RECORD} is damaged: {REMEDY}")
    if record is not None and record.get("state") != COMPLETE:
        raise InputError(f"{source} is not prepared to its end: repeat the command that began it")
    ahead = predict_range or (record or {}).get("options", {}).get("predict_range")
    if ahead is None:
        raise InputError(
            f"{source} has no {RECORD}, which would say how many steps ahead it is for: give predict_range"
        )
    layout = _layout(source)
    pieces = {part: _pieces(source, part, record, layout) for part in PARTITIONS}
    pieces = {part: found for part, found in pieces.items() if found}
    identity = {
        "of": _digest(source, record),
        "options": {"processes": processes, "shard_steps": shard_steps, "predict_range": ahead},
    }
    shards: dict[str, list[_Shard]] = {}
    for part, found in pieces.items():
        shards[part] = _plan(part, found, processes, shard_steps, ahead, _step_bytes(layout))
    done = _result(out, record, layout, pieces, shards, ahead)
    if _is_complete(out, identity, shards):
        logger.info("%s is complete: nothing to do, nothing changed", out)
        return done(0, False)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already, and is not what this command writes: choose a new or empty folder")
    steps = sum(shard.stop - shard.start for planned in shards.values() for shard in planned)
    check_space(out, steps * _step_bytes(layout))
    staging = out.with_name(f".{out.name}.partial")
    with alone(staging, f"another run is writing to {out}: wait until it has ended"):
        _empty(staging)  # of one that was killed
        try:
            _write(staging, layout, pieces, shards)
            _carry_along(source, out, staging, predict_range)
            content = _record(record, identity, layout, shards)
            write_text(staging / RECORD, json.dumps(content, indent=1) + "\n")
            if out.exists():
                out.rmdir()
            staging.rename(out)
            staging.mkdir()  # the lock is on it, as long as it lasts
        except OSError as error:
            what = "no space left on the disk of" if error.errno in FULL else "cannot write to"
            reason = "free some" if error.errno in FULL else error.strerror or error
            raise InputError(f"{what} {out} ({reason}): nothing is left there, repeat the command") from error
        finally:
            _empty(staging)
    with suppress(FileNotFoundError):
        staging.rmdir()
    return done(sum(map(len, shards.values())), True)


def _layout(source: Path) -> Layout:
    """Shape of a step and type of each variable, of the first shard."""
    first = next(path for part in PARTITIONS for path in shard_paths(source / part))
    found = npz_layout(first, REMEDY)
    shapes = {name: shape for name, (shape, _) in found.items()}
    if (
        not shapes
        or any(len(shape) != 4 or shape[1] != 1 for shape in shapes.values())
        or len(set(shapes.values())) > 1
    ):
        raise InputError(f"{first} has arrays [time, 1, height, width] of one size, not {shapes}")
    return {name: (shape[1:], kind) for name, (shape, kind) in found.items()}


def _step_bytes(layout: Layout) -> int:
    return sum(int(np.prod(shape)) * kind.itemsize for shape, kind in layout.values())


def _steps_of(path: Path, layout: Layout) -> int:
    shapes = npz_layout(path, REMEDY)
    check_names(path, list(shapes), list(layout))
    lengths = {shape[0] if shape else 0 for shape, _ in shapes.values()}
    if len(lengths) > 1 or {name: (shape[1:], kind) for name, (shape, kind) in shapes.items()} != layout:
        raise InputError(f"{path} has other variables, shapes or types than the first shard: prepare all of it alike")
    return lengths.pop()


def _pieces(source: Path, part: str, record: Mapping[str, Any] | None, layout: Layout) -> list[list[_File]]:
    """Shards that go on after one another, in order."""
    paths = shard_paths(source / part)
    files = _by_name(paths, layout) if record is None else list(_by_record(source, part, record, paths, layout))
    pieces: list[list[_File]] = []
    for file in files:
        if file.repeats is None or not pieces:
            pieces.append([])
        pieces[-1].append(file)
    if record is None and len(pieces) == len(paths) > 1:
        logger.info("%s: which shards go on after which is not known: each is cut by itself", part)
    return pieces


def _by_name(paths: Sequence[Path], layout: Layout) -> list[_File]:
    """ClimaX's own scripts cut each year into equally long shards, and leave out the end of leap years."""
    steps = {path: _steps_of(path, layout) for path in paths}
    named = {path: CLIMAX_NAME.fullmatch(path.stem) for path in paths}
    if not all(named.values()):
        return [_File(path, steps[path], None) for path in paths]
    place = {path: (match[1], int(match[2])) for path, match in named.items() if match}
    lengths: dict[str, set[int]] = {}
    for path in paths:
        lengths.setdefault(place[path][0], set()).add(steps[path])
    files, before = [], ("", -1)
    for path in sorted(paths, key=place.__getitem__):
        year, number = place[path]
        follows = before == (year, number - 1) and len(lengths[year]) == 1
        files.append(_File(path, steps[path], 0 if follows else None))
        before = (year, number)
    return files


def _by_record(
    source: Path, part: str, record: Mapping[str, Any], paths: Sequence[Path], layout: Layout
) -> Iterator[_File]:
    listed = [shard for shard in record.get("shards", []) if str(shard.get("file", "")).startswith(f"{part}/")]
    names = [source / shard["file"] for shard in listed]
    for path in (*names, *paths):
        if path not in paths:
            raise InputError(f"{path} is missing, which {RECORD} names: {REMEDY}")
        if path not in names:
            raise InputError(f"{path} is not named in {RECORD} beside it: take it away, or prepare the folder again")
    expected = ""
    for shard, path in zip(listed, names, strict=True):
        steps = _steps_of(path, layout)
        stamps = _stamps(shard.get("first"), shard.get("last"), steps, record.get("hours_per_step"))
        # before shards had steps in common, they ended at gaps, and elsewhere
        follows = 0 if expected and expected == shard.get("first") else None
        repeats = shard.get("repeats", follows)
        expected = _following(stamps)
        yield _File(path, steps, repeats, stamps)


def _stamps(first: str | None, last: str | None, steps: int, hours: float | None) -> tuple[str, ...]:
    """Of each step, where steps are equally long or calendar months; () where they are not, or it is not known."""
    if not first or not last:
        return ()
    if steps == 1:
        return (first,)
    months = 12 * (int(last[:4]) - int(first[:4])) + int(last[5:7]) - int(first[5:7])
    try:
        begin, end = np.datetime64(first, "s"), np.datetime64(last, "s")
    except ValueError:  # of a calendar that has the 30th of February
        return ()
    second = (end - begin) // (steps - 1)
    if begin + (steps - 1) * second == end and hours is not None and second == np.timedelta64(round(hours * 3600), "s"):
        return tuple(str(stamp) for stamp in begin + np.arange(steps) * second)
    if first[7:] == last[7:] and months and months % (steps - 1) == 0:
        in_months = np.datetime64(first[:7], "M") + np.arange(steps) * (months // (steps - 1))
        return tuple(f"{month}{first[7:]}" for month in in_months)
    return ()


def _following(stamps: Sequence[str]) -> str:
    """The stamp that would come next; '' where that is not known."""
    if len(stamps) < 2:
        return ""
    begin, end = (np.datetime64(stamp, "s") for stamp in (stamps[0], stamps[-1]))
    step = (end - begin) // (len(stamps) - 1)
    if np.datetime64(stamps[1], "s") - begin == step and begin + (len(stamps) - 1) * step == end:
        return str(end + step)
    months = np.datetime64(stamps[-1][:7], "M") - np.datetime64(stamps[-2][:7], "M")
    return f"{np.datetime64(stamps[-1][:7], 'M') + months}{stamps[-1][7:]}"


def _plan(
    part: str, pieces: Sequence[Sequence[_File]], processes: int, shard_steps: int | None, ahead: int, step_bytes: int
) -> list[_Shard]:
    ranges, begin = [], 0
    for piece in pieces:
        ranges.append(range(begin, begin + sum(file.own for file in piece)))
        begin = ranges[-1].stop
    stretches = cut(
        part, ranges, shard_steps=shard_steps, predict_range=ahead, step_bytes=step_bytes, processes=processes
    )
    shards = []
    for index, (start, stop, repeats) in enumerate(stretches):
        number = next(i for i, steps in enumerate(ranges) if steps.start <= start < steps.stop)
        low, high = start - ranges[number].start, stop - ranges[number].start
        known = all(file.stamps for file in pieces[number])
        stamps = [stamp for file in pieces[number] for stamp in file.stamps[file.repeats or 0 :]] if known else []
        name = stamps[low][:13].replace(":", "") if stamps else f"{_stem(pieces[number][0])}_{low}"
        shards.append(
            _Shard(
                f"{part}/{index:05d}_{name}.npz", number, low, high, repeats, tuple(stamps[low:high][:: high - low - 1])
            )
        )
    left_out = begin - sum(shard.stop - shard.start - (shard.repeats or 0) for shard in shards)
    if left_out:
        logger.info("%s: %d of %d steps are left out, which have none %d steps later", part, left_out, begin, ahead)
    return shards


def _stem(file: _File) -> str:
    """The name of a shard without the number that a cut has put before it."""
    return re.sub(r"^\d{5}_", "", file.path.stem)


class _Steps:
    """The steps of shards that go on after one another, forwards, each once; one shard is open at a time."""

    def __init__(self, files: Sequence[_File], layout: Layout) -> None:
        self._files = iter(files)
        self._layout = layout
        self._left = 0
        self._open = ExitStack()
        self._streams: dict[str, IO[bytes]] = {}
        self._path = Path()

    def close(self) -> None:
        self._open.close()

    def take(self, count: int) -> dict[str, NDArray[Any]]:
        """The next so many."""
        taken: dict[str, list[NDArray[Any]]] = {name: [] for name in self._layout}
        while count:
            if not self._left:
                self._next()
            steps = min(count, self._left)
            for name in self._layout:
                taken[name].append(self._read(name, steps))
            self._left, count = self._left - steps, count - steps
        return {name: np.concatenate(arrays) for name, arrays in taken.items()}

    def _next(self) -> None:
        self.close()
        file = next(self._files)
        self._path, self._left = file.path, file.own
        with reading(self._path, REMEDY):
            archive = self._open.enter_context(zipfile.ZipFile(file.path))
            for name in self._layout:
                stream = self._open.enter_context(archive.open(f"{name}.npy"))
                _, by_columns, _ = npy_header(stream)
                if by_columns:  # which has no steps one after another
                    with archive.open(f"{name}.npy") as again:
                        stream = io.BytesIO(np.lib.format.read_array(again).tobytes())
                self._streams[name] = stream
        if file.repeats:
            for name in self._layout:
                self._read(name, file.repeats)

    def _read(self, name: str, steps: int) -> NDArray[Any]:
        shape, kind = self._layout[name]
        with reading(self._path, REMEDY):
            values = np.frombuffer(self._streams[name].read(steps * int(np.prod(shape)) * kind.itemsize), dtype=kind)
            return values.reshape(steps, *shape)


def _write(
    staging: Path,
    layout: Layout,
    pieces: Mapping[str, Sequence[Sequence[_File]]],
    shards: Mapping[str, Sequence[_Shard]],
) -> None:
    total = sum(map(len, shards.values()))
    with tqdm(total=total, desc="prepare", unit="shard", disable=None) as bar:
        for part, planned in shards.items():
            for number, piece in enumerate(pieces[part]):
                wanted = [shard for shard in planned if shard.piece == number]
                for shard, arrays in zip(wanted, _cut(piece, wanted, layout), strict=True):
                    save_npz(staging / shard.file, arrays)
                    bar.update()


def _cut(piece: Sequence[_File], shards: Sequence[_Shard], layout: Layout) -> Iterator[dict[str, NDArray[Any]]]:
    steps, kept = _Steps(piece, layout), {name: np.empty((0, *shape), kind) for name, (shape, kind) in layout.items()}
    with closing(steps):
        for index, shard in enumerate(shards):
            taken = steps.take(shard.stop - shard.start - (shard.repeats or 0))
            arrays = {name: np.concatenate([kept[name], values]) for name, values in taken.items()}
            yield arrays
            common = 0 if index + 1 == len(shards) else shards[index + 1].repeats or 0
            kept = {name: values[len(values) - common :] for name, values in arrays.items()}


def _carry_along(source: Path, out: Path, staging: Path, ahead: int | None) -> None:
    """Copy what lies beside the shards; the configuration names the new folder."""
    folders = [source, *(source / part for part in PARTITIONS)]
    for path in (path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())):
        place = staging / path.relative_to(source)
        left_out = path.name.startswith(".") or (path.parent != source and is_shard(path))
        if not path.is_file() or left_out or path == source / RECORD:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if path == source / configuration.FILE:
            write_text(place, configuration.moved(path.read_text(), source, out, ahead))
        else:
            shutil.copyfile(path, place)


def _record(
    record: Mapping[str, Any] | None, identity: Mapping[str, Any], layout: Layout, shards: Mapping[str, list[_Shard]]
) -> dict[str, Any]:
    listed = []
    for shard in (shard for planned in shards.values() for shard in planned):
        ends = {"first": shard.stamps[0], "last": shard.stamps[-1]} if shard.stamps else {}
        listed.append({"file": shard.file, **ends, "repeats": shard.repeats})
    kept = dict(record or {"variables": list(layout)})
    options = {**kept.get("options", {}), "predict_range": identity["options"]["predict_range"]}
    return {**kept, "state": COMPLETE, "options": options, RECUT: identity, "shards": listed}


def _digest(source: Path, record: Mapping[str, Any] | None) -> str:
    paths = [path for part in PARTITIONS for path in shard_paths(source / part)]
    files = [(path.relative_to(source).as_posix(), path.stat().st_size) for path in paths]
    return hashlib.sha256(json.dumps([record, files], sort_keys=True).encode()).hexdigest()


def _is_complete(out: Path, identity: Mapping[str, Any], shards: Mapping[str, Sequence[_Shard]]) -> bool:
    made = (read_record(out) or {}).get(RECUT) == identity
    return made and all((out / shard.file).is_file() for planned in shards.values() for shard in planned)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _result(
    out: Path,
    record: Mapping[str, Any] | None,
    layout: Layout,
    pieces: Mapping[str, Sequence[Sequence[_File]]],
    shards: Mapping[str, Sequence[_Shard]],
    ahead: int,
) -> Any:
    height, width = next(iter(layout.values()))[0][-2:]
    own = {part: sum(s.stop - s.start - (s.repeats or 0) for s in planned) for part, planned in shards.items()}

    def done(written: int, changed: bool) -> Prepared:
        return Prepared(
            out=out,
            variables=tuple(layout),
            shape=(height, width),
            steps=own,
            shards={part: len(planned) for part, planned in shards.items()},
            predict_range=ahead,
            hours_per_step=(record or {}).get("hours_per_step"),
            shards_written=written,
            changed=changed,
            commands=configuration.commands(out) if (out / configuration.FILE).is_file() else (),
        )

    return done
