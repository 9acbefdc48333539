"""Patching a copy of ClimaX: what state it is in, and applying or reverting as a whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from climax_elevation.checks import one_of
from climax_elevation.errors import InputError
from climax_elevation.upstream.series import (
    ABSENT,
    SERIES,
    Contents,
    DoesNotApply,
    Patch,
    blob_id,
    git_apply,
    read_patches,
)

logger = logging.getLogger(__name__)

COMMIT = "6d5d354ffb4b91bb684f430b98e8f6f8af7c7f7c"
PREFIX = "src/climax/"  # where the patches find the package
CHOICES = (*SERIES, "all")


class State(Enum):
    """How the patched files of a copy of ClimaX compare with those of `COMMIT`."""

    UNPATCHED = "unpatched"
    PATCHED = "patched"
    PARTLY = "patched with one series, not with the other"
    HALF = "half patched"
    MODIFIED = "modified"


@dataclass(frozen=True)
class Examination:
    """What a copy of ClimaX is.

    Attributes:
        state: Of the files that the series change, together.
        sentence: The same for people, with what to do.
        modified: Those files of the package that are neither `COMMIT`'s nor patched ones.
        left: Those outside the package; patching leaves them as they are.
    """

    state: State
    sentence: str
    modified: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def check(path: Path, series: str = "all") -> Examination:
    """Say whether a copy of ClimaX is unpatched, patched, half patched or another version.

    Args:
        path: A checkout, its `src`, or the package's folder.
        series: "today", ClimaX on today's versions; "terrain", the flag; or "all".

    Raises:
        InputError: If there is no ClimaX, or git is missing and the files are not `COMMIT`'s.
    """
    return examine(package_folder(path), series)


def apply(path: Path, series: str = "all") -> str:
    """Patch a copy of ClimaX at `COMMIT`, all files or none; a half patched one is completed.

    What lies outside the package in a checkout (configurations, documentation, tests) is patched with it,
    but for files with changes of their own, which are left as they are and named.

    Args:
        path: A checkout, its `src`, or the package's folder.
        series: "today", ClimaX on today's versions; "terrain", the flag; or "all".

    Returns:
        What was done.

    Raises:
        InputError: If there is no ClimaX, it is another version or has local changes to the files that
            would be patched, or git is missing. Nothing is changed then.
    """
    return _convert(path, series, State.PATCHED)


def revert(path: Path, series: str = "all") -> str:
    """Undo `apply`; arguments, result and errors are those of `apply`."""
    return _convert(path, series, State.UNPATCHED)


def package_folder(path: Path) -> Path:
    """The package's folder of a checkout, of its `src`, of an installation, or the folder itself.

    Raises:
        InputError: If none of them holds ClimaX.
    """
    path = Path(path).expanduser()
    for folder in (path / "src" / "climax", path / "climax", path):
        if (folder / "arch.py").is_file() and (folder / "utils").is_dir():
            return folder.resolve()
    if not path.exists():
        raise InputError(f"{path} does not exist: give a checkout of microsoft/ClimaX")
    if (path / "climax").is_dir() or (path / "src" / "climax").is_dir():
        raise InputError(
            f"the package climax in {path} has no arch.py: it is not microsoft/ClimaX (PyPI's climax is an unrelated "
            "command-line library); give a checkout of microsoft/ClimaX"
        )
    raise InputError(f"{path} holds no package climax: give a checkout of microsoft/ClimaX")


def examine(package: Path, series: str = "all") -> Examination:
    """`check` of a package's folder."""
    return _examination(_Copy(package), _chosen(series))


def patched_contents(package: Path, series: str = "all") -> dict[str, bytes]:
    """What the package's files become; the files themselves stay as they are.

    A copy with local changes will do. What of the series "today" finds no place among them is left out with a
    warning: somebody may have done its work already.

    Args:
        package: The package's folder.
        series: As `apply`; what is applied already stays.

    Returns:
        By name within the package, the files that change.

    Raises:
        InputError: If the series "terrain" fits neither forwards nor backwards, or git is missing.
    """
    copy, chosen = _Copy(package), _chosen(series)
    inside = [name for name in copy.contents if name.startswith(PREFIX)]
    results = copy.made({name: copy.wanted(name, chosen) for name in inside if name in copy.originals})
    for name in inside:
        if name not in copy.originals:
            results[name] = _fitted(copy, name, chosen)
    return {
        name.removeprefix(PREFIX): content
        for name, content in results.items()
        if content is not None and content != copy.contents[name]
    }


def replace_all(contents: Mapping[Path, bytes | None]) -> None:
    """Replace, create or (None) delete files, all of them or, when one fails, none; modes are kept."""
    before = {path: path.read_bytes() if path.exists() else None for path in contents}
    staged: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for path, content in contents.items():
            if content is not None:
                staged[path] = _stage(path, content)
        for path in contents:
            _put(staged.get(path), path)
            done.append(path)
    except BaseException:
        for path in done:
            content = before[path]
            _put(None if content is None else _stage(path, content), path)
        raise
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


