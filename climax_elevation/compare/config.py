"""What a comparison's YAML file says, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from climax_elevation.checks import count, one_of, text
from climax_elevation.compare.scores import METRICS
from climax_elevation.compare.significance import StatisticsSettings
from climax_elevation.compare.strata import StrataSettings
from climax_elevation.data.format import PARTITIONS
from climax_elevation.errors import InputError
from climax_elevation.testbed.altitude import REGIONS
from climax_elevation.testbed.fit import DataSettings, ModelSettings, TrainingSettings
from climax_elevation.testbed.tracer import TRACER_VARIABLES, TracerSettings

HOSTS = ("auto", "climax", "stand-in")
ACCELERATORS = ("auto", "cpu", "gpu")
CHOICES = ("val", "none")
NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]*")

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Variant:
    """One of the networks that are compared.

    Args:
        name: Its name, and that of its folder.
        bias_type: As `climax_elevation.attach` takes it; None: no bias.
        bias_args: As `climax_elevation.attach` takes them.
    """

    name: str
    bias_type: str | None = None
    bias_args: dict[str, Any] | None = None


@dataclass(frozen=True)
class TracerData:
    """A simulated tracer; see `climax_elevation.testbed.tracer.write_tracer_dataset`.

    Args:
        region: One of `climax_elevation.testbed.altitude.REGIONS`.
        episodes: Number of episodes of "train", "val" and "test".
        seed: Of the data, the same for all runs.
        settings: How episodes are drawn and run.
    """

    region: str
    episodes: dict[str, int]
    seed: int
    settings: TracerSettings

    def settings_in(self, folder: Path, hours: int) -> DataSettings:
        """The data once they lie in `folder`: everything but latitude forecasts the tracer."""
        variables = tuple(name for name in TRACER_VARIABLES if name != "lattitude")
        return DataSettings(str(folder), variables, ("tracer",), hrs_each_step=hours)


@dataclass(frozen=True, kw_only=True)
class Design:
    """What every comparison has, whatever is learned.

    Args:
        out: The run directory.
        variants: The networks, the baseline first.
        pairs: Further comparisons, (variant, counterpart), beside those with the baseline.
        seeds: Of weights, order and dropout.
        choose_on: "val": a run ends with the weights that were best on validation, and the report's best
            variant is the best on validation. "none": a run ends with its last weights.
        metric: The score that the report is about, one of `climax_elevation.compare.scores.METRICS`.
        statistics: How certain is certain.
    """

    out: Path
    variants: tuple[Variant, ...]
    pairs: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    choose_on: str = "val"
    metric: str = "rmse_standardised"
    statistics: StatisticsSettings = field(default_factory=StatisticsSettings)

    @property
    def baseline(self) -> str:
        """Name of what the others are compared with."""
        return self.variants[0].name

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """All (variant, counterpart): each variant with the baseline, then `pairs`; none twice."""
        with_baseline = [(variant.name, self.baseline) for variant in self.variants[1:]]
        return list(dict.fromkeys([*with_baseline, *self.pairs]))


@dataclass(frozen=True, kw_only=True)
class Configuration(Design):
    """A comparison of forecasts.

    Args:
        data: What is learned.
        host: "auto" (ClimaX where there is one, else the stand-in), "climax" or "stand-in".
        accelerator: "auto" (GPUs where there are some, else the CPU), "cpu" or "gpu".
        model, training: Sizes, and how they are trained.
        strata: How pixels are divided by terrain.
    """

    data: TracerData | DataSettings
    host: str = "auto"
    accelerator: str = "auto"
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    strata: StrataSettings = field(default_factory=StrataSettings)


TASKS = ("forecast", "infill", "gaps")
OF_DESIGN = {"task", "out", "data", "variants", "baseline", "pairs", "seeds", "choose_on", "metric", "statistics"}
KEYS = OF_DESIGN | {"host", "accelerator", "model", "training", "strata"}


def read_task(path: str | Path) -> str:
    """Which of `TASKS` a comparison's YAML file is about; forecasts where it does not say."""
    return one_of("task", load(Path(path)).get("task", "forecast"), TASKS)


