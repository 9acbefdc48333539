"""From reanalysis to terrain-aware training, as README has it, cut short: the Andes, bias off and on, either host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[1] / "configs" / "andes.yaml"
SHORT = ["max_epochs=1", "limit_train_batches=3", "limit_val_batches=1", "limit_test_batches=1"]


def run(*arguments, cwd, **environment):
    own = os.environ | {"OUTPUT_DIR": str(cwd / "run")} | environment
    command = [sys.executable, "-m", "climax_elevation", *map(str, arguments)]
    return subprocess.run(command, env=own, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def andes(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("andes")
    split = ("--val-from", "2000", "--test-from", "2010", "--patch-size", "4")
    done = run("prepare", data / "andes_era5_monthly.nc", folder / "shards", *split, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "cropped from 89 x 81 to 88 x 80" in done.stderr
    return folder / "shards"


def train(module, shards, tmp_path, *settings, config=CONFIG, **environment):
    """Train for a few steps, to the end of the script; the lines it wrote, and alpha's moves."""
    given = ["--config", config, f"--data.root_dir={shards}", "--data.batch_size=4", "--model.warmup_epochs=1"]
    given += [f"--trainer.{setting}" for setting in SHORT]
    done = run("train", module, "--", *given, *settings, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "test/w_rmse_2m_temperature" in done.stdout
    moves = [line for line in done.stderr.splitlines() if "elevation_alpha moved from 1 to" in line]
    # nothing decays alpha, so it is its gradient that moved it
    assert all(float(line.rpartition(" ")[2]) != 1.0 for line in moves)
    return done.stderr, moves


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("host", ["stand-in", "ClimaX"])
def test_the_andes_train_to_the_end(andes, no_climax, tmp_path, request, host, on):
    source = {"CLIMAX_SRC": str(request.getfixturevalue("climax"))} if host == "ClimaX" else {}
    flag = f"--model.net.init_args.use_physics_mask={str(on).lower()}"
    said, moves = train("global_forecast", andes, tmp_path, flag, **source)
    assert f"host: {host}" in said
    assert len(moves) == on
    assert ("elevation -2 to 4499 m" in said) == on


def test_a_region_of_it_trains_too(andes, climax, tmp_path):
    config = tmp_path / "regional.yaml"
    config.write_text(CONFIG.read_text().replace("climax.arch.ClimaX", "climax.regional_forecast.arch.RegionalClimaX"))
    region = "--data.region=SouthAmerica"
    said, moves = train("regional_forecast", andes, tmp_path, region, config=config, CLIMAX_SRC=str(climax))
    assert len(moves) == 1
    assert "host: ClimaX" in said


def test_a_projected_grid_trains_too(data, no_climax, climax, tmp_path):
    """HRRR: 78 x 41 pixels of 3 km, with latitude in two dimensions."""
    done = run("prepare", data / "hrrr_idaho_hourly.nc", tmp_path / "shards", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sizes = ["--model.net.init_args.img_size=[78, 40]", "--model.net.init_args.patch_size=2", "--data.hrs_each_step=1"]
    said, moves = train("global_forecast", tmp_path / "shards", tmp_path, *sizes, CLIMAX_SRC=str(climax))
    assert len(moves) == 1
    assert "host: ClimaX" in said