class _Copy:
    """The files of a copy of ClimaX that the patches change, and which patches each of them has.

    Attributes:
        contents: Of the files, with plain line endings, by name in a checkout.
        applied: The patches that each has, as far as they come off it.
        originals: What is left without them, where that is what `COMMIT` has.
        remains: The same of the others, which have local changes.
    """

    def __init__(self, package: Path) -> None:
        self.package = package
        self.patches = read_patches()
        self._ids: dict[str, str] = {}
        for patch in self.patches:
            self._ids |= {name: old for name, old in patch.files.items() if name not in self._ids}  # COMMIT's, then
        self.contents = self._read()
        self.originals: Contents = {}
        self.applied: dict[str, list[Patch]] = {}
        self.remains: Contents = {}
        self._recognise()

    def place(self, name: str) -> Path | None:
        """Where a file is; None for one outside the package, if this is no checkout."""
        if name.startswith(PREFIX):
            return self.package / name.removeprefix(PREFIX)
        root = self.package.parent.parent
        return root / name if self.package.parent.name == "src" and (root / "pyproject.toml").is_file() else None

    def touching(self, name: str, series: Iterable[str] = SERIES) -> list[Patch]:
        """The patches of a file, in order."""
        return [patch for patch in self.patches if name in patch.files and patch.series in series]

    def wanted(self, name: str, series: Iterable[str]) -> list[Patch]:
        """The patches that a file has once the series are applied."""
        return [patch for patch in self.touching(name) if patch.series in series or patch in self.applied[name]]

    def kept(self, name: str, series: Iterable[str]) -> list[Patch]:
        """The patches that a file has once the series are reverted."""
        return [patch for patch in self.applied[name] if patch.series not in series]

    def made(self, wanted: Mapping[str, Sequence[Patch]]) -> Contents:
        """What files become with these patches and no others."""
        changing = {name: patches for name, patches in wanted.items() if patches != self.applied[name]}
        return {name: self.contents[name] for name in wanted} | _apply(self.originals, changing, self.patches)

    def _read(self) -> Contents:
        places = {name: place for name in self._ids if (place := self.place(name)) is not None}
        missing = [name for name, place in places.items() if not place.is_file() and self._ids[name] != ABSENT]
        in_package = [name.removeprefix(PREFIX) for name in missing if name.startswith(PREFIX)]
        if in_package:
            raise InputError(f"{self.package} lacks {', '.join(in_package)}: it is not ClimaX at {COMMIT[:7]}")
        return {
            name: place.read_bytes().replace(b"\r\n", b"\n") if place.is_file() else None
            for name, place in places.items()
            if name not in missing
        }

    def _recognise(self) -> None:
        """Take patches off, the last first, and see whether what `COMMIT` has remains."""
        strange = {name: content for name, content in self.contents.items() if blob_id(content) != self._ids[name]}
        taken: dict[str, list[Patch]] = {name: [] for name in self.contents}
        remains = dict(self.contents)
        for patch in reversed(self.patches):
            part = {name: remains[name] for name in strange if name in patch.files}
            for name, content in _attempt(part, patch, reverse=True).items():
                remains[name] = content
                taken[name].insert(0, patch)
        # with so little context a hunk that was moved would be reverted too, hence the way back
        again = dict(remains)
        for patch in self.patches:
            again |= _attempt({name: again[name] for name in strange if patch in taken[name]}, patch)
        for name, content in remains.items():
            same = blob_id(content) == self._ids[name] and again[name] == self.contents[name]
            (self.originals if same else self.remains)[name] = content
        self.applied = taken


def _chosen(series: str) -> tuple[str, ...]:
    return SERIES if one_of("series", series, CHOICES) == "all" else (series,)


def _examination(copy: _Copy, series: tuple[str, ...]) -> Examination:
    files = [name for name in copy.contents if copy.touching(name, series)]
    inside = {name: name.removeprefix(PREFIX) for name in files}
    unknown = [name for name in files if name not in copy.originals]
    modified = tuple(inside[name] for name in unknown if name.startswith(PREFIX))
    left = tuple(name for name in unknown if not name.startswith(PREFIX))
    note = f"; {', '.join(left)}: left alone, with local changes" if left else ""
    if modified:
        return Examination(State.MODIFIED, _modified_sentence(copy.package, modified), modified, left)
    states = {part: _state_of(copy, part) for part in series}
    named = "" if len(series) == len(SERIES) else f" with {series[0]}"
    if State.HALF in states.values():
        half = [part for part in series if states[part] is State.HALF]
        has = [name for name in files if copy.touching(name, half) and copy.wanted(name, half) == copy.applied[name]]
        only = f" --series {half[0]}" if len(half) == 1 else ""
        sentence = (
            f"half patched{named}, only {', '.join(inside[name] for name in has) or 'a part of each file'}; "
            f"`climax-elevation patch apply{only}` completes it, `patch revert{only}` undoes it"
        )
        return Examination(State.HALF, f"{copy.package}: {sentence}{note}", left=left)
    if len(set(states.values())) > 1:
        has_one, lacks = sorted(series, key=lambda part: states[part] is State.UNPATCHED)
        sentence = f"patched with {has_one}, not with {lacks}, from {COMMIT[:7]}"
        return Examination(State.PARTLY, f"{copy.package}: {sentence}{note}", left=left)
    state = states[series[0]]
    sentence = f"unpatched{named}, at" if state is State.UNPATCHED else f"patched{named}, from"
    return Examination(state, f"{copy.package}: {sentence} {COMMIT[:7]}{note}", left=left)


