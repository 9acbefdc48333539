"""Scores and their differences as tables, one row a number.

results.csv: variant, seed, part, variable, metric, stratum, value. The variants "persistence",
"climatology" and, of the simulated tracer, "floor, first wind" and "floor, true wind" have no seed. What
training cost has part "train": the metrics seconds_a_step, peak_memory_mib and seconds (of the whole run),
and each scalar of a bias before and after training, its name as the variable.

differences.csv: variant less counterpart, the mean over seeds.

| column | what |
|---|---|
| variant, counterpart, part, metric, variable, stratum | which |
| seeds | number of pairs |
| value, counterpart_value | means over seeds |
| difference | value - counterpart_value |
| low, high, p | t interval over seeds and its two-sided p-value |
| p_holm | p corrected for all comparisons of this part, metric, variable and stratum |
| time_low, time_high | block bootstrap over the part's samples, seeds averaged |
| percent, percent_low, ... | the same over counterpart_value, for errors |
| verdict | one of those below |

"better" and "worse": p_holm is below 1 - confidence, and the interval over time, where there is one, leaves out
0. "no difference found": all else, unless there is "one seed: no interval", or a difference is "not finite".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from climax_elevation.compare.config import Design
from climax_elevation.compare.runs import Finished
from climax_elevation.compare.scores import LOWER_IS_BETTER, MEAN, METRICS, PARTS, Samples, score
from climax_elevation.compare.significance import holm, paired_t, percentiles, resample
from climax_elevation.compare.strata import ALL

Array = NDArray[np.floating]

BETTER, WORSE, NONE_FOUND = "better", "worse", "no difference found"
ONE_SEED, NOT_FINITE = "one seed: no interval", "not finite"
ENDS = ("difference", "low", "high", "time_low", "time_high")


@dataclass(frozen=True)
class Results:
    """All that was computed.

    Attributes:
        configuration: What was asked for.
        variables: The targets.
        strata: Names of the strata.
        std: Standard deviations of the targets.
        runs: By variant and seed.
        references: By part, "persistence" and "climatology".
        floors: Of the tracer, by part; see `climax_elevation.testbed.tracer.Floor`.
        host: "ClimaX" or "stand-in".
        metrics: Those that there are, of `climax_elevation.compare.scores.METRICS`.
    """

    configuration: Design
    variables: list[str]
    strata: tuple[str, ...]
    std: Array
    runs: dict[tuple[str, int], Finished]
    references: dict[str, dict[str, Samples]]
    floors: dict[str, dict[str, float]]
    host: str
    metrics: tuple[str, ...] = METRICS

    def score(self, metric: str, samples: Samples, part: str, counts: Array | None = None) -> Array:
        """`climax_elevation.compare.scores.score` against this part's references."""
        return score(metric, samples, self.references.get(part, {}), self.std, counts)

    def shard(self, part: str) -> NDArray[np.integer]:
        """Which shard each sample of a part is of; the same for all runs."""
        return next(iter(self.runs.values())).samples[part].shard

    def of_variant(self, metric: str, variant: str, part: str) -> Array:
        """Of each seed, `[seeds, V + 1, K]`."""
        seeds = self.configuration.seeds
        return np.concatenate(
            [self.score(metric, self.runs[variant, seed].samples[part], part) for seed in seeds], axis=0
        )

    def resampled(self, metric: str, variant: str, part: str, counts: Array) -> Array:
        """Mean over seeds of each resample, `[R, V + 1, K]`."""
        seeds = self.configuration.seeds
        scores = [self.score(metric, self.runs[variant, seed].samples[part], part, counts) for seed in seeds]
        return np.mean(scores, axis=0)

    def places(self) -> Iterator[tuple[int, str, int, str]]:
        """Index and name of each variable and stratum of a score."""
        for v, variable in enumerate([*self.variables, MEAN]):
            for k, stratum in enumerate(self.strata):
                yield v, variable, k, stratum


