"""Real ClimaX, unmodified and patched: what has to be the same is the same, bit for bit."""

import copy
import importlib
import pickle
import subprocess
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from terrains import EVERY_BIAS

from climax_elevation import Attention3D, InputError, PhysicsGuidedBlockCorrected
from climax_elevation.block import TerrainBlock
from climax_elevation.upstream import find_climax, overlay
from climax_elevation.upstream.overlay import importable

WINDS = ["10m_u_component_of_wind", "10m_v_component_of_wind"]
VARIABLES = ["orography", "2m_temperature", *WINDS]
MEAN = {"orography": 400.0, WINDS[0]: -1.0, WINDS[1]: 0.5}
STD = {"orography": 800.0, WINDS[0]: 5.0, WINDS[1]: 4.0}
LAT, LON = torch.linspace(-70, 70, 8).numpy(), torch.arange(0, 360, 22.5).numpy()
SIZES = {
    "img_size": [8, 16],
    "patch_size": 2,
    "embed_dim": 32,
    "depth": 3,
    "decoder_depth": 1,
    "num_heads": 4,
}
REGION = {"patch_ids": [9, 10, 11, 17, 18, 19], "min_h": 2, "max_h": 5, "min_w": 2, "max_w": 7}
MODULES = ["arch", "regional_forecast.arch", "climate_projection.arch"]
LOADERS = ["global_forecast.module", "regional_forecast.module", "climate_projection.module"]
STILL = {"alpha_init": 0}
WINDLESS = {"projection": {"wind": False}, "projection parallel": {"wind": False}}
CASES = ["global", "global parallel", "regional", "projection", "projection parallel"]


def load(module):
    return importlib.import_module(f"climax.{module}")


@pytest.fixture(scope="module")
def both(climax):
    """Classes of unmodified and of patched ClimaX, side by side."""
    with ExitStack() as stack:
        found = {}
        for name, patched in (("plain", False), ("patched", True)):
            folder = stack.enter_context(overlay(find_climax(climax), patched=patched))
            with importable(folder):
                modules = {module: load(module) for module in MODULES + LOADERS}
            found[name] = SimpleNamespace(
                folder=folder,
                GlobalForecastModule=modules["global_forecast.module"].GlobalForecastModule,
                RegionalForecastModule=modules["regional_forecast.module"].RegionalForecastModule,
                ClimateProjectionModule=modules["climate_projection.module"].ClimateProjectionModule,
                ClimaX=modules["arch"].ClimaX,
                RegionalClimaX=modules["regional_forecast.arch"].RegionalClimaX,
                ClimaXClimateBench=modules["climate_projection.arch"].ClimaXClimateBench,
            )
        yield SimpleNamespace(**found)


def build(classes, case, elevation_file, seed=0, on=False, bias="physics", bias_args=None, **options):
    """A model of `case`, and the number that a fresh draw gives after building it."""
    torch.manual_seed(seed)
    flags = {}
    if on:
        flags = {"use_physics_mask": True, "bias_type": bias, "bias_args": {"blocks": "all", **(bias_args or {})}}
        if "projection" in case:
            flags["bias_args"] |= {"elevation_file": str(elevation_file)}
            if bias == "physics" and bias_args is None:
                flags["bias_args"] |= {"wind": False}
    if "parallel" in case:
        flags["parallel_patch_embed"] = True
    if "global" in case:
        model = classes.ClimaX(VARIABLES, **SIZES, **flags, **options)
    elif "regional" in case:
        model = classes.RegionalClimaX(VARIABLES, **SIZES, **flags, **options)
    else:
        model = classes.ClimaXClimateBench(["CO2", "SO2"], "tas", time_history=3, **SIZES, **flags, **options)
    if on:
        model.terrain.set_statistics(MEAN, STD, "a test")
        model.terrain.set_grid(LAT, LON, "a test")
    return model, torch.rand(1)


