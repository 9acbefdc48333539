"""Before anything starts: who reads how much, whether validation comes, and what is refused."""

from itertools import permutations, product
from types import SimpleNamespace

import pytest
import tiny_data
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from test_launch import ON, forecasting

from climax_elevation import InputError
from climax_elevation.data.shares import Share
from climax_elevation.host.shards import GlobalForecastDataModule
from climax_elevation.train import train
from climax_elevation.upstream.schedule import (
    _of_upstream,
    announced,
    check_equal,
    check_shares,
    check_validation,
    count_shares,
    steps_an_epoch,
)


def upstreams(root, processes, workers=1, batch_size=2):
    """What upstream's readers have of a folder, without upstream."""
    listers = {f"lister_{part}": sorted((root / part).iterdir()) for part in ("train", "val", "test")}
    settings = {"variables": tiny_data.VARIABLES, "predict_range": 2, "num_workers": workers, "batch_size": batch_size}
    return count_shares(SimpleNamespace(**listers, hparams=settings), processes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """5 + 1 + 9 + 4 pairs to train, 7 and 3 to validate, 5 to test, 2 steps ahead."""
    return tiny_data.write(tmp_path_factory.mktemp("shards"), train=(7, 3, 11, 6), val=(9, 5), test=(7,))


def test_shares_of_the_plugins_reader_by_hand(root):
    module = GlobalForecastDataModule(str(root), tiny_data.VARIABLES, 4, predict_range=2, batch_size=2)
    assert module.shares(1) == [
        Share("train", 4, 19, 0, 19, 10),
        Share("val", 2, 10, 0, 10, 5),
        Share("test", 1, 5, 0, 5, 3),
    ]
    assert module.shares(4) == [
        Share("train", 4, 19, 0, 4, 3),
        Share("val", 2, 10, 0, 2, 2),
        Share("test", 1, 5, 0, 1, 1),
    ]


def test_shares_of_upstreams_reader_by_hand(root):
    assert upstreams(root, 1)[0] == Share("train", 4, 19, 0, 19, 10)
    # two shards each; the process of the two shortest has 1 + 4 pairs, one of the two longest 5 + 9
    assert upstreams(root, 2)[0] == Share("train", 4, 19, 0, 5, 3, 7, True)
    # three processes take a shard each, and one is left out, the shortest at the least
    assert upstreams(root, 3)[0] == Share("train", 4, 19, 1, 1, 1, 5, True)
    # validation is in order: 7 pairs, and then 3
    assert upstreams(root, 2)[1] == Share("val", 2, 10, 0, 3, 2, 4)
    assert upstreams(root, 1, workers=2)[1] == Share("val", 2, 10, 0, 10, 6)
    # without workers every process reads all of it
    assert upstreams(root, 3, workers=0)[0] == Share("train", 4, 19, 0, 19, 10)


def test_what_every_process_reads_is_said(root):
    first, *_ = announced(trainer(max_epochs=2), upstreams(root, 3, workers=0), 3, 2)
    assert first.endswith("10 batches; every process reads all of them, which data.num_workers: 1 mends")
    first, *_, last = announced(trainer(max_epochs=2), upstreams(root, 2), 2, 2)
    assert first == (
        "train: 19 samples in 4 shards, 5 a process, 3 batches; each process draws its shards by itself, some of them "
        "twice an epoch and others not at all"
    )
    assert last == "3 steps an epoch, 6 in all, 2 epochs: up to 24 samples seen"


def test_a_process_without_a_shard_is_refused(root):
    check_shares(upstreams(root, 1), 1, 1)
    with pytest.raises(InputError, match="test has 1 shards, and 2 processes of 1 readers each.* make 2 or more"):
        check_shares(upstreams(root, 2), 2, 1)
    check_shares(upstreams(root, 4, workers=0), 4, 0)


def test_shares_of_climate_projection_by_hand():
    datasets = {f"dataset_{part}": range(size) for part, size in (("train", 11), ("val", 4), ("test", 3))}
    shares = count_shares(SimpleNamespace(**datasets, hparams={"batch_size": 2}), 3)
    assert shares == [Share("train", 0, 11, 0, 4, 2), Share("val", 0, 4, 0, 2, 1), Share("test", 0, 3, 0, 1, 1)]
    first, *_ = announced(trainer(max_epochs=2), shares, 3, 2)
    assert first == "train: 11 samples, 4 a process, 2 batches"


def test_more_processes_than_samples_are_refused_with_either_reader(root):
    module = GlobalForecastDataModule(str(root), tiny_data.VARIABLES, 4, predict_range=2, batch_size=2)
    check_shares(module.shares(5), 5, 1)
    for shares in (module.shares(6), upstreams(root, 6)):
        with pytest.raises(InputError, match="test has 5 samples, and 6 processes would share them: use fewer"):
            check_shares(shares[2:], 6, 1)


def test_processes_that_would_wait_for_one_another_are_refused(root, tmp_path):
    message = "train: .* one process 3 batches of an epoch, and another up to 7, which would wait .* --processes 2"
    for sharing in (True, False):
        with pytest.raises(InputError, match=message) as error:
            check_equal(trainer(max_epochs=2), upstreams(root, 2), 2, 1, sharing=sharing)
        assert ("--reader plugin" in str(error.value)) == sharing
    for options in ({"limit_train_batches": 3}, {"max_steps": 3}, {"fast_dev_run": True}):
        check_equal(trainer(**options), upstreams(root, 2), 2, 1, sharing=True)
    # what that prepare would have made of it, and shards that make no difference to the number of batches
    alike = tiny_data.write(tmp_path / "alike", train=(7, 7, 7, 7), val=(5, 4), test=(5, 5))
    nearly = tiny_data.write(tmp_path / "nearly", train=(5, 6, 6, 5), val=(5, 4), test=(5, 5))
    for folder, batch_size, workers in ((alike, 2, 1), (alike, 3, 2), (nearly, 8, 1)):
        check_equal(trainer(), upstreams(folder, 2, workers, batch_size), 2, workers, sharing=True)
    # 3 + 4 pairs by two workers are 4 batches of 2, whichever has which; 3 + 3 are four as well
    with pytest.raises(InputError, match="its shards differ in length"):
        check_equal(trainer(), upstreams(nearly, 2, 1, 3), 2, 1, sharing=True)


def test_every_number_of_batches_that_upstreams_reader_may_make_is_within_what_is_counted():
    """All orders of the shards, for each number of processes and workers."""
    for pairs in ((1, 2, 3, 4), (2, 2, 3), (3, 3, 3, 3), (1, 5, 5, 2, 7), (4, 4)):
        for batch_size, workers, processes in product((1, 2, 3), (1, 2), (1, 2)):
            each = len(pairs) // (processes * workers)
            if not each:
                continue
            for whole in (False, True):
                share = _of_upstream(
                    "train", list(pairs), processes, workers, batch_size, drawn=True, whole_batches=whole
                )
                made = set()
                for order in permutations(pairs):
                    shares = [sum(order[worker * each : (worker + 1) * each]) for worker in range(workers)]
                    made.add(sum(n // batch_size if whole else -(-n // batch_size) for n in shares))
                least, most = share.batches, share.most or share.batches
                assert least <= min(made), (pairs, batch_size, workers, processes, whole)
                assert max(made) <= most, (pairs, batch_size, workers, processes, whole)
                if workers == 1:
                    assert {least, most} == {min(made), max(made)}


def test_shares_of_pretraining_by_hand(root):
    """Two sources, one a node of two processes: 5 + 1 + 9 + 4 pairs, and 1 + 5."""
    settings = {
        "num_workers": 1,
        "batch_size": 2,
        **{f"dict_{end}_idx": {"a": at, "b": at} for end, at in (("start", 0), ("end", 1))},
        "dict_in_variables": {"a": tiny_data.VARIABLES, "b": tiny_data.VARIABLES},
        "dict_max_predict_ranges": {"a": 2, "b": 2},
    }
    paths = sorted((root / "train").iterdir())
    module = SimpleNamespace(dict_lister_trains={"a": paths, "b": paths[:2]}, hparams=settings)
    assert count_shares(module, 4, 2) == [
        # 1 + 4 pairs are 2 whole batches of 2, and 5 + 9 are 7
        Share("train of a", 4, 19, 0, 5, 2, 7, True),
        Share("train of b", 2, 6, 0, 1, 0, 2, True),
    ]
    with pytest.raises(InputError, match="train of b has 2 shards, and 4 processes of 1 readers each take whole ones"):
        check_shares(count_shares(module, 8, 2), 4, 1)


def trainer(monitor="val/w_rmse", stopping=False, **options):
    callback = EarlyStopping(monitor) if stopping else ModelCheckpoint(monitor=monitor)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=[callback], **quiet, **options)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 10),
        ({"limit_train_batches": 4}, 4),
        ({"limit_train_batches": 0.5}, 5),
        ({"limit_train_batches": 40}, 10),
        ({"accumulate_grad_batches": 4}, 3),
    ],
)
def test_steps_an_epoch(options, steps):
    assert steps_an_epoch(trainer(**options), 10) == steps


