"""Reading shards: which pairs, in which order, by whom; and what is wrong with a folder."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_data
import torch
from torch import Tensor

from climax_elevation import InputError
from climax_elevation.data.shares import batches_a_process, split, stretch
from climax_elevation.files import save_npy, save_npz
from climax_elevation.host import shards as host_shards
from climax_elevation.host.shards import ForecastDataset, GlobalForecastDataModule, Normalize, Shard


def _module(root: Path, **changes: Any) -> GlobalForecastDataModule:
    settings: dict[str, Any] = {"variables": tiny_data.VARIABLES, "buffer_size": 4, "predict_range": 2, "batch_size": 3}
    return GlobalForecastDataModule(str(root), **settings | changes)


def _time_steps(module: GlobalForecastDataModule, field: Tensor) -> list[int]:
    """Time steps of a batch's fields, from the first pixel's temperature."""
    kelvin = field[:, 1, 0, 0].double() * module.transforms.std[1] + module.transforms.mean[1]
    return [round(value) for value in (kelvin - 280).tolist()]


def _epoch(module: GlobalForecastDataModule) -> list[int]:
    return [step for batch in module.train_dataloader() for step in _time_steps(module, batch[0])]


def test_pairs_by_hand(tmp_path: Path) -> None:
    """Shards of 7, 5 and 6 steps, 2 ahead: no pair crosses from a shard to the next."""
    module = _module(tiny_data.write(tmp_path))
    pairs = []
    for x, y, lead_times, variables, out_variables in module.train_dataloader():
        pairs += list(zip(_time_steps(module, x), _time_steps(module, y), strict=True))
        assert variables == out_variables == tiny_data.VARIABLES
        # 2 steps of 1 hour, in hundreds of hours
        torch.testing.assert_close(lead_times, torch.full((len(x),), 0.02))
    assert sorted(pairs) == [(step, step + 2) for step in (0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 14, 15)]


def test_values_are_standardised_and_targets_chosen(tmp_path: Path) -> None:
    module = _module(tiny_data.write(tmp_path), out_variables=tiny_data.TARGETS, hrs_each_step=730)
    x, y, lead_times, variables, out_variables = next(iter(module.test_dataloader()))
    truth = tiny_data.fields(23, 5)
    mean, std = (np.load(tmp_path / f"normalize_{name}.npz") for name in ("mean", "std"))
    for fields, names, first in ((x, variables, 0), (y, out_variables, 2)):
        for channel, name in enumerate(names):
            expected = (truth[name][first : first + 3, 0] - mean[name]) / std[name]
            # temperatures of 300 K have a float32 step of 3e-5 K, and standard deviations are above 1
            np.testing.assert_allclose(fields[:, channel], expected, atol=1e-4)
    assert out_variables == tiny_data.TARGETS
    torch.testing.assert_close(lead_times, torch.full((3,), 14.6))
    physical = module.output_transforms
    np.testing.assert_allclose(
        Normalize(physical.mean, physical.std).inverse()(y)[0, 0], truth["2m_temperature"][2, 0], atol=1e-3
    )
    assert module.val_clim.shape == (2, 8, 16)
    np.testing.assert_allclose(module.test_clim[0], truth["2m_temperature"].mean(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(module.get_lat_lon()[0], tiny_data.LAT)


def test_one_target_may_be_a_string(tmp_path: Path) -> None:
    assert _module(tiny_data.write(tmp_path), out_variables="2m_temperature").out_variables == ["2m_temperature"]


def test_validation_is_in_order_of_time(tmp_path: Path) -> None:
    module = _module(tiny_data.write(tmp_path, val=(4, 3)))
    assert [step for batch in module.val_dataloader() for step in _time_steps(module, batch[0])] == [18, 19, 22]


def test_training_order_depends_on_seed_and_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_data.write(tmp_path)
    orders = {}
    for seed in ("1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        module, again = _module(tmp_path), _module(tmp_path)
        orders[seed] = [_epoch(module), _epoch(module)]
        assert orders[seed] == [_epoch(again), _epoch(again)]
    every = orders["1"] + orders["2"]
    assert len({tuple(order) for order in every}) == 4
    assert len({tuple(sorted(order)) for order in every}) == 1


def test_training_order_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    tiny_data.write(tmp_path)
    module, resumed = _module(tmp_path), _module(tmp_path)
    _epoch(module)
    resumed.load_state_dict(module.state_dict())
    assert _epoch(module) == _epoch(resumed)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 5])
def test_workers_read_every_pair_once(tmp_path: Path, workers: int) -> None:
    module = _module(tiny_data.write(tmp_path), num_workers=workers)
    first, second = _epoch(module), _epoch(module)
    assert sorted(first) == sorted(second) == sorted(_epoch(_module(tmp_path)))
    assert first != second


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_stretches_hold_every_sample_once_in_equally_many_batches(batch_size: int, workers: int) -> None:
    for processes in range(1, 17):
        for total in range(processes, 2 * processes * batch_size + 2):
            seen: list[int] = []
            counts = set()
            for process in range(processes):
                batches = []
                for worker in range(workers):
                    start, stop, alone = stretch(total, batch_size, process, processes, worker, workers)
                    stream = list(split(iter(range(start, stop)), alone))
                    batches += [stream[n : n + batch_size] for n in range(0, len(stream), batch_size)]
                seen += [sample for batch in batches for sample in batch if sample is not None]
                counts.add(len(batches))
                assert all(any(sample is not None for sample in batch) for batch in batches)
            assert counts == {batches_a_process(total, batch_size, processes)}
            assert sorted(seen) == list(range(total - (total % processes if batch_size == 1 else 0)))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 1 to 21 pairs, 2 steps ahead; 21 pairs in each part."""
    root = tmp_path_factory.mktemp("uneven")
    return tiny_data.write(root, train=(7, 3, 11, 6, 4), val=(9, 5, 13), test=(23,))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("ranks", "batch_size"), [*((ranks, 2 + ranks % 3) for ranks in range(1, 17)), (3, 1), (5, 1), (16, 1)]
)
@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_processes_read_every_pair_once_in_equally_many_batches(
    uneven: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, batch_size: int, workers: int, part: str
) -> None:
    """Each rank's loader, with its workers one after another in this process: starting them would take minutes."""
    module = _module(uneven, batch_size=batch_size)
    read: Counter[int] = Counter()
    counts = set()
    for rank in range(ranks):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)
        loader = getattr(module, f"{part}_dataloader")()
        batches = []
        for worker in range(max(1, workers)):
            info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
            monkeypatch.setattr(host_shards, "get_worker_info", lambda info=info: info)
            loader.dataset.epoch = 0  # each worker has a copy of the data set, of the same epoch
            batches += [_time_steps(module, x) for x, *_ in loader]
        counts.add(len(batches))
        read.update(step for batch in batches for step in batch)
    assert len(counts) == 1
    assert set(read.values()) == {1}
    assert len(read) == (21 // ranks * ranks if (batch_size, part) == (1, "train") else 21)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (3, 2), (16, 2)])
def test_real_workers_do_too(uneven: Path, ranks: int, workers: int) -> None:
    for part in ("train", "val", "test") if ranks < 16 else ("val",):
        read: Counter[int] = Counter()
        counts = set()
        for rank in range(ranks):
            module = _module(uneven, batch_size=2, num_workers=workers)
            module.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)
            batches = [_time_steps(module, x) for x, *_ in getattr(module, f"{part}_dataloader")()]
            counts.add(len(batches))
            read.update(step for batch in batches for step in batch)
        assert (len(counts), set(read.values()), len(read)) == (1, {1}, 21)


