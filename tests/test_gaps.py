"""Values of hidden patches: who sees what, what is scored, the whole command, and mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from prepare_data import with_units, write

from climax_elevation.cli import main
from climax_elevation.compare import compare
from climax_elevation.compare.gaps import patch_strata, read_gaps, sums
from climax_elevation.compare.strata import StrataSettings
from climax_elevation.data.prepare import prepare
from climax_elevation.errors import InputError
from climax_elevation.host import StandInClimaX
from climax_elevation.testbed.fit import ModelSettings, TrainingSettings
from climax_elevation.testbed.gaps import Fields, Gaps, GapsSettings, build_gaps, patch_means, read_fields

xr = pytest.importorskip("xarray")

ROWS, COLUMNS, PATCH = 8, 12, 2
MODEL = {"patch_size": PATCH, "embed_dim": 16, "depth": 1, "decoder_depth": 1, "num_heads": 2}
SMALL = ModelSettings(**MODEL)
QUICK = TrainingSettings(steps=4, batch_size=4, lr=2e-3, validations=2)
SPLIT = {"val_from": "1995", "test_from": "1997"}
CYCLE = 12  # months


def source(folder: Path, months: int = 120, missing: int | None = None) -> Path:
    """Air in two layers, each of its own mood, and a year: what is high follows what is high."""
    random = np.random.RandomState(0)
    height_m = np.kron(random.choice([200.0, 2200.0], (4, 6)), np.ones((PATCH, PATCH))) + random.rand(ROWS, COLUMNS)
    layers = random.standard_normal((months, 2))
    values = 280 + layers[:, (height_m > 1200).astype(int)] + 0.1 * random.standard_normal((months, ROWS, COLUMNS))
    values += 8 * np.cos(2 * np.pi * np.arange(months) / CYCLE)[:, None, None]
    stamps = pd.date_range("1990-01-01", periods=months, freq="MS")
    dims = ("time", "latitude", "longitude")
    dataset = with_units(
        xr.Dataset(
            {
                "t2m": (dims, values.astype(np.float32)),
                "u10": (dims, random.normal(3, 2, values.shape).astype(np.float32)),
                "v10": (dims, random.normal(-1, 2, values.shape).astype(np.float32)),
                "orography": (dims[1:], height_m.astype(np.float32)),
            },
            {"time": stamps, "latitude": 40 + 0.25 * np.arange(ROWS), "longitude": 10 + 0.25 * np.arange(COLUMNS)},
        )
    )
    if missing is not None:
        dataset = dataset.isel(time=[month for month in range(months) if month != missing])
    return write(dataset, folder / "months.nc")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("months")
    prepare(source(folder), folder / "shards", patch_size=PATCH, **SPLIT)
    return folder / "shards"


@pytest.fixture(scope="module")
def fields(root: Path) -> Fields:
    return read_fields(GapsSettings(str(root), "2m_temperature", cycle=CYCLE, sets=2), PATCH)


def network(fields: Fields, **bias: Any) -> torch.nn.Module:
    return build_gaps(SMALL, fields, seed=0, **{"bias_type": None, "bias_args": None, **bias})


def pixels(patches: np.ndarray) -> np.ndarray:
    """`[..., L]` to `[..., H, W]`."""
    grid = patches.reshape(*patches.shape[:-1], ROWS // PATCH, COLUMNS // PATCH)
    return grid.repeat(PATCH, axis=-2).repeat(PATCH, axis=-1)


def test_anomalies_are_from_each_pixels_own_months_of_training(fields: Fields, root: Path) -> None:
    assert [len(fields.parts[part]) for part in ("train", "val", "test")] == [60, 24, 36]
    with xr.open_dataset(root.parent / "months.nc") as dataset:
        values = dataset.t2m.values.astype(np.float64)  # each month once, which shards may have in common
    # the third May of validation's first year, by hand
    may = values[60 + 4] - values[4:60:12].mean(axis=0)
    np.testing.assert_allclose(fields.x[64] * fields.std, may, atol=1e-4)
    assert np.isclose(fields.means("train").std(), 1)
    # the year is gone: its amplitude was eight times that of the moods
    assert fields.std < 2


def test_patch_means_and_hidden_sets(fields: Fields) -> None:
    by_hand = fields.x[0, 2:4, 4:6].mean()  # second row, third column of patches
    assert np.isclose(patch_means(fields.x[:1], PATCH)[0, 1 * 6 + 2], by_hand)
    sets = fields.hidden(0.75, "val")
    assert sets.shape == (2, 24, 24)
    assert (sets.sum(axis=2) == 18).all()
    assert len({each.tobytes() for time in sets for each in time}) == 48
    assert np.array_equal(sets, fields.hidden(0.75, "val"))
    assert not np.array_equal(sets, fields.hidden(0.75, "test")[:, :24])


@pytest.mark.parametrize("bias", [{}, {"bias_type": "structure"}])
def test_what_is_hidden_reaches_no_network(fields: Fields, bias: dict[str, Any]) -> None:
    """Neither as it is trained nor afterwards: validation's hidden values are another matter, they choose."""
    once = replace(fields, settings=replace(fields.settings, sets=1))
    hidden = pixels(once.hidden(0.75, "test")[0])
    gaps, net = Gaps(once, 0.75, True), network(once, **bias)
    gaps.fit(net, QUICK, seed=0, keep_best=False, on_step=lambda error: None)
    inferred = gaps.infer(net, "test")
    changed = once.x.copy()
    changed[once.parts["test"]] += 7 * hidden
    assert np.array_equal(Gaps(replace(once, x=changed), 0.75, True).infer(net, "test"), inferred)
    changed[once.parts["test"]] += 7  # and what is visible does
    assert np.abs(Gaps(replace(once, x=changed), 0.75, True).infer(net, "test") - inferred).max() > 1e-3


