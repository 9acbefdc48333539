"""README and docs: every command and program runs, every link leads somewhere, every number is a committed one.

A block stands on its own, fenced or indented by four spaces. What stands in a comment directly above it says how:
`<!-- not run: reason -->`, `<!-- needs ClimaX -->`, or `<!-- file: NAME -->` for a file that later commands read.
The blocks of a page run in order, in a folder of its own that looks like the root of a checkout, with a small
reanalysis, its shards and the `my_run.yaml` that the pages speak of.
"""

import contextlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import prepare_data
import pytest
import yaml

from climax_elevation import AttachOptions, attach, available_biases
from climax_elevation.bias import registry
from climax_elevation.bias.registry import bias_class
from climax_elevation.cli import main
from climax_elevation.testbed.fit import one_thread

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md"]
TWO_COMMANDS = ["pip install '.[demo]' && climax-elevation demo", "pip install '.[test,demo]' && python -m pytest"]
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = ("benchmarks", "configs", "examples", "patches")
TREE = (*FOLDERS, "climax_elevation", "docs", "tests")
SOURCE = "andes_era5_monthly.nc"
SPLIT = ["--val-from", "2000", "--test-from", "2010", "--patch-size", "4"]
SMALL_RUN = {"img_size": [88, 80], "patch_size": 8, "embed_dim": 16, "depth": 2, "decoder_depth": 1}

SHELL, PYTHON, QUIET = "bash", "python", ("yaml", "text", "toml")
COMMENT = re.compile(r"<!-- (not run|needs ClimaX|file)(?:: (.+?))? -->")


@dataclass
class Block:
    """One block of a page: where it begins, its language, its text, and the comment above it."""

    line: int
    language: str
    text: str
    mark: str | None
    value: str | None


def blocks(page: Path) -> list[Block]:
    found, lines, number = [], page.read_text().splitlines(), 0
    while number < len(lines):
        fence = re.fullmatch(r"```(\w*)", lines[number])
        indented = lines[number].startswith("    ") and (number == 0 or not lines[number - 1])
        if not fence and not indented:
            number += 1
            continue
        start = number
        number += 1 if fence else 0
        text = []
        while lines[number] != "```" if fence else number < len(lines) and lines[number].startswith("    "):
            text.append(lines[number] if fence else lines[number][4:])
            number += 1
        number += 1
        above = [line for line in lines[max(0, start - 2) : start] if line][-1:]
        comment = COMMENT.fullmatch(above[0]) if above else None
        mark, value = comment.groups() if comment else (None, None)
        found.append(Block(start + 1, fence.group(1) if fence else SHELL, "\n".join(text), mark, value))
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A reanalysis of a few years, and the shards made from it."""
    folder = tmp_path_factory.mktemp("prepared")
    dataset = prepare_data.era5(steps=20, height=89, width=81)
    years = [np.datetime64(f"{year}-01-01", "ns") for year in range(1994, 2014)]
    dataset.assign_coords(time=years).to_netcdf(folder / SOURCE)
    assert main(["prepare", str(folder / SOURCE), str(folder / "shards"), *SPLIT]) == 0
    return folder


@pytest.fixture
def checkout(prepared, no_climax, tmp_path, monkeypatch):
    """The current folder: as the root of a checkout, with data."""
    for name in FOLDERS:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / SOURCE).symlink_to(prepared / SOURCE)
    shutil.copytree(prepared / "shards", tmp_path / "data" / "andes")
    (tmp_path / "docs").mkdir()
    (tmp_path / "my_run.yaml").write_text(yaml.safe_dump(my_run()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other take longer than these networks
    with one_thread():
        yield tmp_path


def my_run():
    """A run without terrain: the configuration of the Andes, small."""
    run = yaml.safe_load((ROOT / "configs" / "andes.yaml").read_text())
    for flag in ("use_physics_mask", "bias_type", "bias_args"):
        del run["model"]["net"]["init_args"][flag]
    run["model"]["net"]["init_args"].update(SMALL_RUN)
    run["model"].update(warmup_epochs=1, max_epochs=20)
    run["trainer"].update(max_epochs=1, limit_val_batches=1, num_sanity_val_steps=0, enable_progress_bar=False)
    run["trainer"]["default_root_dir"] = "runs/my_run"
    run["trainer"]["callbacks"] = [entry for entry in run["trainer"]["callbacks"] if "Terrain" not in str(entry)]
    return run


def commands(text):
    """The commands of a block of shell, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def run_command(words):
    if words[0] == "climax-elevation":
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = main(words[1:])
        assert status == 0, f"{' '.join(words)}\n{said.getvalue()}"
        return
    if words[0] == "python":
        words = [sys.executable, *words[1:]]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_what_a_page_shows_runs(page, checkout, request, monkeypatch):
    monkeypatch.setattr(registry, "_biases", dict(registry._biases))  # a page may register its own
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        assert block.language in (SHELL, PYTHON, *QUIET), f"{where}: a block has a language, not {block.language!r}"
        if block.mark == "not run":
            assert block.value, f"{where}: say why it is not run"
            continue
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.mark == "file":
            Path(block.value).write_text(block.text + "\n")
            continue
        if block.mark == "needs ClimaX":
            if not has_climax(request):
                continue
            lay_climax(request.getfixturevalue("climax"), checkout)
        if block.language == PYTHON:
            exec(compile(block.text, where, "exec"), namespace)
        elif block.language == SHELL:
            for words in commands(block.text):
                run_command(words)


