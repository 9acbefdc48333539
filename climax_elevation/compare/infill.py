"""`task: infill`: values at stations that are hidden, inferred from others; everything else equal.

Each variant is trained with every seed twice, told the heights of the stations and not told them, and with each of
`training_days`: an arm is one of these. Beside the networks are the methods of `testbed.interpolation`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from climax_elevation.checks import count, one_of
from climax_elevation.compare.config import OF_DESIGN, Design, Variant, check_keys, fill, load, read_design
from climax_elevation.compare.fingerprints import Record, examine, fingerprint, read_records, write_records
from climax_elevation.compare.infill_report import report
from climax_elevation.compare.runs import (
    RECORD,
    SAMPLES,
    WEIGHTS,
    Finished,
    read_run,
    record_of,
    remove_partial,
    run_missing,
    variant_identity,
    whole_run,
)
from climax_elevation.compare.scores import PARTS, Samples, load_samples, save_samples
from climax_elevation.compare.stored import (
    FILES,
    RUNS,
    Comparison,
    check_stored,
    check_unchanged,
    concluded,
    plain,
    run_directory,
    save_tables,
    unheard,
)
from climax_elevation.compare.strata import ALL
from climax_elevation.compare.tables import Results, differences_table, results_table
from climax_elevation.errors import InputError
from climax_elevation.testbed.fit import TrainingSettings, denormals_as_zero, one_thread
from climax_elevation.testbed.infill import (
    MOST_TIMES_FITTED,
    Infill,
    InfillModel,
    InfillNetwork,
    InfillSettings,
    Series,
    build_infill,
    read_series,
    split_arguments,
)
from climax_elevation.testbed.interpolation import (
    Interpolation,
    Places,
    fit_inverse_distance,
    fit_optimal,
)

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

METRICS = ("rmse_standardised", "rmse")
STRATA = (ALL, "seen in training", "never seen")
METHODS = "methods"  # the folder of what is no network
CLIMATOLOGY = "climatology"


@dataclass(frozen=True)
class Arm:
    """What is the same for all networks that are compared with each other.

    Args:
        elevation_input: Whether they are told the heights of the stations.
        days: Of training, spread evenly over it; None: all.
    """

    elevation_input: bool
    days: int | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{'given' if self.elevation_input else 'withheld'}{'' if self.days is None else f'_{self.days}_days'}"


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
    days = given.get("training_days") or ["all"]
    if not isinstance(days, list) or len(set(map(str, days))) < len(days):
        raise InputError(f"training_days is a list of different numbers of days, such as [all, 60], not {days!r}")
    return InfillConfiguration(
        **design,
        metric=one_of("metric", given.get("metric", "rmse_standardised"), METRICS),
        data=fill(InfillSettings, given["data"], "data"),
        model=fill(InfillModel, given.get("model"), "model"),
        training=fill(TrainingSettings, given.get("training"), "training"),
        training_days=tuple(None if day == "all" else count("training_days", day) for day in days),
    )


@dataclass(frozen=True)
class InfillTask:
    """One run: a variant with a seed, in an arm.

    Attributes:
        folder: Where it goes, when it is done.
        variant, seed, arm: Which.
        data, model, training: Settings.
        keep_best: Whether it ends with the weights that were best on validation.
        configuration: All that defines it, to be told apart from another.
    """

    folder: Path
    variant: Variant
    seed: int
    arm: Arm
    data: InfillSettings
    model: InfillModel
    training: TrainingSettings
    keep_best: bool
    configuration: dict[str, Any]

    @property
    def name(self) -> str:
        """For messages."""
        return f"variant {self.variant.name!r}, seed {self.seed}, {self.arm.name}"

    @property
    def done(self) -> bool:
        """Whether it was finished."""
        return (self.folder / RECORD).is_file()

    def network(self) -> InfillNetwork:
        """The fresh network; InputError, naming the variant, if the bias does not fit."""
        try:
            return build_infill(
                self.model, seed=self.seed, bias_type=self.variant.bias_type, bias_args=self.variant.bias_args
            )
        except InputError as error:
            raise InputError(f"variant {self.variant.name!r}: {error}") from error

    def on(self, series: Series) -> Infill:
        """What the network works on; `control: permuted` shuffles anew for each seed."""
        _, control, _ = split_arguments(self.variant.bias_args)
        terrain = series.terrain(control.get("control", "none"), control.get("control_seed", 0) + self.seed)
        unseen = series.unseen(self.data.unseen, self.seed)
        return Infill(series, unseen, self.arm.elevation_input, series.days(self.arm.days), terrain)

    def work(self, device: int | None, on_step: Callable[[float | None], None]) -> None:
        """Train and score; the run's folder appears whole or not at all. Networks this small gain nothing on GPUs."""
        with whole_run(self.folder) as partial, one_thread(), denormals_as_zero():
            started = time.perf_counter()
            series = read_series(self.data)
            net, infill = self.network(), self.on(series)
            fitted = infill.fit(
                net, self.training, self.data.hidden, seed=self.seed, keep_best=self.keep_best, on_step=on_step
            )
            samples = {part: sums(infill, infill.infer(net, part), part) for part in PARTS}
            record = {**record_of(self.configuration, fitted, None), "seconds": time.perf_counter() - started}
            save_samples(partial / SAMPLES, samples, [series.stations.variable], STRATA)
            torch.save({"state_dict": net.state_dict()}, partial / WEIGHTS)
            (partial / RECORD).write_text(json.dumps(record, indent=2))


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
    out, before = configuration.out, read_records(configuration.out / FILES)
    files = _examine(configuration, before)
    tasks = _tasks(configuration, files["data"])
    for arm in configuration.arms:
        own = [task for task in tasks if task.arm == arm]
        check_stored(out / arm.name, own, before.get("data", {}), files["data"])
    to_do = [task for task in tasks if not task.done]
    with unheard(), one_thread():
        _check(configuration, series, to_do)
    for folder in (METHODS, *(f"{arm.name}/{RUNS}" for arm in configuration.arms)):
        remove_partial(out / folder)
    at = series.stations
    logger.info(
        "%s: %s at %d stations, %.0f to %.0f m",
        at.source,
        at.variable,
        len(at),
        at.elevation_m.min(),
        at.elevation_m.max(),
    )
    logger.info(
        "%d variants with %d seeds in %d arms: %d runs, %d of them finished before; %d at a time on the CPU",
        len(configuration.variants),
        len(configuration.seeds),
        len(configuration.arms),
        len(tasks),
        len(tasks) - len(to_do),
        jobs,
    )
    write_records(out / FILES, files)
    if to_do:
        run_missing(to_do, tasks, jobs, [])
        check_unchanged(files, _examine(configuration, files), to_do)
    return _conclude(configuration, series, tasks, fingerprint(files["data"]))


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
        net = task.network()
        try:
            task.on(series).infer(net, "val", most=1)
        except InputError as error:
            raise InputError(f"variant {task.variant.name!r}: {error}") from error
    for task in seeds.values():
        infill = task.on(series)
        for part in PARTS:
            for stratum, mask in infill.scored(part).items():
                if not mask.any():
                    raise InputError(
                        f"{series.stations.source}: with seed {task.seed}, {part} has no value at stations {stratum} "
                        "of which another is visible: give it more time, or choose another data.hidden or data.unseen"
                    )