@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 9}, "ends after 9 batches a process, before its first validation, after 10"),
        ({"max_epochs": 1, "check_val_every_n_epoch": 2}, "ends after 10 batches a process, .* after 20"),
        ({"max_epochs": 1, "limit_val_batches": 0}, "limit_val_batches is 0"),
        (
            {"max_epochs": 1, "limit_train_batches": 4, "val_check_interval": 5},
            "val_check_interval is 5 batches, of which an epoch has 4",
        ),
        ({"max_steps": 2, "val_check_interval": 0.5}, "ends after 2 batches a process, .* after 5"),
    ],
)
def test_a_validation_that_never_comes_is_refused(options, message, stopping):
    with pytest.raises(InputError, match=message):
        check_validation(trainer(stopping=stopping, **options), 10)


@pytest.mark.parametrize(("limit", "comes"), [(10, True), (11, False), (None, True)])
def test_a_limit_that_upstreams_reader_does_not_reach(limit, comes):
    """Without a length Lightning takes the limit for the number of batches, and validates after so many."""
    limited = trainer(max_epochs=2, limit_train_batches=limit)
    check_validation(limited, 10)
    if comes:
        check_validation(limited, 10, counted=False)
    else:
        with pytest.raises(InputError, match=r"limit_train_batches, 11, and an epoch has 10 batches a process: lower"):
            check_validation(limited, 10, counted=False)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 10},
        {"max_epochs": 1},
        {"max_epochs": -1},
        {"max_steps": 5, "val_check_interval": 5},
        {"max_steps": 4, "limit_train_batches": 4},
        {"max_steps": 1, "monitor": None},
        {"max_steps": 5, "accumulate_grad_batches": 2},
        {"max_steps": 7, "check_val_every_n_epoch": None, "val_check_interval": 7},
    ],
)
def test_a_validation_that_comes_is_not(options):
    check_validation(trainer(**options), 10)


