"""Where real ClimaX and real data are, and the one line that says so; Triton's interpreter where there is no GPU."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported, which has not happened yet

from climax_elevation import compiled

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def climax_source() -> Path | None:
    """The folder that holds the package `climax` of microsoft/ClimaX, or None."""
    checkout = os.environ.get("CLIMAX_SRC")
    if checkout:
        return Path(checkout)
    spec = importlib.util.find_spec("climax")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "arch.py").is_file():  # PyPI's climax, a command-line library, has none
            return Path(folder).parent
    return None


CLIMAX = climax_source()  # once, since some tests hide it


def pytest_report_header() -> list[str]:
    return [
        f"ClimaX: {CLIMAX}" if CLIMAX else "ClimaX: not found (CLIMAX_SRC is unset), its regression tests are skipped",
        f"real data: {'found' if DATA.is_dir() else 'not found, their tests are skipped'}",
    ]


@pytest.fixture(scope="session", autouse=True)
def made_with(record_testsuite_property: Callable[[str, object], None]) -> None:
    """Write into a JUnit report with what this run was made; .ci/matrix.py reads it."""
    record_testsuite_property("python", platform.python_version())
    for name in ("torch", "timm", "pytorch-lightning", "numpy"):
        record_testsuite_property(name, importlib.metadata.version(name).partition("+")[0])
    gpu = ("ROCm" if torch.version.hip else "CUDA") if torch.cuda.is_available() else "CPU"
    system = platform.system()
    record_testsuite_property("place", "macOS" if system == "Darwin" else f"{system}, {gpu}")
    record_testsuite_property("climax", "not found" if CLIMAX is None else "found")


@pytest.fixture(scope="session")
def climax() -> Path:
    """Real ClimaX, or a skip."""
    if CLIMAX is None:
        pytest.skip("needs microsoft/ClimaX: set CLIMAX_SRC to a checkout")
    return CLIMAX


@pytest.fixture(params=["compiled", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With compiled loops, and as where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "library", lambda: None)
    elif compiled.library() is None:
        pytest.skip("needs a C++ compiler")
    return request.param


@pytest.fixture
def no_climax(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ClimaX, here and in processes started from here; PyPI's package of that name hides one that is installed."""
    folder = tmp_path_factory.mktemp("pypi")
    (folder / "climax").mkdir()
    (folder / "climax" / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    monkeypatch.delenv("CLIMAX_SRC", raising=False)


@pytest.fixture(params=["stand-in", "ClimaX"])
def host(request: pytest.FixtureRequest) -> Path | None:
    """What `train` takes for a copy of ClimaX: none, and the real one."""
    if request.param == "ClimaX":
        pytest.importorskip("torchvision")
        return request.getfixturevalue("climax")
    request.getfixturevalue("no_climax")
    return None


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real reanalysis, or a skip."""
    if not DATA.is_dir():
        pytest.skip("needs the real data in ../shared/data")
    return DATA