def test_what_is_left_over_changes(tmp_path: Path) -> None:
    dataset = _module(tiny_data.write(tmp_path, train=(4, 4, 4, 4, 4))).data_train
    dataset.world_size, dataset.buffer_size = 7, 2
    seen = []
    for epoch in range(6):
        dataset.epoch = epoch
        read = set()
        for rank in range(7):
            dataset.rank = rank
            read |= {round(float(x[1, 0, 0]), 4) for x, *_ in dataset}
        seen.append(read)
        assert len(read) == 7
    assert set.union(*seen) > seen[0]


def test_a_large_buffer_mixes_shards(tmp_path: Path) -> None:
    orders = {size: _epoch(_module(tiny_data.write(tmp_path / str(size)), buffer_size=size)) for size in (1, 100)}
    in_sequence = {size: sum(b == a + 1 for a, b in pairwise(order)) for size, order in orders.items()}
    assert in_sequence[1] == 9  # 12 pairs of 3 shards, each in order of time
    assert in_sequence[100] < 6


def test_precipitation_is_scaled_and_not_shifted(tmp_path: Path) -> None:
    tiny_data.write(tmp_path)
    for path in tmp_path.glob("**/*.npz"):
        with np.load(path) as archive:
            save_npz(path, {**archive, "total_precipitation": archive["2m_temperature"]})
    transform = _module(tmp_path, variables=["2m_temperature", "total_precipitation"]).transforms
    assert transform.mean[1] == 0
    assert transform.mean[0] > 200
    assert transform.std[1] == transform.std[0]