def read_configuration(
    path: str | Path,
    *,
    out: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    variants: Sequence[str] | None = None,
) -> Configuration:
    """Read a comparison's YAML file.

    Args:
        path: The file.
        out: Run directory, in the place of the file's; without either, `compare/` and the file's name.
        seeds: In the place of the file's.
        variants: Only these of the file's, and the baseline.

    Raises:
        InputError: If the file is absent, is no YAML, has an unknown key, or a value does not fit.
    """
    given = load(Path(path))
    check_keys(given, KEYS, "the configuration")
    return Configuration(
        **read_design(given, path, out=out, seeds=seeds, variants=variants),
        metric=one_of("metric", given.get("metric", "rmse_standardised"), METRICS),
        data=_data(given["data"]),
        host=one_of("host", given.get("host", "auto"), HOSTS),
        accelerator=one_of("accelerator", given.get("accelerator", "auto"), ACCELERATORS),
        model=fill(ModelSettings, given.get("model"), "model"),
        training=fill(TrainingSettings, given.get("training"), "training"),
        strata=fill(StrataSettings, given.get("strata"), "strata"),
    )


def read_design(
    given: dict[str, Any],
    path: str | Path,
    *,
    out: str | Path | None,
    seeds: Sequence[int] | None,
    variants: Sequence[str] | None,
) -> dict[str, Any]:
    """The arguments of `Design`, but for the metric, from what a file says; arguments as `read_configuration`'s."""
    for name in ("data", "variants"):
        if not given.get(name):
            raise InputError(f"{path} says nothing of {name!r}: a comparison needs data and variants")
    all_variants = _variants(given["variants"], given.get("baseline"))
    chosen = _chosen(all_variants, variants)
    names = [variant.name for variant in chosen]
    pairs = _pairs(given.get("pairs"), [variant.name for variant in all_variants])
    return {
        "out": Path(out) if out is not None else _out(given.get("out"), Path("compare") / Path(path).stem),
        "variants": tuple(chosen),
        "pairs": tuple(pair for pair in pairs if set(pair) <= set(names)),
        "seeds": _seeds(given.get("seeds") if seeds is None else seeds),
        "choose_on": _choose_on(given.get("choose_on", "val")),
        "statistics": fill(StatisticsSettings, given.get("statistics"), "statistics"),
    }


def fill(kind: type[Settings], given: Any, where: str) -> Settings:
    """A data class of settings from a part of the file; what is not given has its default.

    Raises:
        InputError: For an unknown key, or a value of another kind than the default's.
    """
    given = _mapping(given, where)
    known = {item.name: item for item in fields(cast(Any, kind))}
    check_keys(given, known, where)
    return kind(**{name: _typed(f"{where}.{name}", value, str(known[name].type)) for name, value in given.items()})


def numbers_or_all(name: str, given: Any, of: str) -> tuple[int | None, ...]:
    """A list of different numbers `of` something, None for "all" of it, which is also what there is without a list."""
    if given is None:
        return (None,)
    if not isinstance(given, list) or not given or len(set(map(str, given))) < len(given):
        raise InputError(f"{name} is a list of different numbers of {of}, such as [all, 60], not {given!r}")
    return tuple(None if number == "all" else count(name, number) for number in given)


KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
}


def _typed(name: str, value: Any, annotation: str) -> Any:
    if value is None and annotation.endswith("| None"):
        return None
    if annotation.startswith("tuple["):
        if not isinstance(value, list):
            raise InputError(f"{name} is a list, not {value!r}")
        return tuple(_typed(name, item, annotation[len("tuple[") :].split(",")[0]) for item in value)
    types, words = KINDS[annotation.removesuffix(" | None")]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise InputError(f"{name} is {words}, not {value!r}")
    return value


