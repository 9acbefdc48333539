"""Values of hidden patches of gridded fields, inferred from the others: data, network and training.

A sample is a time; its tokens are ClimaX's patches. The variable is the anomaly from each pixel's own climatology, in
units of their standard deviation. Its channel is 0, the mean, at hidden patches, and another channel tells which are
visible. Errors are those of patch means: they are what methods that know no pixels infer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from climax_elevation.checks import count, text
from climax_elevation.data.format import PARTITIONS
from climax_elevation.data.names import OROGRAPHY
from climax_elevation.data.record import RECORD, read_record
from climax_elevation.errors import InputError
from climax_elevation.files import PREPARE, check_finite, load_npy, load_npz
from climax_elevation.host import StandInClimaX
from climax_elevation.host.shards import (
    Shard,
    check_sizes,
    check_tiles,
    find_shards,
    load_statistics,
    read_ground,
    read_places,
)
from climax_elevation.options import AttachOptions
from climax_elevation.terrain.fields import downsample_elevation, patch_centres
from climax_elevation.testbed.fit import ModelSettings, TrainingSettings, build_network
from climax_elevation.testbed.interpolation import Places
from climax_elevation.testbed.masked import MaskedFit, fit_masked, spread_evenly

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

VISIBLE, GROUND = "visible", OROGRAPHY.name
STEPS_A_MEAN = 5  # of a climatology, at least
SAME_STEP = 1.2  # times a step, above which two shards do not follow each other
SETS = 7919  # of the numbers that hidden sets are drawn with
BATCH = 32  # times that are inferred at a time


@dataclass(frozen=True)
class GapsSettings:
    """Which fields, and how often they are scored.

    Args:
        root_dir: Folder of shards that `prepare` wrote.
        variable: Which is inferred.
        variables: Further channels, which are visible everywhere.
        cycle: Steps after which the climatology returns, 12 of monthly data; 1: each pixel's mean over training; 0: no
            anomalies, but values.
        sets: Fixed hidden sets of each time of validation and test.
    """

    root_dir: str
    variable: str
    variables: tuple[str, ...] = ()
    cycle: int = 1
    sets: int = 1

    def __post_init__(self) -> None:
        text("data.root_dir", self.root_dir)
        text("data.variable", self.variable)
        count("data.sets", self.sets)
        if self.cycle < 0:
            raise InputError(f"data.cycle is a whole number of 0 or more, not {self.cycle}")
        taken = [name for name in (self.variable, *self.variables) if name in (GROUND, VISIBLE)]
        if taken:
            raise InputError(
                f"data names {taken[0]!r}, which is a channel already, the orography in one arm and not in the other: "
                "leave it out"
            )
        if len({self.variable, *self.variables}) <= len(self.variables):
            raise InputError(
                f"data.variables names other channels than data.variable, each once, not {list(self.variables)}"
            )


def check_hidden(hidden: Any) -> float:
    """A share of the patches that is hidden; InputError if it is none."""
    if isinstance(hidden, bool) or not isinstance(hidden, int | float) or not 0 < hidden < 1:
        raise InputError(
            f"hidden is a share of the patches above 0 and below 1, not {hidden!r}: with all hidden there is nothing "
            "to infer from, with none nothing to infer"
        )
    return float(hidden)


@dataclass(frozen=True)
class Fields:
    """Anomalies on a grid, divided in time.

    Attributes:
        settings: Of what.
        patch_size: Side of a patch, pixels.
        x: Anomalies over `std`, `[T, H, W]`.
        std: Standard deviation of their patch means over training, in the variable's unit.
        others: Further channels, standardised, `[T, V, H, W]`.
        parts: Indices of the times of "train", "val" and "test".
        shard: Which shard a time is of, `[T]`.
        ground_m: Elevation, metres, `[H, W]`.
        land: Where there is land, `[H, W]`, or None.
        lat, lon: Degrees, `[H]` and `[W]`, or `[H, W]` both.
        mean_of, std_of: By which the orography and the further channels were standardised.
    """

    settings: GapsSettings
    patch_size: int
    x: NDArray[np.float32]
    std: float
    others: NDArray[np.float32]
    parts: dict[str, NDArray[np.int64]]
    shard: NDArray[np.int64]
    ground_m: Array
    land: Mask | None
    lat: Array
    lon: Array
    mean_of: dict[str, float]
    std_of: dict[str, float]

    @property
    def channels(self) -> list[str]:
        """All that the network knows."""
        return [self.settings.variable, VISIBLE, GROUND, *self.settings.variables]

    @property
    def patches(self) -> int:
        """How many there are, L."""
        return self.ground_m.size // self.patch_size**2

    def means(self, part: str) -> Array:
        """Patch means of a part, `[T, L]`."""
        return patch_means(self.x[self.parts[part]], self.patch_size)

    def training(self, number: int | None) -> NDArray[np.int64]:
        """Times of training; with a number, so many, spread evenly over it."""
        train = self.parts["train"]
        return train if number is None else spread_evenly(train, number, "training_times", "times")

    def number_hidden(self, share: float) -> int:
        """How many patches are hidden at each time; InputError if that is all or none."""
        number = round(share * self.patches)
        if not 0 < number < self.patches:
            raise InputError(
                f"hidden {share:g} of {self.patches} patches hides {'all' if number else 'none'} of them: choose "
                "another share, or smaller patches"
            )
        return number

    def hidden(self, share: float, part: str) -> Mask:
        """Fixed sets, the same for whoever infers, `[sets, T, L]`."""
        random = np.random.RandomState(SETS + PARTITIONS.index(part))  # whose numbers NumPy promises to keep
        order = random.random_sample((self.settings.sets, len(self.parts[part]), self.patches)).argsort(axis=2)
        return order < self.number_hidden(share)

    def places(self) -> Places:
        """The patches' centres and heights."""
        lat, lon = (self.lat, self.lon) if self.lat.ndim == 2 else np.meshgrid(self.lat, self.lon, indexing="ij")
        north, east = patch_centres(torch.from_numpy(lat), torch.from_numpy(lon), self.patch_size)
        return Places.of(north.numpy(), east.numpy(), patch_means(self.ground_m[None], self.patch_size)[0])


