"""Upstream's own training scripts, and the stand-in host's, run to their end on what is installed."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_data
import torch

from climax_elevation.errors import InputError
from climax_elevation.train import train

NAMES = "[" + ", ".join(tiny_data.VARIABLES) + "]"
TARGETS = "[" + ", ".join(tiny_data.TARGETS) + "]"
ON = "--model.net.init_args.use_physics_mask=true"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_data.write(tmp_path_factory.mktemp("shards"))


def forecasting(root, out, *, epochs=1):
    """Arguments that train the smallest forecasting model on tiny_data."""
    return [
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        f"--trainer.max_epochs={epochs}",
        f"--trainer.default_root_dir={out}",
        "--trainer.logger=pytorch_lightning.loggers.CSVLogger",
        f"--trainer.logger.save_dir={out}",
        "--trainer.logger.name=log",
        "--trainer.logger.version=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=1",
        "--trainer.callbacks+=pytorch_lightning.callbacks.ModelCheckpoint",
        "--trainer.callbacks.monitor=val/w_rmse",
        "--trainer.callbacks.save_last=true",
        "--model.net=climax.arch.ClimaX",
        f"--model.net.init_args.default_vars={NAMES}",
        "--model.net.init_args.img_size=[8, 16]",
        "--model.net.init_args.embed_dim=16",
        "--model.net.init_args.depth=2",
        "--model.net.init_args.num_heads=2",
        "--model.lr=1e-2",
        "--model.warmup_epochs=1",
        "--model.max_epochs=100",
        f"--data.root_dir={root}",
        f"--data.variables={NAMES}",
        f"--data.out_variables={TARGETS}",
        "--data.predict_range=2",
        "--data.buffer_size=5",
        "--data.batch_size=2",
        "--data.num_workers=0",
    ]


def logged(out, name):
    """The values of one logged name, in order."""
    with open(out / "log" / "version_0" / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def alpha(out):
    """The learned scalar, from the last checkpoint."""
    state = torch.load(next(out.rglob("last.ckpt")), weights_only=True)["state_dict"]
    return state["net.blocks.0.attn.bias.elevation_alpha"].item()


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.py")}


def launched(*arguments, **environment):
    """The command line, in a process of its own."""
    own = {name: value for name, value in os.environ.items() if name not in ("CLIMAX_SRC", "NODES")}
    return subprocess.run(
        [sys.executable, "-m", "climax_elevation", "train", *arguments],
        env=own | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def check_run(out, predicted="2m_temperature"):
    assert len(logged(out, "test/w_rmse")) == 1
    assert 0 < logged(out, "test/w_rmse")[0] < 100  # kelvins and m/s of tiny_data
    assert all(np.isfinite(logged(out, "train/loss")))


@pytest.mark.parametrize("on", [False, True])
def test_stand_in_trains_and_tests(no_climax, shards, tmp_path, caplog, on):
    with caplog.at_level("INFO", "climax_elevation"):
        train("global_forecast", None, [*forecasting(shards, tmp_path), *([ON] if on else [])])
    check_run(tmp_path)
    assert "host: stand-in, which is not ClimaX" in caplog.text
    if on:
        assert abs(alpha(tmp_path) - 1) > 1e-4


@pytest.mark.parametrize("module", ["global_forecast", "regional_forecast"])
@pytest.mark.parametrize("on", [False, True])
def test_upstreams_forecasting_scripts_train_and_test(climax, shards, tmp_path, caplog, module, on):
    pytest.importorskip("torchvision")
    before, path, argv = tree(climax), list(sys.path), list(sys.argv)
    arguments = forecasting(shards, tmp_path)
    if module == "regional_forecast":
        net = "--model.net=climax.regional_forecast.arch.RegionalClimaX"
        arguments = [net if a.startswith("--model.net=") else a for a in arguments] + ["--data.region=Global"]
    with caplog.at_level("INFO", "climax_elevation"):
        train(module, climax, [*arguments, *([ON] if on else [])])
    check_run(tmp_path)
    assert "host: ClimaX" in caplog.text
    assert "climax_elevation.training.TerrainCallback" in next(tmp_path.rglob("config.yaml")).read_text()
    if on:
        assert abs(alpha(tmp_path) - 1) > 1e-4
    # nothing of the run is left in this process or in the user's copy
    assert tree(climax) == before
    assert (sys.path, sys.argv) == (path, argv)
    assert not [name for name in sys.modules if name.split(".")[0] == "climax"]


def test_flag_off_trains_as_unmodified_climax_does(climax, shards, tmp_path):
    """Upstream's script from an unpatched overlay, without any of our arguments, against `train`."""
    pytest.importorskip("torchvision")
    script = (
        "import sys; from pathlib import Path\n"
        "from climax_elevation.upstream import find_climax, overlay\n"
        "from climax_elevation.upstream.overlay import importable\n"
        f"with overlay(find_climax(Path({str(climax)!r})), patched=False) as folder, importable(folder):\n"
        "    from climax.global_forecast.train import main; main()\n"
    )
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    own = os.environ | {"OMP_NUM_THREADS": "1"}  # as `launched` has it: sums depend on the number of threads
    subprocess.run(
        [sys.executable, "-c", script, *forecasting(shards, plain)], check=True, capture_output=True, env=own
    )
    done = launched("global_forecast", "--climax", str(climax), "--", *forecasting(shards, ours))
    assert done.returncode == 0, done.stderr
    states = [torch.load(next(out.rglob("last.ckpt")), weights_only=True)["state_dict"] for out in (plain, ours)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert logged(plain, "test/w_rmse") == logged(ours, "test/w_rmse")


@pytest.mark.parametrize("host", ["stand-in", "ClimaX"])
def test_two_processes(request, tmp_path, host):
    environment = {}
    if host == "ClimaX":
        pytest.importorskip("torchvision")
        environment["CLIMAX_SRC"] = str(request.getfixturevalue("climax"))
    else:
        request.getfixturevalue("no_climax")
    # upstream's reader gives whole shards to each process, and none to one for which there is none
    shards = tiny_data.write(tmp_path / "shards", train=(6, 6, 6), val=(5, 5), test=(5, 5))
    parallel = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.num_workers=1"]
    done = launched("global_forecast", "--", *forecasting(shards, tmp_path / "out"), *parallel, ON, **environment)
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert done.stderr.count("host: ") == 1
    check_run(tmp_path / "out")
    assert abs(alpha(tmp_path / "out") - 1) > 1e-4


@pytest.mark.parametrize("key", ["ckpt_path", "trainer.resume_from_checkpoint"])
def test_a_run_goes_on_from_a_checkpoint(no_climax, shards, tmp_path, key):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train("global_forecast", None, [*forecasting(shards, whole, epochs=2), ON])
    train("global_forecast", None, [*forecasting(shards, halves, epochs=1), ON])
    last = next(halves.rglob("last.ckpt")).relative_to(halves)
    # the interpolation is of this run's configuration, not of the file's
    resume = f"--{key}=${{trainer.default_root_dir}}/{last}"
    train("global_forecast", None, [*forecasting(shards, halves, epochs=2), ON, resume])
    assert alpha(halves) == alpha(whole)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--model.foo=1"], "--model.foo"),
        (["--trainer.max_epochs=many"], "max_epochs"),
        (["--trainer.gpus=1"], "trainer.devices: 1"),
        (["--config=absent.yaml"], "absent.yaml does not exist"),
        (["--data.root_dir=/absent"], "/absent"),
        (["--trainer.accelerator=tpu"], "torch_xla"),
        (["--trainer.resume_from_checkpoint=/absent.ckpt"], "/absent.ckpt does not exist"),
        (["--ckpt_path=/absent.ckpt"], "ckpt_path /absent.ckpt does not exist"),
        (["--trainer.callbacks+=absent.Callback"], "absent.Callback"),
        ([ON, "--model.net.init_args.bias_type=phisics"], "unknown bias 'phisics'"),
        ([ON, "--model.net.init_args.bias_args={elevation_variable: height}"], "lack 'height'"),
    ],
)
@pytest.mark.parametrize("host", ["stand-in", "ClimaX"])
def test_a_wrong_configuration_is_a_sentence(request, shards, tmp_path, host, extra, sentence):
    climax = None
    if host == "ClimaX":
        pytest.importorskip("torchvision")
        climax = request.getfixturevalue("climax")
    else:
        request.getfixturevalue("no_climax")
    with pytest.raises(InputError) as error:
        train("global_forecast", climax, [*forecasting(shards, tmp_path), *extra])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", ["regional_forecast", "climate_projection", "pretrain"])