def _state_of(copy: _Copy, series: str) -> State:
    files = [name for name in copy.originals if copy.touching(name, (series,))]
    if not any(patch.series == series for name in files for patch in copy.applied[name]):
        return State.UNPATCHED
    whole = all(copy.wanted(name, (series,)) == copy.applied[name] for name in files)
    return State.PATCHED if whole else State.HALF


def _convert(path: Path, series: str, target: State) -> str:
    package, chosen = package_folder(path), _chosen(series)
    copy = _Copy(package)
    found = _examination(copy, chosen)
    named = "" if len(chosen) == len(SERIES) else f" with {series}"
    if found.state is target:
        already = f"already patched{named}" if target is State.PATCHED else f"not patched{named}"
        return f"{package}: {already}, nothing to do"
    if found.state is State.MODIFIED:
        raise InputError(f"{found.sentence}; nothing was changed")
    patches_of = copy.wanted if target is State.PATCHED else copy.kept
    try:
        made = copy.made({name: patches_of(name, chosen) for name in copy.originals if copy.touching(name, chosen)})
    except DoesNotApply as error:
        raise InputError(f"{package}: {error}; nothing was changed") from None
    changed = {name: content for name, content in made.items() if content != copy.contents[name]}
    places = {place: content for name, content in changed.items() if (place := copy.place(name)) is not None}
    try:
        replace_all({place: _with_endings(content, like=place) for place, content in places.items()})
    except OSError as error:
        raise InputError(f"{package} could not be written ({error}); nothing was changed") from error
    done = f"patched{named}" if target is State.PATCHED else f"reverted to ClimaX without {' and '.join(chosen)}"
    left = f"; left alone, with local changes: {', '.join(found.left)}" if found.left else ""
    return f"{package}: {done} ({', '.join(name.removeprefix(PREFIX) for name in changed)}){left}"


def _fitted(copy: _Copy, name: str, series: tuple[str, ...]) -> bytes | None:
    """A file with local changes, with the patches that it lacks."""
    content = copy.remains[name]
    for patch in copy.wanted(name, series):
        try:
            content = git_apply({name: content}, patch)[name]
        except DoesNotApply:
            if patch.series != "today":
                raise InputError(f"{_examination(copy, series).sentence}; the patches do not fit it") from None
            logger.warning("%s: %s does not fit its local changes and is left out", name, patch.name)
    return content


def _apply(originals: Contents, wanted: Mapping[str, Sequence[Patch]], order: Sequence[Patch]) -> Contents:
    contents = {name: originals[name] for name in wanted}
    for patch in order:
        part = {name: contents[name] for name in wanted if patch in wanted[name]}
        if part:
            contents |= git_apply(part, patch)
    return contents


def _attempt(contents: Contents, patch: Patch, *, reverse: bool = False) -> Contents:
    """Each file with the patch applied; files that it does not fit are left out."""
    if not contents:
        return {}
    try:
        return git_apply(contents, patch, reverse=reverse)
    except DoesNotApply:
        if len(contents) == 1:
            return {}
    return {k: v for name in contents for k, v in _attempt({name: contents[name]}, patch, reverse=reverse).items()}


def _with_endings(content: bytes | None, *, like: Path) -> bytes | None:
    if content is None or not like.is_file() or b"\r\n" not in like.read_bytes():
        return content
    return content.replace(b"\n", b"\r\n")


def _put(staged: Path | None, path: Path) -> None:
    if staged is None:
        path.unlink()
    else:
        os.replace(staged, path)


def _stage(path: Path, content: bytes) -> Path:
    """Write beside `path`, on the same file system, so that replacing it is one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        if path.exists():
            shutil.copymode(path, name)
        else:
            os.chmod(name, 0o644)  # mkstemp makes it the user's own
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _modified_sentence(package: Path, modified: Sequence[str]) -> str:
    return (
        f"{package}: {', '.join(modified)} {'is' if len(modified) == 1 else 'are'} neither as in microsoft/ClimaX "
        f"{COMMIT[:7]} nor as the patches leave {'it' if len(modified) == 1 else 'them'}{_head(package)}: check out "
        f"{COMMIT[:7]} with no local changes to {'it' if len(modified) == 1 else 'them'}"
    )


def _head(package: Path) -> str:
    """Which commit is checked out, where that can be known."""
    root = next((folder for folder in package.parents if (folder / ".git").exists()), None)
    git = shutil.which("git")
    if root is None or git is None:
        return ""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    run = subprocess.run([git, "rev-parse", "HEAD"], cwd=root, env=own, capture_output=True, text=True, check=False)
    head = run.stdout.strip()
    if run.returncode or not head:
        return ""
    if head == COMMIT:
        return f" (HEAD of {root} is {COMMIT[:7]}, so these are local changes)"
    return f" (HEAD of {root} is {head[:7]})"