def has_climax(request):
    try:
        request.getfixturevalue("climax")
        import torchvision  # noqa: F401
    except (pytest.skip.Exception, ImportError):
        return False
    return True


def lay_climax(source, checkout):
    """A copy, which commands may patch, where the pages say that it is."""
    if not (checkout / "path/to/ClimaX").exists():
        package = source / "src" if (source / "src").is_dir() else source
        shutil.copytree(package, checkout / "path/to/ClimaX/src")


def test_every_block_is_run_or_says_why_not():
    """Blocks that the parser does not see would not be missed otherwise."""
    for page in PROSE:
        text = page.read_text()
        fences = re.findall(r"^```", text, re.MULTILINE)
        fenced = [block for block in blocks(page) if text.splitlines()[block.line - 1].startswith("```")]
        assert len(fences) == 2 * len(fenced), page.name
        assert not re.search(r"^(~~~|\t| +```)", text, re.MULTILINE), f"{page.name}: a block that is not seen"
        comments = [line for line in text.splitlines() if re.match(r"<!-- (not run|needs ClimaX|file)", line)]
        assert len(comments) == sum(block.mark is not None for block in blocks(page)), page.name


def anchors(page):
    """Of the headings, as they are linked to."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name} links to {target}"


def test_files_that_are_named_exist():
    """Paths in backquotes, of this repository's folders."""
    for page in PROSE:
        for path in re.findall(rf"`((?:{'|'.join(TREE)})/[\w./-]+)`", page.read_text()):
            assert "NAME" in path or (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_front_page_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 160
    assert {f"    {command}" for command in TWO_COMMANDS} <= set(lines)  # as other tools read them
    for page in PROSE:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            assert len(line) <= 120 or line.startswith("|"), f"{page.name}, line {number}"


def test_every_page_is_reached_from_the_front_page():
    text = (ROOT / "README.md").read_text()
    missing = [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text]
    assert not missing


def test_the_example_of_a_bias_is_shown_as_it_is():
    code = (ROOT / "examples" / "custom_bias" / "snow_line.py").read_text().partition("class ")
    assert (code[1] + code[2]).strip() in (ROOT / "docs" / "own_bias.md").read_text()


def test_the_citation_is_of_this_version_and_of_the_works_that_the_front_page_names():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f"version = {citation['version']}\n" in (ROOT / "setup.cfg").read_text()
    cited = [identifier["value"] for work in citation["references"] for identifier in work["identifiers"]]
    named = re.findall(r"arXiv \d{4}\.\d{5}", (ROOT / "README.md").read_text())
    assert cited == [name.replace(" ", ":") for name in named]


# ---- flags ---------------------------------------------------------------------------------------


def flag_rows():
    """Rows of the tables of flags: names, the biases that a row is of (none: shared), and the default."""
    rows = []
    for line in (ROOT / "docs" / "add.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) < 5 or not cells[0].startswith("`"):
            continue
        of = re.findall(r"`(\w+)`", cells[1]) if len(cells) == 6 else None
        rows.append((cells[0].strip("`"), of, yaml.safe_load(cells[-2].strip("`"))))
    return rows


def plain(value):
    return list(value) if isinstance(value, tuple) else value


def arguments_of(function, but=()):
    return {
        name: plain(parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name not in but
    }


def test_the_flags_of_the_table_are_those_of_attach():
    flags = {"use_physics_mask": False, "bias_type": "physics", "bias_args": None}  # which ClimaX gets by the patch
    shown = {name: (default, type(default)) for name, of, default in flag_rows() if of is None}
    assert shown == {name: (default, type(default)) for name, default in (flags | arguments_of(attach)).items()}


def test_the_table_of_options_is_written_by_them():
    assert AttachOptions.table() in (ROOT / "docs" / "add.md").read_text()


def test_the_arguments_of_the_table_are_those_of_the_biases():
    table = {(bias, name): default for name, of, default in flag_rows() for bias in of or ()}
    own = {
        (bias, name): default
        for bias in available_biases()
        if bias_class(bias).__module__.startswith("climax_elevation.")
        for name, default in arguments_of(bias_class(bias).__init__, but=["self", "num_heads", "grid"]).items()
    }
    assert table == own


# ---- numbers -------------------------------------------------------------------------------------


def tables_of_numbers():
    """Tables under `<!-- numbers: FILE -->`: page, file, and their cells by row and column."""
    found = []
    for page in PAGES:
        lines = page.read_text().splitlines()
        for number, line in enumerate(lines):
            comment = re.fullmatch(r"<!-- numbers: (\S+) -->", line)
            if not comment:
                continue
            rows = []
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append([cell.strip() for cell in row.split("|")[1:-1]])
            cells = {(row[0], head): cell for row in rows[2:] for head, cell in zip(rows[0][1:], row[1:], strict=True)}
            found.append((page, comment.group(1), cells))
    return found


NAMES = {"`physics`": "physics with wind", "`physics`, no wind": "physics"}


def name_of(label):
    return NAMES.get(label, label.replace("`", ""))


def of_attention(data, row, column):
    """A ratio to unbiased attention of that shape; "extra memory at N tokens": MB."""
    memory = re.fullmatch(r"extra memory at (\d+) tokens", column)
    (found,) = [
        entry
        for entry in data["rows"]
        if entry["bias"] == name_of(row)
        and (entry["tokens"] == int(memory.group(1)) if memory else entry["shape"] == column)
    ]
    return found["extra_mb" if memory else "ratio"]


def of_step(data, row, column):
    (found,) = [entry for entry in data["rows"] if entry["model"] == name_of(row)]
    return {"over unbiased": found["ratio"], "lowest": min(found["ratios"]), "highest": max(found["ratios"])}[column]


def of_growth(data, row, column):
    """Seconds over unbiased attention of that length."""
    tokens = int(column.split()[0])
    seconds = {
        name: [point["seconds"] for point in points if point["tokens"] == tokens]
        for name, points in data["points"].items()
    }
    return seconds[name_of(row)][0] / seconds["unbiased"][0] if seconds[name_of(row)] else None


READERS = {"attention": of_attention, "step": of_step, "growth": of_growth}


@pytest.mark.parametrize(
    ("page", "file", "cells"), tables_of_numbers(), ids=lambda value: str(getattr(value, "name", ""))
)
def test_numbers_are_those_of_the_committed_measurement(page, file, cells):
    data, reader = json.loads((RESULTS / file).read_text()), READERS[file.partition("_")[0]]
    assert cells
    for (row, column), cell in cells.items():
        value = reader(data, row, column)
        shown = re.match(r"-?\d+(?:\.(\d+))?", cell)
        if cell.startswith("none"):
            assert value < 0.5, f"{row}, {column}"
        elif not cell:
            assert value is None, f"{row}, {column}"
        else:
            assert shown.group() == f"{value:.{len(shown.group(1) or '')}f}", f"{row}, {column}"


def test_the_tables_of_costs_are_there():
    assert {"attention_cpu.json", "step_cpu.json", "step_large_cpu.json", "growth_cpu.json"} <= {
        file for _, file, _ in tables_of_numbers()
    }


# ---- what was compared ---------------------------------------------------------------------------

GUIDE = ROOT / "docs" / "terrain_helps.md"
COMPARED = {
    "daily": "trentino_daily",
    "hourly": "trentino_hourly",
    "Germany": "germany_pm10",
    "Idaho": "hrrr_gaps",
    "Andes": "andes_gaps",
}
STRATA = {"seen": "seen in training", "never seen": "never seen", "": "all"}


def compared(column, name):
    """The rows of test that a column is about, of a committed table of a comparison."""
    data, _, stratum = column.partition(", ")
    table = pd.read_csv(ROOT / "docs" / "compare" / COMPARED[data] / name)
    of = (table.part == "test") & (table.metric == "rmse_standardised") & (table.stratum == STRATA[stratum])
    return table[of & (table.variable == table.variable.iloc[-1])]


def tables_of_comparisons():
    """Tables of the guide under `<!-- compared: KIND -->`, by kind."""
    found = {}
    for kind, text in re.findall(r"<!-- compared: (.+?) -->\n((?:\|.*\n)+)", GUIDE.read_text()):
        head, _, *rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
        found[kind] = {(row[0], column): cell for row in rows for column, cell in zip(head[1:], row[1:], strict=True)}
    return found


@pytest.mark.parametrize("kind", ["withheld", "given", "withheld_60_days", "given_60_days"])
def test_the_guide_tells_differences_as_they_came_out(kind):
    arm, _, days = kind.partition("_")
    for (row, column), cell in tables_of_comparisons()[kind].items():
        variant, counterpart = re.findall("`(.+?)`", row)
        found = compared(column, f"{days}_differences.csv.gz".lstrip("_"))
        found = found[found.arm.str.startswith(arm) & (found.variant == variant) & (found.counterpart == counterpart)]
        assert len(found) == bool(cell), f"{row}, {column}"
        for percent, verdict in zip(found.percent, found.verdict, strict=True):
            clear = verdict in ("better", "worse")
            assert cell == (f"**{percent:+.1f}**" if clear else f"{percent:+.1f}"), f"{row}, {column}"


def test_the_guide_tells_errors_as_they_came_out():
    for (row, column), cell in tables_of_comparisons()["errors"].items():
        variant, _, arm = row.partition(", heights ")
        found = compared(column, "results.csv.gz")
        found = found[found.arm.str.startswith(arm or "withheld") & (found.variant == variant.strip("`"))]
        assert cell == f"{found.value.mean():.3f}", f"{row}, {column}"
