"""Parts of a computation at once, each on a core of its own.

Torch shares out every single operation among its threads. What one core has written another then reads, and
between some cores that costs several times what computing it does. Here a core keeps what it works on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import torch

GRAIN = 64  # tokens: parts begin at multiples of it


def at_once(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks that do not write to the same memory, one a thread, without recording gradients."""
    first, *others = tasks
    inference = torch.is_inference_mode_enabled()  # of this thread alone; its tensors are written to nowhere else
    if not others:
        _run(first, inference)
        return
    threads = torch.get_num_threads()
    try:
        running = [_pool(max(1, threads - 1)).submit(_run, task, inference) for task in others]
        torch.set_num_threads(1)
        _run(first, inference)
        for task in running:
            task.result()
    finally:
        torch.set_num_threads(threads)  # threads that come later take over what was set last


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that are kept: what a new one has to set up takes as long as some tiles."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of these threads


def _run(task: Callable[[], None], inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():  # modes that a new thread does not take over
        task()


def shares(count: int, side: int, device: torch.device, others: int = 1) -> list[slice]:
    """`count` tokens, or heads, in parts of much the same size: one a core, but no more than there are tiles.

    Args:
        count: Of tokens or heads.
        side: Of a tile, which may end within it, but at a multiple of `GRAIN`.
        device: Where they are; on others than the CPU there is one part.
        others: Parts in another dimension, in which each of these comes.
    """
    tiles, grain = -(-count // side), min(side, GRAIN)
    parts = min(max(1, torch.get_num_threads() // others), tiles) if device.type == "cpu" else 1
    edges = [min(count, -(-(count * part // parts) // grain) * grain) for part in range(parts)] + [count]
    return [slice(start, stop) for start, stop in pairwise(edges)]