def predict(model, case, seed=1):
    """A forward of a fixed batch."""
    torch.manual_seed(seed)
    if "projection" in case:
        x = torch.randn(2, 3, 2, 8, 16)
        return model(x, None, torch.zeros(2), ["CO2", "SO2"], ["tas"], None, None)[1]
    x = torch.randn(2, 4, 8, 16)
    x[:, 0] = torch.rand(8, 16) * 4 - 0.5  # 0 to 2800 m
    lead_times = torch.tensor([0.24, 0.72])
    if "regional" in case:
        y = torch.zeros_like(x)
        return model(x, y, lead_times, VARIABLES, VARIABLES, None, torch.zeros(8), REGION)[1]
    return model(x, None, lead_times, VARIABLES, VARIABLES, None, None)[1]


def strong(model):
    """Initial weights leave attention almost uniform, and any bias almost unseen."""
    with torch.no_grad():  # the head less, so that outputs stay of order one
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_({"head.0.weight": 3, "head.2.weight": 3, "head.weight": 0.3}.get(name, 10))
    return model.eval()


@pytest.fixture(scope="module")
def elevation_file(tmp_path_factory):
    import numpy as np

    path = tmp_path_factory.mktemp("elevation") / "z.npy"
    np.save(path, np.random.default_rng(0).uniform(0, 4000, (8, 16)))
    return path


def ours(key):
    return key.removeprefix("net.").startswith("terrain.") or ".attn.bias." in key


@pytest.mark.parametrize("case", CASES)
def test_off_is_bit_identical_in_weights_outputs_and_one_step(both, case, elevation_file):
    seen = []
    for classes in (both.plain, both.patched):
        model, draw = build(classes, case, elevation_file)
        initial = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        output = predict(model.train(), case)  # dropout and drop path draw here
        output.square().mean().backward()
        optimizer.step()
        seen.append((initial, draw, output.detach(), model.state_dict()))
    for before, after in zip(*(list(s[0].items()) + list(s[3].items()) for s in seen), strict=True):
        assert before[0] == after[0]
        assert torch.equal(before[1], after[1])
    assert torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[0][2], seen[1][2])
    assert not any(ours(key) for key in seen[1][0])


@pytest.mark.parametrize("case", CASES)
def test_on_leaves_the_hosts_weights_and_random_numbers(both, case, elevation_file):
    plain, draw = build(both.plain, case, elevation_file)
    aware, draw_after = build(both.patched, case, elevation_file, on=True)
    state = aware.state_dict()
    assert {key for key in state if not ours(key)} == set(plain.state_dict())
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert torch.equal(draw, draw_after)
    assert all(isinstance(block, PhysicsGuidedBlockCorrected) for block in aware.blocks)


@pytest.mark.parametrize("case", CASES)
def test_on_at_zero_is_within_rounding_and_at_one_is_not(both, case, elevation_file):
    plain = predict(strong(build(both.plain, case, elevation_file)[0]), case)
    still = predict(
        strong(build(both.patched, case, elevation_file, on=True, bias_args=STILL | WINDLESS.get(case, {}))[0]), case
    )
    moved = predict(strong(build(both.patched, case, elevation_file, on=True)[0]), case)
    assert (still - plain).abs().max() < 1e-5
    assert (moved - plain).abs().max() > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_alpha_learns_through_the_whole_model(both, case, elevation_file):
    model, _ = build(both.patched, case, elevation_file, on=True)
    predict(strong(model).train(), case).square().mean().backward()
    assert all(block.attn.bias.elevation_alpha.grad.abs() > 0 for block in model.blocks)
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not [name for name in unused if ours(name)]


