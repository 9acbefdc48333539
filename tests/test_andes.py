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


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("host", ["stand-in", "ClimaX"])
def test_the_andes_train_to_the_end(andes, no_climax, tmp_path, request, host, on):
    source = {"CLIMAX_SRC": str(request.getfixturevalue("climax"))} if host == "ClimaX" else {}
    settings = ["--config", CONFIG, f"--data.root_dir={andes}", "--data.batch_size=4"]
    settings += [f"--trainer.{setting}" for setting in SHORT]
    settings += [f"--model.net.init_args.use_physics_mask={str(on).lower()}", "--model.warmup_epochs=1"]
    done = run("train", "global_forecast", "--", *settings, cwd=tmp_path, **source)
    assert done.returncode == 0, done.stderr
    assert f"host: {host}" in done.stderr
    assert "test/w_rmse_2m_temperature" in done.stdout
    moved = [line for line in done.stderr.splitlines() if "elevation_alpha moved from 1 to" in line]
    assert len(moved) == on
    # nothing decays alpha, so it is its gradient that moved it
    assert all(float(line.rpartition(" ")[2]) != 1.0 for line in moved)
    assert ("elevation -2 to 4499 m" in done.stderr) == on