def load(path: Path) -> dict[str, Any]:
    """What a YAML file holds; InputError unless it is a mapping."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a comparison's YAML file, such as configs/compare/tracer.yaml")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    return _mapping(loaded, str(path))


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise InputError(f"{where} is a mapping of names to values, not {given!r}")
    return given


def check_keys(given: Mapping[str, Any], known: Mapping[str, Any] | set[str], where: str) -> None:
    """Raise InputError if a key is not among those that are known."""
    unknown = [key for key in given if key not in known]
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r} in {where}; valid: {', '.join(sorted(known))}")


def _out(given: Any, otherwise: Path) -> Path:
    return otherwise if given is None else Path(text("out", given))


def _data(given: Any) -> TracerData | DataSettings:
    given = _mapping(given, "data")
    if "tracer" in given:
        check_keys(given, {"tracer"}, "data, which has a tracer already")
        return _tracer(_mapping(given["tracer"], "data.tracer"))
    for name in ("root_dir", "variables", "out_variables"):
        if not given.get(name):
            raise InputError(f"data has either a tracer, or root_dir, variables and out_variables: it lacks {name}")
    settings = fill(DataSettings, given, "data")
    for name in ("variables", "out_variables"):
        names = getattr(settings, name)
        if len(set(names)) < len(names):
            raise InputError(f"data.{name} names each variable once, not {list(names)}")
    unknown = [name for name in settings.out_variables if name not in settings.variables]
    if unknown:
        raise InputError(
            f"data.out_variables names {unknown[0]}, and data.variables, which are all that a network knows, are "
            f"{', '.join(settings.variables)}: add it there"
        )
    return settings


def _tracer(given: dict[str, Any]) -> TracerData:
    own = {"region", "episodes", "seed"}
    check_keys(given, own | {item.name for item in fields(TracerSettings)}, "data.tracer")
    region = one_of("region", given.get("region", "asia"), REGIONS)
    episodes = _mapping(given.get("episodes"), "data.tracer.episodes")
    if set(episodes) != set(PARTITIONS) or not all(_is_whole(value, 1) for value in episodes.values()):
        raise InputError(
            f"data.tracer.episodes is a number of 1 or more for each of {', '.join(PARTITIONS)}, not {episodes}"
        )
    seed = given.get("seed", 0)
    if not _is_whole(seed, 0):
        raise InputError(f"data.tracer.seed is a whole number of 0 or more, not {seed!r}")
    rest = {name: value for name, value in given.items() if name not in own}
    settings = fill(TracerSettings, rest, "data.tracer")
    if settings.steps < 2:
        raise InputError(f"data.tracer.steps is 2 or more, since one is forecast from another, not {settings.steps}")
    hours = settings.step_hours
    if hours is not None and (hours < 1 or hours != int(hours)):
        raise InputError(f"data.tracer.step_hours is a whole number of hours, as ClimaX wants, not {hours}")
    return TracerData(region, episodes, seed, settings)


def _variants(given: Any, baseline: Any) -> list[Variant]:
    """All variants, the baseline first."""
    given = _mapping(given, "variants")
    if baseline is None:
        baseline = next(iter(given))
    if not isinstance(baseline, str) or baseline not in given:
        raise InputError(f"baseline {baseline!r} is not among the variants, which are {', '.join(given)}")
    variants = [_variant(name, value) for name, value in given.items()]
    return sorted(variants, key=lambda variant: variant.name != baseline)


def _variant(name: str, given: Any) -> Variant:
    if not NAME.fullmatch(name):
        raise InputError(f"a variant's name is letters, digits and _ + - . alone, for it names a folder, not {name!r}")
    where = f"variant {name!r}"
    given = _mapping(given, where)
    check_keys(given, {"bias_type", "bias_args"}, where)
    if given and not isinstance(given.get("bias_type"), str):
        raise InputError(f"{where} has a bias_type, or is null for none: {given}")
    return Variant(name, given.get("bias_type"), _mapping(given.get("bias_args"), f"bias_args of {where}") or None)


def _chosen(variants: list[Variant], names: Sequence[str] | None) -> list[Variant]:
    if names is None:
        return variants
    known = [variant.name for variant in variants]
    for name in names:
        if name not in known:
            raise InputError(f"unknown variant {name!r}; the configuration has {', '.join(known)}")
    return [variant for variant in variants if variant.name in names or variant is variants[0]]


def _pairs(given: Any, names: list[str]) -> list[tuple[str, str]]:
    if not isinstance(given or [], list):
        raise InputError(f"pairs is a list of [variant, counterpart], not {given!r}")
    for pair in given or []:
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
            raise InputError(f"a pair is [variant, counterpart], two different ones, not {pair!r}")
        for name in pair:
            if name not in names:
                raise InputError(f"the pair {pair} names {name!r}, and the variants are {', '.join(names)}")
    return [(pair[0], pair[1]) for pair in given or []]


def _seeds(given: Any) -> tuple[int, ...]:
    if not isinstance(given, list | tuple) or not given:
        raise InputError(f"seeds is a list of at least one whole number, such as [0, 1, 2, 3, 4], not {given!r}")
    for seed in given:
        if not _is_whole(seed, 0) or seed >= 2**32:
            raise InputError(f"a seed is a whole number from 0 to 4294967295, not {seed!r}")
    if len(set(given)) < len(given):
        raise InputError(f"seeds names a seed twice: {list(given)}")
    return tuple(given)


def _choose_on(given: Any) -> str:
    if given in ("test", "train"):
        raise InputError(f"choose_on is val or none, not {given}: a choice made on {given} would spoil its scores")
    return one_of("choose_on", "none" if given is None else given, CHOICES)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def identity(configuration: Configuration) -> dict[str, Any]:
    """What all runs of a comparison have in common, to be told apart from another comparison's; data excepted."""
    return {
        "model": asdict(configuration.model),
        "training": asdict(configuration.training),
        "choose_on": configuration.choose_on,
        "strata": asdict(configuration.strata),
    }