@pytest.mark.parametrize("case", ["global", "regional", "projection"])
@pytest.mark.parametrize("bias", EVERY_BIAS)
def test_every_bias_in_every_architecture(both, case, bias, elevation_file):
    """The host as it was, another output, every parameter learning; and a refusal where wind is wanted and absent."""
    name, bias_args = EVERY_BIAS[bias]
    windless = {"multiplicative", "physics without wind", "ridge both ways", "topoflow"}
    if case == "projection" and not (bias in windless or bias.startswith(("relative", "structure"))):
        with pytest.raises(InputError, match=r"needs wind.*lack '10m_u_component_of_wind'"):
            build(both.patched, case, elevation_file, on=True, bias=name, bias_args=bias_args)
        return
    plain, draw = build(both.plain, case, elevation_file)
    aware, draw_after = build(both.patched, case, elevation_file, on=True, bias=name, bias_args=bias_args)
    state = aware.state_dict()
    assert {key for key in state if not ours(key)} == set(plain.state_dict())
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert torch.equal(draw, draw_after)
    assert all(isinstance(block, TerrainBlock) for block in aware.blocks)
    assert all(isinstance(block.attn, Attention3D) == (name == "relative_3d") for block in aware.blocks)
    output = predict(strong(aware), case)
    assert (output - predict(strong(plain), case)).abs().max() > 1e-4
    output.square().mean().backward()
    learned = {key: parameter.grad for key, parameter in aware.named_parameters() if ours(key)}
    assert not [key for key, gradient in learned.items() if gradient is None]
    assert not [key for key, g in learned.items() if g.abs().max() == 0 and not key.endswith("mlp.2.bias")]


@pytest.mark.parametrize("case", CASES)
def test_a_last_layer_of_zeros_is_the_host(both, case, elevation_file):
    plain = predict(strong(build(both.plain, case, elevation_file)[0]), case)
    zeros = {"bias": "relative_3d", "bias_args": {"zero_init": True}}
    aware = strong(build(both.patched, case, elevation_file, on=True, **zeros)[0])
    still = predict(aware, case)
    assert (still - plain).abs().max() < 1e-5
    still.square().mean().backward()
    assert all(block.attn.bias.mlp[2].weight.grad.abs().max() > 0 for block in aware.blocks)


@pytest.mark.parametrize("case", ["global", "regional"])
def test_wind_order_changes_nothing_but_as_published(both, case, elevation_file):
    raster, wind, published = (
        predict(strong(build(both.patched, case, elevation_file, on=True, bias_args={"patch_order": order})[0]), case)
        for order in ("raster", "wind", "wind_as_published")
    )
    torch.testing.assert_close(wind, raster, rtol=1e-4, atol=1e-4)
    assert (published - raster).abs().max() > 1e-3


def test_projection_has_no_lead_time(both, elevation_file):
    """Wind could be among a projection's inputs; a lead time cannot."""
    torch.manual_seed(0)
    winds = {"wind_variables": ["CO2", "SO2"], "elevation_file": str(elevation_file), "blocks": [0]}
    model = both.patched.ClimaXClimateBench(
        ["CO2", "SO2"], "tas", time_history=3, **SIZES, use_physics_mask=True, bias_type="advection", bias_args=winds
    )
    model.terrain.set_statistics({"CO2": 0.0, "SO2": 0.0}, {"CO2": 5.0, "SO2": 5.0}, "a test")
    model.terrain.set_grid(LAT, LON, "a test")
    with pytest.raises(InputError, match=r"advection bias needs a lead time.*climate projection has none"):
        predict(model, "projection")


@pytest.mark.parametrize("case", CASES)
def test_an_unmodified_checkpoint_loads_through_upstreams_loaders(both, case, elevation_file, tmp_path, monkeypatch):
    source, _ = build(both.plain, "global" + case[case.find(" ") :] if " " in case else "global", None, seed=7)
    keys = {f"net.{key}": value for key, value in source.state_dict().items()}
    if "parallel" in case:
        keys["token_embeds.proj_weights"] = torch.zeros(1)  # what upstream's check for this mode looks for
    torch.save({"state_dict": keys}, tmp_path / "plain.ckpt")
    reports = []
    load = torch.nn.Module.load_state_dict
    monkeypatch.setattr(
        torch.nn.Module, "load_state_dict", lambda self, *a, **k: reports.append(load(self, *a, **k)) or reports[-1]
    )
    loaded = []
    for classes, on in ((both.plain, False), (both.patched, True)):
        net, _ = build(classes, case, elevation_file, on=on)
        module = {
            "global": classes.GlobalForecastModule,
            "regional": classes.RegionalForecastModule,
            "projection": classes.ClimateProjectionModule,
        }[case.split()[0]]
        loaded.append(module(net, pretrained_path=str(tmp_path / "plain.ckpt")))
    plain, patched = (set(report.missing_keys) for report in reports)
    assert plain < patched
    assert all(ours(key) for key in patched - plain)
    assert {key for key in loaded[1].state_dict() if ours(key)} == patched - plain
    state = loaded[1].state_dict()
    assert all(torch.equal(state[key], value) for key, value in loaded[0].state_dict().items())


