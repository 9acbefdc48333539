"""The patch of ClimaX: what state a copy is in, and applying or reverting it as a whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from climax_elevation.errors import InputError

COMMIT = "6d5d354ffb4b91bb684f430b98e8f6f8af7c7f7c"
PREFIX = "src/climax/"  # where the patches find the package

# git blob ids at COMMIT of the files that the patches change
ORIGINALS = {
    "arch.py": "001c4c0663c0e1a813f997427929c684ad141b7c",
    "regional_forecast/arch.py": "6836cb346ac33140919c56e8be00927e242f04da",
    "climate_projection/arch.py": "2e1510ee09e5adea44ffe96c962648bf420c426f",
}

Contents = dict[str, bytes]


class State(Enum):
    """How the patched files of a copy of ClimaX compare with those of `COMMIT`."""

    UNPATCHED = "unpatched"
    PATCHED = "patched"
    HALF = "half patched"
    MODIFIED = "modified"


@dataclass(frozen=True)
class Examination:
    """What a copy of ClimaX is.

    Attributes:
        state: Of the files that the patches change, together.
        sentence: The same for people, with what to do.
        modified: Those files that are neither `COMMIT`'s nor patched ones.
    """

    state: State
    sentence: str
    modified: tuple[str, ...] = ()


def check(path: Path) -> Examination:
    """Say whether a copy of ClimaX is unpatched, patched, half patched or another version.

    Args:
        path: A checkout, its `src`, or the package's folder.

    Raises:
        InputError: If there is no ClimaX, or git is missing and the files are not `COMMIT`'s.
    """
    return examine(package_folder(path))


def apply(path: Path) -> str:
    """Patch a copy of ClimaX at `COMMIT`, all files or none; a half patched one is completed.

    Args:
        path: A checkout, its `src`, or the package's folder.

    Returns:
        What was done.

    Raises:
        InputError: If there is no ClimaX, it is another version or has local changes to the files that
            would be patched, or git is missing. Nothing is changed then.
    """
    return _convert(path, State.PATCHED, "already patched, nothing to do", "patched")


def revert(path: Path) -> str:
    """Undo `apply`; arguments, result and errors are those of `apply`."""
    return _convert(path, State.UNPATCHED, "not patched, nothing to do", "reverted to unmodified ClimaX")


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


def examine(package: Path) -> Examination:
    """`check` of a package's folder."""
    contents = _read(package)
    originals = _as_published(contents)
    modified = tuple(name for name in ORIGINALS if name not in originals)
    unpatched = [name for name, original in originals.items() if contents[name] == original]
    if modified:
        return Examination(State.MODIFIED, _modified_sentence(package, modified), modified)
    if len(unpatched) == len(ORIGINALS):
        return Examination(State.UNPATCHED, f"{package}: unpatched, at {COMMIT[:7]}")
    if not unpatched:
        return Examination(State.PATCHED, f"{package}: patched, from {COMMIT[:7]}")
    done = ", ".join(name for name in ORIGINALS if name not in unpatched)
    return Examination(
        State.HALF,
        f"{package}: half patched, only {done}; `climax-elevation patch apply` completes it, `patch revert` undoes it",
    )


def patched_contents(package: Path) -> Contents:
    """The contents, patched, of the files that the patches change; the files themselves stay as they are.

    A copy with local changes will do as long as every hunk still finds its place.

    Raises:
        InputError: If the patches fit neither forwards nor backwards, or git is missing.
    """
    contents = _read(package)
    originals = _as_published(contents)
    if len(originals) == len(ORIGINALS):
        return _git_apply(originals, read_patches())
    unpatched = {
        name: originals.get(name) or _attempt({name: content}, reverse=True).get(name, content)
        for name, content in contents.items()
    }
    patched = _attempt(unpatched)
    if len(patched) < len(ORIGINALS):
        raise InputError(f"{examine(package).sentence}; the patches do not fit it")
    return patched


def read_patches() -> list[tuple[str, bytes]]:
    """Names and contents of the patches, in order."""
    try:
        folder = importlib.resources.files("climax_elevation.patches")
    except ModuleNotFoundError:  # not installed, but run from a checkout
        folder = Path(__file__).parents[2] / "patches"
    found = {entry.name: entry for entry in folder.iterdir() if entry.name.endswith(".patch")}
    if not found:
        raise FileNotFoundError(f"no *.patch in {folder}")
    return [(name, found[name].read_bytes()) for name in sorted(found)]


