"""What a command imports before it works: nothing heavy for help, and no torch to prepare data."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "timm", "torchvision", "pytorch_lightning", "xarray", "pandas", "scipy", "numpy", "omegaconf")


def imported(program):
    code = (
        f"import json, sys\ntry:\n    {program}\nexcept SystemExit:\n    pass\nprint(json.dumps(sorted(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(ended.stdout.splitlines()[-1]))


@pytest.mark.parametrize("command", [[], ["prepare"], ["train"], ["forecast"], ["compare"]])
def test_help_imports_nothing_heavy(command):
    arguments = [*command, "--help"]
    modules = imported(f"from climax_elevation.cli import main; main({arguments!r})")
    assert not modules & set(HEAVY)
    assert len(modules) < 400


def test_preparing_imports_no_torch():
    modules = imported("import climax_elevation.data.prepare")
    assert "xarray" in modules
    assert not modules & {"torch", "timm", "pytorch_lightning"}


def test_the_package_alone_imports_nothing_and_has_all_its_names():
    assert not imported("import climax_elevation") & set(HEAVY)
    import climax_elevation

    assert set(climax_elevation.__all__) <= set(dir(climax_elevation))
    for name in climax_elevation.__all__:
        assert getattr(climax_elevation, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'climax_elevation' has no attribute 'nothing'"):
        climax_elevation.nothing  # noqa: B018
