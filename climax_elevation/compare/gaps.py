"""`task: gaps`: values of patches that are hidden, inferred from others; everything else equal.

Each variant is trained with every seed twice, with the orography among the channels and without, and with each share of
`hidden` and each of `training_times`: an arm is one of these. Beside the networks are the methods of
`testbed.interpolation`, at patch means.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from climax_elevation.checks import count, one_of
from climax_elevation.compare import inference
from climax_elevation.compare.config import (
    HOSTS,
    OF_DESIGN,
    Design,
    Variant,
    check_keys,
    fill,
    load,
    numbers_or_all,
    read_design,
)
from climax_elevation.compare.fingerprints import Record, bias_files, data_files, examine, fingerprint, read_records
from climax_elevation.compare.gaps_report import report
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
from climax_elevation.compare.runs import find_host, host_class, naming, variant_identity
from climax_elevation.compare.scores import PARTS, Samples
from climax_elevation.compare.stored import FILES, RUNS, Comparison, concluded, plain, run_directory, unheard
from climax_elevation.compare.strata import StrataSettings, divide
from climax_elevation.errors import InputError
from climax_elevation.testbed.fit import ModelSettings, TrainingSettings, one_thread
from climax_elevation.testbed.gaps import Fields, Gaps, GapsSettings, build_gaps, check_hidden, patch_means, read_fields
from climax_elevation.testbed.interpolation import fit_all
from climax_elevation.upstream.locate import Source

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

TIMES_FITTED = 100  # by methods that have two or three parameters, of thousands of values
SEED_OF_METHODS = 0


@dataclass(frozen=True)
class Arm(inference.Arm):
    """What is the same for all networks that are compared with each other.

    Args:
        elevation_input: Whether they have a channel of the orography.
        hidden: Share of the patches that is hidden.
        times: Of training, spread evenly over it; None: all.
    """

    hidden: float
    times: int | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.told}_{self.methods}"

    @property
    def methods(self) -> str:
        """The folder of the methods that were fitted with as much hidden, to the same times."""
        return f"hidden_{self.hidden:g}{'' if self.times is None else f'_{self.times}_times'}"


@dataclass(frozen=True, kw_only=True)
class GapsConfiguration(Design):
    """A comparison at hidden patches.

    Args:
        data: Fields.
        hidden: Shares of the patches that are hidden.
        training_times: Numbers of times that are trained on, None for all.
        host: "auto" (ClimaX where there is one, else the stand-in), "climax" or "stand-in".
        model, training: Sizes, and how they are trained.
        strata: How patches are divided by terrain.
    """

    data: GapsSettings
    hidden: tuple[float, ...]
    training_times: tuple[int | None, ...] = (None,)
    host: str = "auto"
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    strata: StrataSettings = field(default_factory=StrataSettings)

    @property
    def arms(self) -> list[Arm]:
        """As much hidden as is told first, first, and then as many times."""
        kinds = [(hidden, times) for hidden in self.hidden for times in self.training_times]
        return [Arm(told, *kind) for kind in kinds for told in (False, True)]


def read_gaps(
    path: str | Path,
    *,
    out: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    variants: Sequence[str] | None = None,
) -> GapsConfiguration:
    """Read the YAML file of a comparison at hidden patches; arguments and errors as `read_configuration` has them."""
    given = load(Path(path))
    check_keys(
        given, OF_DESIGN | {"host", "hidden", "training_times", "model", "training", "strata"}, "the configuration"
    )
    design = read_design(given, path, out=out, seeds=seeds, variants=variants)
    hidden = given.get("hidden")
    if not isinstance(hidden, list) or not hidden or len(set(map(str, hidden))) < len(hidden):
        raise InputError(f"hidden is a list of different shares of the patches, such as [0.75, 0.95], not {hidden!r}")
    for name in ("root_dir", "variable"):
        if not isinstance(given["data"], dict) or not given["data"].get(name):
            raise InputError(f"data says where shards are, root_dir, and which variable is inferred: it lacks {name}")
    return GapsConfiguration(
        **design,
        metric=one_of("metric", given.get("metric", "rmse_standardised"), METRICS),
        data=fill(GapsSettings, given["data"], "data"),
        hidden=tuple(check_hidden(share) for share in hidden),
        training_times=numbers_or_all("training_times", given.get("training_times"), "times"),
        host=one_of("host", given.get("host", "auto"), HOSTS),
        model=fill(ModelSettings, given.get("model"), "model"),
        training=fill(TrainingSettings, given.get("training"), "training"),
        strata=fill(StrataSettings, given.get("strata"), "strata"),
    )


@dataclass(frozen=True)
class GapsTask(ArmTask):
    """One run, as `ArmTask` has it.

    Attributes:
        data, model, strata: Settings.
        climax: The ClimaX whose architecture is trained; None: the stand-in's.
    """

    data: GapsSettings
    model: ModelSettings
    strata: StrataSettings
    climax: Source | None

    def network(self, data: Fields) -> nn.Module:
        with naming(self.variant):
            return build_gaps(
                self.model,
                data,
                seed=self.seed,
                bias_type=self.variant.bias_type,
                bias_args=self.variant.bias_args,
                host=host_class(self.climax),
            )

    def on(self, data: Fields) -> Gaps:
        return Gaps(data, self.arm.hidden, self.arm.elevation_input, self.arm.times)

    def trained(self, on_step: Callable[[float | None], None]) -> Trained:
        fields = read_fields(self.data, self.model.patch_size)
        strata = patch_strata(fields, self.strata)
        net, gaps = self.network(fields), self.on(fields)
        fitted = gaps.fit(net, self.training, seed=self.seed, keep_best=self.keep_best, on_step=on_step)
        samples = {part: sums(fields, self.arm.hidden, strata, gaps.infer(net, part), part) for part in PARTS}
        return Trained(net, fitted, samples, self.data.variable, list(strata))


def patch_strata(fields: Fields, settings: StrataSettings) -> dict[str, Mask]:
    """Sets of patches by their mean elevation and by the relief within them, `[L]` each; the first is all."""
    size = fields.patch_size
    rows, columns = (pixels // size for pixels in fields.ground_m.shape)
    mean = patch_means(fields.ground_m[None], size).reshape(rows, columns)
    lat, lon = (axis[::size, ::size] if axis.ndim == 2 else axis[::size] for axis in (fields.lat, fields.lon))
    by_height = divide(mean, lat, lon, 1, replace(settings, relief=False), wind=False).fixed
    of_pixels = replace(settings, elevation_m=())
    by_relief = divide(fields.ground_m, fields.lat, fields.lon, size, of_pixels, land=fields.land, wind=False).fixed
    return {
        **{name: mask.ravel() for name, mask in by_height.items()},
        **{name: mask[::size, ::size].ravel() for name, mask in by_relief.items()},
    }


def sums(fields: Fields, share: float, strata: dict[str, Mask], inferred: Array, part: str) -> Samples:
    """Squared errors of a part by time, at hidden patches in each stratum, those of all sets together.

    Args:
        fields: The truth.
        share: That is hidden.
        strata: `patch_strata` of the fields.
        inferred: Anomalies, `[sets, T, L]`.
        part: Which.
    """
    hidden = fields.hidden(share, part).astype(float)
    errors = np.square((inferred - fields.means(part)) * fields.std) * hidden
    masks = np.stack(list(strata.values())).astype(float)
    shard = fields.shard[fields.parts[part]]
    return Samples(
        shard=shard - shard[0],
        weight=np.einsum("stl,kl->tk", hidden, masks),
        squares=np.einsum("stl,kl->tk", errors, masks)[:, None],
        anomalies=np.zeros((len(shard), 1, 0)),
        pixels=fields.patches,
    )


def compare_gaps(
    config: str | Path,
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    seeds: Sequence[int] | None = None,
    variants: Sequence[str] | None = None,
) -> Comparison:
    """Train every variant with every seed in every arm, and say what differs; arguments and errors as `compare`'s."""
    configuration = read_gaps(config, out=out, seeds=seeds, variants=variants)
    jobs = 1 if jobs is None else count("--jobs", jobs)
    with run_directory(configuration.out, (FILES,)):
        return _compare(configuration, jobs)


