"""Trains and scores one network, and many at a time, each in a process of its own."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from pytorch_lightning import Trainer
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from climax_elevation.compare.config import Variant
from climax_elevation.compare.fingerprints import Record, bias_files, digests
from climax_elevation.compare.scores import PARTS, Samples, Scorer, load_samples, save_samples
from climax_elevation.compare.strata import StrataSettings
from climax_elevation.errors import InputError
from climax_elevation.host import StandInClimaX
from climax_elevation.host.module import GlobalForecastModule
from climax_elevation.testbed.fit import (
    FULL_SHUFFLE,
    DataSettings,
    Fitted,
    ModelSettings,
    TrainingSettings,
    build_network,
    fit,
    network_arguments,
    one_thread,
    quiet,
)
from climax_elevation.testbed.masked import MaskedFit
from climax_elevation.training import TerrainCallback
from climax_elevation.upstream.arch import climax_class
from climax_elevation.upstream.config import CLIMAX_CLASS, STAND_IN_CLASS
from climax_elevation.upstream.locate import ClimaXNotFound, Source, find_climax

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

RECORD, SAMPLES, WEIGHTS, LOG = "run.json", "samples.npz", "weights.ckpt", "log.txt"
CONFIG = "config.yaml"  # as a run of train has it, so that doctor and plot open this one too
SECONDS_A_MESSAGE = 1.0
MIB = 2**20
PARTIAL = ".partial"


@dataclass(frozen=True)
class Task:
    """One run: a variant with a seed.

    Attributes:
        folder: Where it goes, when it is done.
        variant, seed: Which.
        data, model, training, strata: Settings.
        keep_best: Whether it ends with the weights that were best on validation.
        climax: The ClimaX whose architecture is trained; None: the stand-in's.
        configuration: All that defines it, to be told apart from another.
    """

    folder: Path
    variant: Variant
    seed: int
    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    strata: StrataSettings
    keep_best: bool
    climax: Source | None
    configuration: dict[str, Any]

    @property
    def name(self) -> str:
        """For messages."""
        return f"variant {self.variant.name!r}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether it was finished."""
        return (self.folder / RECORD).is_file()

    def work(self, device: int | None, on_step: Callable[[float | None], None]) -> None:
        """Train and score it."""
        run(self, device, on_step)


class Work(Protocol):
    """What `run_missing` asks of a task."""

    @property
    def name(self) -> str: ...

    @property
    def training(self) -> TrainingSettings: ...

    @property
    def done(self) -> bool: ...

    def work(self, device: int | None, on_step: Callable[[float | None], None]) -> None: ...


@dataclass(frozen=True)
class Finished:
    """What a run left.

    Attributes:
        samples: Of each part.
        record: `run.json`: configuration, versions, cost, scalars of the bias, validation's curve.
    """

    samples: dict[str, Samples]
    record: dict[str, Any]


def read_run(folder: Path) -> Finished:
    """A finished run."""
    return Finished(load_samples(folder / SAMPLES), json.loads((folder / RECORD).read_text()))


def find_host(wanted: str) -> tuple[Source | None, str]:
    """Whose architecture is trained, one of `HOSTS`, and its name; InputError if it is not to be found."""
    if wanted == "stand-in":
        return None, "stand-in"
    try:
        return find_climax(None), "ClimaX"
    except ClimaXNotFound as error:
        if wanted == "climax":
            raise InputError(f"host is climax: {error}") from error
        return None, "stand-in"


def host_class(climax: Source | None) -> Callable[..., nn.Module]:
    """The architecture that is trained."""
    return StandInClimaX if climax is None else climax_class(climax)


@contextmanager
def naming(variant: Variant) -> Iterator[None]:
    """Within it, an InputError names the variant."""
    try:
        yield
    except InputError as error:
        raise InputError(f"variant {variant.name!r}: {error}") from error


def network(task: Task, img_size: Sequence[int], host: Callable[..., nn.Module]) -> nn.Module:
    """The fresh network of a run.

    Raises:
        InputError: If sizes or the bias do not fit; the message names the variant.
    """
    with naming(task.variant):
        return build_network(
            task.model,
            task.data.variables,
            img_size,
            seed=task.seed,
            bias_type=task.variant.bias_type,
            bias_args=task.variant.bias_args,
            host=host,
        )


