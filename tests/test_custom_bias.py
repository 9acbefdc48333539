"""The example of a bias in another package, installed as a user would, and used by its name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "custom_bias"
PROGRAM = """
import torch
from climax_elevation import available_biases, build_bias, register_bias
from climax_elevation.host import StandInClimaX

assert "snow_line" in available_biases(), available_biases()
model = StandInClimaX(
    ["orography", "t"], [8, 16], embed_dim=32, depth=2, num_heads=4,
    use_physics_mask=True, bias_type="snow_line+relative_2d",
    bias_args={"blocks": "all", "snow_line": {"snow_line_m": 1500.0}},
)
model.terrain.set_statistics({"orography": 400.0}, {"orography": 800.0}, "a test")
x = torch.rand(2, 2, 8, 16) * 4
out = model(x, None, torch.zeros(2), ["orography", "t"], ["t"], None, None)[1]
out.square().mean().backward()
bias = model.blocks[1].attn.bias.snow_line
assert type(bias).__module__ == "snow_line", type(bias)
assert bias.gamma.grad.abs() > 0
# z = 2500 - 500 artanh(1/2) m and above by as much: s = -1/2 and 1/2, b = 0.5 * s s'
z = torch.tensor([[2500.0 - 274.653072, 2500.0 + 274.653072]])
values = build_bias("snow_line", num_heads=4)(z)
assert torch.allclose(values[0, 0], torch.tensor([[0.125, -0.125], [-0.125, 0.125]])), values
try:
    build_bias("snow_line", num_heads=4, snowline=1)
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the example's distribution: its module and its metadata."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # building writes beside the source
    shutil.copytree(EXAMPLE, source)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *offline, "--target", str(folder / "site"), str(source)], check=True
    )
    return folder / "site"


def test_an_installed_bias_is_found_by_its_entry_point(installed):
    assert list(installed.glob("snow_line_bias-1.0.dist-info"))
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "unknown argument 'snowline' for bias 'snow_line'; valid: snow_line_m, gamma_init" in done.stdout
