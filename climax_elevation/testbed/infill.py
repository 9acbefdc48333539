"""Values at stations that are hidden, inferred from those that are not: data, network and training.

A sample is a time; its tokens are stations. Values are anomalies from each station's own climatology, in units of
their standard deviation. A part of the stations is never seen in training: neither as a token nor as a target.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from climax_elevation.bias import ElevationBias
from climax_elevation.block import timm_block
from climax_elevation.checks import count, one_of, positive
from climax_elevation.data.format import PARTITIONS
from climax_elevation.data.stations import Stations, read_stations
from climax_elevation.data.times import moment
from climax_elevation.errors import InputError
from climax_elevation.options import AttachOptions
from climax_elevation.other_hosts import attach_blocks, terrain_given
from climax_elevation.terrain.controls import controlled, shuffled
from climax_elevation.terrain.fields import Terrain
from climax_elevation.terrain.sphere import eastward
from climax_elevation.testbed.fit import TrainingSettings
from climax_elevation.testbed.masked import MaskedFit, fit_masked, spread_evenly

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

TRANSFORMS = ("none", "log")
OF_ATTACH = ("blocks", "engine", "terrain_is_flat")
OF_CONTROL = ("control", "control_seed")
SECONDS_A_DAY, DAYS_A_YEAR = 86400, 365.2425
VALUES_A_TERM = 5  # of a climatology, at least
SETS = 7919  # of the numbers that hidden sets are drawn with


@dataclass(frozen=True)
class InfillSettings:
    """Which stations, and what is hidden.

    Args:
        stations: File that `climax_elevation.data.stations.read_stations` reads.
        variable: Which; None: the only one.
        transform: "log": the logarithm is what is inferred, of values above 0.
        val_from, test_from: First date of validation and of test; what is before is trained on.
        year_harmonics, day_harmonics: Of the climatology, which is fitted to each station's values before test_from.
        hidden: Share of stations that is hidden at each step, of those that training sees.
        unseen: Share of stations that training never sees, drawn anew for each seed, one from each stretch of heights.
        leave_out: Stations that are not wanted.
        elevation_unit: Of heights, where the file names none.
    """

    stations: str
    variable: str | None = None
    transform: str = "none"
    val_from: str = ""
    test_from: str = ""
    year_harmonics: int = 2
    day_harmonics: int = 0
    hidden: float = 0.5
    unseen: float = 0.25
    leave_out: tuple[str, ...] = ()
    elevation_unit: str | None = None

    def __post_init__(self) -> None:
        one_of("data.transform", self.transform, TRANSFORMS)
        for name in ("hidden", "unseen"):
            share = getattr(self, name)
            if isinstance(share, bool) or not 0 < share < 1:
                raise InputError(
                    f"data.{name} is a share of the stations above 0 and below 1, not {share!r}: with all hidden there "
                    "is nothing to infer from, with none nothing to infer"
                )
        for name in ("year_harmonics", "day_harmonics"):
            harmonics = getattr(self, name)
            if not 0 <= harmonics <= 6:
                raise InputError(f"data.{name} is a whole number from 0 to 6, not {harmonics}")
        first, second = self.bounds
        if not first < second:
            raise InputError(f"data.val_from is before test_from, not {self.val_from} and {self.test_from}")

    @property
    def bounds(self) -> tuple[np.datetime64, np.datetime64]:
        """When validation begins, and test."""
        return _date("data.val_from", self.val_from), _date("data.test_from", self.test_from)


@dataclass(frozen=True)
class InfillModel:
    """Sizes of the network.

    Args:
        embed_dim, depth, num_heads, mlp_ratio: As ClimaX's.
    """

    embed_dim: int = 48
    depth: int = 2
    num_heads: int = 4
    mlp_ratio: float = 2.0

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads"):
            count(f"model.{name}", getattr(self, name))
        positive("model.mlp_ratio", self.mlp_ratio, "widths")
        if self.embed_dim % self.num_heads:
            raise InputError(f"model.embed_dim is a multiple of num_heads, not {self.embed_dim} and {self.num_heads}")


@dataclass(frozen=True)
class Series:
    """Anomalies at stations, divided in time.

    Attributes:
        stations: Where, and when.
        x: Anomalies over `std`, `[T, S]`, NaN where there is none.
        std: Their standard deviation over training, in the variable's unit, or its logarithm's.
        parts: Indices of the times of "train", "val" and "test" at which two stations or more have a value.
        hidden: Fixed hidden sets, `[T, S]`, for "val" and "test".
    """

    stations: Stations
    x: Array
    std: float
    parts: dict[str, NDArray[np.int64]]
    hidden: Mask

    def days(self, number: int | None) -> NDArray[np.int64]:
        """Times of training; with a number, those of so many days, spread evenly over it."""
        train = self.parts["train"]
        if number is None:
            return train
        day = self.stations.times[train].astype("datetime64[D]")
        return train[np.isin(day, spread_evenly(np.unique(day), number, "training_days", "days"))]

    def unseen(self, share: float, seed: int) -> Mask:
        """Stations that training never sees, `[S]`: one from each stretch of 1 / share stations in order of height."""
        number = len(self.stations)
        wanted = max(1, round(share * number))
        if number - wanted < 2:
            raise InputError(
                f"{self.stations.source} has {number} stations, of which data.unseen {share:g} leaves "
                f"{number - wanted} to train on: give two or more"
            )
        upwards = self.stations.elevation_m.argsort(kind="stable")
        random = np.random.RandomState(seed)  # whose numbers NumPy promises to keep
        mask = np.zeros(number, dtype=bool)
        mask[[random.choice(stretch) for stretch in np.array_split(upwards, wanted)]] = True
        return mask

    def terrain(self, control: str = "none", control_seed: int = 0) -> Terrain:
        """What biases see of all stations."""
        at = self.stations
        places = [torch.from_numpy(np.asarray(values, dtype=np.float32)) for values in (at.elevation_m, at.lat, at.lon)]
        return controlled(Terrain.of_points(*places), control, shuffled(len(at), control_seed))

    def inputs(self, seen: Mask, elevation_input: bool) -> Tensor:
        """Place of each station as the network has it, `[S, 3]`: east, north and up, standardised over `seen`."""
        at = self.stations
        east = eastward(torch.from_numpy(at.lon)).numpy() * np.cos(np.deg2rad(at.lat.mean()))
        columns = np.stack([east, at.lat, at.elevation_m], axis=1)
        columns = (columns - columns[seen].mean(axis=0)) / np.maximum(columns[seen].std(axis=0), 1e-6)
        columns[:, 2] *= elevation_input
        return torch.from_numpy(columns).float()


def read_series(settings: InfillSettings) -> Series:
    """Read stations and take their anomalies.

    Raises:
        InputError: If the file or its values do not fit; if a part has no time at which two stations have a value; if
            a station has too few values before test_from for a climatology.
    """
    units = {} if settings.elevation_unit is None else {"elevation": settings.elevation_unit}
    at = read_stations(settings.stations, settings.variable, leave_out=settings.leave_out, units=units)
    values = at.values
    if settings.transform == "log":
        if (values <= 0).any():
            raise InputError(
                f"{at.source}: transform: log is of values above 0, and {at.variable} is down to "
                f"{np.nanmin(values):g}: remove those, or set transform: none"
            )
        values = np.log(values)
    part = np.searchsorted(np.array(settings.bounds), at.times, side="right")
    several = np.isfinite(values).sum(axis=1) >= 2
    parts = {name: np.flatnonzero((part == index) & several) for index, name in enumerate(PARTITIONS)}
    for name, times in parts.items():
        if not len(times):
            raise InputError(
                f"{at.source} runs from {at.times[0]} to {at.times[-1]}, and with val_from {settings.val_from} and "
                f"test_from {settings.test_from} no time of {name} has values at two stations: choose other dates"
            )
    x = values - _climatology(at, values, part < 2, settings)
    std = float(np.nanstd(x[parts["train"]]))
    if not std > 0:
        raise InputError(f"{at.source}: {at.variable} never differs from its climatology: nothing is to be inferred")
    hidden = np.random.RandomState(SETS).random_sample(x.shape) < settings.hidden
    return Series(at, x / std, std, parts, hidden)


def _climatology(at: Stations, values: Array, known: Mask, settings: InfillSettings) -> Array:
    """Harmonics of the year times those of the day, fitted to each station's `known` times, `[T, S]`."""
    seconds = at.times.astype("datetime64[s]").astype(np.int64)
    days = seconds / SECONDS_A_DAY
    if settings.year_harmonics and np.ptp(days[known]) < DAYS_A_YEAR - 1:
        raise InputError(
            f"{at.source}: {np.ptp(days[known]):.0f} days before test_from are no year: set data.year_harmonics: 0"
        )
    year = _harmonics(days / DAYS_A_YEAR, settings.year_harmonics)
    day = _harmonics(days, settings.day_harmonics)
    terms = (year[:, :, None] * day[:, None, :]).reshape(len(days), -1)
    there = known[:, None] & np.isfinite(values)
    wanted = VALUES_A_TERM * terms.shape[1]
    few = [f"{name!r} ({n})" for name, n in zip(at.names, there.sum(axis=0), strict=True) if n < wanted]
    if few:
        raise InputError(
            f"{at.source}: a climatology of {terms.shape[1]} terms wants {wanted} values before test_from, and there "
            f"are fewer of {', '.join(few)}: name them in leave_out, or take fewer harmonics"
        )
    for cycle, turns, number in (
        ("year", days / DAYS_A_YEAR, settings.year_harmonics),
        ("day", days, settings.day_harmonics),
    ):
        gaps = [_longest_gap(turns[own]) for own in there.T]
        wide = [f"{name!r} ({gap:.2f})" for name, gap in zip(at.names, gaps, strict=True) if 2 * number * gap > 1]
        if wide:
            raise InputError(
                f"{at.source}: {number} harmonics of the {cycle} want values in all of it, with gaps of up to "
                f"{1 / (2 * number):.2f} {cycle}s, and before test_from there are longer ones at {', '.join(wide)}: "
                "name them in leave_out, or take fewer harmonics"
            )
    result = np.empty(values.shape)
    for index, own in enumerate(there.T):
        result[:, index] = terms @ np.linalg.lstsq(terms[own], values[own, index], rcond=None)[0]
    return result


