"""Scores of forecasts, from sums over the pixels of each sample, which are kept.

Sample s, variable v, stratum k, pixel n with weight a_n = cos(lat_n) / mean cos(lat); e = prediction - truth in
physical units; sums over pixels run over the stratum:

    mse[s, v, k]        = sum(a e^2) / sum(a)
    rmse                = mean over s of sqrt(mse)                            as ClimaX has it
    rmse_standardised   = rmse / std_v                                        std_v: of normalize_std.npz
    skill_persistence   = 1 - M / M_p,  M = sum_s sum(a e^2) / sum_s sum(a)   M_p: of persistence
    skill_climatology   = 1 - M / M_c                                         M_c: of the climatology
    acc                 = sum(a p t) / sqrt(sum(a p^2) sum(a t^2))            over all samples and pixels

p and t are prediction and truth less the climatology, less their own unweighted mean over all samples and
pixels: ClimaX's ACC with the whole part as one batch, of stratum "all" only. Samples in which a stratum has no
pixel are left out of its means. Over variables, "mean" is the plain mean of their scores (for `rmse` of unlike
units, as in ClimaX's w_rmse).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from climax_elevation.compare.strata import Strata, StrataSettings, divide
from climax_elevation.data.format import PARTITIONS
from climax_elevation.files import save_npz
from climax_elevation.host.metrics import latitude_weights
from climax_elevation.host.shards import (
    ForecastDataset,
    GlobalForecastDataModule,
    Normalize,
    check_tiles,
    read_ground,
    read_places,
)
from climax_elevation.testbed.fit import DataSettings

Array = NDArray[np.floating]

METRICS = ("rmse_standardised", "rmse", "acc", "skill_persistence", "skill_climatology")
LOWER_IS_BETTER = ("rmse_standardised", "rmse")
PARTS = PARTITIONS[1:]  # that are scored
MEAN = "mean"
WIND = ("10m_u_component_of_wind", "10m_v_component_of_wind")


@dataclass(frozen=True)
class Samples:
    """Sums over pixels, for each sample of a part.

    Attributes:
        shard: Which shard a sample is of, `[S]`; shards that go on after one another count as one.
        weight: sum(a), `[S, K]`.
        squares: sum(a e^2), `[S, V, K]`, physical units squared.
        anomalies: sum(p), sum(t), sum(a p), sum(a t), sum(a p t), sum(a p^2), sum(a t^2) with p and t less the
            climatology alone, over all pixels, `[S, V, 7]`.
        pixels: How many a sample has.
    """

    shard: NDArray[np.int64]
    weight: Array
    squares: Array
    anomalies: Array
    pixels: int

    def __len__(self) -> int:
        return len(self.shard)


@dataclass(frozen=True)
class Scorer:
    """Knows the data that forecasts are scored on.

    Attributes:
        data: Its parts "val" and "test" are scored.
        strata: How pixels are divided.
        wind: Whether the shards hold both of `WIND`.
    """

    data: GlobalForecastDataModule
    strata: Strata
    wind: bool

    @staticmethod
    def of(settings: DataSettings, strata: StrataSettings, patch_size: int, batch_size: int) -> Scorer:
        """The scorer of a folder of shards.

        Raises:
            InputError: If the shards hold no orography, or patches do not tile it.
        """
        data = settings.module(batch_size)
        first = data.shards["val"][0]
        elevation_m, land = read_ground(data.root, first)
        with np.load(first.path) as shard:
            wind = all(name in shard.files for name in WIND)
        check_tiles(elevation_m.shape, patch_size)
        divided = divide(elevation_m, *read_places(data.root), patch_size, strata, land=land, wind=wind)
        return Scorer(data, divided, wind)

    def network(self, net: nn.Module, part: str) -> Samples:
        """Sums of a trained network's forecasts."""
        device = next(net.parameters()).device
        mean, std = (torch.from_numpy(np.asarray(a, dtype=np.float64))[:, None, None] for a in self._statistics())
        batches = iter(self._loader(part))

        @torch.no_grad()
        def predict(first: Tensor) -> Tensor:
            x, _, lead_times, variables, out_variables = next(batches)
            _, predicted = net.forward(
                x.to(device), None, lead_times.to(device), variables, out_variables, None, lat=None
            )
            return predicted.cpu().double() * std + mean

        net.eval()
        return self._sums(predict, part)

    def persistence(self, part: str) -> Samples:
        """Sums of the forecast that nothing changes."""
        return self._sums(lambda first: first, part)

    def climatology(self, part: str) -> Samples:
        """Sums of the forecast that it is as on average."""
        mean = self._climatology(part)
        return self._sums(lambda first: mean.expand_as(first), part)

    def _sums(self, predict: Callable[[Tensor], Tensor], part: str) -> Samples:
        weights = torch.from_numpy(latitude_weights(self.data.get_lat_lon()[0]))[:, None]
        climatology = self._climatology(part)
        parts = []
        for first, truth, u, v in self._observed(part):
            predicted = predict(first)
            masks = self.strata.masks(u, v, len(first)).flatten(2).double()
            area = weights.expand(truth.shape[-2:]).flatten()
            squares = (predicted - truth).square().flatten(2) * area
            anomalies = _anomaly_sums(predicted - climatology, truth - climatology, weights)
            parts.append((masks @ area, squares @ masks.transpose(1, 2), anomalies))
        weight, sums, means = (torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True))
        shards = self.data.shards[part]
        pairs = [shard.pairs(self.data.hparams["predict_range"]) for shard in shards]
        # shards that go on after one another are one stretch of time, in however many files it lies
        stretch = np.cumsum([shard.repeats is None for shard in shards]) - 1
        return Samples(np.repeat(stretch, pairs), weight, sums, means, int(area.numel()))

    def _observed(self, part: str) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Batches of targets at initial time, targets at forecast time, and wind at initial time, in physical units."""
        targets = self.data.out_variables
        wind = list(WIND) if self.wind else []
        inputs = list(dict.fromkeys([*targets, *wind]))
        same, same_out = (Normalize(np.zeros(len(names)), np.ones(len(names))) for names in (inputs, targets))
        steps = self.data.hparams["predict_range"]
        pairs = ForecastDataset(self.data.shards[part], inputs, targets, steps, 0.0, same, same_out)
        for x, y, *_ in DataLoader(pairs, batch_size=self.data.hparams["batch_size"]):
            u, v = (x[:, inputs.index(name)] for name in WIND) if wind else (None, None)
            yield x[:, : len(targets)].double(), y.double(), u, v

    def _loader(self, part: str) -> DataLoader:
        return self.data.val_dataloader() if part == "val" else self.data.test_dataloader()

    def _climatology(self, part: str) -> Tensor:
        return (self.data.val_clim if part == "val" else self.data.test_clim).double()

    def _statistics(self) -> tuple[Array, Array]:
        return self.data.output_transforms.mean, self.data.output_transforms.std


def _anomaly_sums(p: Tensor, t: Tensor, weights: Tensor) -> Tensor:
    terms = (p, t, weights * p, weights * t, weights * p * t, weights * p * p, weights * t * t)
    return torch.stack([term.sum(dim=(-2, -1)) for term in terms], dim=-1)


def score(
    metric: str, samples: Samples, references: dict[str, Samples], std: Array, counts: Array | None = None
) -> Array:
    """A score of a part, for each variable and stratum, as defined at the top.

    Args:
        metric: One of `METRICS`.
        samples: Of the forecast.
        references: Of "persistence" and "climatology".
        std: Standard deviations of the variables, `[V]`.
        counts: How often each sample counts, `[R, S]`, for R resamples; None: once, and R is 1.

    Returns:
        `[R, V + 1, K]`, the last of the variables being their mean; NaN where there is nothing to score.
    """
    counts = np.ones((1, len(samples))) if counts is None else counts
    with np.errstate(invalid="ignore", divide="ignore"):
        if metric == "acc":
            values = np.full((len(counts), *samples.squares.shape[1:]), np.nan)
            values[:, :, 0] = _acc(samples, counts)
        elif metric.startswith("skill_"):
            reference = references[metric.removeprefix("skill_")]
            values = 1 - _total(samples, counts) / _total(reference, counts)
        else:
            values = _mean_root(samples, counts)
            values = values / std[:, None] if metric == "rmse_standardised" else values
    return np.concatenate([values, values.mean(axis=1, keepdims=True)], axis=1)


def _mean_root(samples: Samples, counts: Array) -> Array:
    there = samples.weight > 0
    roots = np.where(there[:, None], np.sqrt(samples.squares / samples.weight[:, None]), 0.0)
    return np.tensordot(counts, roots, axes=1) / (counts @ there.astype(float))[:, None]


def _total(samples: Samples, counts: Array) -> Array:
    return np.tensordot(counts, samples.squares, axes=1) / (counts @ samples.weight)[:, None]


def _acc(samples: Samples, counts: Array) -> Array:
    sums = np.tensordot(counts, samples.anomalies, axes=1)  # [R, V, 7]
    plain_p, plain_t, p, t, pt, pp, tt = np.moveaxis(sums, -1, 0)
    number = counts.sum(axis=1)[:, None] * samples.pixels  # the sum of the weights as well, whose mean is 1
    mean_p, mean_t = plain_p / number, plain_t / number
    covariance = pt - mean_p * t - mean_t * p + mean_p * mean_t * number
    variances = [xx - 2 * mean * x + mean**2 * number for xx, x, mean in ((pp, p, mean_p), (tt, t, mean_t))]
    return covariance / np.sqrt(variances[0] * variances[1])


def save_samples(path: Path, parts: dict[str, Samples], variables: Sequence[str], strata: Sequence[str]) -> None:
    """Write samples by name (of a part, or of a reference and a part), with what their axes mean."""
    arrays = {
        f"{name}/{item.name}": np.asarray(getattr(samples, item.name))
        for name, samples in parts.items()
        for item in fields(samples)
    }
    save_npz(path, {**arrays, "variables": np.array(list(variables)), "strata": np.array(list(strata))})


def load_samples(path: Path) -> dict[str, Samples]:
    """What `save_samples` wrote."""
    with np.load(path) as archive:
        names = dict.fromkeys(key.rpartition("/")[0] for key in archive.files if "/" in key)
        return {
            name: Samples(
                archive[f"{name}/shard"],
                archive[f"{name}/weight"],
                archive[f"{name}/squares"],
                archive[f"{name}/anomalies"],
                int(archive[f"{name}/pixels"]),
            )
            for name in names
        }
