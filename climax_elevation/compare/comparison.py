"""`climax-elevation compare`: several networks, several seeds, everything else equal."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from climax_elevation.checks import count
from climax_elevation.compare.config import Configuration, TracerData, identity, read_configuration, read_task
from climax_elevation.compare.fingerprints import (
    Record,
    bias_files,
    data_files,
    examine,
    fingerprint,
    read_records,
    write_records,
)
from climax_elevation.compare.gaps import compare_gaps
from climax_elevation.compare.infill import compare_infill
from climax_elevation.compare.report import report
from climax_elevation.compare.runs import (
    Finished,
    Task,
    find_host,
    host_class,
    network,
    read_run,
    remove_partial,
    run_missing,
    try_out,
    variant_identity,
)
from climax_elevation.compare.scores import PARTS, Samples, Scorer, save_samples
from climax_elevation.compare.significance import FEWEST_BLOCKS
from climax_elevation.compare.stored import (
    FILES,
    RUNS,
    Comparison,
    check_stored,
    check_unchanged,
    concluded,
    first_difference,
    plain,
    run_directory,
    unheard,
)
from climax_elevation.compare.tables import Results, differences_table, results_table
from climax_elevation.errors import InputError
from climax_elevation.testbed.altitude import region_elevation
from climax_elevation.testbed.fit import DataSettings, one_thread
from climax_elevation.testbed.tracer import floor, write_tracer_dataset
from climax_elevation.upstream.locate import Source

logger = logging.getLogger(__name__)

OF_INFERENCE = {"infill": compare_infill, "gaps": compare_gaps}
DATA, DATA_RECORD, REFERENCES = "data", "data.json", "references.npz"


def compare(
    config: str | Path,
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    seeds: Sequence[int] | None = None,
    variants: Sequence[str] | None = None,
) -> Comparison:
    """Train every variant with every seed, everything else equal, and say what differs.

    Equal are the data and their order, the host's first weights (per seed) and dropout. What a run depends
    on is written with it: a comparison that was stopped goes on with the same command, and seeds and
    variants may be added.

    Args:
        config: YAML file, see `climax_elevation.compare.config.Configuration` and `configs/compare`.
        out: Run directory, in the place of the file's.
        jobs: Runs at a time; None: as many as there are GPUs, or one on the CPU.
        seeds: In the place of the file's.
        variants: Only these of the file's, and the baseline.

    Returns:
        The tables and the report, which are also in the run directory.

    Raises:
        InputError: For every mistake in the file, the data or the run directory, before any training.
    """
    task = read_task(config)
    if task in OF_INFERENCE:
        return OF_INFERENCE[task](config, out=out, jobs=jobs, seeds=seeds, variants=variants)
    configuration = read_configuration(config, out=out, seeds=seeds, variants=variants)
    devices = _devices(configuration.accelerator)
    jobs = count("--jobs", jobs) if jobs is not None else max(1, len(devices))
    climax, host = find_host(configuration.host)
    out = configuration.out
    with run_directory(out, (FILES, DATA, RUNS)):
        return _compare(configuration, climax, host, devices, jobs)


def _compare(
    configuration: Configuration, climax: Source | None, host: str, devices: list[int], jobs: int
) -> Comparison:
    data, data_identity = _data_settings(configuration)
    common = {"host": host, "accelerator": "gpu" if devices else "cpu", **identity(configuration)}
    before = read_records(configuration.out / FILES)
    files = _examine(configuration, data, before)

    def planned() -> list[Task]:
        with_files = {"data": {**data_identity, "fingerprint": fingerprint(files["data"])}, **common}
        return _tasks(configuration, data, climax, plain(with_files), files["biases"])

    tasks = planned()
    check_stored(configuration.out, tasks, before.get("data", {}), files["data"])
    to_do = [task for task in tasks if not task.done]
    _check_networks(configuration, to_do, climax)
    if _simulate(configuration, data, data_identity):
        files = _examine(configuration, data, files)
        to_do = tasks = planned()
    scorer = Scorer.of(data, configuration.strata, configuration.model.patch_size, configuration.training.batch_size)
    _check_blocks(configuration, scorer)
    _check_terrain(to_do, scorer, climax)
    remove_partial(configuration.out / RUNS)
    logger.info("host: %s", "ClimaX" if climax else "stand-in, which is not ClimaX")
    logger.info(
        "%d variants with %d seeds: %d runs, %d of them finished before; %d at a time on %s",
        len(configuration.variants),
        len(configuration.seeds),
        len(tasks),
        len(tasks) - len(to_do),
        jobs,
        f"{len(devices)} GPUs" if devices else "the CPU",
    )
    write_records(configuration.out / FILES, files)
    if to_do:
        run_missing(to_do, tasks, jobs, devices)
        check_unchanged(files, _examine(configuration, data, files), to_do)
    return _conclude(configuration, tasks, scorer, host)


def _conclude(configuration: Configuration, tasks: list[Task], scorer: Scorer, host: str) -> Comparison:
    runs: dict[tuple[str, int], Finished] = {(task.variant.name, task.seed): read_run(task.folder) for task in tasks}
    results = Results(
        configuration=configuration,
        variables=scorer.data.out_variables,
        strata=scorer.strata.names,
        std=scorer.data.output_transforms.std,
        runs=runs,
        references=_references(configuration.out, scorer),
        floors=_stored_floors(configuration.out),
        host=host,
    )
    table, differences = results_table(results), differences_table(results)
    text = report(results, table, differences)
    return concluded(configuration.out, table, differences, text)


def _devices(accelerator: str) -> list[int]:
    number = torch.cuda.device_count() if accelerator != "cpu" and torch.cuda.is_available() else 0
    if accelerator == "gpu" and not number:
        raise InputError("accelerator is gpu, and torch finds none: write accelerator: auto, or cpu")
    return list(range(number))


def _data_settings(configuration: Configuration) -> tuple[DataSettings, dict[str, Any]]:
    """The data, and what tells them from others."""
    data = configuration.data
    if isinstance(data, DataSettings):
        named = {name: value for name, value in asdict(data).items() if name != "root_dir"}
        data.module(configuration.training.batch_size)  # says what is missing
        return data, named
    hours = int(data.settings.hours(region_elevation(data.region)))
    return data.settings_in(configuration.out / DATA, hours), {"tracer": asdict(data)}


def _examine(configuration: Configuration, data: DataSettings, known: dict[str, Record]) -> dict[str, Record]:
    """What the files hold that runs depend on."""
    of_biases: dict[str, Path] = {}
    for variant in configuration.variants:
        of_biases |= bias_files(variant.bias_args)
    files = {"data": data_files(data.root_dir), "biases": of_biases}
    return {kind: examine(paths, known.get(kind)) for kind, paths in files.items()}


def _tasks(
    configuration: Configuration,
    data: DataSettings,
    climax: Source | None,
    common: dict[str, Any],
    files: Record,
) -> list[Task]:
    """Variant after variant; all seeds of each."""

    return [
        Task(
            folder=configuration.out / RUNS / variant.name / f"seed{seed}",
            variant=variant,
            seed=seed,
            data=data,
            model=configuration.model,
            training=configuration.training,
            strata=configuration.strata,
            keep_best=configuration.choose_on == "val",
            climax=climax,
            configuration={**common, "variant": plain(variant_identity(variant, files)), "seed": seed},
        )
        for variant in configuration.variants
        for seed in configuration.seeds
    ]


def _check_networks(configuration: Configuration, tasks: list[Task], climax: Source | None) -> None:
    """Networks for simulated data can be built before there are any."""
    if isinstance(configuration.data, TracerData):
        size, architecture = region_elevation(configuration.data.region).elevation_m.shape, host_class(climax)
        with unheard():
            for task in _one_a_variant(tasks):
                network(task, size, architecture)


def _check_terrain(tasks: list[Task], scorer: Scorer, climax: Source | None) -> None:
    """Every variant's terrain fits the data."""
    size, architecture = [len(axis) for axis in scorer.data.get_lat_lon()], host_class(climax)
    with unheard(), one_thread():
        for task in _one_a_variant(tasks):
            try_out(task, size, architecture)


