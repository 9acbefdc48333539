"""`task: infill`: values at stations that are hidden, inferred from others; everything else equal.

Each variant is trained with every seed twice, told the heights of the stations and not told them, and with each of
`training_days`: an arm is one of these. Beside the networks are the methods of `testbed.interpolation`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from climax_elevation.checks import count, one_of
from climax_elevation.compare import inference
from climax_elevation.compare.config import OF_DESIGN, Design, check_keys, fill, load, numbers_or_all, read_design
from climax_elevation.compare.fingerprints import Record, examine, fingerprint, read_records
from climax_elevation.compare.inference import (
    METHODS,
    METRICS,
    ArmTask,
    Key,
    Methods,
    PlannedMethods,
    Scored,
    Trained,
    records_of,
    scored_methods,
    tables,
    train_missing,
)
from climax_elevation.compare.infill_report import report
from climax_elevation.compare.runs import naming, variant_identity
from climax_elevation.compare.scores import PARTS, Samples
from climax_elevation.compare.stored import FILES, RUNS, Comparison, concluded, plain, run_directory, unheard
from climax_elevation.compare.strata import ALL
from climax_elevation.errors import InputError
from climax_elevation.testbed.fit import TrainingSettings, one_thread
from climax_elevation.testbed.infill import (
    Infill,
    InfillModel,
    InfillNetwork,
    InfillSettings,
    Series,
    build_infill,
    read_series,
    split_arguments,
)
from climax_elevation.testbed.interpolation import Places, fit_all

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

STRATA = (ALL, "seen in training", "never seen")
MOST_TIMES_FITTED = 400  # for methods that have two or three parameters


@dataclass(frozen=True)
class Arm(inference.Arm):
    """What is the same for all networks that are compared with each other.

    Args:
        elevation_input: Whether they are told the heights of the stations.
        days: Of training, spread evenly over it; None: all.
    """

    days: int | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.told}{'' if self.days is None else f'_{self.methods}'}"

    @property
    def methods(self) -> str:
        """The folder of the methods that were fitted to the same days."""
        return "all" if self.days is None else f"{self.days}_days"


@dataclass(frozen=True, kw_only=True)
class InfillConfiguration(Design):
    """A comparison at stations.

    Args:
        data: Stations, and what is hidden.
        model, training: Sizes, and how they are trained.
        training_days: Numbers of days that are trained on, None for all.
    """

    data: InfillSettings
    model: InfillModel = field(default_factory=InfillModel)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    training_days: tuple[int | None, ...] = (None,)

    @property
    def arms(self) -> list[Arm]:
        """All data first."""
        return [Arm(told, days) for days in self.training_days for told in (False, True)]


def read_infill(
    path: str | Path,
    *,
    out: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    variants: Sequence[str] | None = None,
) -> InfillConfiguration:
    """Read the YAML file of a comparison at stations; arguments and errors as `read_configuration` has them."""
    given = load(Path(path))
    check_keys(given, OF_DESIGN | {"model", "training", "training_days"}, "the configuration")
    design = read_design(given, path, out=out, seeds=seeds, variants=variants)
    return InfillConfiguration(
        **design,
        metric=one_of("metric", given.get("metric", "rmse_standardised"), METRICS),
        data=fill(InfillSettings, given["data"], "data"),
        model=fill(InfillModel, given.get("model"), "model"),
        training=fill(TrainingSettings, given.get("training"), "training"),
        training_days=numbers_or_all("training_days", given.get("training_days"), "days"),
    )


@dataclass(frozen=True)
class InfillTask(ArmTask):
    """One run, as `ArmTask` has it.

    Attributes:
        data, model: Settings.
    """

    data: InfillSettings
    model: InfillModel

    def network(self, data: Series) -> InfillNetwork:
        with naming(self.variant):
            return build_infill(
                self.model, seed=self.seed, bias_type=self.variant.bias_type, bias_args=self.variant.bias_args
            )

    def on(self, data: Series) -> Infill:
        """What the network works on; `control: permuted` shuffles anew for each seed."""
        _, control, _ = split_arguments(self.variant.bias_args)
        terrain = data.terrain(control.get("control", "none"), control.get("control_seed", 0) + self.seed)
        unseen = data.unseen(self.data.unseen, self.seed)
        return Infill(data, unseen, self.arm.elevation_input, data.days(self.arm.days), terrain)

    def trained(self, on_step: Callable[[float | None], None]) -> Trained:
        series = read_series(self.data)
        net, infill = self.network(series), self.on(series)
        fitted = infill.fit(
            net, self.training, self.data.hidden, seed=self.seed, keep_best=self.keep_best, on_step=on_step
        )
        samples = {part: sums(infill, infill.infer(net, part), part) for part in PARTS}
        return Trained(net, fitted, samples, series.stations.variable, STRATA)


def sums(infill: Infill, inferred: Array, part: str) -> Samples:
    """Squared errors of a part by time, at hidden stations in each of `STRATA`; shards are months."""
    series, times = infill.series, infill.series.parts[part]
    scored = infill.scored(part)
    masks = np.stack([np.logical_or(*scored.values()), *scored.values()], axis=1)  # [T, K, S]
    errors = np.where(masks.any(axis=1), np.square((inferred - series.x[times]) * series.std), 0.0)
    months = series.stations.times[times].astype("datetime64[M]").astype(np.int64)
    return Samples(
        shard=months - months.min(),
        weight=masks.sum(axis=2).astype(float),
        squares=np.einsum("ts,tks->tk", errors, masks.astype(float))[:, None],
        anomalies=np.zeros((len(times), 1, 0)),
        pixels=len(series.stations),
    )


def compare_infill(
    config: str | Path,
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    seeds: Sequence[int] | None = None,
    variants: Sequence[str] | None = None,
) -> Comparison:
    """Train every variant with every seed in every arm, and say what differs; arguments and errors as `compare`'s."""
    configuration = read_infill(config, out=out, seeds=seeds, variants=variants)
    jobs = 1 if jobs is None else count("--jobs", jobs)
    out = configuration.out
    with run_directory(out, (FILES,)):
        return _compare(configuration, jobs)


