"""The doctor tells what is there, and is only alarmed by what is wrong."""

import configparser
import importlib.metadata
import re
import shutil
from pathlib import Path

import pytest
from engines import CPU_ENGINES

from climax_elevation import attention, available_biases, compiled
from climax_elevation.attention.engine import Engine
from climax_elevation.doctor import OLDEST_PYTHON, SUPPORTED, Finding, Level, doctor, render, status
from climax_elevation.errors import InputError
from climax_elevation.upstream.patching import apply, package_folder, revert


def found(subject):
    return next(finding for finding in doctor() if finding.subject == subject)


@pytest.fixture
def copy(climax, tmp_path, monkeypatch):
    """An unpatched copy of ClimaX, to which the environment points."""
    package = tmp_path / "src" / "climax"
    shutil.copytree(package_folder(climax), package, ignore=shutil.ignore_patterns("__pycache__"))
    revert(tmp_path)
    monkeypatch.setenv("CLIMAX_SRC", str(tmp_path))
    return tmp_path


def test_without_climax_nothing_is_wrong(no_climax):
    findings = doctor()
    assert status(findings) == 0, render(findings)
    by_subject = {finding.subject: finding for finding in findings}
    assert by_subject["ClimaX"].level is Level.NOTE
    assert "unrelated command-line library" in by_subject["ClimaX"].text
    assert by_subject["timm"].text.startswith(importlib.metadata.version("timm"))
    assert by_subject["biases"].text == ", ".join(available_biases())
    for engine in CPU_ENGINES:
        assert by_subject[f"engine {engine}"].text.startswith("works")


def test_an_engine_that_is_for_other_devices_is_no_fault(no_climax, monkeypatch):
    def for_gpus(*_):
        raise InputError("for GPUs: choose 'tiled'")

    monkeypatch.setitem(attention.ENGINES, "for GPUs", Engine(for_gpus))
    assert found("engine for GPUs") == Finding(Level.NOTE, "engine for GPUs", "for GPUs: choose 'tiled'")
    assert status(doctor()) == 0


@pytest.mark.parametrize(
    ("distribution", "version", "level"),
    [
        ("timm", "0.6.12", Level.WRONG),
        ("timm", "0.6.13", Level.OK),
        ("timm", "1.0.31", Level.OK),
        ("timm", "2.0.0", Level.WRONG),
        ("torch", "2.3.1+cu118", Level.WRONG),
        ("torch", "2.6.0", Level.WRONG),
        ("torch", "2.7.0+cpu", Level.OK),
        ("torch", "2.15.0a0", Level.OK),
        ("pytorch-lightning", "1.9.5", Level.WRONG),
        ("pytorch-lightning", "2.5.5", Level.WRONG),
        ("pytorch-lightning", "2.5.6", Level.OK),
        ("pytorch-lightning", "3.0", Level.WRONG),
    ],
)
def test_versions_out_of_range_are_wrong(no_climax, monkeypatch, distribution, version, level):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == distribution else real(name))
    findings = doctor()
    assert next(finding for finding in findings if finding.subject == distribution).level is level
    assert status(findings) == (level is Level.WRONG)


def test_engines_that_fail_or_differ_are_wrong(no_climax, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel")

    def wrong(*arguments):
        return attention.ENGINES["dense"].attend(*arguments) + 0.01

    monkeypatch.setitem(attention.ENGINES, "broken", Engine(broken))
    monkeypatch.setitem(attention.ENGINES, "wrong", Engine(wrong))
    findings = doctor()
    texts = {finding.subject: finding.text for finding in findings if finding.level is Level.WRONG}
    assert texts.keys() == {"engine broken", "engine wrong"}
    assert "no kernel" in texts["engine broken"]
    assert "0.01 off the reference" in texts["engine wrong"]
    assert status(findings) == 1


def test_without_a_compiler_nothing_is_wrong(no_climax, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = found("compiled loops")
    assert finding.level is Level.NOTE
    assert finding.text == "none: no C++ compiler: CXX, 'no-such-compiler', is not there; install GCC or Clang"
    assert status(doctor()) == 0
    monkeypatch.delenv("CXX")
    if compiled.library() is not None:
        assert found("compiled loops").level is Level.OK


def test_missing_git_is_wrong_only_with_a_climax_to_patch(no_climax, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert found("git").level is Level.NOTE
    assert status(doctor()) == 0


def test_unpatched_and_patched_climax_are_well(copy):
    findings = doctor()
    assert status(findings) == 0, render(findings)
    texts = {finding.subject: finding.text for finding in findings}
    assert "unpatched, at 6d5d354" in texts["ClimaX"]
    assert "south" in texts["ClimaX regions"]
    assert texts["ClimaX patches"].startswith("yes")
    apply(copy)
    assert "patched, from 6d5d354" in found("ClimaX").text
    assert status(doctor()) == 0


def test_missing_git_stops_patching(copy, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    wrong = [finding.subject for finding in doctor() if finding.level is Level.WRONG]
    assert wrong == ["ClimaX imports", "ClimaX patches"]  # today's versions want patches too


def test_climax_that_cannot_be_used_is_wrong(copy, monkeypatch):
    file = copy / "src" / "climax" / "arch.py"
    original = file.read_text()

    file.write_text(original.replace("self.blocks", "self.layers"))
    findings = doctor()
    assert next(finding for finding in findings if finding.subject == "ClimaX patches").level is Level.WRONG
    assert status(findings) == 1

    file.write_text("import absent_library\n" + original)
    assert "absent_library" in found("ClimaX imports").text
    assert status(doctor()) == 1

    monkeypatch.setenv("CLIMAX_SRC", str(copy / "absent"))
    assert found("ClimaX").level is Level.WRONG


def test_half_patched_climax_is_wrong(copy):
    file = copy / "src" / "climax" / "arch.py"
    original = file.read_text()
    apply(copy)
    file.write_text(original)
    assert "half patched" in found("ClimaX").text
    assert status(doctor()) == 1


def test_rendering():
    findings = [Finding(Level.OK, "a", "fine"), Finding(Level.WRONG, "longer", "broken")]
    assert render(findings) == "ok     a       fine\nwrong  longer  broken\n1 wrong"
    assert render(findings[:1]).endswith("nothing wrong")


def test_the_oldest_versions_are_told_once_and_tested():
    """setup.cfg's lower bounds, what .ci/run installs, and what the doctor calls too old."""
    root = Path(__file__).parents[1]
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    required = re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)", setup["options"]["install_requires"], re.MULTILINE)
    assert len(required) == len(setup["options"]["install_requires"].split())
    installed = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (root / ".ci" / "oldest.txt").read_text(), re.MULTILINE))
    for name, oldest in required:
        assert (installed[name] + ".").startswith(f"{oldest}."), name
    for name, (_, oldest, _) in SUPPORTED.items():
        assert dict(required)[name] == oldest
    assert setup["options"]["python_requires"] == f">={OLDEST_PYTHON}"