def _compare(configuration: GapsConfiguration, jobs: int) -> Comparison:
    climax, host = find_host(configuration.host)
    fields = read_fields(configuration.data, configuration.model.patch_size)
    for share in configuration.hidden:
        fields.number_hidden(share)
    for times in configuration.training_times:
        fields.training(times)
    files = _examine(configuration, read_records(configuration.out / FILES))
    tasks = _tasks(configuration, files, climax, host)

    def check(to_do: Sequence[GapsTask]) -> None:
        with unheard(logging.ERROR), one_thread():
            _check(fields, to_do)
        logger.info("host: %s", "ClimaX" if climax else "stand-in, which is not ClimaX")
        logger.info(
            "%s: %s in %d patches, %.0f to %.0f m",
            configuration.data.root_dir,
            configuration.data.variable,
            fields.patches,
            *np.quantile(patch_means(fields.ground_m[None], fields.patch_size), [0, 1]),
        )

    strata = patch_strata(fields, configuration.strata)
    scored = Scored(configuration.data.variable, fields.std, tuple(strata), host)
    data = fingerprint(files["data"])
    planned: dict[Key, PlannedMethods] = {
        (arm.methods, None): _methods(configuration, fields, strata, arm, data, scored)
        for arm in configuration.arms
        if arm.elevation_input
    }
    train_missing(
        configuration, tasks, files, lambda known: _examine(configuration, known), check, planned.values(), jobs
    )
    methods = {key: each.kept() for key, each in planned.items()}
    table, differing = tables(configuration, tasks, methods, scored)
    fitted = {key: kept.parameters for key, kept in methods.items()}
    text = report(configuration, fields, host, records_of(tasks), table, differing, fitted)
    return concluded(configuration.out, table, differing, text)


