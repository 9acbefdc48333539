"""Markdown of comparisons of networks that infer hidden values: what all of them tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from climax_elevation.compare.config import Design
from climax_elevation.compare.inference import Arm, Key
from climax_elevation.compare.report import interval, markdown, number, signed
from climax_elevation.compare.scores import MEAN
from climax_elevation.compare.significance import FEWEST_BLOCKS
from climax_elevation.compare.tables import BETTER, NONE_FOUND, WORSE
from climax_elevation.testbed.fit import TrainingSettings

PART = "test"
TIME = ("time_low", "time_high")


def trained(configuration: Design, training: TrainingSettings) -> str:
    """The line about how."""
    return (
        f"- Training: {training.steps} steps of {training.batch_size} times, learning rate {training.lr:g}, of the "
        f"biases {training.lr_factor:g} times that; weights of "
        f"{'the least validation error' if configuration.choose_on == 'val' else 'the last step'}."
    )


def cost(configuration: Design, records: Sequence[Mapping[str, Any]]) -> str:
    """The line about seeds, time and versions."""
    versions = sorted({f"{name} {text}" for record in records for name, text in record["versions"].items()})
    return (
        f"- Seeds: {', '.join(map(str, configuration.seeds))}; {len(records)} runs, "
        f"{sum(record['seconds'] for record in records) / 60:.0f} minutes in all, one after another; "
        f"{', '.join(versions)}."
    )


def scores(table: pd.DataFrame, arms: Sequence[Arm], strata: Sequence[str], spread_of: str) -> str:
    """RMSE in standard deviations, mean over seeds and its standard deviation between them.

    Args:
        table: Of all arms.
        arms: Those that are told of.
        strata: Columns of each.
        spread_of: What the standard deviation between seeds holds besides, in words.
    """
    kept = table[(table.part == PART) & (table.metric == "rmse_standardised") & (table.variable == MEAN)]
    groups = kept.groupby(["arm", "variant", "stratum"], sort=False)["value"].agg(["mean", "std"])
    header = ["", *(f"{stratum}, heights {arm.told}" for arm in arms for stratum in strata)]
    rows = []
    for variant in kept.variant.unique():
        cells = []
        for arm in arms:
            for stratum in strata:
                mean, spread = groups.loc[(arm.name, variant, stratum)]
                cells.append(f"{mean:.4f}" if pd.isna(spread) else f"{mean:.4f} ± {spread:.4f}")
        rows.append([str(variant), *cells])
    besides = f", {spread_of}" if spread_of else ""
    return (
        "RMSE on test over the anomalies' standard deviation: mean over seeds, and standard deviation between them"
        f"{besides}. Below the networks: climatology, inverse distance and optimal interpolation, which know heights "
        "where their name says so.\n\n" + markdown(header, rows)
    )


def compared(configuration: Design, differences: pd.DataFrame, strata: Sequence[str], where: str) -> str:
    """Each comparison of an arm, a row a stratum; `where` heads their column."""
    kept = differences[(differences.part == PART) & (differences.variable == MEAN)]
    kept = kept[kept.metric == configuration.metric]
    share = f"{100 * configuration.statistics.confidence:g}%"
    header = ["variant", "against", where, "error, %", f"{share} over seeds", f"{share} over time", "p, Holm", ""]
    rows = []
    for variant, counterpart in configuration.comparisons:
        pair = kept[(kept.variant == variant) & (kept.counterpart == counterpart) & kept.stratum.isin(strata)]
        for row in pair.to_dict("records"):
            ends = [interval(row[f"percent_{a}"], row[f"percent_{b}"]) for a, b in (("low", "high"), TIME)]
            rows.append([variant, counterpart, row["stratum"], signed(row["percent"]), *ends])
            rows[-1] += [number(row["p_holm"]), row["verdict"]]
    return markdown(header, rows) if rows else ""


def fitted_on_training(folder: str, fitted: Mapping[Key, Mapping[str, Mapping[str, Any]]]) -> str:
    """Parameters of the methods of a folder."""
    lines = []
    for method in next(iter(fitted.values())):
        each = [parameters[method] for (of, _), parameters in fitted.items() if of == folder]
        told = [f"{name} {_span([own[name] for own in each])}" for name in each[0]]
        lines.append(f"- {method}: {', '.join(told)}")
    return "Fitted on training, over the seeds:\n\n" + "\n".join(lines)


def _span(values: Sequence[Any]) -> str:
    if isinstance(values[0], str):
        return ", ".join(dict.fromkeys(values))
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def learned(table: pd.DataFrame) -> str:
    """Single numbers of the biases, before and after training."""
    train = table[table.part == "train"]
    kept = train[train.metric.isin(["scalar_before", "scalar_after"])]
    if kept.empty:
        return ""
    means = kept.groupby(["arm", "variant", "variable", "metric"], sort=False)["value"].mean()
    rows = []
    for arm, variant, name in dict.fromkeys(key[:3] for key in means.index):
        first, last = (number(means.loc[(arm, variant, name, end)]) for end in ("scalar_before", "scalar_after"))
        rows.append([arm, variant, name, first, last])
    return "## What the biases learned\n\nMeans over seeds of single numbers.\n\n" + markdown(
        ["arm", "variant", "parameter", "first", "last"], rows
    )


def reading(configuration: Design, differences: pd.DataFrame, scored: str, of_row: str, without_block: str) -> str:
    """How to read it all.

    Args:
        configuration: What was asked for.
        differences: Of all arms.
        scored: Where errors are of, in words.
        of_row: Which comparisons of an arm Holm corrects for together, in words.
        without_block: What is drawn together where `statistics.block` is not given.
    """
    settings = configuration.statistics
    blocks = without_block if settings.block is None else f"{settings.block} times"
    lines = [
        "## How to read it",
        "",
        f"The error is the mean over times of the root of the mean square at {scored}. "
        f"'{BETTER}' and '{WORSE}': the p-value of the paired t-test over seeds, after Holm's correction for all "
        f"comparisons of the arm {of_row}, is below {1 - settings.confidence:g}, and the interval over time, "
        f"where there is one, leaves out 0; all else is '{NONE_FOUND}'. Time was resampled {settings.resamples} times "
        f"in blocks of {blocks}, the seeds' mean each time.",
    ]
    if len(differences) and differences[differences.part == PART].time_low.isna().all():
        lines.append(f"There are fewer than {FEWEST_BLOCKS} such blocks, so there is no interval over time.")
    return "\n".join(lines)
