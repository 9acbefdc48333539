"""docs/versions.md says what was run, and nothing else."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATRIX = ROOT / ".ci" / "matrix.py"
pytestmark = pytest.mark.skipif(not MATRIX.exists(), reason="needs .ci of a checkout")


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("matrix", MATRIX)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(**changes):
    stack = {"python": "3.11.7", "torch": "2.14.1", "timm": "1.0.31", "pytorch-lightning": "2.6.6", "numpy": "2.4.6"}
    counts = {"climax": True, "passed": 90, "skipped": 7, "files": 5, "of_files": 5, "date": "2026-01-02"}
    return stack | {"place": "Linux, CPU"} | counts | changes


def rows(text):
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(table[0], row, strict=True)) for row in table[2:]]


def test_the_page_is_that_of_the_recorded_runs(matrix):
    written = matrix.page(json.loads(matrix.RUNS.read_text()))
    assert matrix.PAGE.read_text() == written, "run `python .ci/matrix.py` and commit docs/versions.md"


def test_a_cell_without_a_run_says_so(matrix):
    row, lowest = rows(matrix.page([run()]))
    assert row["Linux, CPU"] == "90 passed, 7 skipped, all files, with ClimaX, 2026-01-02"
    assert {row[place] for place in ("Linux, CUDA", "Linux, ROCm", "macOS")} == {"not measured"}
    assert {lowest[place] for place in matrix.PLACES} == {"not measured"}
    assert {name: lowest[name] for name in matrix.oldest()} == matrix.oldest()
    assert lowest["python"] == "3.10"


def test_the_lowest_versions_are_measured_only_if_all_of_them_were_run_together(matrix):
    lowest = matrix.oldest()
    for name in lowest:
        assert len(rows(matrix.page([run(**lowest | {name: run()[name]})]))) == 2
    (row,) = rows(matrix.page([run(**lowest | {"python": "3.10.14"}, files=2)]))
    assert "2 of 5 files" in row["Linux, CPU"]


def test_the_latest_run_stays_unless_an_earlier_one_had_more_files(matrix):
    runs = matrix.with_run([], run())
    assert matrix.with_run(runs, run(files=4, passed=1)) == runs
    assert matrix.with_run(runs, run(passed=91)) == [run(passed=91)]
    other = run(torch="2.9.0"), run(place="macOS")
    assert len(matrix.with_run(matrix.with_run(runs, other[0]), other[1])) == 3
    assert [r["torch"] for r in matrix.with_run([other[0]], run())] == ["2.14.1", "2.9.0"]


def report(folder, tests, failing=False):
    """Of pytest itself, over a test or two with this repository's conftest.py."""
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_one.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml", "report.xml", "tests"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == int(failing), ended.stdout
    return folder / "report.xml"


def test_a_run_is_recorded_as_it_was(matrix, tmp_path):
    tests = "import pytest\ndef test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass\n"
    recorded = matrix.read_report(report(tmp_path, tests))
    import torch

    assert (recorded["passed"], recorded["skipped"], recorded["files"]) == (1, 1, 1)
    assert recorded["torch"] == torch.__version__.partition("+")[0]
    assert recorded["python"] == ".".join(map(str, sys.version_info[:3]))
    assert recorded["of_files"] > 50


def test_what_is_no_run_that_passed_is_refused(matrix, tmp_path):
    with pytest.raises(SystemExit, match="has 1 failures and 1 passed: not recorded"):
        matrix.read_report(report(tmp_path, "def test_a(): pass\ndef test_b(): assert 0\n", failing=True))
    with pytest.raises(SystemExit, match="is no report of pytest --junitxml"):
        matrix.read_report(tmp_path / "conftest.py")
    (tmp_path / "other.xml").write_text("<testsuites><testsuite tests='1'/></testsuites>")
    with pytest.raises(SystemExit, match="does not say with what it was made"):
        matrix.read_report(tmp_path / "other.xml")
