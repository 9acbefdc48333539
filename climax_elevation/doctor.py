"""What is installed, whether it fits, and what is wrong: `climax-elevation doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from climax_elevation import compiled
from climax_elevation.attention import ENGINES, biased_attention
from climax_elevation.bias import PhysicsBias
from climax_elevation.bias.registry import all_biases
from climax_elevation.errors import InputError
from climax_elevation.upstream.locate import ClimaXNotFound, Source, find_climax
from climax_elevation.upstream.overlay import importable, overlay
from climax_elevation.upstream.patching import State
from climax_elevation.upstream.series import git_executable

# distribution: (module, oldest that is supported, first that is not)
SUPPORTED: dict[str, tuple[str, str, str | None]] = {
    "torch": ("torch", "2.7", None),
    "timm": ("timm", "0.6.13", "2"),
    "pytorch-lightning": ("pytorch_lightning", "2.5.6", "3"),
    "jsonargparse": ("jsonargparse", "4.44", None),
    "numpy": ("numpy", "1.23.5", None),
}
OLDEST_PYTHON = "3.10"
ENGINE_TOLERANCE = 1e-5  # float32 rounding of sums over a handful of tokens

MIRRORED_REGIONS = (
    "get_region_info reads latitudes from the wrong end: region NorthAmerica takes the rows at 65 to 15 degrees south, "
    "for ascending and descending lat.npy alike; the patch leaves it so"
)


class Level(Enum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: Whether something has to be done.
        subject: What was looked at.
        text: What it is like; where it is wrong, what to do.
    """

    level: Level
    subject: str
    text: str


def doctor() -> list[Finding]:
    """Look at versions, compiled loops, engines, biases, git and ClimaX, and change nothing but a cache."""
    return [
        _python(),
        *(_version(name, *bounds) for name, bounds in SUPPORTED.items()),
        _git(),
        _loops(),
        *(_engine(name) for name in ENGINES),
        *_biases(),
        *_climax(),
    ]


def render(findings: Sequence[Finding]) -> str:
    """One line a finding, and a last one that counts what is wrong."""
    width = max(len(finding.subject) for finding in findings)
    lines = [f"{finding.level.value:5}  {finding.subject:{width}}  {finding.text}" for finding in findings]
    wrong = sum(finding.level is Level.WRONG for finding in findings)
    return "\n".join([*lines, f"{wrong} wrong" if wrong else "nothing wrong"])


def status(findings: Sequence[Finding]) -> int:
    """Exit status: 1 where something is wrong, else 0."""
    return int(any(finding.level is Level.WRONG for finding in findings))


def _python() -> Finding:
    return _in_range("python", platform.python_version(), OLDEST_PYTHON, None)


def _version(distribution: str, module: str, oldest: str, too_new: str | None) -> Finding:
    try:
        importlib.import_module(module)
        return _in_range(distribution, importlib.metadata.version(distribution), oldest, too_new)
    except Exception as error:  # a broken installation may raise anything
        return Finding(Level.WRONG, distribution, f"cannot be imported ({error}): install it again")


def _in_range(subject: str, version: str, oldest: str, too_new: str | None) -> Finding:
    supported = f">= {oldest}" + (f", < {too_new}" if too_new else "")
    if _release(version) < _release(oldest) or (too_new is not None and _release(version) >= _release(too_new)):
        return Finding(Level.WRONG, subject, f"{version}, and {supported} is supported: install such a version")
    return Finding(Level.OK, subject, f"{version} ({supported})")


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without trailing zeros and without what follows them."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = tuple(map(int, found.group().split("."))) if found else ()
    while numbers and numbers[-1] == 0:
        numbers = numbers[:-1]
    return numbers


def _git() -> Finding:
    try:
        return Finding(Level.OK, "git", git_executable())
    except InputError as error:
        # wrong only where there is a ClimaX to patch, and then that is found below
        return Finding(Level.NOTE, "git", str(error))


def _loops() -> Finding:
    try:
        compiled.load()
    except compiled.NotCompiled as reason:  # slower, but nothing is wrong
        return Finding(Level.NOTE, "compiled loops", f"none: {reason}")
    return Finding(Level.OK, "compiled loops", "for the CPU, as attention uses them")


def _engine(name: str) -> Finding:
    """Run an engine on three patches, and compare it with the reference."""
    subject = f"engine {name}"
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 3, 4, generator=generator).to(device)
    elevation, speed = torch.tensor([[[0.0, 1500.0, 300.0]], [[2.0, 8.0, 5.0]]], device=device)
    bias = PhysicsBias().to(device)

    def run(engine: str) -> torch.Tensor:
        return biased_attention(q, k, v, bias, (elevation, speed), engine=engine)

    try:
        error = (run(name) - run("dense")).abs().max().item()
    except InputError as refusal:  # as "triton" gives where there is no GPU
        return Finding(Level.NOTE, subject, str(refusal))
    except Exception as failure:  # an engine may fail in whatever way its library does
        return Finding(Level.WRONG, subject, f"does not work here ({failure}): choose another with bias_args.engine")
    if not error <= ENGINE_TOLERANCE:
        return Finding(Level.WRONG, subject, f"is {error:.2g} off the reference: choose another with bias_args.engine")
    return Finding(Level.OK, subject, f"works on the {'GPU' if device == 'cuda' else 'CPU'}")


def _biases() -> Iterator[Finding]:
    names, broken = all_biases()
    yield Finding(Level.OK, "biases", ", ".join(names))
    for sentence in broken:
        yield Finding(Level.WRONG, "biases", sentence)


def _climax() -> Iterator[Finding]:
    try:
        source = find_climax()
    except ClimaXNotFound as error:
        yield Finding(Level.NOTE, "ClimaX", f"{error}; training runs on the stand-in host")
        return
    except InputError as error:
        yield Finding(Level.WRONG, "ClimaX", str(error))
        return
    yield _state(source)
    yield _attempt("ClimaX imports", lambda: _imports(source, patched=False))
    if source.state is not State.PATCHED:
        yield _attempt("ClimaX patches", lambda: _imports(source, patched=True))
    yield Finding(Level.NOTE, "ClimaX regions", MIRRORED_REGIONS)


def _state(source: Source) -> Finding:
    text = f"{source.examination.sentence} ({source.origin})"
    # the patches may fit local changes all the same, which is found next
    level = {State.HALF: Level.WRONG, State.MODIFIED: Level.NOTE}.get(source.state, Level.OK)
    return Finding(level, "ClimaX", text)


def _attempt(subject: str, run: Callable[[], None]) -> Finding:
    try:
        run()
    except Exception as error:  # ClimaX itself is imported here
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return Finding(Level.WRONG, subject, f"no: {kind}{error}")
    return Finding(Level.OK, subject, "yes, in a temporary copy")


def _imports(source: Source, *, patched: bool) -> None:
    with overlay(source, patched=patched) as folder, importable(folder):
        importlib.import_module("climax.regional_forecast.arch")
        importlib.import_module("climax.climate_projection.arch")