def test_without_climax_the_other_modules_say_so(no_climax, module):
    with pytest.raises(InputError, match=f"{module} needs ClimaX.*CLIMAX_SRC"):
        train(module, None, [])


def test_unknown_module():
    with pytest.raises(InputError, match="unknown module 'everything'; available: global_forecast"):
        train("everything", None, [])


def test_pretraining_says_that_it_is_distributed(climax, shards, tmp_path):
    pytest.importorskip("torchvision")
    given = [a for a in forecasting(shards, tmp_path) if not a.startswith("--data") and "_epochs" not in a]
    sources = {"root_dirs": shards, "in_variables": NAMES, "max_predict_ranges": 3, "buffer_sizes": 5}
    sources |= {"start_idx": 0, "end_idx": 1, "out_variables": "null", "random_lead_time": "true", "hrs_each_step": 6}
    given += [f"--data.dict_{key}={{mpi-esm: {value}}}" for key, value in sources.items()]
    with pytest.raises(InputError, match=r"trainer\.strategy: ddp"):
        train("pretrain", climax, given)


def test_a_copy_whose_script_is_no_script(climax, tmp_path):
    import shutil

    shutil.copytree(climax / "src" if (climax / "src").is_dir() else climax, tmp_path / "src", dirs_exist_ok=True)
    Path(tmp_path / "src" / "climax" / "pretrain" / "train.py").write_text("import absent_library\n")
    with pytest.raises(InputError, match="cannot be imported: No module named 'absent_library'"):
        train("pretrain", tmp_path, [])
