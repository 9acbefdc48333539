"""The processes of one run end together: no other waits for one that cannot go on, whose sentence is seen once."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.distributed as dist
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning import Callback, LightningModule, Trainer

from climax_elevation.errors import InputError, SickRun

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

logger = logging.getLogger(__name__)

# keys of the store that the processes met in
FAILED, STOP, ENDING, DONE = (f"climax_elevation/{name}" for name in ("failed", "stop", "ending", "done"))
LOOK_EVERY_S = 0.5
ENDS_WITHIN_S = 10.0
LEAD_S = 3.0
STATUS = SickRun.status


class EndTogether(Callback):
    """Ends all processes of a distributed run where one of them fails; does nothing in a run of one process.

    The one that fails says so in the store that the processes met in, and not by a collective operation, in which the
    others may be waiting for it. A thread of each process looks there twice a second.
    """

    def __init__(self) -> None:
        self._ending: threading.Event | None = None  # a run that is spawned takes this along, and no lock
        self._told: threading.Event | None = None
        self._watch: threading.Thread | None = None
        self._store: Store | None = None
        self._stages = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size < 2 or not dist.is_initialized() or self._watch is not None:
            return
        self._store, self._ending = dist.distributed_c10d._get_default_store(), threading.Event()
        self._told = threading.Event()
        arguments = (self._store, trainer, self._ending, self._told)
        self._watch = threading.Thread(target=_end_with_others, args=arguments, daemon=True, name="end-together")
        self._watch.start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Exception):  # Ctrl-C and SIGTERM reach all of them
            return
        if self._store is None or self._ending is None or self._told is None:
            return
        if self._told.is_set():  # the one that failed has ended, and what waited here for it notices
            raise SystemExit(STATUS)
        store = self._store
        self._ending.set()
        if store.add(FAILED, 1) > 1:  # what came here follows from what another process has said
            _acknowledge(store, trainer)
            raise SystemExit(STATUS)
        if isinstance(exception, InputError):
            print(f"error: {exception}", file=sys.stderr, flush=True)
            exception.said = True
        if threading.current_thread() is threading.main_thread():
            # Lightning answers SIGTERM, which launchers send now, by a collective operation
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        store.add(STOP, 1)
        _wait(lambda: store.add(ENDING, 0) >= trainer.world_size - 1)
        if _started_by_lightning(trainer):
            _wait_for_parent(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._store is None or self._watch is None or self._ending is None:
            return
        store, self._stages = self._store, self._stages + 1
        everyone = self._stages * trainer.world_size
        self._ending.set()
        self._watch.join()
        self._watch = None
        if store.add(DONE, 1) < everyone and trainer.global_rank == 0:
            _wait(lambda: store.add(DONE, 0) >= everyone)  # it holds the store, and others may be looking there


def _end_with_others(store: Store, trainer: Trainer, ending: threading.Event, told: threading.Event) -> None:
    while not ending.wait(LOOK_EVERY_S):
        try:
            stopped = store.check([STOP])
        except RuntimeError:  # the process that holds it was killed
            return
        if stopped and not ending.is_set():
            told.set()
            _close_loggers(trainer)
            _acknowledge(store, trainer)
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(STATUS)  # the main thread may be waiting in a collective operation, for ever


def _acknowledge(store: Store, trainer: Trainer) -> None:
    """Say that this process ends, and let the one that failed end first, as launchers end all where one has ended."""
    store.add(ENDING, 1)
    if trainer.global_rank == 0:  # it holds the store, and is there until all have said so
        _wait(lambda: store.add(ENDING, 0) >= trainer.world_size - 1)
        time.sleep(LOOK_EVERY_S)  # the one that failed looks there once more
    if _started_by_lightning(trainer):
        _wait_for_parent(trainer)
    else:
        time.sleep(LEAD_S)


def _started_by_lightning(trainer: Trainer) -> bool:
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)


def _wait_for_parent(trainer: Trainer) -> None:
    """Let the process end first that has started this one: Lightning kills it where this is gone."""
    parent = os.getppid()
    if trainer.local_rank:
        _wait(lambda: os.getppid() != parent)


def _wait(done: Callable[[], bool]) -> None:
    until = time.monotonic() + ENDS_WITHIN_S
    while time.monotonic() < until and not done():
        time.sleep(LOOK_EVERY_S / 5)


def _close_loggers(trainer: Trainer) -> None:
    for log in trainer.loggers:
        try:
            log.finalize("failed")
        except Exception as error:  # whatever a logger's library raises: it must not keep this process
            logger.info("what %s has not written yet is lost (%s)", type(log).__name__, error)
