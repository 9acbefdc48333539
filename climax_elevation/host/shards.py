"""Reads ClimaX's shards for global forecasting; see `climax_elevation.data.format` for what they are."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from climax_elevation.data.format import PARTITIONS, shard_paths
from climax_elevation.data.names import LAND_SEA_MASK, OROGRAPHY
from climax_elevation.data.record import repeats
from climax_elevation.data.shares import Part, Share, batches_a_process, split, stretch
from climax_elevation.errors import InputError
from climax_elevation.files import (
    PREPARE,
    check_degrees,
    check_finite,
    check_names,
    load_npy,
    load_npz,
    load_scalars,
    npz_shapes,
    reading,
)
from climax_elevation.host.loading import Loader, ResumableLoader, Stretch
from climax_elevation.terrain.reader import HOURS_PER_LEAD_TIME

logger = logging.getLogger(__name__)

Sample = tuple[Tensor, Tensor, Tensor, list[str], list[str]]
Drawn = TypeVar("Drawn")


class Normalize:
    """(x - mean) / std, a value a channel.

    Args:
        mean, std: `[V]`.
    """

    def __init__(self, mean: NDArray[np.floating], std: NDArray[np.floating]) -> None:
        self.mean = mean
        self.std = std

    def __call__(self, x: Tensor) -> Tensor:
        """Standardise `[..., V, H, W]`."""
        mean, std = (torch.as_tensor(values).to(x)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std

    def inverse(self) -> Normalize:
        """The transform back to physical units."""
        return Normalize(-self.mean / self.std, 1 / self.std)


@dataclass(frozen=True)
class Shard:
    """One file of consecutive time steps.

    Attributes:
        path: Where it is.
        steps: Number of time steps, N.
        size: Height and width, pixels.
        repeats: How many of its first steps the shard before it has too; None where it goes on after none.
    """

    path: Path
    steps: int
    size: tuple[int, int]
    repeats: int | None = None

    def first(self, predict_range: int) -> int:
        """The first step whose pair the shard before it does not have."""
        return max(0, (self.repeats or 0) - predict_range)

    def pairs(self, predict_range: int) -> int:
        """Number of pairs that the shard before it does not have."""
        return self.steps - predict_range - self.first(predict_range)


class ForecastDataset(IterableDataset[Sample | None]):
    """Streams (now, later) pairs from shards, each reader its own part of them; None, where a batch ends early.

    The pairs of all shards are one sequence, of which every worker of every rank has its own part, as
    `climax_elevation.data.shares` cuts it: each pair is read once an epoch, whatever the shards' lengths and the
    number of ranks and workers, and all ranks have equally many batches, so that none waits for another. In training
    with a batch size of 1 alone up to `world_size - 1` pairs are left over, other ones each epoch.

    Args:
        shards: The files; each has more steps than predict_range.
        variables: Input channels.
        out_variables: Target channels.
        predict_range: Steps from input to target.
        hours: Hours of that.
        normalize: From physical units to the model's, for the input.
        normalize_out: The same for the target.
        buffer_size: Pairs among which the next is drawn; 0: shard after shard, as they are.
        seed: With `epoch`, all that the order depends on.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        variables: list[str],
        out_variables: list[str],
        predict_range: int,
        hours: float,
        normalize: Normalize,
        normalize_out: Normalize,
        buffer_size: int = 0,
        seed: int = 0,
    ) -> None:
        self.shards = list(shards)
        self.variables = variables
        self.out_variables = out_variables
        self.predict_range = predict_range
        self.lead_time = torch.tensor(hours / HOURS_PER_LEAD_TIME, dtype=torch.float32)
        self.normalize = normalize
        self.normalize_out = normalize_out
        self.buffer_size = buffer_size
        self.seed = seed
        self.epoch = 0
        self.rank, self.world_size, self.batch_size = 0, 1, 1
        self.stretch = Stretch()

    def total(self) -> int:
        """Number of pairs in all shards."""
        return sum(shard.pairs(self.predict_range) for shard in self.shards)

    def __iter__(self) -> Iterator[Sample | None]:
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        index, passed = self.stretch.of_worker(index, workers)
        start, stop, alone = self._part(index, workers)
        if not self.buffer_size:
            return islice(split(self._read(self.shards, start, stop), alone), passed, None)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.shards))

        def drawn(pairs: Iterator[Drawn]) -> Iterator[Drawn | None]:
            random = np.random.default_rng([self.seed, self.epoch, self.rank * workers + index])
            return split(_shuffled(pairs, self.buffer_size, random), alone)

        before = islice(drawn(iter(range(start, stop))), passed)
        pairs = self._read([self.shards[i] for i in order], start, stop, frozenset(before))
        return islice(drawn(pairs), passed, None)

    def lengths(self, workers: int) -> list[int]:
        """How much each worker of this rank hands out, with the None that end a batch; 0 workers read as 1."""
        parts = (self._part(worker, max(1, workers)) for worker in range(max(1, workers)))
        return [stop - start + alone for start, stop, alone in parts]

    def _part(self, worker: int, workers: int) -> Part:
        return stretch(self.total(), self.batch_size, self.rank, self.world_size, worker, workers)

    def _read(
        self, shards: Sequence[Shard], start: int, stop: int, without: frozenset[int | None] = frozenset()
    ) -> Iterator[Any]:
        """Pairs number `start` to `stop` of the sequence of all; None, and not read, for those `without`."""
        first = 0
        for shard in shards:
            pairs = shard.pairs(self.predict_range)
            begin, end = max(start - first, 0), min(stop - first, pairs)
            if begin < end:
                wanted = [first + number not in without for number in range(begin, end)]
                yield from self._read_shard(shard, begin, wanted) if any(wanted) else repeat(None, end - begin)
            first += pairs

    def _read_shard(self, shard: Shard, begin: int, wanted: list[bool]) -> Iterator[Sample | None]:
        names = dict.fromkeys([*self.variables, *self.out_variables])
        arrays = load_npz(shard.path, "prepare it again", names)
        fields = {name: torch.from_numpy(values.astype(np.float32, copy=False)) for name, values in arrays.items()}
        for i, is_wanted in enumerate(wanted, begin + shard.first(self.predict_range)):
            if not is_wanted:
                yield None
                continue
            x = torch.cat([fields[name][i] for name in self.variables])
            y = torch.cat([fields[name][i + self.predict_range] for name in self.out_variables])
            yield self.normalize(x), self.normalize_out(y), self.lead_time, self.variables, self.out_variables


