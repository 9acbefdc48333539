"""How certain a difference is: over seeds, over time, and with several variants at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from climax_elevation.checks import count
from climax_elevation.errors import InputError

Array = NDArray[np.floating]

FEWEST_BLOCKS = 5
"""Of fewer, resampling says little about others that might have been drawn."""


@dataclass(frozen=True)
class StatisticsSettings:
    """How certain is certain.

    Args:
        confidence: Of all intervals; 1 - confidence is what p-values are held against.
        block: Samples in a row that are drawn together, in resampling time; None: a shard, which of the
            simulated tracer is an episode.
        resamples: How often time is resampled.
        seed: Of resampling.
    """

    confidence: float = 0.95
    block: int | None = None
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.5 < self.confidence < 1:
            raise InputError(f"statistics.confidence is a share between 0.5 and 1, not {self.confidence}")
        count("statistics.resamples", self.resamples)
        if self.block is not None:
            count("statistics.block", self.block)
        if self.seed < 0:
            raise InputError(f"statistics.seed is 0 or more, not {self.seed}")


@dataclass(frozen=True)
class Interval:
    """A mean difference with its interval.

    Attributes:
        mean: Of the differences.
        low, high: Ends of the interval; NaN where there is none.
        p: Of the two-sided test that the true mean is 0; NaN where there is none.
    """

    mean: float
    low: float
    high: float
    p: float


def paired_t(differences: Sequence[float] | Array, confidence: float) -> Interval:
    """Student's t interval of the mean of n paired differences, and its p-value.

        mean +- t s / sqrt(n),    s^2 = sum (d - mean)^2 / (n - 1),    t: quantile of n - 1 degrees of freedom

    One difference has no interval. Differences that are all the same have one of no width, and a p-value
    of 0, or of 1 where they are all 0.

    Args:
        differences: `[n]`, one a seed.
        confidence: Such as 0.95.
    """
    d = np.asarray(differences, dtype=np.float64)
    mean = float(d.mean())
    if len(d) < 2 or not np.isfinite(d).all():
        return Interval(mean, math.nan, math.nan, math.nan)
    error = float(d.std(ddof=1)) / math.sqrt(len(d))
    if error == 0:
        return Interval(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    half = float(stats.t.ppf((1 + confidence) / 2, len(d) - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, len(d) - 1))
    return Interval(mean, mean - half, mean + half, p)


def holm(p: Sequence[float] | Array) -> Array:
    """Holm's step-down correction for several tests at once.

    With the m p-values in ascending order, that of rank i (from 1) becomes

        max over j <= i of min(1, (m - j + 1) p_j)

    NaN is no test: it stays NaN and does not count in m.
    """
    p = np.asarray(p, dtype=np.float64)
    corrected = np.full(p.shape, np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return corrected


def resample(shard: NDArray[np.integer], settings: StatisticsSettings) -> Array | None:
    """Draw the samples of a part anew, in blocks, as often as `settings` says.

    Without `block`: as many shards as there are, with replacement (a cluster bootstrap). With it: the
    moving block bootstrap, ceil(S / block) runs of `block` samples, each beginning anywhere, of which the
    last is cut so that there are S again. Samples are in time order, so a block may join two shards.

    Args:
        shard: Which shard a sample is of, `[S]`.
        settings: How.

    Returns:
        How often each sample was drawn, `[resamples, S]`; None if there are fewer than `FEWEST_BLOCKS`.
    """
    random = np.random.default_rng(settings.seed)
    size = len(shard)
    if settings.block is None:
        names, place = np.unique(shard, return_inverse=True)
        if len(names) < FEWEST_BLOCKS:
            return None
        drawn = random.integers(len(names), size=(settings.resamples, len(names)))
        return _counts(drawn, len(names))[:, place]
    if size < FEWEST_BLOCKS * settings.block:
        return None
    blocks = math.ceil(size / settings.block)
    begin = random.integers(size - settings.block + 1, size=(settings.resamples, blocks))
    drawn = (begin[:, :, None] + np.arange(settings.block)).reshape(settings.resamples, -1)[:, :size]
    return _counts(drawn, size)


def _counts(drawn: NDArray[np.integer], number: int) -> Array:
    """How often each of `number` things occurs in each row."""
    rows = np.arange(len(drawn))[:, None] * number
    return np.bincount((drawn + rows).ravel(), minlength=len(drawn) * number).reshape(len(drawn), number).astype(float)


def percentiles(values: Array, confidence: float) -> tuple[float, float]:
    """Ends of the bootstrap's percentile interval; NaN where a value is."""
    if not np.isfinite(values).all():
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
