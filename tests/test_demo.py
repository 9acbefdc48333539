"""The demonstration, end to end, with a few steps of training; and its field, whose least error is known."""

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from terrains import EVERY_BIAS

pytest.importorskip("pvlib", reason="the demo's terrain comes from the package pvlib, which is not installed")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib, which is not installed")

from climax_elevation.cli import main
from climax_elevation.errors import InputError
from climax_elevation.testbed import demo as module
from climax_elevation.testbed.altitude import region_elevation
from climax_elevation.testbed.demo import DemoReport, demo
from climax_elevation.testbed.fit import denormals_as_zero
from climax_elevation.testbed.gaussian_field import GaussianField, visible_cells

STEPS = 20


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> DemoReport:
    return demo(tmp_path_factory.mktemp("demo") / "new", region="alps", seed=3, steps=STEPS, fields=40)


def test_reports_what_came_out(report: DemoReport) -> None:
    lines = str(report).splitlines()
    assert "simulated" in lines[0]
    assert "not ClimaX" in lines[0]
    assert "51 of 256 visible, heights not among the inputs" in lines[1]
    assert list(report.runs) == ["without bias", "with structure", "with structure, ground mirrored"]
    errors = {name: run.error for name, run in report.runs.items()}
    for name, error in {"climatology": report.climatology, "floor": report.floor, **errors}.items():
        line = next(line for line in lines if line.startswith(name))
        assert line.endswith(f" {error:.4f}")
    assert all(report.floor < error for error in errors.values())  # which no function of the inputs can pass
    biased, without = errors["with structure"], errors["without bias"]
    verdict = next(line for line in lines if line.startswith("With the bias"))
    word = "lower" if biased < without else "higher"
    assert verdict.startswith(
        f"With the bias the error is {abs(100 * (biased / without - 1)):.1f}% {word} than without"
    )


def test_the_learned_lengths_are_told_beside_the_true_ones(report: DemoReport) -> None:
    run = report.runs["with structure"]
    assert set(run.lengths_m) == {"blocks.0", "blocks.1"}
    lengths, heights = run.lengths_m["blocks.1"]
    # from one patch, of 1 degree from south to north, to a quarter of 16
    patch_m = np.deg2rad(1.0) * 6.371e6
    assert lengths[[0, -1], 0] == pytest.approx([patch_m, 4 * patch_m], rel=1e-3)
    assert (lengths[:, 0] != lengths[:, 1]).all()
    assert heights[:, 0] == pytest.approx([300, 600, 150, 1e4])
    assert (heights[:, 0] != heights[:, 1]).all()
    text = str(report)
    assert f"L of the heads, in truth {report.field.length_m / 1e3:.0f} km:" in text
    assert "V of the heads, in truth 500 m:" in text
    assert ", ".join(f"{start:.0f} → {end:.0f}" for start, end in heights) in text
    # the factors of 4 heads in 2 blocks, in the middle
    factors = sorted(max(end / 500, 500 / end) for rows in run.lengths_m.values() for end in rows[1][:, 1])
    middle = (factors[3] * factors[4]) ** 0.5
    assert text.splitlines()[-3].startswith(f"  half of them are off by less than a factor of {middle:.2f}")
    assert report.runs["without bias"].lengths_m == {}


def test_the_mirrored_ground_is_mirrored_and_the_networks_begin_alike() -> None:
    ground = region_elevation("alps", module.GRID)
    made = [
        module._network(ground, module.CHANNELS, 1, bias, {"blocks": "all", **control} if bias else {})
        for bias, control in ((None, {}), ("structure", {}), ("structure", {"control": "mirrored"}))
    ]
    plain, biased, mirrored = made
    for name, weights in plain.state_dict().items():
        assert torch.equal(weights, biased.state_dict()[name]), name
        assert torch.equal(weights, mirrored.state_dict()[name]), name
    x = torch.zeros(1, 2, *module.GRID)
    seen = [net.terrain(x, torch.zeros(1), module.CHANNELS).elevation_m[0].reshape(module.GRID) for net in made[1:]]
    torch.testing.assert_close(seen[0], torch.from_numpy(ground.elevation_m).float())
    torch.testing.assert_close(seen[1], seen[0].flip(1))


def test_networks_see_what_is_visible_and_nothing_else() -> None:
    ground = region_elevation("alps", module.GRID)
    net = module._network(ground, module.CHANNELS, 1, "structure", {"blocks": "all"}).eval()
    data = module._simulated(GaussianField(ground, 3e5, 500.0), 20, seed=0)["val"]
    other = replace(data, values=torch.where(data.visible, data.values, 7.0))
    with torch.no_grad():
        assert torch.equal(module._infer(net, module.CHANNELS, data), module._infer(net, module.CHANNELS, other))
    assert (data.visible.sum(dim=1) == 51).all()
    assert not torch.equal(data.visible[0], data.visible[1])


def test_training_lowers_the_error(report: DemoReport) -> None:
    for run in report.runs.values():
        assert [step for step, _ in run.curve] == list(range(2, STEPS + 1, 2))
        assert run.curve[-1][1] < run.curve[0][1]


