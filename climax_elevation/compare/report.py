"""A comparison as Markdown: what was run, and what came out, also where nothing did."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import pandas as pd

from climax_elevation.compare.config import Configuration, TracerData
from climax_elevation.compare.scores import LOWER_IS_BETTER, MEAN
from climax_elevation.compare.significance import FEWEST_BLOCKS
from climax_elevation.compare.strata import ALL
from climax_elevation.compare.tables import BETTER, NONE_FOUND, NOT_FINITE, ONE_SEED, WORSE, Results

TITLES = {"val": "Validation", "test": "Test"}


def report(results: Results, table: pd.DataFrame, differences: pd.DataFrame) -> str:
    """The Markdown text.

    Args:
        results: All that was computed.
        table: `results_table` of it.
        differences: `differences_table` of it.
    """
    sections = [_setting(results)]
    if len(results.configuration.variants) > 1:
        sections.append(_choice(_configuration(results), table, differences))
    for part, title in TITLES.items():
        sections.append(f"## {title}\n\n{_scores(results, table, differences, part)}")
        if results.configuration.comparisons:
            sections.append(_strata(results, differences, part))
    sections += [_cost(results, table), _reading(results, differences)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _configuration(results: Results) -> Configuration:
    return cast(Configuration, results.configuration)


def _setting(results: Results) -> str:
    configuration, runs = _configuration(results), list(results.runs.values())
    records = [run.record for run in runs]
    model, training = configuration.model, configuration.training
    host = "ClimaX's architecture" if results.host == "ClimaX" else "the stand-in host, which is not ClimaX"
    versions = ", ".join(
        sorted({f"{name} {number}" for record in records for name, number in record["versions"].items()})
    )
    parts = ", ".join(f"{part} {len(results.references[part]['persistence'])} samples" for part in TITLES)
    return "\n".join(
        [
            "# Comparison",
            "",
            f"- Data: {_data(configuration)}; {parts}.",
            f"- Network: {host}; patches of {model.patch_size}, {model.embed_dim} wide, {model.depth} blocks, "
            f"{model.num_heads} heads{', fresh weights rescaled to 1/sqrt(inputs)' if model.rescale_weights else ''}.",
            f"- Training: {training.steps} steps of {training.batch_size}, learning rate {training.lr:g}"
            f"{'' if training.lr_factor == 1 else f', of the biases {training.lr_factor:g} times that'}; weights of "
            f"{'the least validation error' if configuration.choose_on == 'val' else 'the last step'}.",
            f"- Seeds: {', '.join(map(str, configuration.seeds))}; the same data in the same order and, per seed, the "
            "same first weights of the host for all variants.",
            f"- Ran on {', '.join(sorted({record['device'] for record in records}))}: {len(runs)} runs, "
            f"{sum(record['seconds'] for record in records) / 60:.0f} minutes in all, one after another; {versions}.",
        ]
    )


def _data(configuration: Configuration) -> str:
    data = configuration.data
    if isinstance(data, TracerData):
        numbers = ", ".join(f"{number} {part}" for part, number in data.episodes.items())
        return f"a simulated tracer over real terrain, region {data.region} (episodes: {numbers}), one step ahead"
    return (
        f"{data.root_dir}, {', '.join(data.out_variables)} from {len(data.variables)} channels, "
        f"{data.predict_range * data.hrs_each_step} h ahead"
    )


def _choice(configuration: Configuration, table: pd.DataFrame, differences: pd.DataFrame) -> str:
    """The best on validation, and what it is worth on test."""
    metric = configuration.metric
    chosen = table[(table.metric == metric) & (table.variable == MEAN) & (table.stratum == ALL)]
    names = [variant.name for variant in configuration.variants]
    means = _means(chosen[(chosen.part == "val") & chosen.variant.isin(names)].groupby("variant")["value"])
    if not means.notna().any():
        return "No variant has a finite score on validation."
    best = str(means.idxmin() if metric in LOWER_IS_BETTER else means.idxmax())
    said = f"Best on validation by {metric}: **{best}**."
    if best == configuration.baseline:
        return f"{said} That is the baseline: no variant was better there."
    row = _headline(differences, configuration, "test", best, configuration.baseline)
    against = f"On test, against {configuration.baseline}: {row['verdict']} ({_change(row, metric)})."
    counts = _main(differences, configuration, "test").query("counterpart == @configuration.baseline").verdict
    others = ", ".join(f"{int((counts == word).sum())} {word}" for word in dict.fromkeys(counts))
    return f"{said} {against}\n\nOf all {len(counts)} variants against {configuration.baseline}, on test: {others}."


def _scores(results: Results, table: pd.DataFrame, differences: pd.DataFrame, part: str) -> str:
    configuration = _configuration(results)
    errors = _by_variant(table, part, "rmse", ALL)
    skills = {kind: _by_variant(table, part, f"skill_{kind}", ALL) for kind in ("persistence", "climatology")}
    acc, standardised = _by_variant(table, part, "acc", ALL), _by_variant(table, part, "rmse_standardised", ALL)
    header = ["", *(f"RMSE {name}" for name in results.variables), "RMSE, standardised", "ACC"]
    header += ["skill over persistence", "over climatology"]
    names = [*table[table.part == part].variant.unique()]
    rows = [
        [
            name,
            *(number(errors.get((name, variable))) for variable in results.variables),
            *(number(scores.get((name, MEAN))) for scores in (standardised, acc, *skills.values())),
        ]
        for name in names
    ]
    text = "Means over seeds.\n\n" + markdown(header, rows)
    if not configuration.comparisons:
        return text
    return f"{text}\n\n{_compared(configuration, differences, part)}"


def _compared(configuration: Configuration, differences: pd.DataFrame, part: str) -> str:
    metric, share = configuration.metric, f"{100 * configuration.statistics.confidence:g}%"
    unit = ", %" if metric in LOWER_IS_BETTER else ""
    header = ["variant", "against", f"difference of {metric}{unit}", f"{share} over seeds", f"{share} over time"]
    header += ["p", "p, Holm", "verdict"]
    prefix = "percent" if metric in LOWER_IS_BETTER else ""
    rows = []
    for row in _main(differences, configuration, part).to_dict("records"):
        mean = row["percent"] if prefix else row["difference"]
        ends = [row[f"{prefix}_{name}" if prefix else name] for name in ("low", "high", "time_low", "time_high")]
        intervals = [interval(*ends[:2]), interval(*ends[2:])]
        rows.append([row["variant"], row["counterpart"], signed(mean), *intervals])
        rows[-1] += [number(row["p"]), number(row["p_holm"]), row["verdict"]]
    return markdown(header, rows)


def _strata(results: Results, differences: pd.DataFrame, part: str) -> str:
    """Percent of error by terrain, a star where the interval over seeds leaves out 0."""
    kept = differences[(differences.part == part) & (differences.metric == "rmse_standardised")]
    kept = kept[kept.variable == MEAN].set_index(["variant", "counterpart", "stratum"])
    rows = []
    for variant, counterpart in results.configuration.comparisons:
        cells = []
        for stratum in results.strata:
            row = kept.loc[(variant, counterpart, stratum)]
            star = "*" if row["low"] > 0 or row["high"] < 0 else ""
            cells.append(f"{signed(row['percent'])}{star}")
        rows.append([variant, counterpart, *cells])
    return (
        f"### {TITLES[part]}, by terrain\n\nDifference of the standardised RMSE in %; a star where the interval over "
        "seeds leaves out 0, not corrected for the number of strata or variants.\n\n"
        + markdown(["variant", "against", *results.strata], rows)
    )


def _cost(results: Results, table: pd.DataFrame) -> str:
    train = table[table.part == "train"]
    cost = train[train.metric.isin(["seconds_a_step", "peak_memory_mib", "seconds"])]
    means = cost.pivot_table(index="variant", columns="metric", values="value", sort=False)
    base = means.loc[results.configuration.baseline, "seconds_a_step"]
    scalars = train[train.metric.isin(["scalar_before", "scalar_after"])]
    rows = []
    for name, row in means.iterrows():
        own = scalars[scalars.variant == name].groupby(["variable", "metric"], sort=False)["value"].mean()
        moved = [
            f"{scalar} {own[scalar, 'scalar_before']:.3g} → {own[scalar, 'scalar_after']:.3g}"
            for scalar in dict.fromkeys(own.index.get_level_values(0))
        ]
        cells = [f"{row['seconds_a_step']:.4f}", f"{row['seconds_a_step'] / base:.2f}"]
        cells += [number(row.get("peak_memory_mib")), f"{row['seconds']:.0f}", ", ".join(moved)]
        rows.append([str(name), *cells])
    header = ["", "s a step", "of the baseline's", "peak memory, MiB", "s a run", "scalars, first → last"]
    return "## Cost, and what the biases learned\n\nMeans over seeds.\n\n" + markdown(header, rows)


def _reading(results: Results, differences: pd.DataFrame) -> str:
    configuration = results.configuration
    settings = configuration.statistics
    level = f"{1 - settings.confidence:g}"
    lines = [
        "## How to read it",
        "",
        "RMSE is weighted by latitude, the mean over samples of each sample's root; the definitions are those of "
        "`climax_elevation.compare.scores`. "
        f"'{BETTER}' and '{WORSE}' mean that the p-value of the paired t-test over seeds, after Holm's correction for "
        f"all comparisons in the table, is below {level}, and that the interval over time, where there is one, leaves "
        f"out 0; all else is '{NONE_FOUND}'.",
    ]
    blocks = "a shard" if settings.block is None else f"{settings.block} samples"
    lines.append(f"Time was resampled {settings.resamples} times in blocks of {blocks}, the seeds' mean each time.")
    lines += [
        f"In {part} there are fewer than {FEWEST_BLOCKS} such blocks, so there is no interval over time there."
        for part in TITLES
        if configuration.comparisons and differences[differences.part == part].time_low.isna().all()
    ]
    if len(configuration.seeds) == 1:
        lines.append(f"There is one seed: no interval over seeds and no test; every verdict is '{ONE_SEED}'.")
    if configuration.comparisons and (differences.verdict == NOT_FINITE).any():
        lines.append(f"'{NOT_FINITE}': a training diverged, or there was nothing to score.")
    if results.floors:
        lines.append(
            "'floor, first wind' is the simulator itself, given what a network sees; 'floor, true wind' is given the "
            "winds of the whole lead time too."
        )
    return "\n".join(lines)


def _main(differences: pd.DataFrame, configuration: Configuration, part: str) -> pd.DataFrame:
    """The rows that the comparison is about."""
    table = differences[(differences.part == part) & (differences.metric == configuration.metric)]
    return table[(table.variable == MEAN) & (table.stratum == ALL)]


def _headline(
    differences: pd.DataFrame, configuration: Configuration, part: str, variant: str, counterpart: str
) -> dict[Any, Any]:
    table = _main(differences, configuration, part)
    return table[(table.variant == variant) & (table.counterpart == counterpart)].iloc[0].to_dict()


def _change(row: dict[Any, Any], metric: str) -> str:
    if metric not in LOWER_IS_BETTER:
        return f"{signed(row['difference'])}, over seeds {interval(row['low'], row['high'])}"
    ends = interval(row["percent_low"], row["percent_high"])
    return f"error {signed(row['percent'])} %, over seeds {ends}"


def _by_variant(table: pd.DataFrame, part: str, metric: str, stratum: str) -> dict[tuple[str, str], float]:
    kept = table[(table.part == part) & (table.metric == metric) & (table.stratum == stratum)]
    return dict(_means(kept.groupby(["variant", "variable"])["value"]))


def _means(groups: Any) -> pd.Series:
    """Of each group; not finite where one of its values is not: a seed that diverged is not passed over."""
    return groups.agg(lambda values: values.mean(skipna=False))


def number(value: float | None) -> str:
    """Four digits, or nothing."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.4g}"


def signed(value: float) -> str:
    """Three digits with a sign, or nothing."""
    return f"{value:+.3g}" if math.isfinite(value) else ""


def interval(low: float, high: float) -> str:
    """Both ends, or none."""
    return f"{low:+.3g} to {high:+.3g}" if math.isfinite(low) else "none"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
