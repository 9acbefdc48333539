"""The command line, as a user's shell sees it."""

import os
import re
import subprocess
import sys

import pytest
import tiny_data

from climax_elevation.cli import main

pytestmark = pytest.mark.usefixtures("no_climax")


def run(*arguments, cwd=None, **environment):
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "climax_elevation", *map(str, arguments)],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", ["demo", "train", "patch", "prepare", "compare", "plot", "doctor"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: climax-elevation {command}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("prepare", "none.nc", "out"), "none.nc"),
        (("prepare", "none.nc", "out", "--units", "orography"), "NAME=UNIT"),
        (("patch", "apply", "nowhere"), "nowhere does not exist"),
        (("train", "global_forecast", "--climax", "nowhere", "--", "--config", "x.yaml"), "nowhere does not exist"),
        (("doctor", "--", "--x"), "only train takes arguments after '--'"),
        (("train", "everything"), "invalid choice: 'everything'"),
    ],
)
def test_mistakes_end_as_a_sentence(tmp_path, arguments, sentence):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_name_in_bias_args_ends_a_run_with_the_valid_ones(tmp_path):
    root = tiny_data.write(tmp_path / "data")
    done = run(*training(root, "--model.net.init_args.bias_args={alpha: 1}"), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "unknown argument 'alpha' for bias 'physics'; valid: blocks, " in done.stderr
    assert "Traceback" not in done.stderr


def training(root, *overrides):
    """Arguments that train the smallest model for an epoch."""
    names = "[" + ", ".join(tiny_data.VARIABLES) + "]"
    return (
        "train",
        "global_forecast",
        "--",
        "--model.net=climax.arch.ClimaX",
        f"--model.net.init_args.default_vars={names}",
        "--model.net.init_args.img_size=[8, 16]",
        "--model.net.init_args.embed_dim=16",
        "--model.net.init_args.depth=1",
        "--model.net.init_args.num_heads=2",
        "--model.net.init_args.use_physics_mask=true",
        "--model.lr=1e-2",
        "--model.warmup_epochs=1",
        "--model.max_epochs=9",
        f"--data.root_dir={root}",
        f"--data.variables={names}",
        f"--data.out_variables=[{tiny_data.TARGETS[0]}]",
        "--data.buffer_size=5",
        "--data.predict_range=1",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.max_epochs=1",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        *overrides,
    )


@pytest.mark.parametrize("host", ["stand-in", "ClimaX"])
def test_the_flag_alone_trains_terrain_aware_attention(tmp_path, request, host):
    """No callback is named: the command adds it, and alpha, which nothing decays, moves by its gradient alone."""
    source = {"CLIMAX_SRC": str(request.getfixturevalue("climax"))} if host == "ClimaX" else {}
    done = run(*training(tiny_data.write(tmp_path / "data")), cwd=tmp_path, **source)
    assert done.returncode == 0, done.stderr
    assert f"host: {host}" in done.stderr
    assert "bias physics in blocks 0 of 1, elevation from channel 'orography'" in done.stderr
    assert re.search(r"elevation \d+ to \d+ m \(patch means.*engine sdpa \(32 tokens, float32 on cpu\)", done.stderr)
    moved = next(line for line in done.stderr.splitlines() if "elevation_alpha moved from 1 to" in line)
    assert float(moved.rpartition(" ")[2]) != 1.0


def test_doctor_without_climax_finds_nothing_wrong():
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    assert "engine sdpa" in done.stdout
    assert done.stdout.strip().endswith("nothing wrong")