def _conclude(configuration: InfillConfiguration, series: Series, tasks: list[InfillTask], data: str) -> Comparison:
    methods = {
        (days, seed): _methods(configuration, series, days, seed, data)
        for days in configuration.training_days
        for seed in configuration.seeds
    }
    tables: list[pd.DataFrame] = []
    differences: list[pd.DataFrame] = []
    for arm in configuration.arms:
        runs: dict[tuple[str, int], Finished] = {
            (task.variant.name, task.seed): read_run(task.folder) for task in tasks if task.arm == arm
        }
        results = Results(
            configuration=configuration,
            variables=[series.stations.variable],
            strata=STRATA,
            std=np.array([series.std]),
            runs=runs,
            references={},
            floors={},
            host="infill",
            metrics=METRICS,
        )
        networks, differing = results_table(results), differences_table(results)
        others = results_table(_with_runs(results, methods, arm))
        table = pd.concat([networks, others[others.part != "train"]], ignore_index=True)
        for kind, rows in ((tables, table), (differences, differing)):
            rows.insert(0, "arm", arm.name)
            kind.append(rows)
        save_tables(configuration.out / arm.name, table, differing)
    table, differing = (pd.concat(kind, ignore_index=True) for kind in (tables, differences))
    fitted = {key: record["parameters"] for key, (record, _) in methods.items()}
    text = report(configuration, series, runs_of(tasks), table, differing, fitted)
    return concluded(configuration.out, table, differing, text)


