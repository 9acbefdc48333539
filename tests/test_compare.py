"""`climax-elevation compare`, end to end on the smallest networks."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny_data
import torch
import yaml
from pytorch_lightning import Trainer

from climax_elevation.cli import main
from climax_elevation.compare import Comparison, compare, comparison
from climax_elevation.compare.config import read_configuration, read_task
from climax_elevation.compare.runs import PARTIAL, host_class, remove_partial
from climax_elevation.compare.significance import holm
from climax_elevation.compare.tables import verdict
from climax_elevation.diagnostics import open_run
from climax_elevation.errors import InputError
from climax_elevation.forecast import load_run
from climax_elevation.testbed.fit import ModelSettings, build_network, quiet
from climax_elevation.upstream.locate import find_climax

CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs" / "compare").glob("*.yaml"))
    if read_task(path) == "forecast"
]
VARIANTS: dict[str, Any] = {
    "none": None,
    "physics": {"bias_type": "physics", "bias_args": {"static_terrain": True}},
    "sum": {"bias_type": "advection+ridge", "bias_args": {"ridge": {"wind": False}}},
}


def tiny(root: Path) -> dict[str, Any]:
    return {
        "data": {
            "root_dir": str(root),
            "variables": tiny_data.VARIABLES,
            "out_variables": tiny_data.TARGETS,
            "predict_range": 2,
        },
        "host": "stand-in",
        "accelerator": "cpu",
        "model": {"patch_size": 2, "embed_dim": 16, "num_heads": 2, "drop_rate": 0.1},
        "training": {"steps": 6, "batch_size": 4, "validations": 2},
        "seeds": [3, 4],
        "variants": VARIANTS,
        "pairs": [["sum", "physics"]],
        "statistics": {"resamples": 50},
    }


def write(path: Path, configuration: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(configuration, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data.write(tmp_path_factory.mktemp("shards"), train=(12, 9), val=(4, 5, 4, 4, 4), test=(9,))


@pytest.fixture(scope="module")
def config(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("config") / "tiny.yaml", tiny(root))


@pytest.fixture(scope="module")
def done(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(config, out=tmp_path_factory.mktemp("done"), jobs=2)


def _pick(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table


def test_every_run_is_there_and_every_table(done: Comparison) -> None:
    runs = sorted(path.relative_to(done.out / "runs").as_posix() for path in (done.out / "runs").glob("*/*"))
    assert runs == [f"{name}/seed{seed}" for name in sorted(VARIANTS) for seed in (3, 4)]
    for folder in (done.out / "runs").glob("*/*"):
        files = {"run.json", "samples.npz", "weights.ckpt", "config.yaml", "log.txt"}
        assert {path.name for path in folder.iterdir()} == files
    results = pd.read_csv(done.out / "results.csv")
    assert list(results) == ["variant", "seed", "part", "variable", "metric", "stratum", "value"]
    assert set(results.variant) == {*VARIANTS, "persistence", "climatology"}
    assert len(results[results.duplicated(list(results)[:-1])]) == 0
    assert (done.out / "report.md").read_text() == done.report
    log = (done.out / "runs" / "physics" / "seed3" / "log.txt").read_text()
    assert "bias physics in blocks 0 of 1" in log


def test_scores_of_a_run_are_those_of_its_weights(done: Comparison, config: Path) -> None:
    """The kept weights, in a fresh network, have the error in the table."""
    from climax_elevation.compare.scores import Scorer, score

    settings = read_configuration(config)
    scorer = Scorer.of(settings.data, settings.strata, 2, 4)  # type: ignore[arg-type]
    given = {"bias_type": "physics", "bias_args": VARIANTS["physics"]["bias_args"]}
    net = build_network(settings.model, tiny_data.VARIABLES, (8, 16), seed=0, **given)
    saved = torch.load(done.out / "runs" / "physics" / "seed4" / "weights.ckpt", weights_only=True)["state_dict"]
    net.load_state_dict({name.removeprefix("net."): value for name, value in saved.items()})
    rmse = score("rmse", scorer.network(net, "test"), {}, np.ones(2))[0, :, 0]
    found = _pick(done.results, variant="physics", seed=4, part="test", metric="rmse", stratum="all")
    np.testing.assert_allclose(found.value, rmse, rtol=1e-5)


def test_differences_are_those_of_the_scores(done: Comparison) -> None:
    for variant, counterpart in (("physics", "none"), ("sum", "none"), ("sum", "physics")):
        where = {"part": "val", "metric": "rmse_standardised", "variable": "mean", "stratum": "all"}
        own, other = (_pick(done.results, variant=name, **where).value.to_numpy() for name in (variant, counterpart))
        row = _pick(done.differences, variant=variant, counterpart=counterpart, **where).iloc[0]
        assert row.difference == pytest.approx((own - other).mean())
        assert row.percent == pytest.approx(100 * (own.mean() / other.mean() - 1))
        # two differences: 1 degree of freedom, t = 12.706, and an error of half their distance
        assert row.high - row.low == pytest.approx(2 * 12.7062 * abs(np.diff(own - other)[0]) / 2, rel=1e-4)
        assert row.time_low <= row.time_high
        assert row.p <= row.p_holm
        assert row.seeds == 2
    rows = _pick(done.differences, part="val", metric="rmse", variable="2m_temperature", stratum="all")
    assert len(rows) == 3
    np.testing.assert_allclose(rows.p_holm, holm(rows.p.to_numpy()))
    test = _pick(done.differences, part="test")
    assert test.time_low.isna().all()  # one shard
    assert "In test there are fewer than 5 such blocks" in done.report


@pytest.mark.parametrize("host", ["stand-in", "ClimaX"])
def test_first_weights_depend_on_the_seed_alone(request: pytest.FixtureRequest, host: str) -> None:
    source = find_climax(request.getfixturevalue("climax")) if host == "ClimaX" else None
    architecture = host_class(source)
    settings = ModelSettings(patch_size=2, embed_dim=16, num_heads=2)

    def weights(seed: int, **bias: Any) -> dict[str, torch.Tensor]:
        net = build_network(settings, tiny_data.VARIABLES, (8, 16), seed=seed, host=architecture, **bias)
        return net.state_dict()

    plain = weights(1)
    for name in ("relative_3d", "advection+physics", "topoflow"):
        biased = weights(1, bias_type=name)
        assert len(biased) > len(plain)
        assert all(torch.equal(value, biased[key]) for key, value in plain.items()), name
    assert not torch.equal(weights(2)["head.0.weight"], plain["head.0.weight"])


def test_on_climax_itself(config: Path, climax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIMAX_SRC", str(climax))
    configuration = yaml.safe_load(config.read_text()) | {"host": "auto"}
    found = compare(write(tmp_path / "c.yaml", configuration), out=tmp_path / "out", seeds=[3], variants=["physics"])
    assert "ClimaX's architecture" in found.report
    assert "There is one seed: no interval over seeds and no test" in found.report
    assert set(found.differences.verdict) == {"one seed: no interval"}
    record = json.loads((tmp_path / "out" / "runs" / "physics" / "seed3" / "run.json").read_text())
    assert record["configuration"]["host"] == "ClimaX"
    assert record["scalars"]["blocks.0.elevation_alpha"][0] == 1.0
    moved = record["scalars"]["blocks.0.elevation_alpha"][1]
    assert moved != 1.0
    with open_run(tmp_path / "out" / "runs" / "physics" / "seed3") as opened:
        alpha = dict(opened.module.named_parameters())["net.blocks.0.attn.bias.elevation_alpha"]
        assert alpha.item() == pytest.approx(moved)
    with pytest.raises(InputError, match="host ClimaX, now stand-in"):
        compare(config, out=tmp_path / "out", seeds=[3])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, "better"),
        ({"metric": "acc"}, "worse"),
        ({"difference": 0.2, "time_low": 0.1, "time_high": 0.3}, "worse"),
        ({"p_holm": 0.06}, "no difference found"),
        ({"time_high": 0.1}, "no difference found"),
        ({"time_low": math.nan, "time_high": math.nan}, "better"),
        ({"seeds": 1, "p_holm": math.nan}, "one seed: no interval"),
        ({"difference": math.nan, "p_holm": math.nan}, "not finite"),
    ],
)
def test_verdicts(row: dict[str, Any], expected: str) -> None:
    clear = {"metric": "rmse", "difference": -0.2, "seeds": 5, "p_holm": 0.04, "time_low": -0.3, "time_high": -0.1}
    assert verdict(clear | row, 0.05) == expected


def test_a_run_is_opened_as_a_run_of_train_is(done: Comparison, capsys: pytest.CaptureFixture) -> None:
    """By doctor and plot, with the weights that were scored."""
    folder = done.out / "runs" / "physics" / "seed3"
    record = json.loads((folder / "run.json").read_text())
    with open_run(folder) as opened:
        with quiet():
            trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
            found = trainer.validate(opened.module, datamodule=opened.datamodule, verbose=False)[0]
        assert found["val/w_rmse"] == pytest.approx(min(error for _, error in record["curve"]), rel=1e-4)
        alpha = dict(opened.module.named_parameters())["net.blocks.0.attn.bias.elevation_alpha"]
        assert alpha.item() == pytest.approx(record["scalars"]["blocks.0.elevation_alpha"][1], rel=1e-5)
        x, y, *_ = next(iter(opened.datamodule.val_dataloader()))
    forecast = load_run(folder)
    assert forecast.step(x).shape == y.shape
    assert f"elevation_alpha {alpha.item():.6g}" in forecast.bias
    assert main(["doctor", str(folder)]) == 0
    assert "elevation zeroed" in capsys.readouterr().out


def test_a_simulated_tracer(tmp_path: Path) -> None:
    pytest.importorskip("pvlib", reason="the terrain comes from the package pvlib, which is not installed")
    configuration = tiny(Path()) | {
        "data": {"tracer": {"region": "alps", "episodes": {"train": 6, "val": 5, "test": 5}, "steps": 2}},
        "variants": {"none": None, "physics": VARIANTS["physics"]},
        "seeds": [0],
        "pairs": [],
    }
    configuration["model"]["patch_size"] = 4
    configuration["training"] |= {"steps": 2, "validations": 1}
    found = compare(write(tmp_path / "c.yaml", configuration), out=tmp_path / "out")
    floors = json.loads((tmp_path / "out" / "data.json").read_text())["floors"]
    for part in ("val", "test"):
        for name, key in (("floor, first wind", "initial_wind"), ("persistence", "persistence")):
            where = {"variant": name, "part": part, "metric": "rmse", "variable": "tracer", "stratum": "all"}
            assert _pick(found.results, **where).value.item() == pytest.approx(floors[part][key], rel=1e-5)
    assert "| floor, true wind |" in found.report
    assert "a simulated tracer over real terrain, region alps" in found.report
    assert {"windward", "lee", "neutral"} < set(found.results.stratum)
    assert compare(tmp_path / "c.yaml", out=tmp_path / "out").report == found.report
    shard = sorted((tmp_path / "out" / "data" / "train").glob("*.npz"))[0]
    simulated = shard.read_bytes()
    rewrite_keeping_times(shard)
    with pytest.raises(InputError, match=f"other data \\(train/{shard.name} has changed\\)"):
        compare(tmp_path / "c.yaml", out=tmp_path / "out")
    shard.write_bytes(simulated)
    configuration["data"]["tracer"]["speed_m_s"] = 8.0
    with pytest.raises(InputError, match="data.tracer.settings.speed_m_s 9.0, now 8.0"):
        compare(write(tmp_path / "c.yaml", configuration), out=tmp_path / "out")


def test_seeds_and_variants_are_added(done: Comparison, config: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.out.glob("runs/*/*/run.json")}
    more = compare(config, out=done.out, seeds=[3, 5], variants=["physics"])
    assert set(more.results.variant) == {"none", "physics", "persistence", "climatology"}
    assert set(more.results.seed.dropna()) == {3, 5}
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    same = compare(config, out=done.out)
    pd.testing.assert_frame_equal(same.results, done.results)
    pd.testing.assert_frame_equal(same.differences, done.differences)


def _start(config: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "climax_elevation", "compare", str(config), "--out", str(out)]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # tests that a shell runs in the background ignore Ctrl-C, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for(condition: Any, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_folders_and_files_of_killed_runs_are_removed(tmp_path: Path) -> None:
    """One that is killed while it saves its samples leaves a file beside its folder."""
    kept = tmp_path / "physics" / "seed3"
    left = [kept.with_name(f".seed4.1{PARTIAL}"), kept.with_name(f"..seed3.1{PARTIAL}-samples.npz{PARTIAL}")]
    for folder in (kept, left[0]):
        folder.mkdir(parents=True)
        (folder / "log.txt").touch()
    left[1].touch()
    remove_partial(tmp_path)
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_comparison_goes_on(config: Path, done: Comparison, tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "out"
    process = _start(config, out)
    _wait_for(lambda: len(list(out.glob("runs/*/seed*/run.json"))) >= 2)
    os.killpg(process.pid, signal.SIGSTOP)  # lest it be done before it is stopped
    with pytest.raises(InputError, match="another comparison is running"):
        compare(config, out=out)
    os.killpg(process.pid, signal.SIGCONT)
    time.sleep(0.5)  # all of its processes are at work again
    if how is signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does, to all of its processes
    else:
        process.kill()
    _, said = process.communicate(timeout=30)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/seed*/run.json")}
    assert len(finished) < 6
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert f"{len(finished)} of 6 runs are finished and kept" in said
        assert "Traceback" not in said
    went_on = compare(config, out=out)
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert not list(out.glob("runs/*/.*"))
    timeless = ~went_on.results.metric.isin(["seconds", "seconds_a_step", "peak_memory_mib"])
    pd.testing.assert_frame_equal(went_on.results[timeless], done.results[timeless])


def _nested(configuration: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    *groups, last = place.split(".")
    inner = configuration
    for name in groups:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return configuration


MISTAKES = [
    ("seeds", [], "seeds is a list of at least one"),
    ("seeds", [1, 1], "names a seed twice"),
    ("seeds", [-1], "a seed is a whole number from 0"),
    ("metric", "mae", "unknown metric 'mae'; choose one of 'rmse_standardised'"),
    ("choose_on", "test", "would spoil its scores"),
    ("baseline", "nothing", "baseline 'nothing' is not among the variants, which are none, physics, sum"),
    ("sedes", [1], "unknown key 'sedes' in the configuration; valid: "),
    ("training.stpes", 1, "unknown key 'stpes' in training; valid: batch_size, "),
    ("training.steps", "many", "training.steps is a whole number, not 'many'"),
    ("training.steps", 1, "training.steps is at least training.validations"),
    ("training.lr_factor", 0, "training.lr_factor is a"),
    ("model.embed_dim", 15, "embed_dim is a multiple of 4"),
    ("model.patch_size", 3, "patches of 3 pixels do not tile fields of 8 x 16"),
    ("model.drop_rate", 1.0, "model.drop_rate is a share"),
    ("strata.elevation_m", [3, 2], "ascending metres"),
    ("statistics.confidence", 95, "confidence is a share"),
    ("pairs", [["sum", "ridge"]], "names 'ridge', and the variants are none, physics, sum"),
    ("pairs", [["sum"]], "a pair is \\[variant, counterpart\\]"),
    ("variants", {}, "a comparison needs data and variants"),
    ("variants.a/b", None, "names a folder"),
    ("variants.wrong", {"bias_args": {}}, "variant 'wrong' has a bias_type"),
    ("variants.wrong", {"bias_type": "phisics"}, "variant 'wrong': unknown bias 'phisics'; available: "),
    (
        "variants.wrong",
        {"bias_type": "physics", "bias_args": {"alpha": 1}},
        "variant 'wrong': unknown argument 'alpha' for bias 'physics'",
    ),
    ("data.variables", ["orography"], "out_variables names 2m_temperature, and data.variables, .* are orography"),
    (
        "data.variables",
        tiny_data.VARIABLES[1:],
        "variant 'physics': the model's default_vars .* lack 'orography'",
    ),
    ("data.root_dir", "nowhere", "nowhere/normalize_mean.npz is missing"),
    ("data.out_variables", ["snow"], "out_variables names snow"),
    ("data.tracer", {}, "unknown key 'root_dir' in data, which has a tracer already"),
    ("data", {"tracer": {"region": "mars"}}, "unknown region 'mars'"),
    ("data", {"tracer": {"episodes": {"train": 3}}}, "a number of 1 or more for each of train, val, test"),
    ("data", {"tracer": {"spede": 3}}, "unknown key 'spede' in data.tracer"),
    ("host", "aurora", "unknown host 'aurora'"),
]


@pytest.mark.parametrize(("place", "value", "sentence"), MISTAKES)
def test_mistakes_are_told_before_any_training(
    root: Path, tmp_path: Path, place: str, value: Any, sentence: str
) -> None:
    path = write(tmp_path / "wrong.yaml", _nested(tiny(root) | {"variants": dict(VARIANTS)}, place, value))
    with pytest.raises(InputError, match=sentence):
        compare(path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_that_wants_wind_where_there_is_none(root: Path, tmp_path: Path) -> None:
    configuration = tiny(root)
    configuration["data"] |= {"variables": ["orography", "2m_temperature"], "out_variables": ["2m_temperature"]}
    with pytest.raises(InputError, match="variant 'physics': the bias needs wind, and the model's default_vars"):
        compare(write(tmp_path / "calm.yaml", configuration), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_configuration_is_refused(done: Comparison, root: Path, tmp_path: Path) -> None:
    for place, value, sentence in (
        ("training.steps", 7, "training.steps 6, now 7"),
        ("data.predict_range", 1, "data.predict_range 2, now 1"),
        ("variants.physics", {"bias_type": "physics"}, "variant.bias_args"),
        ("strata.relief", False, "strata.relief True, now False"),
    ):
        path = write(tmp_path / "other.yaml", _nested(tiny(root) | {"variants": dict(VARIANTS)}, place, value))
        with pytest.raises(InputError, match=f"was run with another configuration \\({sentence}"):
            compare(path, out=done.out)


def rewrite_keeping_times(path: Path) -> None:
    """Another number in place: name, size and time of modification stay."""
    before = path.stat()
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays[next(iter(arrays))].flat[-1] += 1
    with open(path, "r+b") as file:
        np.savez(file, **arrays)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def with_files(root: Path, folder: Path) -> dict[str, Any]:
    """A comparison one variant of which has its terrain from files of its own."""
    own = folder / "own"
    shutil.copytree(root, own, ignore=shutil.ignore_patterns("train", "val", "test"))
    np.savez(folder / "heights.npz", orography=tiny_data.fields(0, 1)["orography"][0, 0])
    of_files = {"elevation_file": str(folder / "heights.npz"), "stats_dir": str(own)}
    configuration = tiny(root)
    configuration["variants"] = {"none": None, "physics": {"bias_type": "physics", "bias_args": of_files}}
    return configuration | {"seeds": [3], "pairs": []}


def test_a_folder_of_other_data_is_refused_and_the_file_named(root: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(root, data)
    path = write(tmp_path / "c.yaml", with_files(data, tmp_path))
    done = compare(path, out=out)
    assert compare(path, out=out).report == done.report
    for changed, named in (
        (data / "train" / "1.npz", "train/1.npz"),
        (data / "test" / "climatology.npz", "test/climatology.npz"),
        (data / "normalize_std.npz", "normalize_std.npz"),
        (tmp_path / "heights.npz", str(tmp_path / "heights.npz")),
        (tmp_path / "own" / "normalize_mean.npz", str(tmp_path / "own" / "normalize_mean.npz")),
    ):
        original = changed.read_bytes()
        rewrite_keeping_times(changed)
        with pytest.raises(
            InputError, match=rf"was run with other data \({re.escape(named)} has changed\): give another"
        ):
            compare(path, out=out)
        changed.write_bytes(original)  # at another time, which tells nothing
        assert compare(path, out=out).report == done.report
    shutil.move(data / "val" / "4.npz", tmp_path)
    np.save(data / "lat.npy", tiny_data.LAT + 1)
    with pytest.raises(InputError, match=r"other data \(lat.npy has changed, and 1 more\)"):
        compare(path, out=out)
    np.save(data / "lat.npy", tiny_data.LAT)
    with pytest.raises(InputError, match=r"other data \(val/4.npz is gone\)"):
        compare(path, out=out)
    (out / "files.json").unlink()  # which file it was is not known any more, but that there was one
    with pytest.raises(InputError, match=r"another configuration \(data.fingerprint \w+, now \w+\)"):
        compare(path, out=out)


def test_data_that_change_while_they_are_trained_on(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(root, data)
    configuration = tiny(data) | {"variants": {"none": None}, "seeds": [3], "pairs": []}
    path = write(tmp_path / "c.yaml", configuration)
    run_missing = comparison.run_missing

    def meanwhile(*arguments: Any) -> None:
        run_missing(*arguments)
        rewrite_keeping_times(data / "train" / "0.npz")

    monkeypatch.setattr(comparison, "run_missing", meanwhile)
    with pytest.raises(
        InputError, match=r"train/0.npz has changed while runs were trained on it: remove them \(.*seed3\)"
    ):
        compare(path, out=out)
    assert not (out / "report.md").exists()
    with pytest.raises(InputError, match=r"other data \(train/0.npz has changed\)"):
        compare(path, out=out)


def test_the_command_line_ends_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("seeds: [1\n")
    assert main(["compare", str(tmp_path / "bad.yaml")]) == 2
    assert "cannot be read as YAML" in capsys.readouterr().err


def test_a_mistake_that_shows_while_training_ends_it(config: Path, tmp_path: Path) -> None:
    """Damage that no check sees: a run says so, and finished runs stay."""
    configuration = yaml.safe_load(config.read_text())
    root = tiny_data.write(tmp_path / "shards", train=(60,))
    shard = root / "train" / "0.npz"
    configuration["data"]["root_dir"] = str(root)
    data = bytearray(shard.read_bytes())
    data[20000] ^= 255  # far from what is read of a shard at first, its headers
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"variant 'none', seed 3: .*0.npz is damaged"):
        compare(write(tmp_path / "c.yaml", configuration), out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("runs/*/*"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configurations_are_right(path: Path) -> None:
    read = read_configuration(path)
    assert len(read.seeds) == 5
    assert {variant.bias_type for variant in read.variants} >= {None, "physics", "relative_3d", "ridge", "topoflow"}
    size = (8 * read.model.patch_size, 8 * read.model.patch_size)
    variables = read.data.settings_in(Path(), 1).variables if path.stem == "tracer" else read.data.variables  # type: ignore[union-attr]
    for variant in read.variants:
        given = {"bias_type": variant.bias_type, "bias_args": variant.bias_args}
        build_network(read.model, variables, size, seed=0, **given)