def _examine(configuration: GapsConfiguration, known: dict[str, Record]) -> dict[str, Record]:
    of_biases: dict[str, Path] = {}
    for variant in configuration.variants:
        of_biases |= bias_files(variant.bias_args)
    files = {"data": data_files(configuration.data.root_dir), "biases": of_biases}
    return {kind: examine(paths, known.get(kind)) for kind, paths in files.items()}


def _tasks(
    configuration: GapsConfiguration, files: dict[str, Record], climax: Source | None, host: str
) -> list[GapsTask]:
    """Share after share that is hidden, as many times after as many, then variant after variant in both arms."""
    common = {
        "data": {**_named(configuration.data), "fingerprint": fingerprint(files["data"])},
        "host": host,
        "model": asdict(configuration.model),
        "training": asdict(configuration.training),
        "choose_on": configuration.choose_on,
        "strata": asdict(configuration.strata),
    }

    def identity(variant: Variant, arm: Arm, seed: int) -> dict[str, Any]:
        own = variant_identity(variant, files["biases"])
        return plain({**common, "arm": _defined(asdict(arm)), "variant": own, "seed": seed})

    return [
        GapsTask(
            folder=configuration.out / arm.name / RUNS / variant.name / f"seed{seed}",
            variant=variant,
            seed=seed,
            arm=arm,
            data=configuration.data,
            model=configuration.model,
            training=configuration.training,
            strata=configuration.strata,
            keep_best=configuration.choose_on == "val",
            climax=climax,
            configuration=identity(variant, arm, seed),
        )
        for kind in dict.fromkeys(arm.methods for arm in configuration.arms)
        for variant in configuration.variants
        for arm in configuration.arms
        if arm.methods == kind
        for seed in configuration.seeds
    ]


def _named(data: GapsSettings) -> dict[str, Any]:
    """Settings of the data but for the path, in whose place is what the files hold."""
    return {name: value for name, value in asdict(data).items() if name != "root_dir"}


def _defined(identity: dict[str, Any]) -> dict[str, Any]:
    """But for what is None: an arm of all times is told apart as before there were others."""
    return {name: value for name, value in identity.items() if value is not None}


def _check(fields: Fields, tasks: Iterable[GapsTask]) -> None:
    """Every variant's bias works on these fields in every arm."""
    first: dict[tuple[str, str], GapsTask] = {}
    for task in tasks:
        first.setdefault((task.variant.name, task.arm.told), task)
    for task in first.values():
        task.check(fields)


def _methods(
    configuration: GapsConfiguration, fields: Fields, strata: dict[str, Mask], arm: Arm, data: str, scored: Scored
) -> PlannedMethods:
    """What is no network, fitted on up to `TIMES_FITTED` of the arm's times of training; the same for all seeds."""
    places, sets = fields.places(), configuration.data.sets

    def compute() -> Methods:
        random = np.random.RandomState(SEED_OF_METHODS)
        x = patch_means(fields.x[fields.training(arm.times)], fields.patch_size)
        if len(x) > TIMES_FITTED:
            x = x[random.choice(len(x), TIMES_FITTED, replace=False)]
        hidden = random.random_sample(x.shape).argsort(axis=1) < fields.number_hidden(arm.hidden)
        fitted = fit_all(x, ~hidden, hidden, places)

        def of_sets(part: str) -> tuple[Array, Mask]:
            covered = fields.hidden(arm.hidden, part)
            return np.tile(fields.means(part), (sets, 1)), ~covered.reshape(-1, fields.patches)

        def scores(inferred: Array, part: str) -> Samples:
            return sums(fields, arm.hidden, strata, inferred.reshape(sets, -1, fields.patches), part)

        return scored_methods(fitted, places, {part: of_sets(part) for part in PARTS}, scores)

    identity = {
        **_defined({"times": arm.times}),
        "data": {**_named(configuration.data), "fingerprint": data},
        "patch_size": fields.patch_size,
        "strata": asdict(configuration.strata),
        "hidden": arm.hidden,
    }
    return PlannedMethods(configuration.out / METHODS / arm.methods / "all_seeds", identity, scored, compute)
