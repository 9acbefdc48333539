"""Runs that are there already: whether they would be the same today."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from climax_elevation.compare.config import Variant
from climax_elevation.compare.fingerprints import Record, difference, digests, fingerprint
from climax_elevation.compare.runs import RECORD
from climax_elevation.errors import InputError
from climax_elevation.files import alone, check_own

RUNS, RESULTS, DIFFERENCES, REPORT, FILES = "runs", "results.csv", "differences.csv", "report.md", "files.json"


class Planned(Protocol):
    """A run, to be told apart from another."""

    @property
    def folder(self) -> Path: ...

    @property
    def variant(self) -> Variant: ...

    @property
    def seed(self) -> int: ...

    @property
    def configuration(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Comparison:
    """What a comparison left.

    Attributes:
        out: The run directory, with results.csv, differences.csv and report.md.
        results: A row for each variant, seed, part, variable, metric and stratum; see `tables`.
        differences: A row for each comparison, part, metric, variable and stratum; see `tables`.
        report: The Markdown text.
    """

    out: Path
    results: pd.DataFrame
    differences: pd.DataFrame
    report: str


@contextmanager
def run_directory(out: Path, marks: Sequence[str]) -> Iterator[None]:
    """`out`, for one comparison alone.

    Args:
        out: Made if it is not there.
        marks: Files and folders of which a comparison has one.

    Raises:
        InputError: If it holds other data, or another comparison is running there.
    """
    check_own(out, marks, "a comparison")
    with alone(out, f"another comparison is running in {out}: wait for it, or give another --out"):
        yield


def save_tables(folder: Path, results: pd.DataFrame, differences: pd.DataFrame) -> None:
    """Write both as CSV."""
    results.to_csv(folder / RESULTS, index=False)
    differences.to_csv(folder / DIFFERENCES, index=False)


def concluded(out: Path, results: pd.DataFrame, differences: pd.DataFrame, report: str) -> Comparison:
    """A comparison whose tables and report are written."""
    save_tables(out, results, differences)
    (out / REPORT).write_text(report)
    return Comparison(out, results, differences, report)


def check_unchanged(before: Mapping[str, Record], now: Mapping[str, Record], tasks: Sequence[Planned]) -> None:
    """Raise InputError if a file is another than when the runs began."""
    for kind, record in before.items():
        found = difference(digests(record), digests(now[kind]))
        if found:
            folders = ", ".join(str(task.folder) for task in tasks)
            raise InputError(f"{found} while runs were trained on it: remove them ({folders}), and train them again")


def check_stored(out: Path, tasks: Sequence[Planned], before: Record, now: Record) -> None:
    """Every run that is there already would be the same today; the data's files were `before` and are `now`."""
    wanted = {(task.variant.name, task.seed): task.configuration for task in tasks}
    variants = {task.variant.name: task.configuration["variant"] for task in tasks}
    common = {name: value for name, value in tasks[0].configuration.items() if name not in ("variant", "seed")}
    for path in sorted((out / RUNS).glob(f"*/seed*/{RECORD}")):
        stored = json.loads(path.read_text())["configuration"]
        name = path.parts[-3]
        expected = wanted.get((name, stored["seed"])) or {
            **common,
            "variant": variants.get(name, stored["variant"]),
            "seed": stored["seed"],
        }
        same_data = stored["data"].get("fingerprint") == fingerprint(before)
        files = [(digests(before), digests(now))] if same_data else []
        files.append((stored["variant"].get("files", {}), expected["variant"].get("files", {})))
        changed = next(filter(None, (difference(*pair) for pair in files)), None)
        found = changed or first_difference(stored, expected)
        if found is not None:
            raise InputError(
                f"{path.parent} was run with {'other data' if changed else 'another configuration'} ({found}): give "
                "another --out, or remove what is there"
            )


def first_difference(stored: Any, expected: Any, place: str = "") -> str | None:
    """Where two nested dictionaries differ first, in words; None: nowhere."""
    if isinstance(stored, dict) and isinstance(expected, dict):
        for name in dict.fromkeys([*stored, *expected]):
            found = first_difference(stored.get(name), expected.get(name), f"{place}.{name}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if stored == expected else f"{place} {stored}, now {expected}"


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """As it is after having been written as JSON."""
    return json.loads(json.dumps(values))


@contextmanager
def unheard(below: int = logging.WARNING) -> Iterator[None]:
    """What a network says of its terrain is in its run's log, but for what is as grave as `below`."""
    library = logging.getLogger("climax_elevation")
    level = library.level
    library.setLevel(below)
    try:
        yield
    finally:
        library.setLevel(level)