def try_out(task: Task, img_size: Sequence[int], host: Callable[..., nn.Module]) -> None:
    """Forecast one batch of validation, which is where terrain that does not fit shows.

    Raises:
        InputError: If it does not; the message names the variant.
    """
    net = network(task, img_size, host)
    module = GlobalForecastModule(net, warmup_epochs=0, max_epochs=1)
    with quiet():
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            limit_val_batches=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[TerrainCallback()],
        )
        with naming(task.variant):
            trainer.validate(module, datamodule=task.data.module(task.training.batch_size), verbose=False)


def run(task: Task, device: int | None, on_step: Callable[[float | None], None]) -> None:
    """Train and score; the run's folder appears whole or not at all.

    Args:
        task: What.
        device: Index of a GPU; None: the CPU.
        on_step: Called after every training step.
    """
    with whole_run(task.folder) as partial:
        with one_thread():
            started = time.perf_counter()
            scorer = Scorer.of(task.data, task.strata, task.model.patch_size, task.training.batch_size)
            img_size = [len(axis) for axis in scorer.data.get_lat_lon()]
            net = network(task, img_size, host_class(task.climax))
            fitted = fit(
                net,
                task.data,
                task.training,
                seed=task.seed,
                on_step=on_step,
                device=device,
                keep_best=task.keep_best,
            )
            record = record_of(task.configuration, fitted, device)
            samples = {part: scorer.network(net, part) for part in PARTS}
            record["seconds"] = time.perf_counter() - started
        save_samples(partial / SAMPLES, samples, task.data.out_variables, scorer.strata.names)
        torch.save({"state_dict": fitted.module.cpu().state_dict()}, partial / WEIGHTS)
        (partial / CONFIG).write_text(yaml.safe_dump(_configuration(task, img_size), sort_keys=False))
        (partial / RECORD).write_text(json.dumps(record, indent=2))


@contextmanager
def whole_run(folder: Path) -> Iterator[Path]:
    """A folder to write to, with what the library logs, that becomes `folder` at the end, or nothing."""
    partial = folder.parent / f".{folder.name}.{os.getpid()}{PARTIAL}"
    partial.mkdir(parents=True)
    try:
        with _log_to(partial / LOG):
            yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _configuration(task: Task, img_size: Sequence[int]) -> dict[str, Any]:
    variant, data = task.variant, asdict(task.data)
    arguments = network_arguments(task.model, data["variables"], img_size, variant.bias_type, variant.bias_args)
    host = STAND_IN_CLASS if task.climax is None else CLIMAX_CLASS
    return {
        "model": {"net": {"class_path": host, "init_args": arguments}, "lr": task.training.lr},
        "data": {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in data.items()},
            "buffer_size": FULL_SHUFFLE,
            "batch_size": task.training.batch_size,
            "num_workers": 0,
        },
    }


def record_of(configuration: dict[str, Any], fitted: Fitted | MaskedFit, device: int | None) -> dict[str, Any]:
    """What is kept of a training beside its weights and scores."""
    return {
        "configuration": configuration,
        "versions": {name: version(name) for name in ("torch", "timm", "pytorch-lightning")},
        "device": "cpu" if device is None else torch.cuda.get_device_name(device),
        "seconds_a_step": fitted.seconds_a_step,
        "peak_memory_mib": peak_memory_mib(device),
        "scalars": fitted.scalars,
        "curve": fitted.curve,
    }


def peak_memory_mib(device: int | None) -> float | None:
    """Most memory so far: of the GPU's allocations, or of the whole process, libraries included."""
    if device is not None:
        return torch.cuda.max_memory_allocated(device) / MIB
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """What the library logs goes to a file, instead of between the progress bars of other runs."""
    library = logging.getLogger("climax_elevation")
    handler = logging.FileHandler(path)
    level, propagate = library.level, library.propagate
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    library.propagate = False
    try:
        yield
    finally:
        library.removeHandler(handler)
        handler.close()
        library.setLevel(level)
        library.propagate = propagate