def _compare(configuration: InfillConfiguration, jobs: int) -> Comparison:
    series = read_series(configuration.data)
    at = series.stations
    files = _examine(configuration, read_records(configuration.out / FILES))
    tasks = _tasks(configuration, files["data"])

    def check(to_do: Sequence[InfillTask]) -> None:
        with unheard(), one_thread():
            _check(configuration, series, to_do)
        logger.info(
            "%s: %s at %d stations, %.0f to %.0f m",
            at.source,
            at.variable,
            len(at),
            at.elevation_m.min(),
            at.elevation_m.max(),
        )

    scored = Scored(at.variable, series.std, STRATA, "infill")
    planned: dict[Key, PlannedMethods] = {
        (arm.methods, seed): _methods(configuration, series, arm, seed, fingerprint(files["data"]), scored)
        for arm in configuration.arms
        if arm.elevation_input
        for seed in configuration.seeds
    }
    train_missing(
        configuration, tasks, files, lambda known: _examine(configuration, known), check, planned.values(), jobs
    )
    methods = {key: each.kept() for key, each in planned.items()}
    table, differing = tables(configuration, tasks, methods, scored)
    fitted = {key: kept.parameters for key, kept in methods.items()}
    text = report(configuration, series, records_of(tasks), table, differing, fitted)
    return concluded(configuration.out, table, differing, text)


def _examine(configuration: InfillConfiguration, known: dict[str, Record]) -> dict[str, Record]:
    path = Path(configuration.data.stations)
    return {"data": examine({path.name: path}, known.get("data"))}


def _tasks(configuration: InfillConfiguration, files: Record) -> list[InfillTask]:
    """All data first, then variant after variant in both arms."""
    common = {
        "data": {**_named(configuration.data), "fingerprint": fingerprint(files)},
        "model": asdict(configuration.model),
        "training": asdict(configuration.training),
        "choose_on": configuration.choose_on,
    }
    return [
        InfillTask(
            folder=configuration.out / arm.name / RUNS / variant.name / f"seed{seed}",
            variant=variant,
            seed=seed,
            arm=arm,
            data=configuration.data,
            model=configuration.model,
            training=configuration.training,
            keep_best=configuration.choose_on == "val",
            configuration=plain({**common, "arm": asdict(arm), "variant": variant_identity(variant), "seed": seed}),
        )
        for days in configuration.training_days
        for variant in configuration.variants
        for arm in configuration.arms
        if arm.days == days
        for seed in configuration.seeds
    ]


def _named(data: InfillSettings) -> dict[str, Any]:
    """Settings of the data but for the path, in whose place is what the file holds."""
    return {name: value for name, value in asdict(data).items() if name != "stations"}


def _check(configuration: InfillConfiguration, series: Series, tasks: Iterable[InfillTask]) -> None:
    """Every variant's bias works at these stations, and every part has something to score, for every seed."""
    for days in configuration.training_days:
        series.days(days)
    first: dict[str, InfillTask] = {}
    seeds: dict[int, InfillTask] = {}
    for task in tasks:
        first.setdefault(task.variant.name, task)
        seeds.setdefault(task.seed, task)
    for task in first.values():
        task.check(series)
    for task in seeds.values():
        infill = task.on(series)
        for part in PARTS:
            for stratum, mask in infill.scored(part).items():
                if not mask.any():
                    raise InputError(
                        f"{series.stations.source}: with seed {task.seed}, {part} has no value at stations {stratum} "
                        "of which another is visible: give it more time, or choose another data.hidden or data.unseen"
                    )


def _methods(
    configuration: InfillConfiguration, series: Series, arm: Arm, seed: int, data: str, scored: Scored
) -> PlannedMethods:
    """What is no network, fitted at stations that training sees, on up to `MOST_TIMES_FITTED` of its times."""
    infill = Infill(
        series, series.unseen(configuration.data.unseen, seed), True, series.days(arm.days), series.terrain()
    )
    places = Places.of(series.stations.lat, series.stations.lon, series.stations.elevation_m)

    def compute() -> Methods:
        random = np.random.RandomState(seed)
        seen, times = np.flatnonzero(~infill.unseen), infill.times
        if len(times) > MOST_TIMES_FITTED:
            times = random.choice(times, MOST_TIMES_FITTED, replace=False)
        x = series.x[times][:, seen]
        covered = random.random_sample(x.shape) < configuration.data.hidden
        known = np.isfinite(x)
        fitted = fit_all(x, known & ~covered, known & covered, places.only(seen))
        visible = {part: (series.x[series.parts[part]], infill.visible(part)) for part in PARTS}
        return scored_methods(fitted, places, visible, lambda inferred, part: sums(infill, inferred, part))

    identity = {"data": {**_named(configuration.data), "fingerprint": data}, "days": arm.days, "seed": seed}
    return PlannedMethods(configuration.out / METHODS / arm.methods / f"seed{seed}", identity, scored, compute)
