"""A comparison at stations as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from climax_elevation.compare.report import interval, markdown, number, signed
from climax_elevation.compare.scores import MEAN
from climax_elevation.compare.significance import FEWEST_BLOCKS
from climax_elevation.compare.strata import ALL
from climax_elevation.compare.tables import BETTER, NONE_FOUND, WORSE
from climax_elevation.testbed.infill import Series

if TYPE_CHECKING:
    from climax_elevation.compare.infill import InfillConfiguration

PART = "test"
TOLD = {False: "heights withheld", True: "heights given"}


def report(
    configuration: InfillConfiguration,
    series: Series,
    records: Sequence[Mapping[str, Any]],
    table: pd.DataFrame,
    differences: pd.DataFrame,
    fitted: Mapping[tuple[int | None, int], Mapping[str, Mapping[str, Any]]],
) -> str:
    """The Markdown text.

    Args:
        configuration, series: What was asked for, and of what.
        records: Of all runs.
        table, differences: Of all arms.
        fitted: Parameters of the methods, by days of training and seed.
    """
    sections = [_setting(configuration, series, records)]
    for days in configuration.training_days:
        sections.append(f"## Trained on {'all days' if days is None else f'{days} days'}")
        arms = [arm for arm in configuration.arms if arm.days == days]
        sections.append(_scores(table, [arm.name for arm in arms]))
        for arm in arms:
            sections.append(f"### {TOLD[arm.elevation_input].capitalize()}")
            sections.append(_compared(configuration, differences[differences.arm == arm.name]))
        sections.append(_fitted(days, fitted))
    sections += [_learned(table), _reading(configuration, differences)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _setting(configuration: InfillConfiguration, series: Series, records: Sequence[Mapping[str, Any]]) -> str:
    data, model, training, at = configuration.data, configuration.model, configuration.training, series.stations
    unit = f"{at.unit or 'no unit named'}{', its logarithm' if data.transform == 'log' else ''}"
    versions = sorted({f"{name} {text}" for record in records for name, text in record["versions"].items()})
    parts = ", ".join(f"{part} {len(times)}" for part, times in series.parts.items())
    unseen = int(series.unseen(data.unseen, configuration.seeds[0]).sum())
    return "\n".join(
        [
            "# Comparison at stations",
            "",
            f"- Data: {at.variable} ({unit}) at {len(at)} stations, {at.elevation_m.min():.0f} to "
            f"{at.elevation_m.max():.0f} m; times: {parts} (validation from {data.val_from}, test from "
            f"{data.test_from}). Anomalies from each station's own climatology ({data.year_harmonics} harmonics of the "
            f"year, {data.day_harmonics} of the day, fitted to what is before test); their standard deviation in "
            f"training is {series.std:.4g}.",
            f"- Hidden: {100 * data.hidden:g} % of the stations at each time, others each time in training, a fixed "
            f"set of each time in validation and test; and always {unseen} stations that training never sees, drawn "
            "anew for each seed, one from each stretch of heights.",
            f"- Network: {model.depth} blocks, {model.embed_dim} wide, {model.num_heads} heads.",
            f"- Training: {training.steps} steps of {training.batch_size} times, learning rate {training.lr:g}, of the "
            f"biases {training.lr_factor:g} times that; weights of "
            f"{'the least validation error' if configuration.choose_on == 'val' else 'the last step'}.",
            f"- Seeds: {', '.join(map(str, configuration.seeds))}; {len(records)} runs, "
            f"{sum(record['seconds'] for record in records) / 60:.0f} minutes in all, one after another; "
            f"{', '.join(versions)}.",
        ]
    )


def _scores(table: pd.DataFrame, arms: Sequence[str]) -> str:
    """RMSE in standard deviations, mean over seeds and its standard deviation between them."""
    kept = table[(table.part == PART) & (table.metric == "rmse_standardised") & (table.variable == MEAN)]
    strata = [name for name in kept.stratum.unique() if name != ALL]
    groups = kept.groupby(["arm", "variant", "stratum"], sort=False)["value"].agg(["mean", "std"])
    header = ["", *(f"{stratum}, heights {arm.split('_')[0]}" for arm in arms for stratum in strata)]
    rows = []
    for variant in kept.variant.unique():
        cells = []
        for arm in arms:
            for stratum in strata:
                mean, spread = groups.loc[(arm, variant, stratum)]
                cells.append(f"{mean:.4f}" if pd.isna(spread) else f"{mean:.4f} ± {spread:.4f}")
        rows.append([str(variant), *cells])
    return (
        "RMSE on test over the anomalies' standard deviation: mean over seeds, and standard deviation between them, "
        "which holds other stations each time. Below the networks: climatology, inverse distance and optimal "
        "interpolation, which know heights where their name says so.\n\n" + markdown(header, rows)
    )


def _compared(configuration: InfillConfiguration, differences: pd.DataFrame) -> str:
    kept = differences[(differences.part == PART) & (differences.variable == MEAN)]
    kept = kept[(kept.metric == configuration.metric) & (kept.stratum != ALL)]
    share = f"{100 * configuration.statistics.confidence:g}%"
    header = ["variant", "against", "stations", "error, %", f"{share} over seeds", f"{share} over time", "p, Holm", ""]
    rows = []
    for variant, counterpart in configuration.comparisons:
        pair = kept[(kept.variant == variant) & (kept.counterpart == counterpart)]
        for row in pair.to_dict("records"):
            ends = [interval(row[f"percent_{a}"], row[f"percent_{b}"]) for a, b in (("low", "high"), TIME)]
            rows.append([variant, counterpart, row["stratum"], signed(row["percent"]), *ends])
            rows[-1] += [number(row["p_holm"]), row["verdict"]]
    return markdown(header, rows) if rows else ""


TIME = ("time_low", "time_high")


def _fitted(days: int | None, fitted: Mapping[tuple[int | None, int], Mapping[str, Mapping[str, Any]]]) -> str:
    lines = []
    for method in next(iter(fitted.values())):
        each = [parameters[method] for (of, _), parameters in fitted.items() if of == days]
        told = [f"{name} {_span([own[name] for own in each])}" for name in each[0]]
        lines.append(f"- {method}: {', '.join(told)}")
    return "Fitted on training, over the seeds:\n\n" + "\n".join(lines)


def _span(values: Sequence[Any]) -> str:
    if isinstance(values[0], str):
        return ", ".join(dict.fromkeys(values))
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _learned(table: pd.DataFrame) -> str:
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


def _reading(configuration: InfillConfiguration, differences: pd.DataFrame) -> str:
    settings = configuration.statistics
    blocks = "a month" if settings.block is None else f"{settings.block} times"
    lines = [
        "## How to read it",
        "",
        "The error is the mean over times of the root of the mean square at hidden stations. "
        f"'{BETTER}' and '{WORSE}': the p-value of the paired t-test over seeds, after Holm's correction for all "
        f"comparisons of the arm at these stations, is below {1 - settings.confidence:g}, and the interval over time, "
        f"where there is one, leaves out 0; all else is '{NONE_FOUND}'. Time was resampled {settings.resamples} times "
        f"in blocks of {blocks}, the seeds' mean each time.",
    ]
    if len(differences) and differences[differences.part == PART].time_low.isna().all():
        lines.append(f"There are fewer than {FEWEST_BLOCKS} such blocks, so there is no interval over time.")
    return "\n".join(lines)
