"""A comparison at stations as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from climax_elevation.compare.inference import Key
from climax_elevation.compare.inference_report import (
    compared,
    cost,
    fitted_on_training,
    learned,
    reading,
    scores,
    trained,
)
from climax_elevation.compare.strata import ALL
from climax_elevation.testbed.infill import Series

if TYPE_CHECKING:
    from climax_elevation.compare.infill import InfillConfiguration


def report(
    configuration: InfillConfiguration,
    series: Series,
    records: Sequence[Mapping[str, Any]],
    table: pd.DataFrame,
    differences: pd.DataFrame,
    fitted: Mapping[Key, Mapping[str, Mapping[str, Any]]],
) -> str:
    """The Markdown text.

    Args:
        configuration, series: What was asked for, and of what.
        records: Of all runs.
        table, differences: Of all arms.
        fitted: Parameters of the methods, by their folder and seed.
    """
    strata = [name for name in table.stratum.unique() if name and name != ALL]
    sections = [_setting(configuration, series, records)]
    for days in configuration.training_days:
        sections.append(f"## Trained on {'all days' if days is None else f'{days} days'}")
        arms = [arm for arm in configuration.arms if arm.days == days]
        sections.append(
            scores(table, arms, strata, "which holds other stations each time")
            + "\n\n"
            + fitted_on_training(arms[0].methods, fitted)
        )
        for arm in arms:
            sections.append(f"### Heights {arm.told}")
            sections.append(compared(configuration, differences[differences.arm == arm.name], strata, "stations"))
    sections += [learned(table), reading(configuration, differences, "hidden stations", "at these stations", "a month")]
    return "\n\n".join(section for section in sections if section) + "\n"


def _setting(configuration: InfillConfiguration, series: Series, records: Sequence[Mapping[str, Any]]) -> str:
    data, model, at = configuration.data, configuration.model, series.stations
    unit = f"{at.unit or 'no unit named'}{', its logarithm' if data.transform == 'log' else ''}"
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
            trained(configuration, configuration.training),
            cost(configuration, records),
        ]
    )