def patch_means(fields: NDArray[Any], patch_size: int) -> Array:
    """`[T, H, W]` to `[T, L]`."""
    return downsample_elevation(torch.from_numpy(np.asarray(fields, dtype=np.float64)), patch_size).numpy()


def read_fields(settings: GapsSettings, patch_size: int) -> Fields:
    """Read shards and take anomalies.

    Raises:
        InputError: If shards or a variable are missing or do not fit each other or the patches; if there are too few
            times for a climatology, or its cycle is not known to go through them.
    """
    root, names = Path(settings.root_dir), [settings.variable, *settings.variables]
    shards = {part: find_shards(root / part, names, 0) for part in PARTITIONS}
    ground_m, land = read_ground(root, shards["train"][0])
    check_sizes(root, shards, *(load_npy(root / name, PREPARE) for name in ("lat.npy", "lon.npy")))
    check_tiles(ground_m.shape, patch_size)
    lat, lon = read_places(root)
    own = [GROUND, *settings.variables]
    mean, std = (load_statistics(root / f"normalize_{kind}.npz", own) for kind in ("mean", "std"))
    every = [shard for part in PARTITIONS for shard in shards[part]]
    arrays: dict[str, list[NDArray[np.floating]]] = {name: [] for name in names}
    for shard in every:
        loaded = load_npz(shard.path, PREPARE, names)
        check_finite(loaded, shard.path, PREPARE)
        for name in names:
            arrays[name].append(loaded[name][shard.first(0) :, 0])
    values = np.concatenate(arrays[settings.variable]).astype(np.float64)
    steps = {part: sum(shard.pairs(0) for shard in shards[part]) for part in PARTITIONS}
    ends = np.cumsum([0, *steps.values()])
    parts = {part: np.arange(ends[i], ends[i + 1]) for i, part in enumerate(PARTITIONS)}
    if settings.cycle > 1:
        _check_follow(root, every)
    x = values - _climatology(settings, values, steps["train"])
    deviation = float(patch_means(x[parts["train"]], patch_size).std())
    if not deviation > 0:
        raise InputError(
            f"{root}: {settings.variable} never differs from its climatology in training: nothing is to be inferred"
        )
    others = [(np.concatenate(arrays[name]) - mean[i]) / std[i] for i, name in enumerate(settings.variables, 1)]
    return Fields(
        settings,
        patch_size,
        (x / deviation).astype(np.float32),
        deviation,
        np.stack(others, axis=1).astype(np.float32) if others else np.empty((len(x), 0, *x.shape[1:]), np.float32),
        parts,
        np.repeat(np.arange(len(every)), [shard.pairs(0) for shard in every]),
        ground_m,
        land,
        np.asarray(lat, dtype=np.float64),
        np.asarray(lon, dtype=np.float64),
        {name: float(value) for name, value in zip(own, mean, strict=True)},
        {name: float(value) for name, value in zip(own, std, strict=True)},
    )