def test_picture_is_written(report: DemoReport) -> None:
    from matplotlib.image import imread

    assert imread(report.picture).shape == (700, 1500, 4)


def test_the_field_has_its_covariance() -> None:
    ground = region_elevation("alps", (4, 4))
    field = GaussianField(ground, 4e5, 500.0)
    drawn = field.simulate(40000, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.T @ drawn / 40000, field.covariance, atol=0.03)
    # two cells by hand: a haversine, and the difference of their heights
    (lat_a, lat_b), (lon_a, lon_b) = np.deg2rad(ground.lat[:2]), np.deg2rad(ground.lon[:2])
    haversine = np.sin((lat_b - lat_a) / 2) ** 2 + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2
    chord_m, rise_m = 2 * 6.371e6 * np.sqrt(haversine), ground.elevation_m[1, 1] - ground.elevation_m[0, 0]
    expected = np.exp(-((chord_m / 4e5) ** 2) / 2 - (rise_m / 500) ** 2 / 2)
    assert field.covariance[0, 5] == pytest.approx(expected, rel=1e-9)


def test_the_floor_is_the_least_error() -> None:
    field = GaussianField(region_elevation("asia", (8, 8)), 1e6, 500.0)
    rng = np.random.default_rng(1)
    values, visible = field.simulate(400, rng), visible_cells(400, 64, 0.2, rng)
    inferred = field.infer(values, visible)
    np.testing.assert_allclose(inferred[visible], values[visible], atol=1e-4)
    least = np.square(inferred - values)[~visible].mean()
    c, v = field.covariance, visible[0]
    expected = np.diag(c) - np.einsum("iv,vi->i", c[:, v], np.linalg.solve(c[np.ix_(v, v)], c[v]))
    one_mask = np.broadcast_to(v, visible.shape)
    found = np.square(field.infer(values, one_mask) - values).mean(axis=0)
    np.testing.assert_allclose(found[~v], expected[~v], rtol=0.4, atol=1e-3)
    for length_m, height_m in ((5e5, 500.0), (2e6, 500.0), (1e6, 200.0), (1e6, 1e5)):
        other = GaussianField(field.ground, length_m, height_m).infer(values, visible)
        assert np.square(other - values)[~visible].mean() > least


def test_same_seed_same_result_and_the_bias_matters(report: DemoReport, tmp_path: Path) -> None:
    again = demo(tmp_path, region="alps", seed=3, steps=STEPS, fields=40, bias_args={"vertical": False})
    assert again.runs["without bias"].curve == report.runs["without bias"].curve
    assert again.runs["with structure"].error != report.runs["with structure"].error
    # without height the ground is not read, mirrored or not
    assert again.runs["with structure"].error == again.runs["with structure, ground mirrored"].error
    assert "V of the heads" not in str(again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"region": "mars"}, "unknown region 'mars'"),
        ({"bias": "phisics"}, "unknown bias 'phisics'"),
        ({"bias_args": {"directoin": "both"}}, "unknown argument 'directoin'"),
        ({"seed": -1}, "a seed is"),
        ({"steps": 3}, "needs 10 steps"),
        ({"fields": 9}, "10 fields or more"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(arguments: dict, message: str, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with pytest.raises(InputError, match=message):
        demo(out, **arguments)
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the folder .* cannot be written to"):
        demo(tmp_path / "file" / "demo")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["adaptive", "advection", "physics", "relative_2d", "ridge froude", "sum of three"])
def test_any_bias_can_be_shown(tmp_path: Path, case: str) -> None:
    name, arguments = EVERY_BIAS[case]
    report = demo(tmp_path, region="alps", bias=name, bias_args=arguments, steps=10, fields=10)
    assert f"with {name}, ground mirrored" in str(report)
    assert report.picture.is_file()
    if name == "physics":
        assert "blocks.0.elevation_alpha: 1.000 before training" in str(report)


def test_the_command_has_two_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from climax_elevation.testbed import transport as other

    called = []
    for where, name, task in ((module, "demo", "gaps"), (other, "transport", "transport")):
        usual = inspect.signature(getattr(where, name)).parameters["bias"].default

        def show(out: Path, *, bias: str = usual, task: str = task, **_: object) -> None:
            called.append((task, bias))

        monkeypatch.setattr(where, name, show)
    for arguments in ([], ["--bias", "ridge"], ["--task", "transport"], ["--task", "transport", "--bias", "ridge"]):
        assert main(["demo", "--out", str(tmp_path), *arguments]) == 0
    assert called == [("gaps", "structure"), ("gaps", "ridge"), ("transport", "physics"), ("transport", "ridge")]


@pytest.mark.parametrize("before", [False, True])
def test_the_tails_of_gaussians_are_zero_while_training_and_then_as_before(before: bool) -> None:
    if not torch.set_flush_denormal(before):
        pytest.skip("this processor cannot")
    tail = torch.tensor(1e-38)
    try:
        with denormals_as_zero():
            assert tail / 16 == 0
        assert bool(tail / 16 == 0) == before
    finally:
        torch.set_flush_denormal(False)