def _longest_gap(turns: Array) -> float:
    """Of a cycle, the longest part without a value, in turns."""
    phases = np.unique(turns % 1)
    return float(np.diff(phases, append=phases[0] + 1).max())


def _harmonics(turns: Array, number: int) -> Array:
    angle = 2 * np.pi * turns[:, None] * np.arange(1, number + 1)
    return np.concatenate([np.ones((len(turns), 1)), np.cos(angle), np.sin(angle)], axis=1)


def _date(name: str, text: str) -> np.datetime64:
    date = moment(text)
    if date is None:
        raise InputError(f"{name} is a year or an ISO date of UTC such as 2000-06-01, not {text!r}")
    return date


class InfillNetwork(nn.Module):
    """Tokens are stations: an embedding of value, visibility and place, timm's blocks, a head.

    Args:
        settings: Sizes.
    """

    def __init__(self, settings: InfillModel) -> None:
        super().__init__()
        width = settings.embed_dim
        self.value = nn.Linear(2, width)
        self.place = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        sizes = (width, settings.num_heads, settings.mlp_ratio)
        self.blocks = nn.ModuleList([timm_block(*sizes, qkv_bias=True, drop=0.0) for _ in range(settings.depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, visible: Tensor, places: Tensor) -> Tensor:
        """Anomalies at all stations, `[B, L]`.

        Args:
            x: Anomalies, `[B, L]`; read where visible.
            visible: `[B, L]`, boolean.
            places: `[L, 3]`, of `Series.inputs`.
        """
        shown = torch.stack([torch.where(visible, x, 0.0), visible.to(x.dtype)], dim=-1)
        tokens = self.value(shown) + self.place(places)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens))[..., 0]


