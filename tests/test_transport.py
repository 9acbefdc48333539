"""The demonstration `transport`, end to end, with a few steps of training."""

from pathlib import Path

import pytest
import torch
from terrains import EVERY_BIAS

pytest.importorskip("pvlib", reason="the demo's terrain comes from the package pvlib, which is not installed")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib, which is not installed")

from climax_elevation.errors import InputError
from climax_elevation.testbed import transport as module
from climax_elevation.testbed.altitude import region_elevation
from climax_elevation.testbed.transport import TransportReport, transport

STEPS = 20


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> TransportReport:
    return transport(tmp_path_factory.mktemp("demo"), region="alps", seed=3, steps=STEPS, episodes=24)


def test_reports_what_came_out(report: TransportReport) -> None:
    lines = str(report).splitlines()
    assert "simulated" in lines[0]
    assert "not ClimaX" in lines[0]
    for name, error in (
        ("persistence", report.floor.persistence),
        ("without bias", report.without.error),
        ("with bias physics", report.with_bias.error),
    ):
        assert f"{error:.4f}" in next(line for line in lines if line.startswith(name))
    assert 0 < report.floor.true_wind < report.floor.initial_wind < report.floor.persistence
    worse = report.with_bias.error > report.without.error
    assert any(("higher" if worse else "lower") in line for line in lines)


def test_alpha_and_beta_are_trained_and_named(report: TransportReport) -> None:
    assert set(report.with_bias.scalars) == {"blocks.0.elevation_alpha", "blocks.0.wind_beta"}
    assert report.with_bias.scalars["blocks.0.elevation_alpha"][0] == 1.0
    assert all(before != after for before, after in report.with_bias.scalars.values())
    assert report.without.scalars == {}
    assert report.without.seconds_a_step > 0


def test_training_lowers_the_error(report: TransportReport) -> None:
    for run in (report.without, report.with_bias):
        assert [step for step, _ in run.curve] == list(range(2, STEPS + 1, 2))
        assert run.curve[-1][1] < run.curve[0][1]


def test_picture_is_written(report: TransportReport) -> None:
    from matplotlib.image import imread

    assert imread(report.picture).shape == (1080, 1440, 4)


def test_both_start_from_the_same_host_weights() -> None:
    ground = region_elevation("alps")
    plain = module._network(ground, seed=1).state_dict()
    biased = module._network(ground, seed=1, bias="physics").state_dict()
    for name, weights in plain.items():
        assert torch.equal(weights, biased[name]), name
    assert float(biased["blocks.0.attn.bias.elevation_alpha"]) == 1.0  # scaling fresh weights leaves the bias alone


def test_same_seed_same_result_and_the_bias_matters(report: TransportReport, tmp_path: Path) -> None:
    again = transport(
        tmp_path, region="alps", seed=3, steps=STEPS, episodes=24, bias_args={"wind": False, "direction": "query_above"}
    )
    assert again.without.error == report.without.error
    assert again.without.curve == report.without.curve
    assert again.with_bias.error != report.with_bias.error
    assert set(again.with_bias.scalars) == {"blocks.0.elevation_alpha"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"region": "mars"}, "unknown region 'mars'"),
        ({"bias": "phisics"}, "unknown bias 'phisics'"),
        ({"bias_args": {"directoin": "both"}}, "unknown argument 'directoin'"),
        ({"seed": -1}, "a seed is"),
        ({"steps": 3}, "needs 10 steps"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(arguments: dict, message: str, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with pytest.raises(InputError, match=message):
        transport(out, **arguments)
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in EVERY_BIAS if case != "physics"])
def test_every_bias_can_be_shown(tmp_path: Path, case: str) -> None:
    name, arguments = EVERY_BIAS[case]
    report = transport(tmp_path, region="alps", bias=name, bias_args=arguments, steps=10, episodes=16)
    assert f"with bias {name}" in str(report)
    assert report.picture.is_file()
    assert all("bias" not in scalar for scalar in report.with_bias.scalars)  # blocks.0.physics.elevation_alpha
