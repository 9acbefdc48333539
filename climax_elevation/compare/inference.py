"""What comparisons of networks that infer hidden values share: arms, methods beside the networks, tables.

An arm is what is the same for all networks that are compared with each other. Each has the folder of its name, with
runs and tables of its own.
"""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from climax_elevation.compare.config import Design, Variant
from climax_elevation.compare.fingerprints import Record, read_records, write_records
from climax_elevation.compare.runs import (
    RECORD,
    SAMPLES,
    WEIGHTS,
    Finished,
    naming,
    read_run,
    record_of,
    remove_partial,
    run_missing,
    whole_run,
)
from climax_elevation.compare.scores import PARTS, Samples, load_samples, save_samples
from climax_elevation.compare.stored import (
    FILES,
    RUNS,
    check_stored,
    check_unchanged,
    plain,
    save_tables,
)
from climax_elevation.compare.tables import Results, differences_table, results_table
from climax_elevation.errors import InputError
from climax_elevation.testbed.fit import TrainingSettings, denormals_as_zero, one_thread
from climax_elevation.testbed.interpolation import Interpolation, Mask, Places
from climax_elevation.testbed.masked import MaskedFit

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

METRICS = ("rmse_standardised", "rmse")
METHODS = "methods"  # the folder of what is no network
CLIMATOLOGY = "climatology"


@dataclass(frozen=True)
class Arm(ABC):
    """What is the same for all networks that are compared with each other.

    Args:
        elevation_input: Whether they are told heights.
    """

    elevation_input: bool

    @property
    def told(self) -> str:
        """What they are told of heights, in a word."""
        return "given" if self.elevation_input else "withheld"

    @property
    @abstractmethod
    def name(self) -> str:
        """Of its folder."""

    @property
    @abstractmethod
    def methods(self) -> str:
        """The folder of the methods that were fitted to the same."""


@dataclass(frozen=True)
class ArmTask(ABC):
    """One run: a variant with a seed, in an arm.

    Attributes:
        folder: Where it goes, when it is done.
        variant, seed, arm: Which.
        training: How it is trained.
        keep_best: Whether it ends with the weights that were best on validation.
        configuration: All that defines it, to be told apart from another.
    """

    folder: Path
    variant: Variant
    seed: int
    arm: Any
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

    @abstractmethod
    def network(self, data: Any) -> nn.Module:
        """The fresh network; InputError, naming the variant, if the bias does not fit."""

    @abstractmethod
    def on(self, data: Any) -> Any:
        """What the network works on."""

    @abstractmethod
    def trained(self, on_step: Callable[[float | None], None]) -> Trained:
        """Train and score."""

    def check(self, data: Any) -> None:
        """Raise InputError, naming the variant, unless its bias works on these data."""
        net = self.network(data)
        with naming(self.variant):
            self.on(data).infer(net, "val", most=1)

    def work(self, device: int | None, on_step: Callable[[float | None], None]) -> None:
        """Train and score; the run's folder appears whole or not at all. Networks this small gain nothing on GPUs."""
        with whole_run(self.folder) as partial, one_thread(), denormals_as_zero():
            started = time.perf_counter()
            net, fitted, samples, variable, strata = self.trained(on_step)
            record = {**record_of(self.configuration, fitted, None), "seconds": time.perf_counter() - started}
            save_samples(partial / SAMPLES, samples, [variable], strata)
            torch.save({"state_dict": net.state_dict()}, partial / WEIGHTS)
            (partial / RECORD).write_text(json.dumps(record, indent=2))


class Trained(NamedTuple):
    """What a run's folder is made of.

    Attributes:
        net: With its last or best weights.
        fitted: How it came to them.
        samples: Its errors in each part.
        variable, strata: What these are of.
    """

    net: nn.Module
    fitted: MaskedFit
    samples: dict[str, Samples]
    variable: str
    strata: Sequence[str]


Run = TypeVar("Run", bound=ArmTask)
Key = tuple[str, int | None]  # of methods: the folder that their arms name, and the seed; None: the same for all seeds


@dataclass(frozen=True)
class Scored:
    """What errors are of.

    Attributes:
        variable: That is inferred.
        std: Its standard deviation.
        strata: By which errors are divided.
        host: Whose architecture it is.
    """

    variable: str
    std: float
    strata: tuple[str, ...]
    host: str


@dataclass(frozen=True)
class Methods:
    """What is no network, fitted on training, and its scores.

    Attributes:
        parameters: Of each method, by name with its unit.
        samples: By "METHOD/PART".
    """

    parameters: dict[str, dict[str, float | str]]
    samples: dict[str, Samples]


def arms_of(tasks: Iterable[ArmTask]) -> list[Arm]:
    """Each once, in order."""
    return list({task.arm.name: task.arm for task in tasks}.values())