class GlobalForecastDataModule(LightningDataModule):
    """ClimaX's data module for global forecasting, with its constructor's names.

    Batches are (x, y, lead_times, variables, out_variables): x `[B, V, H, W]` and y `[B, Vo, H, W]`
    standardised by the folder's statistics, lead_times `[B]` in hundreds of hours. Training pairs come in
    an order that depends on the seed (of `seed_everything`; 0 without) and on how many epochs were begun,
    which a checkpoint keeps, with the place in the epoch: a resumed run reads on as an uninterrupted one
    would, if as many processes and workers read as before. Any number of
    workers and ranks reads every pair once, but for what `ForecastDataset` says.

    Args:
        root_dir: Folder of shards, statistics, latitudes and longitudes.
        variables: Input channels.
        buffer_size: Pairs among which the next training pair is drawn.
        out_variables: Target channels; None: the input's.
        predict_range: Steps from input to target.
        hrs_each_step: Hours of a step.
        batch_size: Pairs a batch.
        num_workers: Processes that read; 0: none but the main one.
        pin_memory: Whether batches are copied to page-locked memory.

    Raises:
        InputError: If a number is out of range; if a file or variable is missing; if a part has no shard,
            or a shard is damaged, of another size, or not longer than predict_range.

    Attributes:
        transforms, output_transforms: `Normalize` of input and target.
        val_clim, test_clim: Climatologies of the target, `[Vo, H, W]`.
    """

    def __init__(
        self,
        root_dir: str,
        variables: list[str],
        buffer_size: int,
        out_variables: list[str] | str | None = None,
        predict_range: int = 6,
        hrs_each_step: int = 1,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        for name in ("buffer_size", "predict_range", "hrs_each_step", "batch_size"):
            if self.hparams[name] < 1:
                raise InputError(f"data.{name} is 1 or more, not {self.hparams[name]}")
        self.root = Path(root_dir)
        self.variables = list(variables)
        self.out_variables = [out_variables] if isinstance(out_variables, str) else list(out_variables or variables)
        needed = list(dict.fromkeys([*self.variables, *self.out_variables]))
        self.transforms = self._normalize(self.variables)
        self.output_transforms = self._normalize(self.out_variables)
        self.shards = {part: find_shards(self.root / part, needed, predict_range) for part in PARTITIONS}
        check_sizes(self.root, self.shards, *self.get_lat_lon())
        self.val_clim = self._climatology("val")
        self.test_clim = self._climatology("test")
        self.data_train = self._dataset("train", buffer_size)
        self.data_val = self._dataset("val")
        self.data_test = self._dataset("test")

    def get_lat_lon(self) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Latitudes of the rows and longitudes of the columns, degrees."""
        lat, lon = (load_npy(self.root / name, PREPARE) for name in ("lat.npy", "lon.npy"))
        check_degrees(lat, lon, self.root)
        return lat, lon

    def train_dataloader(self) -> DataLoader:
        """Training pairs, in another order each time it is iterated."""
        return self._loader(self.data_train, partial(ResumableLoader, trained=self._trained if self.trainer else None))

    def _trained(self) -> int:
        """How many batches of this epoch the trainer is done with; it fetches them ahead."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[union-attr]

    def val_dataloader(self) -> DataLoader:
        """Validation pairs, shard after shard."""
        return self._loader(self.data_val)

    def test_dataloader(self) -> DataLoader:
        """Test pairs, shard after shard."""
        return self._loader(self.data_test)

    def shares(self, processes: int) -> list[Share]:
        """What each of so many processes is given of each part."""
        found = []
        for name, dataset in (("train", self.data_train), ("val", self.data_val), ("test", self.data_test)):
            total = dataset.total()
            batch_size = self._batch_size(dataset, processes)
            left = total % processes if batch_size == 1 else 0
            batches = batches_a_process(total, batch_size, processes)
            found.append(Share(name, len(dataset.shards), total, left, (total - left) // processes, batches))
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: how many epochs of training were begun."""
        return {"epochs_begun": self.data_train.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the epochs that a checkpoint's run had begun."""
        self.data_train.epoch = state_dict["epochs_begun"]

    def _normalize(self, variables: Sequence[str]) -> Normalize:
        mean, std = (load_statistics(self.root / f"normalize_{kind}.npz", variables) for kind in ("mean", "std"))
        for name, value in zip(variables, std, strict=True):
            if not (value > 0).all():
                raise InputError(
                    f"{self.root / 'normalize_std.npz'} has a standard deviation of {name!r} that is not above 0: "
                    f"{PREPARE}"
                )
        if "total_precipitation" in variables:
            # ClimaX scales precipitation only, so that none stays none
            mean[list(variables).index("total_precipitation")] = 0.0
        return Normalize(mean, std)

    def _climatology(self, part: str) -> Tensor:
        path, (lat, lon) = self.root / part / "climatology.npz", self.get_lat_lon()
        arrays = load_npz(path, PREPARE, self.out_variables)
        check_names(path, list(arrays), self.out_variables)
        check_finite(arrays, path, PREPARE)
        for name, values in arrays.items():
            if values.shape != (1, len(lat), len(lon)):
                raise InputError(
                    f"{path} has {name!r} of shape {list(values.shape)}, and the data have {[1, len(lat), len(lon)]}: "
                    f"{PREPARE}"
                )
        return torch.from_numpy(np.concatenate([arrays[name] for name in self.out_variables]))

    def _dataset(self, part: str, buffer_size: int = 0) -> ForecastDataset:
        return ForecastDataset(
            self.shards[part],
            self.variables,
            self.out_variables,
            self.hparams["predict_range"],
            self.hparams["predict_range"] * self.hparams["hrs_each_step"],
            self.transforms,
            self.output_transforms,
            buffer_size,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
        )

    def _batch_size(self, dataset: ForecastDataset, processes: int) -> int:
        wanted = self.hparams["batch_size"]
        # of two one can be left, so that no pair of validation and test is left out
        return 2 if wanted == 1 and dataset is not self.data_train and dataset.total() % processes else wanted

    def _loader(self, dataset: ForecastDataset, kind: Callable[..., Loader] = Loader) -> Loader:
        if self.trainer is not None:
            dataset.rank, dataset.world_size = self.trainer.global_rank, self.trainer.world_size
        total, ranks = dataset.total(), dataset.world_size
        if total < ranks:
            raise InputError(f"{ranks} processes cannot share {total} pairs of fields in {self.root}: use fewer")
        batch_size = self._batch_size(dataset, ranks)
        if total % ranks and batch_size == 1:
            logger.info(
                "%d of %d pairs are left out each epoch, so that %d processes have equally many batches of one",
                total % ranks,
                total,
                ranks,
            )
        dataset.batch_size = batch_size
        return kind(
            dataset,
            batch_size=batch_size,
            num_workers=self.hparams["num_workers"],
            pin_memory=self.hparams["pin_memory"],
            collate_fn=partial(_collate, beside=self._beside()),
        )

    def _beside(self) -> tuple[Any, ...]:
        """What else a batch holds, at its end."""
        return ()


def _collate(given: Sequence[Sample | None], beside: tuple[Any, ...]) -> tuple[Any, ...]:
    samples = [sample for sample in given if sample is not None]
    x, y, lead_times = (torch.stack([sample[i] for sample in samples]) for i in range(3))  # type: ignore[misc]
    return x, y, lead_times, list(samples[0][3]), list(samples[0][4]), *beside


def _shuffled(samples: Iterator[Drawn], buffer_size: int, random: np.random.Generator) -> Iterator[Drawn]:
    """Draw each sample from the next `buffer_size` that are still to come."""
    buffer: list[Drawn] = []
    for sample in samples:
        if len(buffer) < buffer_size:
            buffer.append(sample)
            continue
        drawn = int(random.integers(buffer_size))
        yield buffer[drawn]
        buffer[drawn] = sample
    for drawn in random.permutation(len(buffer)):
        yield buffer[drawn]


def find_shards(folder: Path, needed: Sequence[str], predict_range: int) -> list[Shard]:
    """The shards of a part, in order; InputError if there is none, or one lacks a variable or is too short."""
    paths = shard_paths(folder)
    if not paths:
        raise InputError(f"{folder} has no shard (*.npz): prepare data into {folder.parent}, or mend data.root_dir")
    common = repeats(folder.parent)
    shards = [_inspect(path, needed, common.get(f"{folder.name}/{path.name}")) for path in paths]
    for shard in shards:
        if shard.steps <= predict_range:
            raise InputError(
                f"{shard.path} has {shard.steps} time steps, and predict_range {predict_range} needs more: make "
                "larger shards, or lower data.predict_range"
            )
    return shards


def _inspect(path: Path, needed: Sequence[str], common: int | None) -> Shard:
    """Read what a shard holds from its headers alone."""
    shapes = npz_shapes(path, "prepare it again", needed)
    shape = shapes[needed[0]]
    if len(shape) != 4 or shape[1] != 1 or any(other != shape for other in shapes.values()):
        raise InputError(f"{path} has arrays [time, 1, height, width] of one size, not {shapes}")
    return Shard(path, shape[0], (shape[2], shape[3]), common)


def check_sizes(root: Path, shards: dict[str, list[Shard]], lat: NDArray[Any], lon: NDArray[Any]) -> None:
    """Raise InputError unless all shards are of the grid of these coordinates."""
    size = (len(lat), len(lon))
    for shard in (shard for part in shards.values() for shard in part):
        if shard.size != size:
            raise InputError(
                f"{root} has {size[0]} latitudes and {size[1]} longitudes, and {shard.path} has fields of "
                f"{shard.size[0]} x {shard.size[1]}: prepare all of it from one grid"
            )


def load_statistics(path: Path, variables: Sequence[str]) -> NDArray[Any]:
    """One a variable, `[V]`."""
    found = load_scalars(path, PREPARE)
    check_names(path, list(found), variables)
    values = {name: np.array([found[name]]) for name in variables}
    check_finite(values, path, PREPARE)
    return np.concatenate([values[name] for name in variables])


def check_tiles(size: Sequence[int], patch_size: int) -> None:
    """Raise InputError unless patches tile fields of so many rows and columns."""
    if any(pixels % patch_size for pixels in size):
        raise InputError(
            f"patches of {patch_size} pixels do not tile fields of {size[0]} x {size[1]}: choose another "
            f"model.patch_size, or prepare with --patch-size {patch_size}"
        )


def read_ground(root: Path, shard: Shard) -> tuple[NDArray[np.float64], NDArray[np.bool_] | None]:
    """Elevation in metres, and where there is land, if that is known, `[H, W]`; InputError without an orography."""
    with reading(shard.path, PREPARE), np.load(shard.path) as arrays:
        if OROGRAPHY.name not in arrays.files:
            raise InputError(
                f"{root} has no orography, by which errors are divided and biases work; it has "
                f"{', '.join(sorted(arrays.files))}: prepare it with orography"
            )
        land = arrays[LAND_SEA_MASK.name][0, 0] >= 0.5 if LAND_SEA_MASK.name in arrays.files else None
        return arrays[OROGRAPHY.name][0, 0].astype(np.float64), land


def read_places(root: Path) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Latitude and longitude, degrees, in two dimensions where the grid is projected."""
    curved = [root / name for name in ("lat2d.npy", "lon2d.npy")]
    chosen = curved if all(path.is_file() for path in curved) else [root / name for name in ("lat.npy", "lon.npy")]
    lat, lon = (load_npy(path, PREPARE) for path in chosen)
    check_degrees(lat, lon, root)
    return lat, lon