def _climatology(settings: GapsSettings, values: Array, training: int) -> Array:
    """Each pixel's mean over every `cycle`-th step of training; with cycle 0 the mean of all. `[T, H, W]`."""
    wanted = max(2, STEPS_A_MEAN * settings.cycle)
    if training < wanted:
        raise InputError(
            f"{settings.root_dir} has {training} time step{'s'[: training > 1]} of training, and inference with "
            f"data.cycle {settings.cycle} is learned from {wanted} or more: prepare more of them, or choose a shorter "
            "data.cycle"
        )
    if settings.cycle == 0:
        return np.full(values.shape, values[:training].mean())
    mean = np.stack([values[phase : training : settings.cycle].mean(axis=0) for phase in range(settings.cycle)])
    return mean[np.arange(len(values)) % settings.cycle]


def _check_follow(root: Path, shards: list[Shard]) -> None:
    """Raise InputError unless each shard goes on a step after the one before: steps tell where a cycle is."""
    path = root / RECORD
    try:
        record = read_record(root) or {}
        hours = float(record["hours_per_step"])
        times = {shard["file"]: (_date(shard["first"]), _date(shard["last"])) for shard in record["shards"]}
        ends = [times[shard.path.relative_to(root).as_posix()] for shard in shards]
        spans = [
            (first + shard.first(0) * timedelta(hours=hours), last)
            for shard, (first, last) in zip(shards, ends, strict=True)
        ]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} does not tell the times of all shards, and data.cycle counts steps: set data.cycle: 1, or prepare "
            "the data again"
        ) from None
    for (_, last), (first, _) in pairwise(spans):
        if not 0 < (first - last) / timedelta(hours=hours) < SAME_STEP:
            raise InputError(
                f"{root} goes on at {first.isoformat()} after {last.isoformat()}, which is not the next step of "
                f"{hours:g} h, and data.cycle counts steps: set data.cycle: 1, or prepare data without gaps"
            )


def _date(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp)


def build_gaps(
    settings: ModelSettings,
    fields: Fields,
    *,
    seed: int,
    bias_type: str | None,
    bias_args: Mapping[str, Any] | None,
    host: Callable[..., nn.Module] = StandInClimaX,
) -> nn.Module:
    """A fresh network; the host's weights depend on the seed alone, not on the bias.

    In both arms biases read the ground from a file, for one of them has no channel of it. `control: permuted` shuffles
    anew for each seed.
    """
    given = {"blocks": "all", **(bias_args or {})}
    if given.get("control") == "permuted":
        given["control_seed"] = given.get("control_seed", AttachOptions.control_seed) + seed
    with TemporaryDirectory() as folder:
        file = Path(folder) / "orography.npy"
        np.save(file, fields.ground_m)
        net = build_network(
            settings,
            fields.channels,
            fields.ground_m.shape,
            seed=seed,
            bias_type=bias_type,
            bias_args={"elevation_file": str(file), **given} if bias_type is not None else None,
            host=host,
        )
    if bias_type is not None:
        terrain = cast(Any, net).terrain
        terrain.set_statistics(fields.mean_of, fields.std_of, fields.settings.root_dir)
        terrain.set_grid(fields.lat, fields.lon, fields.settings.root_dir)
        terrain.cache_dir = Path(fields.settings.root_dir)
    return net