def train_missing(
    configuration: Design,
    tasks: Sequence[Run],
    files: dict[str, Record],
    examine: Callable[[dict[str, Record]], dict[str, Record]],
    check: Callable[[Sequence[Run]], None],
    methods: Iterable[PlannedMethods],
    jobs: int,
) -> None:
    """Run what is not there, once all of it is known to work; networks this small gain nothing on GPUs.

    Args:
        configuration: What was asked for.
        tasks: All runs.
        files: What they depend on, "data" and more, as `examine` has just found it.
        examine: What the files hold, given what they held.
        check: Raises InputError if one of the runs that are to do cannot be.
        methods: That come after them.
        jobs: How many at a time.
    """
    out, before = configuration.out, read_records(configuration.out / FILES)
    arms = arms_of(tasks)
    for arm in arms:
        own = [task for task in tasks if task.arm.name == arm.name]
        check_stored(out / arm.name, own, before.get("data", {}), files["data"])
    for planned in methods:
        planned.record()
    to_do = [task for task in tasks if not task.done]
    check(to_do)
    for folder in (METHODS, *(f"{arm.name}/{RUNS}" for arm in arms)):
        remove_partial(out / folder)
    logger.info(
        "%d variants with %d seeds in %d arms: %d runs, %d of them finished before; %d at a time on the CPU",
        len(configuration.variants),
        len(configuration.seeds),
        len(arms),
        len(tasks),
        len(tasks) - len(to_do),
        jobs,
    )
    write_records(out / FILES, files)
    if to_do:
        run_missing(to_do, tasks, jobs, [])
        check_unchanged(files, examine(files), to_do)


@dataclass(frozen=True)
class PlannedMethods:
    """Methods that were fitted before, or are to be.

    Attributes:
        folder: Where they are, or go.
        identity: All that defines them.
        scored: What they are scored on.
        compute: Fits and scores.
    """

    folder: Path
    identity: dict[str, Any]
    scored: Scored
    compute: Callable[[], Methods]

    def record(self) -> dict[str, Any] | None:
        """Of the folder's, None where there are none; InputError if others are there."""
        path = self.folder / RECORD
        if not path.is_file():
            return None
        record: dict[str, Any] = json.loads(path.read_text())
        if record["configuration"] != plain(self.identity):
            raise InputError(f"{self.folder} is of other data or settings: give another --out, or remove what is there")
        return record

    def kept(self) -> Methods:
        """Those of the folder, fitted first where there are none."""
        if (found := self.record()) is not None:
            return Methods(found["parameters"], load_samples(self.folder / SAMPLES))
        methods = self.compute()
        with whole_run(self.folder) as partial:
            save_samples(partial / SAMPLES, methods.samples, [self.scored.variable], self.scored.strata)
            record = {"configuration": plain(self.identity), "parameters": methods.parameters}
            (partial / RECORD).write_text(json.dumps(record, indent=2))
        return methods


def scored_methods(
    fitted: Sequence[Interpolation],
    places: Places,
    visible: Mapping[str, tuple[Array, Mask]],
    sums: Callable[[Array, str], Samples],
) -> Methods:
    """Fitted methods, and the climatology, scored.

    Args:
        fitted: Methods.
        places: Of all tokens.
        visible: Of each part the anomalies and which of them may be seen, `[T, L]` each.
        sums: Squared errors of what was inferred, `[T, L]`, by part.
    """
    samples = {}
    for part, (x, seen) in visible.items():
        samples[f"{CLIMATOLOGY}/{part}"] = sums(np.zeros(x.shape), part)
        for method in fitted:
            samples[f"{method.name}/{part}"] = sums(method.infer(x, seen, places), part)
    return Methods({method.name: method.parameters for method in fitted}, samples)


def tables(
    configuration: Design,
    tasks: Sequence[ArmTask],
    methods: Mapping[Key, Methods],
    scored: Scored,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and differences of all arms, each arm's written to its folder too.

    Args:
        configuration: What was asked for.
        tasks: All runs, which are there.
        methods: All of them.
        scored: What errors are of.
    """
    both: tuple[list[pd.DataFrame], list[pd.DataFrame]] = [], []
    for arm in arms_of(tasks):
        results = Results(
            configuration=configuration,
            variables=[scored.variable],
            strata=scored.strata,
            std=np.array([scored.std]),
            runs={(t.variant.name, t.seed): read_run(t.folder) for t in tasks if t.arm.name == arm.name},
            references={},
            floors={},
            host=scored.host,
            metrics=METRICS,
        )
        networks, differing = results_table(results), differences_table(results)
        others = results_table(replace(results, runs=_in_the_place_of_runs(methods, arm)))
        table = pd.concat([networks, others[others.part != "train"]], ignore_index=True)
        for kind, rows in zip(both, (table, differing), strict=True):
            rows.insert(0, "arm", arm.name)
            kind.append(rows)
        save_tables(configuration.out / arm.name, table, differing)
    table, differing = (pd.concat(kind, ignore_index=True) for kind in both)
    return table, differing


def records_of(tasks: Iterable[ArmTask]) -> list[dict[str, Any]]:
    """Of all runs."""
    return [json.loads((task.folder / RECORD).read_text()) for task in tasks]


def _in_the_place_of_runs(methods: Mapping[Key, Methods], arm: Arm) -> dict[Any, Finished]:
    cost = dict.fromkeys(("seconds_a_step", "peak_memory_mib", "seconds"), float("nan"))
    runs = {}
    for (folder, seed), kept in methods.items():
        if folder == arm.methods:
            for name in dict.fromkeys(key.rpartition("/")[0] for key in kept.samples):
                of_parts = {part: kept.samples[f"{name}/{part}"] for part in PARTS}
                runs[name, seed] = Finished(of_parts, {**cost, "scalars": {}})
    return runs