def test_the_plan_is_printed_and_nothing_is_started(host, root, tmp_path, capsys):
    out = tmp_path / "out"
    train(
        "global_forecast", host, [*forecasting(root, out, epochs=3), ON, "--trainer.limit_train_batches=4"], plan=True
    )
    said = capsys.readouterr().out
    for line in (
        "bias: PhysicsBias in blocks 0 of 2, engine ",
        f"reader: {'the plugin' if host is None else 'ClimaX'}'s GlobalForecastDataModule",
        "processes: 1 (1 nodes of 1)",
        "train: 19 samples in 4 shards, 19 a process, 10 batches",
        "4 steps an epoch, 12 in all, 3 epochs: up to 24 samples seen",
        "tokens: 32 a sample, 64 a step and process",
        "parameters: ",
        f"results: {out}",
    ):
        assert line in said, line
    assert not out.exists()


def test_real_shards_that_do_not_reach_are_refused_before_a_process_starts(climax, root, tmp_path):
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.num_workers=1"]
    with pytest.raises(InputError, match="test has 1 shards, and 2 processes of 1 readers each take whole ones"):
        train("global_forecast", climax, [*forecasting(root, tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_validation_is_refused_at_its_start(host, root, tmp_path):
    more = ["--trainer.max_steps=2"]
    with pytest.raises(InputError, match="ModelCheckpoint waits for 'val/w_rmse', and the run ends after 2 batches"):
        train("global_forecast", host, [*forecasting(root, tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


def test_names_of_metrics_say_the_lead_time_of_either_host(host, root, tmp_path):
    train("global_forecast", host, [*forecasting(root, tmp_path / "out"), "--data.hrs_each_step=6"])
    header = next((tmp_path / "out").rglob("metrics.csv")).read_text().splitlines()[0]
    named = [name for name in header.split(",") if "w_rmse_2m_temperature" in name]
    assert named
    assert all(name.endswith("_12_hours") for name in named)