def test_frozen_encoders_leave_the_bias_trainable(both, elevation_file):
    for case in ("projection", "projection parallel"):
        plain, _ = build(both.plain, case, elevation_file, freeze_encoder=True)
        aware, _ = build(both.patched, case, elevation_file, on=True, freeze_encoder=True)
        trainable = {name for name, p in aware.named_parameters() if p.requires_grad}
        assert {name for name, p in plain.named_parameters() if p.requires_grad} == {
            name for name in trainable if not ours(name)
        }
        assert {name for name, _ in aware.named_parameters() if ours(name)} <= trainable
        assert not aware.blocks[0].attn.qkv.weight.requires_grad


@pytest.mark.parametrize("case", CASES)
def test_copies_are_independent(both, case, elevation_file):
    with importable(both.patched.folder):
        classes = SimpleNamespace(
            ClimaX=load("arch").ClimaX,
            RegionalClimaX=load("regional_forecast.arch").RegionalClimaX,
            ClimaXClimateBench=load("climate_projection.arch").ClimaXClimateBench,
        )
        model = strong(build(classes, case, elevation_file, on=True)[0])
        before = predict(model, case)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(predict(other, case), before)
            with torch.no_grad():
                other.blocks[0].attn.bias.elevation_alpha.add_(10)
            assert not torch.equal(predict(other, case), before)
        assert torch.equal(predict(model, case), before)


def test_a_region_reads_its_own_ground(both, elevation_file):
    """The terrain of the region's patches, not of the first ones of the grid."""
    model = strong(build(both.patched, "regional", elevation_file, on=True)[0])
    seen = []
    inputs = model.blocks[0].attn.bias.inputs
    model.blocks[0].attn.bias.inputs = lambda terrain: seen.append(terrain) or inputs(terrain)
    predict(model, "regional")
    torch.manual_seed(1)
    torch.randn(2, 4, 8, 16)
    field = (torch.rand(8, 16) * 4 - 0.5) * STD["orography"] + MEAN["orography"]
    patches = field.reshape(4, 2, 8, 2).mean(dim=(1, 3)).flatten()[REGION["patch_ids"]]
    torch.testing.assert_close(seen[0].elevation_m[0], patches, rtol=1e-5, atol=1e-2)


def test_projection_refuses_a_bias_that_needs_wind(both, elevation_file):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"lack '10m_u_component_of_wind'.*wind: false"):
        both.patched.ClimaXClimateBench(
            ["CO2"], "tas", **SIZES, use_physics_mask=True, bias_args={"elevation_file": str(elevation_file)}
        )


def test_compiled_patched_model_equals_itself(both, elevation_file):
    model = strong(build(both.patched, "global", elevation_file, on=True)[0])
    expected = predict(model, "global")
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(predict(compiled, "global"), expected, rtol=1e-4, atol=1e-5)


def test_upstreams_own_tests_end_alike(both, climax):
    suite = climax / "tests"
    if not suite.is_dir():
        pytest.skip("this ClimaX is an installation, without upstream's tests")
    ends = []
    for classes in (both.plain, both.patched):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-rA",
                "--rootdir",
                str(suite),
                str(suite),
            ],
            env={"PYTHONPATH": f"{classes.folder}:{':'.join(filter(None, sys.path))}", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        ends.append((done.returncode, [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]))
    assert ends[0] == ends[1]
    assert ends[0][1]
