"""A comparison at hidden patches as Markdown."""

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
from climax_elevation.testbed.gaps import Fields, patch_means

if TYPE_CHECKING:
    from climax_elevation.compare.gaps import GapsConfiguration


def report(
    configuration: GapsConfiguration,
    fields: Fields,
    host: str,
    records: Sequence[Mapping[str, Any]],
    table: pd.DataFrame,
    differences: pd.DataFrame,
    fitted: Mapping[Key, Mapping[str, Mapping[str, Any]]],
) -> str:
    """The Markdown text.

    Args:
        configuration, fields: What was asked for, and of what.
        host: "ClimaX" or "stand-in".
        records: Of all runs.
        table, differences: Of all arms.
        fitted: Parameters of the methods, by their folder and seed.
    """
    strata = [name for name in table.stratum.unique() if name]
    by_terrain = [name for name in strata if name != ALL]
    sections = [_setting(configuration, fields, host, records)]
    for kind in dict.fromkeys(arm.methods for arm in configuration.arms):
        arms = [arm for arm in configuration.arms if arm.methods == kind]
        trained_on = "" if arms[0].times is None else f", trained on {arms[0].times} times"
        sections += [
            f"## {100 * arms[0].hidden:g} % hidden{trained_on}",
            scores(table, arms, [ALL], ""),
            fitted_on_training(arms[0].methods, fitted),
        ]
        for arm in arms:
            own = differences[differences.arm == arm.name]
            sections += [f"### Heights {arm.told}", compared(configuration, own, [ALL], "patches")]
        if by_terrain:
            sections += ["### By terrain", scores(table, arms, by_terrain, "")]
            for arm in arms:
                own = differences[differences.arm == arm.name]
                sections += [f"Heights {arm.told}:", compared(configuration, own, by_terrain, "patches")]
    scored = f"hidden patches, {configuration.data.sets} sets of them at each time"
    sections += [learned(table), reading(configuration, differences, scored, "at these patches", "a shard")]
    return "\n\n".join(section for section in sections if section) + "\n"


def _setting(configuration: GapsConfiguration, fields: Fields, host: str, records: Sequence[Mapping[str, Any]]) -> str:
    data, model = configuration.data, configuration.model
    architecture = "ClimaX's architecture" if host == "ClimaX" else "the stand-in host, which is not ClimaX"
    parts = ", ".join(f"{part} {len(times)}" for part, times in fields.parts.items())
    heights = patch_means(fields.ground_m[None], fields.patch_size)
    climatology = {
        0: "values less their mean over all of training",
        1: "anomalies from each pixel's mean over training",
    }.get(data.cycle, f"anomalies from each pixel's mean over every {data.cycle}th step of training")
    further = f"; {', '.join(data.variables)} visible everywhere" if data.variables else ""
    return "\n".join(
        [
            "# Comparison at hidden patches",
            "",
            f"- Data: {data.root_dir}, {data.variable} in {fields.patches} patches of {model.patch_size} x "
            f"{model.patch_size} pixels, mean height {heights.min():.0f} to {heights.max():.0f} m; times: {parts}; "
            f"{climatology}; the standard deviation of their patch means in training is {fields.std:.4g}{further}.",
            f"- Hidden: {', '.join(f'{100 * share:g} %' for share in configuration.hidden)} of the patches, others at "
            f"each step of training, {data.sets} fixed sets of each time in validation and test, the same for all "
            "networks, seeds and methods. The network's channels are the variable, 0 where it is hidden, what is "
            "visible, and, where heights are given, the orography; biases read the ground from a file in both arms.",
            f"- Network: {architecture}; {model.embed_dim} wide, {model.depth} blocks, {model.num_heads} heads"
            f"{', fresh weights rescaled to 1/sqrt(inputs)' if model.rescale_weights else ''}.",
            trained(configuration, configuration.training),
            cost(configuration, records),
        ]
    )