def _replace(path: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    with np.load(path) as archive:
        save_npz(path, change(dict(archive)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "val" / "0.npz").unlink(), r"val has no shard"),
        (lambda root: (root / "lat.npy").unlink(), r"lat.npy is missing"),
        (lambda root: (root / "normalize_std.npz").unlink(), r"normalize_std.npz is missing"),
        (lambda root: (root / "test" / "climatology.npz").unlink(), r"climatology.npz is missing"),
        (lambda root: (root / "train" / "1.npz").write_bytes(b"PK"), r"1.npz is damaged"),
        (lambda root: save_npy(root / "lon.npy", np.arange(15.0)), r"15 longitudes, and .* 8 x 16"),
        (
            lambda root: _replace(root / "train" / "1.npz", lambda a: {k: v[:2] for k, v in a.items()}),
            r"2 time steps, and predict_range 2",
        ),
        (
            lambda root: _replace(root / "train" / "2.npz", lambda a: {"orography": a["orography"]}),
            r"2.npz lacks 2m_temperature, 10m_u.*; it has orography",
        ),
        (
            lambda root: _replace(root / "train" / "2.npz", lambda a: a | {"orography": a["orography"][0]}),
            r"\[time, 1, height, width\]",
        ),
    ],
)
def test_a_spoilt_folder_is_said(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(tiny_data.write(tmp_path))
    with pytest.raises(InputError, match=message):
        _module(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variables": ["snow"]}, r"lacks snow; it has 10m_u"),
        ({"out_variables": ["snow"]}, r"lacks snow"),
        ({"predict_range": 0}, r"predict_range is 1 or more, not 0"),
        ({"buffer_size": 0}, r"buffer_size"),
        ({"batch_size": -1}, r"batch_size"),
    ],
)
def test_wrong_settings_are_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _module(tiny_data.write(tmp_path), **changes)


def test_more_processes_than_pairs_are_said(tmp_path: Path) -> None:
    module = _module(tiny_data.write(tmp_path))
    module.trainer = type("Trainer", (), {"global_rank": 0, "world_size": 13})()
    with pytest.raises(InputError, match="13 processes cannot share 12 pairs"):
        module.train_dataloader()


def test_compressed_shards_are_read(tmp_path: Path) -> None:
    tiny_data.write(tmp_path)
    path = tmp_path / "train" / "0.npz"
    before = _epoch(_module(tmp_path))
    with np.load(path) as archive:
        np.savez_compressed(path, **dict(archive))
    assert _epoch(_module(tmp_path)) == before


def test_a_shard_is_read_only_where_needed(tmp_path: Path) -> None:
    """A reader opens none but the shards that hold its part."""
    present = tiny_data.write(tmp_path) / "train" / "0.npz"
    absent = Shard(tmp_path / "absent.npz", 9, (8, 16))
    unit = Normalize(np.zeros(4), np.ones(4))
    names = tiny_data.VARIABLES
    dataset = ForecastDataset([Shard(present, 7, (8, 16)), absent], names, names, 2, 2.0, unit, unit)
    dataset.world_size = 3
    assert [round(float(x[1, 0, 0])) - 280 for x, *_ in dataset] == [0, 1, 2, 3]


def test_a_shard_that_is_damaged_in_its_data_is_named_when_it_is_read(tmp_path: Path) -> None:
    """Its headers are whole, so that only reading finds it."""
    path = tiny_data.write(tmp_path) / "train" / "1.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"1.npz is damaged \(Bad CRC-32"):
        list(_module(tmp_path).train_dataloader())