@dataclass(frozen=True)
class Gaps:
    """One network at work on fields.

    Attributes:
        fields: Of all times.
        hidden: Share of the patches that is.
        elevation_input: Whether the network has a channel of the orography.
        times: Of training, as `Fields.training` takes it.
    """

    fields: Fields
    hidden: float
    elevation_input: bool
    times: int | None = None

    def fit(
        self,
        net: nn.Module,
        training: TrainingSettings,
        *,
        seed: int,
        keep_best: bool,
        on_step: Callable[[float | None], None],
    ) -> MaskedFit:
        """Train it, with other patches hidden at each step; the loss is over the pixels of these.

        Args:
            net: Fresh; trained in place.
            training: How.
            seed: Of times, hidden sets and dropout.
            keep_best: Leave the weights of the least validation error, not the last ones.
            on_step: Called after every step, with the latest validation error or None.
        """
        random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        times = torch.from_numpy(self.fields.training(self.times))
        number, patches = self.fields.number_hidden(self.hidden), self.fields.patches

        def learn() -> None:
            chosen = times[torch.randint(len(times), (training.batch_size,), generator=random)].numpy()
            hidden = torch.rand(len(chosen), patches, generator=random).argsort(dim=1) < number
            inferred, covered = self.inferred(net, chosen, hidden), self._pixels(hidden)
            truth = torch.from_numpy(self.fields.x[chosen])
            ((inferred - truth).square() * covered).sum().div(covered.sum()).backward()

        def validate() -> float:
            errors = np.square(self.infer(net, "val") - self.fields.means("val"))
            return float(np.sqrt(errors[self.fields.hidden(self.hidden, "val")].mean()))

        return fit_masked(net, training, learn, validate, keep_best=keep_best, on_step=on_step)

    def infer(self, net: nn.Module, part: str, most: int | None = None) -> Array:
        """Patch means of the network's anomalies, `[sets, T, L]`, at a part's times or its first `most` of them."""
        times = self.fields.parts[part][:most]
        net.eval()
        sets = []
        with torch.no_grad():
            for hidden in torch.from_numpy(self.fields.hidden(self.hidden, part)):
                batches = [slice(start, start + BATCH) for start in range(0, len(times), BATCH)]
                inferred = torch.cat([self.inferred(net, times[rows], hidden[: len(times)][rows]) for rows in batches])
                sets.append(patch_means(inferred.numpy(), self.fields.patch_size))
        return np.stack(sets)

    def inferred(self, net: nn.Module, times: NDArray[np.int64], hidden: Tensor) -> Tensor:
        """What a network makes of some times, `[B, H, W]`, with the patches `hidden`, `[B, L]`."""
        x = self.inputs(times, hidden)
        channels = [name for name in self.fields.channels if self.elevation_input or name != GROUND]
        now = torch.zeros(len(x))
        return net(x, None, now, channels, [self.fields.settings.variable], None, None)[1][:, 0]

    def inputs(self, times: NDArray[np.int64], hidden: Tensor) -> Tensor:
        """The network's channels, `[B, V, H, W]`: the variable where visible, what is visible, the others."""
        visible = ~self._pixels(hidden)
        shown = torch.where(visible, torch.from_numpy(self.fields.x[times]), 0.0)
        channels = [shown[:, None], visible.float()[:, None]]
        if self.elevation_input:
            ground = (self.fields.ground_m - self.fields.mean_of[GROUND]) / self.fields.std_of[GROUND]
            channels.append(torch.from_numpy(ground).float().expand(len(times), 1, -1, -1))
        return torch.cat([*channels, torch.from_numpy(self.fields.others[times])], dim=1)

    def _pixels(self, patches: Tensor) -> Tensor:
        """`[B, L]` to `[B, H, W]`, each patch's value at all of its pixels."""
        size = self.fields.patch_size
        rows = self.fields.ground_m.shape[0] // size
        return patches.unflatten(1, (rows, -1)).repeat_interleave(size, dim=1).repeat_interleave(size, dim=2)