def _one_a_variant(tasks: list[Task]) -> Iterable[Task]:
    first: dict[str, Task] = {}
    for task in tasks:
        first.setdefault(task.variant.name, task)
    return first.values()


def _check_blocks(configuration: Configuration, scorer: Scorer) -> None:
    block = configuration.statistics.block
    for part in PARTS:
        steps = sum(shard.pairs(scorer.data.hparams["predict_range"]) for shard in scorer.data.shards[part])
        if block is not None and block * FEWEST_BLOCKS > steps:
            logger.warning(
                "statistics.block %d gives fewer than %d blocks in the %d samples of %s: there will be no interval "
                "over time",
                block,
                FEWEST_BLOCKS,
                steps,
                part,
            )


def _simulate(configuration: Configuration, data: DataSettings, data_identity: dict[str, Any]) -> bool:
    """Simulate the tracer, unless it is there, and note how well it could be forecast; whether it was simulated."""
    tracer = configuration.data
    if not isinstance(tracer, TracerData):
        return False
    record = configuration.out / DATA_RECORD
    if record.is_file():
        found = first_difference(json.loads(record.read_text())["data"], plain(data_identity))
        if found is not None:
            raise InputError(f"{data.root_dir} holds another simulation ({found}): give another --out")
        return False
    ground = region_elevation(tracer.region)
    simulator = write_tracer_dataset(
        data.root_dir, ground, episodes=tracer.episodes, seed=tracer.seed, settings=tracer.settings, progress=True
    )
    floors = {part: asdict(floor(data.root_dir, simulator, hours=data.hrs_each_step, partition=part)) for part in PARTS}
    # last of all: it says that the simulation is complete
    record.write_text(json.dumps({"data": data_identity, "floors": floors}, indent=2))
    return True


def _stored_floors(out: Path) -> dict[str, dict[str, float]]:
    record = out / DATA_RECORD
    return json.loads(record.read_text())["floors"] if record.is_file() else {}


def _references(out: Path, scorer: Scorer) -> dict[str, dict[str, Samples]]:
    """Persistence and climatology, by part; kept too, for later questions."""
    kinds = {"persistence": scorer.persistence, "climatology": scorer.climatology}
    references = {part: {name: kind(part) for name, kind in kinds.items()} for part in PARTS}
    named = {f"{part}/{name}": samples for part in PARTS for name, samples in references[part].items()}
    save_samples(out / REFERENCES, named, scorer.data.out_variables, scorer.strata.names)
    return references
