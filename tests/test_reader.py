"""The plugin's reader under ClimaX's own scripts: every pair once an epoch, in equally many batches."""

import json
from collections import Counter
from pathlib import Path

import pytest
import tiny_data
import torch
from test_launch import ON, check_run, forecasting, launched

from climax_elevation import InputError
from climax_elevation.train import train

SEEN = "--trainer.callbacks+=seen.Seen"
TRAIN, VAL, TEST = (
    {*range(7), *range(9, 10), *range(12, 16)},
    {*range(18, 21), *range(23, 25)},
    {*range(27, 30), 32, 33},
)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Two steps ahead 7, 1 and 4 pairs to train, 3 and 2 to validate, 3 and 2 to test."""
    return tiny_data.write(tmp_path_factory.mktemp("uneven"), train=(9, 3, 6), val=(5, 4), test=(5, 4))


def regional(arguments):
    return [a.replace("climax.arch.Cl", "climax.regional_forecast.arch.RegionalCl") for a in arguments]


def check_seen(out, processes, epochs):
    """Each part's pairs, by all processes together, once an epoch; and equally many batches each."""
    read = [json.loads((out / f"seen-{rank}.json").read_text()) for rank in range(processes)]
    assert len({tuple((part, epoch) for part, epoch, _ in batches) for batches in read}) == 1
    found = {}
    for part, epoch, steps in (batch for batches in read for batch in batches):
        found.setdefault((part, epoch), Counter()).update(steps)
    expected = {("train", e): TRAIN for e in range(epochs)} | {("val", e): VAL for e in range(epochs)}
    assert {key: dict(steps) for key, steps in found.items()} == {
        key: dict.fromkeys(steps, 1) for key, steps in (expected | {("test", epochs): TEST}).items()
    }


@pytest.mark.parametrize(("module", "workers"), [("global_forecast", 0), ("regional_forecast", 2)])
def test_one_process(climax, uneven, tmp_path, module, workers):
    pytest.importorskip("torchvision")
    given = [*forecasting(uneven, tmp_path, epochs=2), ON, SEEN, f"--data.num_workers={workers}"]
    given = [*regional(given), "--data.region=Global"] if module == "regional_forecast" else given
    train(module, climax, given, reader="plugin")
    check_run(tmp_path)
    check_seen(tmp_path, 1, 2)


@pytest.mark.slow
def test_two_processes(climax, uneven, tmp_path):
    """Which ClimaX's own reader refuses, of which one process would wait for the other."""
    pytest.importorskip("torchvision")
    parallel = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    given = [*forecasting(uneven, tmp_path, epochs=2), ON, SEEN, *parallel, "--data.num_workers=1"]
    message = "train: .* one process 1 batches of an epoch, and another up to 4.*: read with --reader plugin, or cut"
    with pytest.raises(InputError, match=message):
        train("global_forecast", climax, given)
    options = ["--climax", str(climax), "--reader", "plugin"]
    own = str(Path(__file__).parent)
    done = launched("regional_forecast", *options, "--", *regional(given), "--data.region=Global", PYTHONPATH=own)
    assert done.returncode == 0, done.stderr
    assert "train: 12 samples in 3 shards, 6 a process, 3 batches\n" in done.stderr
    check_run(tmp_path)
    check_seen(tmp_path, 2, 2)


def test_a_region_and_its_name(climax, uneven, tmp_path):
    pytest.importorskip("torchvision")
    given = [*regional(forecasting(uneven, tmp_path)), "--data.region=Atlantis"]
    with pytest.raises(InputError, match=r"unknown data.region 'Atlantis'; available: NorthAmerica, .*Global"):
        train("regional_forecast", climax, given, reader="plugin")


@pytest.mark.parametrize("module", ["pretrain", "climate_projection"])
def test_what_is_read_otherwise_is_refused(climax, module):
    with pytest.raises(InputError, match=f"{module} reads other data than the plugin's reader, .*: leave it out"):
        train(module, climax, [], reader="plugin")


def test_an_unknown_reader(no_climax):
    with pytest.raises(InputError, match="unknown reader 'fast'; available: climax, plugin"):
        train("global_forecast", None, [], reader="fast")


def test_a_run_goes_on_within_an_epoch(climax, uneven, tmp_path):
    """Six batches an epoch, stopped after the eighth; without dropout, whose random numbers are no reader's."""
    pytest.importorskip("torchvision")
    drop = ["--model.net.init_args.drop_rate=0.0", "--model.net.init_args.drop_path=0.0"]
    kept = ["--trainer.callbacks+=pytorch_lightning.callbacks.ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
    kept += ["--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.filename=at-{step}"]

    def run(out, *more):
        train("global_forecast", climax, [*forecasting(uneven, out, epochs=3), *drop, *kept, *more], reader="plugin")
        return torch.load(next(out.rglob("last.ckpt")), weights_only=True)

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", f"--ckpt_path={next((tmp_path / 'whole').rglob('at-step=8.ckpt'))}")
    assert resumed["global_step"] == whole["global_step"] == 18
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)
