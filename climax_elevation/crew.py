"""The processes of one run end together: no other waits for one that cannot go on, whose sentence is seen once."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer

from climax_elevation.errors import InputError, SickRun

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

logger = logging.getLogger(__name__)

# keys of the store that the processes met in
FAILED, STOP, ENDING = (f"climax_elevation/{name}" for name in ("failed", "stop", "ending"))
LOOK_EVERY_S = 0.5
ENDS_WITHIN_S = 10.0
STATUS = SickRun.status


class EndTogether(Callback):
    """Ends all processes of a distributed run where one of them fails; does nothing in a run of one process.

    The one that fails says so in the store that the processes met in, by its own thread and not by a collective
    operation, in which the others may be waiting for it. A thread of each other process looks there twice a second.
    """

    def __init__(self) -> None:
        self._ending = threading.Event()
        self._watch: threading.Thread | None = None
        self._store: Store | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size < 2 or not dist.is_initialized() or self._watch is not None:
            return
        self._store = dist.distributed_c10d._get_default_store()
        arguments = (self._store, trainer.global_rank, lambda: _close_loggers(trainer), self._ending)
        self._watch = threading.Thread(target=_end_with_others, args=arguments, daemon=True, name="end-together")
        self._watch.start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._store is None or not isinstance(exception, Exception):  # Ctrl-C and SIGTERM reach all of them
            return
        store = self._store
        self._ending.set()
        try:
            first = store.add(FAILED, 1) == 1
        except RuntimeError:  # the process that holds the store has ended
            first = False
        if not first:  # what came here follows from what another process has said
            _acknowledge(store, trainer.global_rank)
            raise SystemExit(STATUS)
        if isinstance(exception, InputError):
            print(f"error: {exception}", file=sys.stderr, flush=True)
            exception.said = True
        store.add(STOP, 1)
        _wait(lambda: store.add(ENDING, 0) >= trainer.world_size - 1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._ending.set()
        if self._watch is not None:
            self._watch.join()
        self._ending, self._watch = threading.Event(), None


def _end_with_others(store: Store, rank: int, close: Callable[[], None], ending: threading.Event) -> None:
    while not ending.wait(LOOK_EVERY_S):
        try:
            stopped = store.check([STOP])
        except RuntimeError:  # the process that holds it has ended, perhaps as it should
            return
        if stopped and not ending.is_set():
            close()
            _acknowledge(store, rank)
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(STATUS)  # its main thread may be waiting in a collective operation, for ever


def _acknowledge(store: Store, rank: int) -> None:
    """Say that this process ends, and let that of rank 0 end first: Lightning's kills it where another is gone."""
    try:
        store.add(ENDING, 1)
        if rank:
            _wait(lambda: store.add(ENDING, 0) < 0)
    except RuntimeError:
        pass


def _wait(done: Callable[[], bool]) -> None:
    until = time.monotonic() + ENDS_WITHIN_S
    try:
        while time.monotonic() < until and not done():
            time.sleep(LOOK_EVERY_S / 5)
    except RuntimeError:  # the store has gone with its process
        return


def _close_loggers(trainer: Trainer) -> None:
    for log in trainer.loggers:
        try:
            log.finalize("failed")
        except Exception as error:  # whatever a logger's library raises: it must not keep this process
            logger.info("what %s has not written yet is lost (%s)", type(log).__name__, error)