def split_arguments(bias_args: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What of `bias_args` is `attach_blocks`'s, the control's, and the bias's own.

    Raises:
        InputError: For an option that is for grids alone.
    """
    given = dict(bias_args or {})
    AttachOptions(**{name: value for name, value in given.items() if name in (*OF_ATTACH, *OF_CONTROL)})
    for name in given:
        if name in AttachOptions.names() and name not in (*OF_ATTACH, *OF_CONTROL):
            valid = ", ".join((*OF_ATTACH, *OF_CONTROL))
            raise InputError(f"{name} is for grids: at stations, bias_args take {valid} and the bias's own")
    parts = [{name: given.pop(name) for name in names if name in given} for names in (OF_ATTACH, OF_CONTROL)]
    return parts[0], parts[1], given


def build_infill(
    settings: InfillModel, *, seed: int, bias_type: str | None, bias_args: Mapping[str, Any] | None
) -> InfillNetwork:
    """A fresh network; the host's weights depend on the seed alone, not on the bias."""
    torch.manual_seed(seed)
    net = InfillNetwork(settings)
    of_attach, control, own = split_arguments(bias_args)
    if control.get("control") == "flat":
        of_attach["terrain_is_flat"] = True
    if bias_type is not None:
        attach_blocks(net, bias_type, points=True, bias_args=own, **{"blocks": "all", **of_attach})
    return net


@dataclass(frozen=True)
class Infill:
    """One network at work on a series.

    Attributes:
        series: Of all stations.
        unseen: Those that training never sees, `[S]`.
        elevation_input: Whether the network is told heights.
        times: Of training.
        terrain: What biases see of all stations.
    """

    series: Series
    unseen: Mask
    elevation_input: bool
    times: NDArray[np.int64]
    terrain: Terrain

    def fit(
        self,
        net: InfillNetwork,
        training: TrainingSettings,
        hidden: float,
        *,
        seed: int,
        keep_best: bool,
        on_step: Callable[[float | None], None],
    ) -> MaskedFit:
        """Train on the stations that are seen, of which others are hidden at each step.

        Args:
            net: Fresh; trained in place.
            training: How.
            hidden: Share that is hidden.
            seed: Of times and hidden sets.
            keep_best: Leave the weights of the least validation error, not the last ones.
            on_step: Called after every step, with the latest validation error or None.
        """
        random = torch.Generator().manual_seed(seed)
        seen = torch.from_numpy(np.flatnonzero(~self.unseen))
        x = torch.from_numpy(self.series.x[self.times]).float()[:, seen]
        known = x.isfinite()
        x = torch.where(known, x, 0.0)
        places = self.series.inputs(~self.unseen, self.elevation_input)[seen]

        def learn() -> None:
            rows = torch.randint(len(x), (training.batch_size,), generator=random)
            covered = torch.rand(len(rows), len(seen), generator=random) < hidden
            # a part of the ground is seen: handed in anew, since validation sees all of it
            with _over(net, self.terrain.select(seen)):
                inferred = net(x[rows], known[rows] & ~covered, places)
                scored = known[rows] & covered
                loss = ((inferred - x[rows]).square() * scored).sum() / scored.sum().clamp(min=1)
                loss.backward()

        return fit_masked(net, training, learn, lambda: self._validation(net), keep_best=keep_best, on_step=on_step)

    def infer(self, net: InfillNetwork, part: str, most: int | None = None) -> Array:
        """The network's anomalies at all stations, `[times, S]`, at a part's times or its first `most` of them."""
        batch_size = 256
        x = torch.from_numpy(self.series.x[self.series.parts[part]][:most]).float()
        visible = torch.from_numpy(self.visible(part)[:most])
        places = self.series.inputs(~self.unseen, self.elevation_input)
        net.eval()
        with torch.no_grad(), _over(net, self.terrain):
            batches = zip(x.split(batch_size), visible.split(batch_size), strict=True)
            return torch.cat([net(*batch, places) for batch in batches]).double().numpy()

    def visible(self, part: str) -> Mask:
        """What a method may see: values at stations that are neither hidden nor never seen."""
        times = self.series.parts[part]
        return np.isfinite(self.series.x[times]) & ~self.series.hidden[times] & ~self.unseen

    def scored(self, part: str) -> dict[str, Mask]:
        """What a method is held against: values at hidden stations, of those seen in training and the others.

        Times at which nothing is visible are left out.
        """
        times = self.series.parts[part]
        known = np.isfinite(self.series.x[times]) & self.visible(part).any(axis=1, keepdims=True)
        return {
            "seen in training": known & self.series.hidden[times] & ~self.unseen,
            "never seen": known & self.unseen,
        }

    def _validation(self, net: InfillNetwork) -> float:
        part = "val"
        errors = np.square(self.infer(net, part) - self.series.x[self.series.parts[part]])
        return float(np.sqrt(errors[self.scored(part)["seen in training"]].mean()))


@contextmanager
def _over(net: nn.Module, terrain: Terrain) -> Iterator[None]:
    biased = any(isinstance(part, ElevationBias) for part in net.modules())
    with terrain_given(net, terrain) if biased else nullcontext():
        yield
