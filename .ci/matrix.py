"""Which versions passed which tests, and where: reports of runs into .ci/versions.json, and that into docs/versions.md.

    python -m pytest --junitxml report.xml
    python .ci/matrix.py report.xml

What a run was made with is written into its report by tests/conftest.py, in the process that ran. A run with failures
is refused. Of runs with the same versions in the same place the latest stays, unless an earlier one had more test
files. Without a report the page is written anew.
"""

from __future__ import annotations

import configparser
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / ".ci" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
STACK = ("python", "torch", "timm", "pytorch-lightning", "numpy")
PLACES = ("Linux, CPU", "Linux, CUDA", "Linux, ROCm", "macOS")
NOT_MEASURED = "not measured"

Run = dict[str, Any]


def read_report(report: Path) -> Run:
    """What a JUnit report of pytest says of its run; SystemExit, in one sentence, if that is not to be recorded."""
    try:
        suite = ET.parse(report).getroot().find("testsuite")
    except (OSError, ET.ParseError) as error:
        sys.exit(f"{report} is no report of pytest --junitxml: {error}")
    known = {} if suite is None else {p.get("name"): p.get("value") for p in suite.iterfind("properties/property")}
    missing = [name for name in (*STACK, "place", "climax") if name not in known]
    if suite is None or missing:
        sys.exit(f"{report} does not say with what it was made ({', '.join(missing)}): run this repository's tests")
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    if count["failures"] or count["errors"] or not passed:
        sys.exit(f"{report} has {count['failures'] + count['errors']} failures and {passed} passed: not recorded")
    return {
        **{name: known[name] for name in STACK},
        "place": known["place"],
        "climax": known["climax"] == "found",
        "passed": passed,
        "skipped": count["skipped"],
        "files": len({case.get("classname", "").split(".")[1] for case in suite.iterfind("testcase")}),
        "of_files": len(list((ROOT / "tests").glob("test_*.py"))),
        "date": str(suite.get("timestamp"))[:10],
    }


def with_run(runs: list[Run], new: Run) -> list[Run]:
    """The runs and a new one, which takes the place of one of the same versions and place that has no more files."""
    same = [run for run in runs if _where(run) == _where(new)]
    if any(run["files"] > new["files"] for run in same):
        return runs
    return sorted([run for run in runs if run not in same] + [new], key=_order, reverse=True)


def oldest() -> dict[str, str]:
    """The lowest versions that setup.cfg allows."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lowest = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)", config["options"]["install_requires"], re.MULTILINE))
    return {"python": config["options"]["python_requires"].removeprefix(">=")} | {
        name: lowest[name] for name in STACK if name in lowest
    }


def page(runs: list[Run]) -> str:
    """docs/versions.md."""
    stacks = list(dict.fromkeys(tuple(run[name] for name in STACK) for run in runs))
    rows = []
    for stack in stacks:
        cells = [next((_cell(r) for r in runs if _where(r) == (*stack, place)), NOT_MEASURED) for place in PLACES]
        rows.append(f"| {' | '.join([*stack, *cells])} |")
    lowest = oldest()
    if not any(all(_is(stack[STACK.index(name)], low) for name, low in lowest.items()) for stack in stacks):
        versions = [lowest.get(name, "any") for name in STACK]
        rows.append(f"| {' | '.join([*versions, *[NOT_MEASURED] * len(PLACES)])} |")
    head = f"| {' | '.join([*STACK, *PLACES])} |\n|{'---|' * (len(STACK) + len(PLACES))}"
    return TEXT.format(table="\n".join([head, *rows]), lowest=", ".join(f"{n} {low}" for n, low in lowest.items()))


TEXT = """\
# What works where?

What the tests were run with, and where. The lowest versions that `setup.cfg` allows are
{lowest};
their row says "not measured" until all of them were run together.

{table}

A cell says how many tests passed and were skipped (for want of a GPU, of ClimaX, or of an optional package), in how
many of the test files, when, and whether real ClimaX was there. No run with a failure is recorded. Triton's kernels
are run by its interpreter where there is no GPU. Combinations that are not named were not run.

This page is written by `.ci/matrix.py`. To add a run:

<!-- not run: it runs all tests -->
```bash
python -m pytest --junitxml report.xml
python .ci/matrix.py report.xml
```
"""


def _where(run: Run) -> tuple[str, ...]:
    return (*(run[name] for name in STACK), run["place"])


def _order(run: Run) -> tuple[list[int], ...]:
    return tuple([int(number) for number in re.findall(r"\d+", run[name])] for name in STACK)


def _is(version: str, low: str) -> bool:
    """Whether `version` is `low`, as far as that goes: 2.4.1 is 2.4."""
    return f"{version}.".startswith(f"{low}.")


def _cell(run: Run) -> str:
    climax = "with ClimaX" if run["climax"] else "without ClimaX"
    files = "all files" if run["files"] == run["of_files"] else f"{run['files']} of {run['of_files']} files"
    return f"{run['passed']} passed, {run['skipped']} skipped, {files}, {climax}, {run['date']}"


def main(reports: list[str]) -> None:
    runs: list[Run] = json.loads(RUNS.read_text()) if RUNS.exists() else []
    for report in reports:
        runs = with_run(runs, read_report(Path(report)))
    RUNS.write_text(json.dumps(runs, indent=1) + "\n")
    PAGE.write_text(page(runs))


if __name__ == "__main__":
    main(sys.argv[1:])