def test_training_reads_training_alone(fields: Fields) -> None:
    changed = fields.x.copy()
    changed[len(fields.parts["train"]) :] += 7
    weights = []
    for x in (fields.x, changed):
        net = network(fields)
        Gaps(replace(fields, x=x), 0.75, False).fit(net, QUICK, seed=0, keep_best=False, on_step=lambda error: None)
        weights.append(net.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_few_times_of_training_are_spread_over_it_and_others_are_not_read(fields: Fields) -> None:
    assert fields.training(3).tolist() == [0, 30, 59]
    assert np.array_equal(fields.training(60), fields.training(None))
    changed = fields.x.copy()
    changed[np.setdiff1d(fields.parts["train"], fields.training(9))] += 7
    weights = []
    for x in (fields.x, changed):
        net, few = network(fields), Gaps(replace(fields, x=x), 0.75, False, 9)
        few.fit(net, QUICK, seed=0, keep_best=False, on_step=lambda error: None)
        weights.append(net.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_hidden_patch_is_the_mean_and_other_channels_say_which_and_how_high(fields: Fields) -> None:
    hidden = torch.zeros(1, 24, dtype=torch.bool)
    hidden[0, 8] = True  # rows 2 and 3, columns 4 and 5
    given, withheld = (Gaps(fields, 0.75, told).inputs(np.array([3]), hidden)[0] for told in (True, False))
    assert given.shape == (3, ROWS, COLUMNS)
    assert torch.equal(given[:2], withheld)  # both arms differ by one channel
    assert (given[:2, 2:4, 4:6] == 0).all()
    visible = torch.from_numpy(~pixels(hidden.numpy())[0])
    assert torch.equal(given[0][visible], torch.from_numpy(fields.x[3])[visible])
    assert torch.equal(given[1], visible.float())
    assert np.corrcoef(given[2].ravel(), fields.ground_m.ravel())[0, 1] > 1 - 1e-9


def test_both_arms_start_from_the_same_weights_and_the_bias_sees_the_same_ground(fields: Fields) -> None:
    plain, biased = network(fields).state_dict(), network(fields, bias_type="structure")
    assert all(torch.equal(value, biased.state_dict()[name]) for name, value in plain.items())
    terrain = biased.terrain
    np.testing.assert_allclose(terrain.elevation_m[0], patch_means(fields.ground_m[None], PATCH)[0], atol=0.01)
    np.testing.assert_allclose(terrain.lat[:6], 40.125, atol=1e-4)
    permuted = [
        build_gaps(SMALL, fields, seed=seed, bias_type="structure", bias_args={"control": "permuted"})
        for seed in (0, 1)
    ]
    assert not torch.equal(*(net.terrain.control_order for net in permuted))


def test_further_channels_are_visible_everywhere_and_biases_read_the_wind_there(root: Path) -> None:
    winds = ("10m_u_component_of_wind", "10m_v_component_of_wind")
    fields = read_fields(GapsSettings(str(root), "2m_temperature", variables=winds), PATCH)
    hidden = torch.ones(1, 24, dtype=torch.bool)
    inputs = Gaps(fields, 0.75, False).inputs(np.array([3]), hidden)
    assert (inputs[0, :2] == 0).all()
    physical = np.load(sorted((root / "train").glob("*.npz"))[0])[winds[0]][3, 0]
    np.testing.assert_allclose(inputs[0, 2] * fields.std_of[winds[0]] + fields.mean_of[winds[0]], physical, atol=1e-4)
    net = network(fields, bias_type="physics")  # as published, with wind
    seen: list[Any] = []
    net.terrain.register_forward_hook(lambda module, given, terrain: seen.append(terrain.u))
    Gaps(fields, 0.75, False).inferred(net, np.array([3]), hidden)
    np.testing.assert_allclose(seen[0][0], patch_means(physical[None], PATCH)[0], atol=1e-4)


def test_patches_are_divided_by_their_mean_height_and_their_relief(fields: Fields) -> None:
    strata = patch_strata(fields, StrataSettings(elevation_m=(1000.0,)))
    high = patch_means(fields.ground_m[None], PATCH)[0] > 1000
    assert np.array_equal(strata["above 1000 m"], high)
    assert np.array_equal(strata["below 1000 m"], ~high)
    relief = fields.ground_m.reshape(4, 2, 6, 2).std(axis=(1, 3)).ravel()
    assert np.array_equal(strata["high relief"], relief > np.quantile(relief, 2 / 3))
    assert not any("wind" in name for name in strata)


def test_scores_are_of_patch_means_that_are_hidden(fields: Fields) -> None:
    """Two sets of each time: 18 of 24 patches hidden in each, wrong by 2 K there and by 9 K where visible."""
    hidden = fields.hidden(0.75, "test")
    wrong = np.where(hidden, 2.0, 9.0) / fields.std
    high = patch_means(fields.ground_m[None], PATCH)[0] > 1200
    samples = sums(fields, 0.75, {"all": np.ones(24, bool), "high": high}, fields.means("test") + wrong, "test")
    assert (samples.weight[:, 0] == 36).all()
    assert np.array_equal(samples.weight[:, 1], (hidden & high).sum(axis=(0, 2)))
    np.testing.assert_allclose(samples.squares[:, 0], 4 * samples.weight)
    assert np.array_equal(samples.shard, fields.shard[fields.parts["test"]] - fields.shard[fields.parts["test"]][0])


def written(folder: Path, root: Path, **changes: Any) -> Path:
    given = {
        "task": "gaps",
        "out": str(folder / "out"),
        "data": {"root_dir": str(root), "variable": "2m_temperature", "cycle": CYCLE},
        "hidden": [0.75],
        "host": "stand-in",
        "model": MODEL,
        "training": {"steps": 4, "batch_size": 4, "validations": 2},
        "strata": {"elevation_m": [1000.0], "relief": False},
        "seeds": [0, 1],
        "variants": {
            "none": None,
            "structure": {"bias_type": "structure"},
            "mirrored": {"bias_type": "structure", "bias_args": {"control": "mirrored"}},
        },
        "pairs": [["structure", "mirrored"]],
        "statistics": {"resamples": 20, "block": 5},
    }
    for name, value in changes.items():
        whole = name == "variants" or not isinstance(given.get(name), dict)
        given[name] = value if whole else {**given[name], **value}
    path = folder / "gaps.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def test_both_arms_and_what_weather_services_use_are_reported_and_a_killed_comparison_goes_on(
    root: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, root)
    command = [sys.executable, "-m", "climax_elevation", "compare", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    out = tmp_path / "out"
    until = time.monotonic() + 600  # lest it wait for ever
    while len(list(out.glob("*/runs/*/seed*/run.json"))) < 2:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    runs = {run: run.stat().st_mtime_ns for run in out.glob("*/runs/*/seed*/run.json")}
    assert len(runs) < 12
    found = compare(path)
    assert {run: run.stat().st_mtime_ns for run in runs} == runs
    assert len(list(out.glob("*/runs/*/seed*/run.json"))) == 12  # three variants, two seeds, two arms
    assert not list(out.glob("*/runs/*/.*"))
    table = found.results[found.results.part != "train"]
    assert set(table.arm) == {"withheld_hidden_0.75", "given_hidden_0.75"}
    assert set(table.stratum) == {"all", "below 1000 m", "above 1000 m"}
    optimal = ["optimal interpolation, distance", "optimal interpolation, distance and height"]
    assert set(table.variant) == {"none", "structure", "mirrored", "climatology", "inverse distance", *optimal}
    assert np.isfinite(table.value).all()
    # the methods are told the same in both arms, and the layers are found by height alone
    where = (table.part == "test") & (table.metric == "rmse_standardised") & (table.stratum == "all")
    errors = table[where & table.variant.isin(optimal)].groupby("variant", sort=False)["value"].agg(["min", "max"])
    assert (errors["min"] == errors["max"]).all()
    assert errors["min"][optimal[1]] < 0.6 * errors["min"][optimal[0]]
    assert set(found.differences.arm) == set(table.arm)
    for text in ("the stand-in host, which is not ClimaX", "### Heights withheld", "### Heights given", "V, m"):
        assert text in found.report
    record = json.loads(next(iter(runs)).read_text())
    assert record["configuration"]["arm"]["hidden"] == 0.75
    with pytest.raises(InputError, match="another configuration .*cycle 12, now 1"):
        compare(written(tmp_path, root, data={"cycle": 1}))


def test_methods_are_fitted_on_training_alone(root: Path, tmp_path: Path) -> None:
    """With other values in validation and test their parameters are the same."""
    fitted = []
    for name in ("as it is", "other"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "other":
            subprocess.run(["cp", "-r", str(root), str(folder / "shards")], check=True)
            for shard in [*(folder / "shards" / "val").glob("0*"), *(folder / "shards" / "test").glob("0*")]:
                arrays = dict(np.load(shard))
                arrays["2m_temperature"] = arrays["2m_temperature"] + np.arange(COLUMNS, dtype=np.float32)
                np.savez(shard, **arrays)
        at = root if name == "as it is" else folder / "shards"
        compare(written(folder, at, variants={"none": None}, pairs=[]), seeds=[0])
        fitted.append(json.loads((folder / "out/methods/hidden_0.75/all_seeds/run.json").read_text())["parameters"])
    assert fitted[0] == fitted[1]


def test_few_times_of_training_are_arms_of_their_own_and_earlier_runs_stay(root: Path, tmp_path: Path) -> None:
    few = {"variants": {"none": None}, "pairs": []}
    compare(written(tmp_path, root, **few), seeds=[0])
    out = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    record = json.loads((out / "withheld_hidden_0.75/runs/none/seed0/run.json").read_text())
    assert record["configuration"]["arm"] == {"elevation_input": False, "hidden": 0.75}
    found = compare(written(tmp_path, root, training_times=["all", 9], **few), seeds=[0])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    arms = ["withheld_hidden_0.75", "given_hidden_0.75", "withheld_hidden_0.75_9_times", "given_hidden_0.75_9_times"]
    assert list(dict.fromkeys(found.results.arm)) == arms
    record = json.loads((out / arms[2] / "runs/none/seed0/run.json").read_text())
    assert record["configuration"]["arm"]["times"] == 9
    fitted = [
        json.loads((out / f"methods/hidden_0.75{few}/all_seeds/run.json").read_text()) for few in ("", "_9_times")
    ]
    assert fitted[0]["parameters"] != fitted[1]["parameters"]
    assert "## 75 % hidden, trained on 9 times" in found.report


def test_on_climax_itself(root: Path, climax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights infer the same on both: ClimaX's own forward, with a channel that is left out."""
    monkeypatch.setenv("CLIMAX_SRC", str(climax))
    found = compare(written(tmp_path, root, host="climax"), seeds=[0], variants=["none", "structure"])
    assert "ClimaX's architecture" in found.report
    configuration = read_gaps(tmp_path / "gaps.yaml")
    fields = read_fields(configuration.data, PATCH)
    run = tmp_path / "out/withheld_hidden_0.75/runs/structure/seed0"
    net = build_gaps(configuration.model, fields, seed=5, bias_type="structure", bias_args=None, host=StandInClimaX)
    net.load_state_dict(torch.load(run / "weights.ckpt", weights_only=True)["state_dict"])
    inferred = Gaps(fields, 0.75, False).infer(net, "test")
    strata = {"all": np.ones(fields.patches, bool)}
    own = sums(fields, 0.75, strata, inferred, "test")
    kept = np.load(run / "samples.npz")
    np.testing.assert_allclose(own.squares[:, 0, 0], kept["test/squares"][:, 0, 0], rtol=1e-4)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"hidden": [1.0]}, "hidden is a share .* with all hidden there is nothing to infer from"),
    ({"hidden": [0]}, "with none nothing to infer"),
    ({"hidden": [0.99]}, "hidden 0.99 of 24 patches hides all of them: choose another share"),
    ({"hidden": [0.01]}, "hidden 0.01 of 24 patches hides none of them"),
    ({"hidden": 0.75}, "hidden is a list of different shares"),
    ({"hidden": [0.5, 0.5]}, "hidden is a list of different shares"),
    ({"data": {"variable": "humidity"}}, "lacks humidity; it has"),
    ({"data": {"variable": ""}}, "it lacks variable"),
    ({"data": {"variable": "orography"}}, "data names 'orography', which is a channel already"),
    ({"data": {"variables": ["orography"]}}, "data names 'orography', which is a channel already"),
    ({"data": {"variables": ["2m_temperature"]}}, "names other channels than data.variable"),
    ({"data": {"cycle": 13}}, "has 60 time steps of training, and inference with data.cycle 13 is learned from 65"),
    ({"data": {"cycle": -1}}, "data.cycle is a whole number of 0 or more"),
    ({"data": {"sets": 0}}, "data.sets is a whole number of 1 or more"),
    ({"data": {"root_dir": "nowhere"}}, "has no shard"),
    ({"model": {"patch_size": 5}}, "patches of 5 pixels do not tile fields of 8 x 12"),
    ({"pairs": [], "variants": {"none": None, "p": {"bias_type": "physics"}}}, "variant 'p': the bias needs wind"),
    ({"pairs": [], "variants": {"none": None, "p": {"bias_type": "phisics"}}}, "variant 'p': unknown bias 'phisics'"),
    ({"training_days": [60]}, "unknown key 'training_days' in the configuration; valid: .*training_times"),
    ({"training_times": [61]}, "training_times is at most the 60 times of training, not 61"),
    ({"training_times": 0}, "training_times is a list of different numbers of times"),
    ({"training_times": [0]}, "training_times is a whole number of 1 or more"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda value: None if isinstance(value, dict) else value)
def test_mistakes_are_told_before_anything_is_trained(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict[str, Any], message: str
) -> None:
    assert main(["compare", str(written(tmp_path, root, **changes))]) == 2
    with pytest.raises(InputError, match=message):
        raise InputError(" ".join(capsys.readouterr().err.split()))
    assert not list(tmp_path.glob("out/*/runs/*/*"))


def test_ground_times_and_one_time_only(root: Path, tmp_path: Path) -> None:
    def changed(name: str, change: Any, settings: dict[str, Any], message: str) -> None:
        copy = tmp_path / name
        subprocess.run(["cp", "-r", str(root), str(copy)], check=True)
        change(copy)
        with pytest.raises(InputError, match=message):
            read_fields(GapsSettings(str(copy), "2m_temperature", **settings), PATCH)

    def without_orography(copy: Path) -> None:
        for shard in copy.glob("*/0*.npz"):
            np.savez(shard, **{name: values for name, values in np.load(shard).items() if name != "orography"})

    def one_time(copy: Path) -> None:
        first, *others = sorted((copy / "train").glob("*.npz"))
        for shard in others:
            shard.unlink()
        np.savez(first, **{name: values[:1] for name, values in np.load(first).items()})

    changed("flat", without_orography, {}, "has no orography, by which errors are divided .* prepare it with orography")
    changed("one", one_time, {}, "has 1 time step of training, and .* is learned from 5 or more")
    changed("undated", lambda copy: (copy / "prepare.json").unlink(), {"cycle": 12}, "does not tell the times of all")
    folder = tmp_path / "gap"
    folder.mkdir()
    prepare(source(folder, missing=30), folder / "shards", patch_size=PATCH, **SPLIT)
    with pytest.raises(InputError, match="goes on at 1992-08-01T00:00:00 after 1992-06-01.* not the next step"):
        read_fields(GapsSettings(str(folder / "shards"), "2m_temperature", cycle=2), PATCH)


@pytest.mark.parametrize("name", ["hrrr_gaps", "andes_gaps"])
def test_committed_configurations_are_right(name: str) -> None:
    read = read_gaps(Path(__file__).parents[1] / "configs" / "compare" / f"{name}.yaml")
    assert len(read.seeds) == 5
    assert {arm.name for arm in read.arms} == {"withheld_hidden_0.75", "given_hidden_0.75"}
    assert {"none", "distance", "structure", "structure_permuted", "structure_mirrored", "ridge"} < {
        variant.name for variant in read.variants
    }