def results_table(results: Results) -> pd.DataFrame:
    """results.csv."""
    rows: list[dict[str, Any]] = []
    for (variant, seed), run in results.runs.items():
        for part in PARTS:
            rows += _score_rows(results, variant, seed, part, run.samples[part])
        rows += _cost_rows(variant, seed, run.record)
    for part in PARTS:
        for name, samples in results.references.get(part, {}).items():
            rows += _score_rows(results, name, None, part, samples)
        for name in ("initial_wind", "true_wind"):
            if part in results.floors:
                variant = f"floor, {name.removesuffix('_wind').replace('initial', 'first')} wind"
                value = results.floors[part][name]
                rows.append(_row(variant, None, part, results.variables[0], "rmse", ALL, value))
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def _score_rows(results: Results, variant: str, seed: int | None, part: str, samples: Samples) -> list[dict[str, Any]]:
    rows = []
    for metric in results.metrics:
        values = results.score(metric, samples, part)[0]
        for v, variable, k, stratum in results.places():
            if metric != "acc" or stratum == ALL:
                rows.append(_row(variant, seed, part, variable, metric, stratum, float(values[v, k])))
    return rows


def _cost_rows(variant: str, seed: int, record: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        _row(variant, seed, "train", "", name, "", record[name])
        for name in ("seconds_a_step", "peak_memory_mib", "seconds")
    ]
    for name, ends in record["scalars"].items():
        for metric, value in zip(("scalar_before", "scalar_after"), ends, strict=True):
            rows.append(_row(variant, seed, "train", name, metric, "", value))
    return rows


def _row(
    variant: str, seed: int | None, part: str, variable: str, metric: str, stratum: str, value: float
) -> dict[str, Any]:
    return {
        "variant": variant,
        "seed": seed,
        "part": part,
        "variable": variable,
        "metric": metric,
        "stratum": stratum,
        "value": value,
    }


def differences_table(results: Results) -> pd.DataFrame:
    """differences.csv."""
    settings = results.configuration.statistics
    rows: list[dict[str, Any]] = []
    for part in PARTS:
        counts = resample(results.shard(part), settings)
        for metric in results.metrics:
            rows += _metric_rows(results, part, metric, counts)
    if not rows:
        return pd.DataFrame(columns=["variant", "counterpart", "part", "metric", "variable", "stratum", "verdict"])
    table = pd.DataFrame(rows)
    family = ["part", "metric", "variable", "stratum"]
    table.insert(table.columns.get_loc("p") + 1, "p_holm", table.groupby(family)["p"].transform(holm))
    for name in ENDS:
        share = 100 * table[name] / table["counterpart_value"]
        column = name.replace("difference", "percent") if name == "difference" else f"percent_{name}"
        table[column] = share.where(table["metric"].isin(LOWER_IS_BETTER))
    table["verdict"] = [verdict(row, 1 - settings.confidence) for row in table.to_dict("records")]
    return table


def _metric_rows(results: Results, part: str, metric: str, counts: Array | None) -> list[dict[str, Any]]:
    settings, comparisons = results.configuration.statistics, results.configuration.comparisons
    names = dict.fromkeys(name for pair in comparisons for name in pair)
    values = {name: results.of_variant(metric, name, part) for name in names}
    drawn = {} if counts is None else {name: results.resampled(metric, name, part, counts) for name in names}
    rows = []
    for variant, counterpart in comparisons:
        for v, variable, k, stratum in results.places():
            if metric == "acc" and stratum != ALL:
                continue
            own, other = values[variant][:, v, k], values[counterpart][:, v, k]
            interval = paired_t(own - other, settings.confidence)
            time_low, time_high = math.nan, math.nan
            if drawn:
                apart = drawn[variant][:, v, k] - drawn[counterpart][:, v, k]
                time_low, time_high = percentiles(apart, settings.confidence)
            rows.append(
                {
                    "variant": variant,
                    "counterpart": counterpart,
                    "part": part,
                    "metric": metric,
                    "variable": variable,
                    "stratum": stratum,
                    "seeds": len(own),
                    "value": own.mean(),
                    "counterpart_value": other.mean(),
                    "difference": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "p": interval.p,
                    "time_low": time_low,
                    "time_high": time_high,
                }
            )
    return rows


def verdict(row: dict[str, Any], level: float) -> str:
    """What a row of differences amounts to, as defined at the top; level is 1 - confidence."""
    if not math.isfinite(row["difference"]):
        return NOT_FINITE
    if row["seeds"] < 2:
        return ONE_SEED
    within_time = row["time_low"] <= 0 <= row["time_high"]  # false where there is no interval
    if not row["p_holm"] < level or within_time:
        return NONE_FOUND
    return BETTER if (row["difference"] < 0) == (row["metric"] in LOWER_IS_BETTER) else WORSE