def run_missing(to_do: Sequence[Work], tasks: Sequence[Work], jobs: int, devices: Sequence[int]) -> None:
    """`run_all` of those of `tasks` that are to do; where it is interrupted, how many of all are kept is said."""
    try:
        run_all(to_do, jobs, devices)
    except KeyboardInterrupt:
        finished = sum(task.done for task in tasks)
        logger.info("%d of %d runs are finished and kept; the same command goes on", finished, len(tasks))
        raise


def run_all(tasks: Sequence[Work], jobs: int, devices: Sequence[int]) -> None:
    """Run tasks, `jobs` at a time, each in a process of its own, with one progress bar over all.

    Args:
        tasks: Those that are to do.
        jobs: How many at a time.
        devices: Indices of GPUs, which the processes take in turn; none: the CPU.

    Raises:
        InputError: If a run finds a mistake, or its process is killed; the others are stopped then, and
            those that are finished stay.
        RuntimeError: If a run fails otherwise; the message holds its traceback.
    """
    waiting, active = deque(tasks), dict[Connection, _Running]()
    free = deque(range(jobs))
    steps = sum(task.training.steps for task in tasks)
    with tqdm(total=steps, unit="step", desc=f"0 of {len(tasks)} runs") as bar, logging_redirect_tqdm():
        try:
            while waiting or active:
                while waiting and free:
                    slot = free.popleft()
                    started = _start(waiting.popleft(), slot, devices[slot % len(devices)] if devices else None)
                    active[started.pipe] = started
                for pipe in wait(list(active)):
                    running = active[pipe]  # type: ignore[index]
                    if _listen(running, bar):
                        del active[running.pipe]
                        free.append(running.slot)
                        bar.set_description(f"{len(tasks) - len(waiting) - len(active)} of {len(tasks)} runs")
        finally:
            for running in active.values():
                running.process.kill()
                running.process.join()


@dataclass
class _Running:
    task: Work
    slot: int
    process: BaseProcess
    pipe: Connection
    steps: int = 0


def _start(task: Work, slot: int, device: int | None) -> _Running:
    # from a server that has the libraries loaded, where there is one: a fresh process takes seconds to load them
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, device, theirs), daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    return _Running(task, slot, process, ours)


def _listen(running: _Running, bar: tqdm) -> bool:
    """Take one message of a run; whether it has ended."""
    try:
        kind, value = running.pipe.recv()
    except EOFError:
        running.process.join()
        raise InputError(
            f"{running.task.name} was killed (exit code {running.process.exitcode}), perhaps for lack of memory: give "
            "fewer --jobs, or a smaller model; finished runs are kept, and the same command goes on"
        ) from None
    if kind == "steps":
        bar.update(value - running.steps)
        running.steps = value
        return False
    running.process.join()
    running.pipe.close()
    if kind == "mistake":
        raise InputError(f"{running.task.name}: {value}")
    if kind == "failure":
        raise RuntimeError(f"{running.task.name} failed:\n{value}")
    bar.update(running.task.training.steps - running.steps)
    return True


def _child(task: Work, device: int | None, pipe: Connection) -> None:
    # Ctrl-C goes to all processes of a terminal; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    steps, told = 0, time.monotonic()

    def on_step(error: float | None) -> None:
        nonlocal steps, told
        steps += 1
        if time.monotonic() - told > SECONDS_A_MESSAGE:
            told = time.monotonic()
            pipe.send(("steps", steps))

    try:
        task.work(device, on_step)
    except InputError as error:
        pipe.send(("mistake", str(error)))
    except BaseException:
        pipe.send(("failure", traceback.format_exc()))
    else:
        pipe.send(("done", None))


def _end_with_parent() -> None:
    """A run whose comparison was killed would otherwise go on, and meet the one that resumes it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def remove_partial(folder: Path) -> None:
    """Remove what killed runs left behind."""
    for partial in folder.glob(f"*/.*{PARTIAL}"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def variant_identity(variant: Variant, files: Record | None = None) -> dict[str, Any]:
    """A variant without its name, with what the files hold that it names.

    Args:
        variant: Which.
        files: Of all variants; None: none is named.
    """
    own = {} if files is None else digests({name: files[name] for name in bias_files(variant.bias_args)})
    named = {name: value for name, value in asdict(variant).items() if name != "name"}
    return {**named, **({"files": own} if own else {})}
