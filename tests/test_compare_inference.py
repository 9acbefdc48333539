"""Statistics of a comparison: by hand, and by how often they are right."""

import math

import numpy as np
import pytest
from scipy import stats

from climax_elevation.compare.significance import StatisticsSettings, holm, paired_t, percentiles, resample
from climax_elevation.errors import InputError


def test_t_interval_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, s = 1, error 1 / sqrt(3) = 0.57735.

    With 2 degrees of freedom the 97.5 % quantile is 4.30265, so the interval is 2 +- 2.48414; t = 3.46410, and
    with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2) = 1 - 3.46410 / 3.74166 = 0.07418.
    """
    found = paired_t([1.0, 2.0, 3.0], 0.95)
    assert found.mean == 2.0
    assert (found.low, found.high) == pytest.approx((-0.48414, 4.48414), abs=1e-5)
    assert found.p == pytest.approx(0.07418, abs=1e-5)


def test_t_interval_is_scipys() -> None:
    random = np.random.default_rng(1)
    own, other = random.normal(0.3, 1, 7), random.normal(0, 1, 7)
    expected = stats.ttest_rel(own, other)
    found = paired_t(own - other, 0.9)
    interval = expected.confidence_interval(0.9)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue))


def test_what_has_no_interval() -> None:
    alone = paired_t([0.5], 0.95)
    assert alone.mean == 0.5
    assert all(map(math.isnan, (alone.low, alone.high, alone.p)))
    diverged = paired_t([0.5, math.nan], 0.95)
    assert all(map(math.isnan, (diverged.mean, diverged.low, diverged.p)))
    same = paired_t([0.0, 0.0, 0.0], 0.95)
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)
    assert paired_t([0.5, 0.5], 0.95).p == 0.0


def test_t_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    draws = random.normal(0.7, 2.0, (4000, 5))
    intervals = [paired_t(draw, 0.95) for draw in draws]
    covered = np.mean([interval.low <= 0.7 <= interval.high for interval in intervals])
    assert covered == pytest.approx(0.95, abs=0.012)  # three and a half standard errors of 4000 draws


def test_holm_by_hand() -> None:
    """0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, and 0.04, which must not fall below 0.06."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.04, math.nan, 0.02]), [0.04, math.nan, 0.04])  # two tests, not three
    assert holm([]).size == 0


def test_holm_keeps_the_error_of_the_family() -> None:
    p = np.random.default_rng(3).random((4000, 6))
    false_alarms = np.mean([(holm(row) < 0.05).any() for row in p])
    assert false_alarms == pytest.approx(0.049, abs=0.012)  # 1 - (1 - 0.05 / 6)^6
    assert all((holm(row) >= row).all() for row in p[:100])


def test_shards_are_drawn_whole() -> None:
    shard = np.repeat(np.arange(6), [1, 2, 3, 1, 2, 3])
    counts = resample(shard, StatisticsSettings(resamples=500))
    assert counts is not None
    by_shard = [counts[:, shard == name] for name in range(6)]
    assert all((block == block[:, :1]).all() for block in by_shard)
    assert (sum(block[:, 0] for block in by_shard) == 6).all()
    assert np.mean([block[:, 0] for block in by_shard], axis=1) == pytest.approx(1, abs=0.2)
    assert resample(np.repeat(np.arange(4), 50), StatisticsSettings()) is None


def test_blocks_are_runs_of_samples() -> None:
    shard = np.zeros(23, dtype=int)
    counts = resample(shard, StatisticsSettings(block=4, resamples=500))
    assert counts is not None
    assert (counts.sum(axis=1) == 23).all()
    # an end belongs to one block only, a middle to four
    assert counts[:, 0].mean() < 0.6 * counts[:, 11].mean()
    assert resample(shard, StatisticsSettings(block=5, resamples=10)) is None
    again = resample(shard, StatisticsSettings(block=4, resamples=500))
    np.testing.assert_array_equal(counts, again)


def _coverage(series: np.ndarray, shard: np.ndarray, settings: StatisticsSettings) -> float:
    counts = resample(shard, settings)
    assert counts is not None
    weights = counts / counts.sum(axis=1, keepdims=True)
    intervals = [percentiles(weights @ each, 0.95) for each in series]
    return float(np.mean([low <= 0 <= high for low, high in intervals]))


def test_blocks_cover_what_single_samples_do_not() -> None:
    random = np.random.default_rng(4)
    noise = random.normal(size=(400, 950))
    series = np.zeros_like(noise)
    for t in range(1, 950):
        series[:, t] = 0.7 * series[:, t - 1] + noise[:, t]
    series = series[:, 50:]
    shard = np.zeros(900, dtype=int)
    blocks = _coverage(series, shard, StatisticsSettings(block=30, resamples=400))
    single = _coverage(series, shard, StatisticsSettings(block=1, resamples=400))
    # of the variance 17/3, blocks of 30 miss 15.6/30, and estimate the rest from 30 blocks: 0.92 +- 0.014 is due;
    # single samples see a variance of 1 and are due 0.59
    assert blocks > 0.88
    assert single < 0.7


def test_shards_cover_what_single_samples_do_not() -> None:
    random = np.random.default_rng(5)
    shard = np.repeat(np.arange(40), 3)
    series = random.normal(size=(400, 40))[:, shard] + 0.3 * random.normal(size=(400, 120))
    assert _coverage(series, shard, StatisticsSettings(resamples=400)) == pytest.approx(0.94, abs=0.03)
    assert _coverage(series, shard, StatisticsSettings(block=1, resamples=400)) < 0.82


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence": 95}, "confidence is a share"),
        ({"block": 0}, "block is a whole number of 1 or more"),
        ({"resamples": 0}, "resamples is a whole number of 1 or more"),
        ({"seed": -1}, "seed is 0 or more"),
    ],
)
def test_mistakes(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        StatisticsSettings(**arguments)
