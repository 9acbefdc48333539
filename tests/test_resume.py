"""A run that was killed in the middle of an epoch goes on as if it had not been: the same batches, the same weights."""

import resource

import pytest
import tiny_data
import torch
from test_launch import ON, forecasting, launched, logged

from climax_elevation import InputError
from climax_elevation.checkpoints import read_checkpoint
from climax_elevation.errors import SickRun
from climax_elevation.host import shards as host_shards
from climax_elevation.host.loading import after
from climax_elevation.host.shards import GlobalForecastDataModule
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
def test_from_any_step_of_an_epoch(no_climax, shards, tmp_path, caplog, workers):
    """14 pairs in batches of 2, 7 steps an epoch: early, with its last batch, and in a later one."""
    options = [f"--data.num_workers={workers}", *kept(1)]
    whole = run(shards, tmp_path / "whole", *options)
    assert whole["global_step"] == 7 * EPOCHS  # workers share whole batches, and make none smaller
    for step in (3, whole["global_step"] // EPOCHS, 10):
        checkpoint = next((tmp_path / "whole").rglob(f"at-step={step}.ckpt"))
        out = tmp_path / f"from-{step}"
        assert_same(run(shards, out, *options, f"--ckpt_path={checkpoint}"), whole)
        assert logged(out, "val/w_rmse") == logged(tmp_path / "whole", "val/w_rmse")[-len(logged(out, "val/w_rmse")) :]
        assert logged(out, "test/w_rmse") == logged(tmp_path / "whole", "test/w_rmse")
    assert "keeps no place" not in caplog.text


def test_from_an_epochs_end_where_steps_are_counted(no_climax, shards, tmp_path):
    """With max_steps Lightning takes every checkpoint for one of the middle of an epoch."""
    options = ["--trainer.max_steps=18", "--trainer.callbacks.save_on_train_epoch_end=true", *kept(1)]
    at_end = []
    run(shards, tmp_path / "whole", *options)
    checkpoint = next((tmp_path / "whole").rglob("epoch=*-step=14.ckpt"))
    run(shards, tmp_path / "resumed", *options, f"--ckpt_path={checkpoint}")
    for out in ("whole", "resumed"):
        at_end.append(read_checkpoint(next((tmp_path / out).rglob("at-step=18.ckpt"))))
    assert_same(at_end[1], at_end[0])
    counted = [saved["loops"]["fit_loop"]["epoch_progress"] for saved in at_end]
    assert counted[1] == counted[0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_in_two_processes(no_climax, shards, tmp_path, workers):
    """7 pairs a process, 4 steps an epoch: from its middle and from its last step."""
    parallel = ["--trainer.strategy=ddp", "--trainer.devices=2", f"--data.num_workers={workers}", *kept(1)]

    def of_two(name, *more):
        arguments = forecasting(shards, tmp_path / name, epochs=2)
        done = launched("global_forecast", "--", *arguments, ON, *parallel, *more)
        assert done.returncode == 0, done.stderr
        return state_of(tmp_path / name)

    whole = of_two("whole")
    assert whole["global_step"] == 2 * 4
    for step in (3, 4):
        checkpoint = next((tmp_path / "whole").rglob(f"at-step={step}.ckpt"))
        assert_same(of_two(f"from-{step}", f"--ckpt_path={checkpoint}"), whole)


def test_a_run_that_ends_before_its_next_validation(host, shards, tmp_path, caplog):
    """There is no score yet when EarlyStopping asks for one at the end."""
    stop = ["--trainer.callbacks+=pytorch_lightning.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/w_rmse"]

    def fit(name, steps, *more):
        arguments = [*forecasting(shards, tmp_path / name, epochs=4), ON, *kept(1), *stop, *more]
        train("global_forecast", host, [*arguments, f"--trainer.max_steps={steps}"])
        last = max(int(path.stem.partition("=")[2]) for path in (tmp_path / name).rglob("at-*.ckpt"))
        return last, len(logged(tmp_path / name, "test/w_rmse"))

    assert fit("begun", 9) == (9, 1)
    begun = {step: next((tmp_path / "begun").rglob(f"at-step={step}.ckpt")) for step in (5, 8)}
    assert fit("on", 9, f"--ckpt_path={begun[8]}") == (9, 1)
    with caplog.at_level("INFO", "climax_elevation"):
        assert fit("in the first epoch", 8, f"--ckpt_path={begun[5]}") == (8, 1)
    # upstream's begins the epoch of 7 steps anew, and ends in it
    assert caplog.text.count("the weights of the end are tested") == (0 if host is None else 1)
    with pytest.raises(InputError, match="Early stopping conditioned on metric `val/w_rmsd`"):  # once it could be there
        fit("misnamed", 30, f"--ckpt_path={begun[8]}", "--trainer.callbacks.monitor=val/w_rmsd")


def ordered(root, workers, buffer_size=4, batch_size=2):
    module = GlobalForecastDataModule(
        str(root), tiny_data.VARIABLES, buffer_size, predict_range=2, batch_size=batch_size, num_workers=workers
    )
    return module.train_dataloader()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "batch_size"), [(0, 3), (2, 2), (3, 1)])
