"""A run that was killed in the middle of an epoch goes on as if it had not been: the same batches, the same weights."""

import pytest
import tiny_data
import torch
from test_launch import ON, forecasting, logged

from climax_elevation.train import train

EPOCHS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_data.write(tmp_path_factory.mktemp("shards"), train=(7, 5, 6, 4), val=(5, 5), test=(5, 5))


def kept(every, **more):
    """A checkpoint every so many steps, beside the one of the best validation."""
    options = {"every_n_train_steps": every, "save_top_k": -1, "filename": "at-{step}", **more}
    callback = "pytorch_lightning.callbacks.ModelCheckpoint"
    return [f"--trainer.callbacks+={callback}", *(f"--trainer.callbacks.{k}={v}" for k, v in options.items())]


def run(shards, out, *more, epochs=EPOCHS):
    train("global_forecast", None, [*forecasting(shards, out, epochs=epochs), ON, *more])
    return state_of(out)


def state_of(out):
    return torch.load(next(out.rglob("last.ckpt")), weights_only=True)


def assert_same(resumed, whole):
    """Weights, optimiser, schedule and counters, bit for bit."""
    assert resumed["global_step"] == whole["global_step"]
    assert resumed["epoch"] == whole["epoch"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0, equal_nan=True)  # terrain.* not set


@pytest.mark.parametrize("workers", [0, 2])
def test_from_any_step_of_an_epoch(no_climax, shards, tmp_path, workers):
    """14 pairs in batches of 2, 7 steps an epoch: early, with its last batch, and in a later one."""
    options = [f"--data.num_workers={workers}", *kept(1)]
    whole = run(shards, tmp_path / "whole", *options)
    assert whole["global_step"] == 7 * EPOCHS + (EPOCHS if workers else 0)  # two workers have 7 pairs each
    for step in (3, whole["global_step"] // EPOCHS, 10):
        checkpoint = next((tmp_path / "whole").rglob(f"at-step={step}.ckpt"))
        out = tmp_path / f"from-{step}"
        assert_same(run(shards, out, *options, f"--ckpt_path={checkpoint}"), whole)
        assert logged(out, "val/w_rmse") == logged(tmp_path / "whole", "val/w_rmse")[-len(logged(out, "val/w_rmse")) :]
        assert logged(out, "test/w_rmse") == logged(tmp_path / "whole", "test/w_rmse")