def runs_of(tasks: Iterable[InfillTask]) -> list[dict[str, Any]]:
    """The records of all runs."""
    return [json.loads((task.folder / RECORD).read_text()) for task in tasks]


def _with_runs(results: Results, methods: dict[Any, tuple[dict[str, Any], dict[str, Samples]]], arm: Arm) -> Results:
    """The methods in the place of the networks."""
    runs = {}
    for (days, seed), (_, samples) in methods.items():
        if days == arm.days:
            for name in dict.fromkeys(key.rpartition("/")[0] for key in samples):
                of_parts = {part: samples[f"{name}/{part}"] for part in PARTS}
                cost = dict.fromkeys(("seconds_a_step", "peak_memory_mib", "seconds"), float("nan"))
                runs[name, seed] = Finished(of_parts, {**cost, "scalars": {}})
    return replace(results, runs=runs)


def _methods(
    configuration: InfillConfiguration, series: Series, days: int | None, seed: int, data: str
) -> tuple[dict[str, Any], dict[str, Samples]]:
    """What is no network: fitted on training, scored, and kept."""
    folder = configuration.out / METHODS / ("all" if days is None else f"{days}_days") / f"seed{seed}"
    wanted = plain({"data": {**_named(configuration.data), "fingerprint": data}, "days": days, "seed": seed})
    if (folder / RECORD).is_file():
        record = json.loads((folder / RECORD).read_text())
        if record["configuration"] == wanted:
            return record, load_samples(folder / SAMPLES)
        raise InputError(f"{folder} is of other data or settings: give another --out, or remove what is there")
    infill = Infill(series, series.unseen(configuration.data.unseen, seed), True, series.days(days), series.terrain())
    at = series.stations
    places = Places.of(at.lat, at.lon, at.elevation_m)
    fitted = fitted_methods(infill, places, configuration.data.hidden, seed)
    samples = {}
    for part in PARTS:
        x, visible = series.x[series.parts[part]], infill.visible(part)
        samples[f"{CLIMATOLOGY}/{part}"] = sums(infill, np.zeros(x.shape), part)
        for method in fitted:
            samples[f"{method.name}/{part}"] = sums(infill, method.infer(x, visible, places), part)
    record = {"configuration": wanted, "parameters": {method.name: method.parameters for method in fitted}}
    with whole_run(folder) as partial:
        save_samples(partial / SAMPLES, samples, [at.variable], STRATA)
        (partial / RECORD).write_text(json.dumps(record, indent=2))
    return record, samples


def fitted_methods(infill: Infill, places: Places, hidden: float, seed: int) -> list[Interpolation]:
    """Methods fitted at stations that training sees, on up to `MOST_TIMES_FITTED` of its times."""
    random = np.random.RandomState(seed)
    seen = np.flatnonzero(~infill.unseen)
    times = infill.times
    if len(times) > MOST_TIMES_FITTED:
        times = random.choice(times, MOST_TIMES_FITTED, replace=False)
    x = infill.series.x[times][:, seen]
    covered, known = random.random_sample(x.shape) < hidden, np.isfinite(x)
    given = (x, known & ~covered, known & covered, places.only(seen))
    return [
        fit_inverse_distance(*given),
        fit_optimal(*given, heights=False),
        fit_optimal(*given, heights=True),
    ]