def test_every_place_of_an_epoch(shards, workers, batch_size):
    """Without a trainer a loader counts what it hands out."""
    loader = ordered(shards, workers, batch_size=batch_size)
    epochs = [[batch[0] for batch in loader] for _ in range(2)]
    places = range(len(epochs[0]) + 1)
    for passed in places if not workers else (0, 1, workers + 1, len(epochs[0]) - 1, len(epochs[0])):
        stopped, resumed = (ordered(shards, workers, batch_size=batch_size) for _ in range(2))
        batches = iter(stopped)
        for _ in range(passed):
            next(batches)
        resumed.load_state_dict(stopped.state_dict())
        for expected in (epochs[0][passed:], epochs[1]):
            found = [batch[0] for batch in resumed]
            assert len(found) == len(expected)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_workers_turns_by_hand():
    """Workers of 5, 2 and 3 samples in batches of 2 make 3, 1 and 2: a b c a c a."""
    turns = [after(batches, [5, 2, 3], 2) for batches in range(7)]
    assert [turn.passed for turn in turns] == [
        (0, 0, 0), (2, 0, 0), (2, 2, 0), (2, 2, 2), (4, 2, 2), (4, 2, 3), (5, 2, 3)
    ]  # fmt: skip
    assert turns[4].of_worker(0, 3) == (1, 2)  # the second has no more, and the third comes next
    assert turns[4].of_worker(1, 3) == (2, 2)


def test_another_number_of_readers_is_said(shards, caplog):
    stopped, other = ordered(shards, 0), ordered(shards, 0, batch_size=1)
    batches = iter(stopped)
    next(batches), next(batches)
    other.load_state_dict(stopped.state_dict())
    assert "batch_size 2, and now 1" in caplog.text
    assert len(list(other)) == 14 - 4


def test_what_was_passed_is_not_read_again(shards, monkeypatch):
    loader, resumed = ordered(shards, 0, buffer_size=1), ordered(shards, 0, buffer_size=1)
    steps = list(loader)
    resumed.load_state_dict(loader.state_dict() | {"batches": len(steps) - 1})
    opened = []
    load = host_shards.load_npz
    monkeypatch.setattr(host_shards, "load_npz", lambda path, *more: opened.append(path) or load(path, *more))
    (last,) = list(resumed)
    assert torch.equal(last[0], steps[-1][0])
    assert len(opened) == 1 < len(resumed.dataset.shards)


def test_upstreams_reader_says_once_that_it_cannot(climax, shards, tmp_path, caplog):
    pytest.importorskip("torchvision")
    arguments = [*forecasting(shards, tmp_path / "whole"), *kept(4)]
    train("global_forecast", climax, arguments)
    checkpoint = next((tmp_path / "whole").rglob("at-step=4.ckpt"))
    caplog.clear()
    train("global_forecast", climax, [*forecasting(shards, tmp_path / "on"), f"--ckpt_path={checkpoint}"])
    assert caplog.text.count("keeps no place in checkpoints") == 1
    assert "its epoch 0 begins anew after 4 batches" in caplog.text


def test_words_for_checkpoints(no_climax, shards, tmp_path):
    """As Lightning has them: the last that ModelCheckpoint left in its folder, and the best that it knew of."""
    folder = ["--trainer.callbacks.dirpath", str(tmp_path / "kept")]
    whole = run(shards, tmp_path / "whole", epochs=2)
    halves = ["--trainer.callbacks.save_last=true", *folder]
    train("global_forecast", None, [*forecasting(shards, tmp_path / "a", epochs=1), ON, *halves])
    train("global_forecast", None, [*forecasting(shards, tmp_path / "a", epochs=2), ON, *halves, "--ckpt_path=last"])
    assert_same(read_checkpoint(tmp_path / "kept" / "last.ckpt"), whole)
    best = next(path for path in (tmp_path / "kept").glob("epoch=*.ckpt"))
    train("global_forecast", None, [*forecasting(shards, tmp_path / "b", epochs=3), ON, *halves, "--ckpt_path=best"])
    assert best.exists()
    with pytest.raises(InputError, match="ckpt_path best: there is no checkpoint in"):
        run(shards, tmp_path / "new", "--ckpt_path=best")


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(no_climax, shards, tmp_path):
    out, folder = tmp_path / "out", ["--trainer.callbacks.dirpath", str(tmp_path / "kept")]
    run_in = lambda *more, epochs: train(  # noqa: E731
        "global_forecast", None, [*forecasting(shards, out, epochs=epochs), ON, *folder, *more]
    )
    run_in(epochs=1)
    last = tmp_path / "kept" / "last.ckpt"
    before, names = last.read_bytes(), sorted((tmp_path / "kept").iterdir())
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, was[1]))
    try:
        with pytest.raises(SickRun, match=r"\.ckpt cannot be written \(File too large\).*nothing of it is left"):
            run_in("--ckpt_path=last", epochs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert last.read_bytes() == before
    assert sorted((tmp_path / "kept").iterdir()) == names
    run_in("--ckpt_path=last", epochs=2)
    assert read_checkpoint(last)["global_step"] == 14