def replace_all(contents: Mapping[Path, bytes]) -> None:
    """Replace files, all of them or, when one fails, none; modes are kept."""
    before = {path: path.read_bytes() for path in contents}
    staged: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for path, content in contents.items():
            staged[path] = _stage(path, content)
        for path, temporary in staged.items():
            os.replace(temporary, path)
            done.append(path)
    except BaseException:
        for path in done:
            os.replace(_stage(path, before[path]), path)
        raise
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def git_executable() -> str:
    """The path of git.

    Raises:
        InputError: If there is none.
    """
    found = shutil.which("git")
    if found is None:
        raise InputError("patching ClimaX needs the program git, which is not on the PATH: install it")
    return found


def _convert(path: Path, target: State, nothing_to_do: str, done: str) -> str:
    package = package_folder(path)
    found = examine(package)
    if found.state is target:
        return f"{package}: {nothing_to_do}"
    if found.state is State.MODIFIED:
        raise InputError(f"{found.sentence}; nothing was changed")
    contents = _read(package)
    wanted = _as_published(contents)
    if target is State.PATCHED:
        wanted = _git_apply(wanted, read_patches())
    changed = {package / name: wanted[name] for name in ORIGINALS if wanted[name] != contents[name]}
    try:
        replace_all({file: _with_endings(content, like=file.read_bytes()) for file, content in changed.items()})
    except OSError as error:
        raise InputError(f"{package} could not be written ({error}); nothing was changed") from error
    return f"{package}: {done} ({', '.join(str(file.relative_to(package)) for file in changed)})"


def _read(package: Path) -> Contents:
    """The files that the patches change, with plain line endings."""
    missing = [name for name in ORIGINALS if not (package / name).is_file()]
    if missing:
        raise InputError(f"{package} lacks {', '.join(missing)}: it is not ClimaX at {COMMIT[:7]}")
    return {name: (package / name).read_bytes().replace(b"\r\n", b"\n") for name in ORIGINALS}


def _as_published(contents: Contents) -> Contents:
    """What `COMMIT` has for each file that is unchanged or exactly patched; other files are left out."""
    originals: Contents = {}
    for name, content in contents.items():
        if _blob_id(content) == ORIGINALS[name]:
            originals[name] = content
            continue
        reverted = _attempt({name: content}, reverse=True)
        # with so little context a hunk that was moved would be reverted too, hence the way back
        if name in reverted and _blob_id(reverted[name]) == ORIGINALS[name] and _attempt(reverted) == {name: content}:
            originals[name] = reverted[name]
    return originals


def _attempt(contents: Contents, *, reverse: bool = False) -> Contents:
    """Each file with the patches applied; files that they do not fit are left out."""
    results: Contents = {}
    for name, content in contents.items():
        try:
            results |= _git_apply({name: content}, read_patches(), reverse=reverse)
        except _DoesNotApply:
            continue
    return results


class _DoesNotApply(Exception):
    """A patch does not fit."""


def _git_apply(contents: Contents, patches: Sequence[tuple[str, bytes]], *, reverse: bool = False) -> Contents:
    """Apply the parts of the patches that are about these files, in a folder of their own."""
    git = git_executable()
    with tempfile.TemporaryDirectory(prefix="climax-elevation-") as temporary:
        # resolved, since git compares ceilings with real paths
        root = Path(temporary).resolve()
        work = root / "work"
        for name, content in contents.items():
            file = work / PREFIX / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        command = [git, "-c", "core.autocrlf=false", "apply", "-p1", "--unidiff-zero", "--whitespace=nowarn"]
        command += [f"--include={PREFIX}{name}" for name in contents]
        for name, patch in reversed(patches) if reverse else patches:
            file = root / name
            file.write_bytes(patch)
            options = ["--reverse", str(file)] if reverse else [str(file)]
            run = subprocess.run(
                [*command, *options], cwd=work, env=_environment(root), capture_output=True, text=True, check=False
            )
            if run.returncode:
                raise _DoesNotApply(f"{name} does not apply: {run.stderr.strip()}")
        return {name: (work / PREFIX / name).read_bytes() for name in contents}


def _environment(ceiling: Path) -> dict[str, str]:
    """Inside a repository git would skip, silently, what the repository does not have; and users configure git."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return own | {
        "GIT_CEILING_DIRECTORIES": str(ceiling),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "LC_ALL": "C",
    }


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _with_endings(content: bytes, *, like: bytes) -> bytes:
    return content.replace(b"\n", b"\r\n") if b"\r\n" in like else content


def _stage(path: Path, content: bytes) -> Path:
    """Write beside `path`, on the same file system, so that replacing it is one step."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        shutil.copymode(path, name)
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _modified_sentence(package: Path, modified: Sequence[str]) -> str:
    return (
        f"{package}: {', '.join(modified)} {'is' if len(modified) == 1 else 'are'} neither as in microsoft/ClimaX "
        f"{COMMIT[:7]} nor as the patch leaves {'it' if len(modified) == 1 else 'them'}{_head(package)}: check out "
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
