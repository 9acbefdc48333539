"""One training of a network that infers what is hidden from it: what stations and hidden patches share."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from climax_elevation.bias import ElevationBias
from climax_elevation.errors import InputError
from climax_elevation.host.module import NOT_DECAYED
from climax_elevation.testbed.fit import WARM_UP_SHARE, TrainingSettings, bias_scalars

LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class MaskedFit:
    """A finished training.

    Attributes:
        curve: Steps, and the validation error where it is hidden, in standard deviations.
        seconds_a_step: Median.
        scalars: Each of the biases' single numbers, before and after.
    """

    curve: list[tuple[int, float]]
    seconds_a_step: float
    scalars: dict[str, tuple[float, float]]


def spread_evenly(known: NDArray[Any], number: int, setting: str, of: str) -> NDArray[Any]:
    """So many of what is `known` of training, spread evenly; InputError, naming `setting`, where there are fewer."""
    if number > len(known):
        raise InputError(f"{setting} is at most the {len(known)} {of} of training, not {number}")
    return known[np.linspace(0, len(known) - 1, number).round().astype(int)]


def fit_masked(
    net: nn.Module,
    training: TrainingSettings,
    learn: Callable[[], None],
    validate: Callable[[], float],
    *,
    keep_best: bool,
    on_step: Callable[[float | None], None],
) -> MaskedFit:
    """Train a network, and score it in between.

    Args:
        net: Fresh; trained in place.
        training: How.
        learn: Leaves the gradients of one batch.
        validate: The validation error.
        keep_best: Leave the weights of the least validation error, not the last ones.
        on_step: Called after every step, with the latest validation error or None.
    """
    optimizer = torch.optim.AdamW(_groups(net, training), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _shape(training.steps))
    before, curve, seconds = bias_scalars(net), [], []
    least, best = float("inf"), None
    every = training.steps // training.validations
    net.train()
    for step in range(1, training.steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        learn()
        nn.utils.clip_grad_norm_(net.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - started)
        if step % every == 0:
            net.eval()
            with torch.no_grad():
                error = validate()
            curve.append((step, error))
            if error < least:
                least, best = error, deepcopy(net.state_dict())
            net.train()
        on_step(curve[-1][1] if curve else None)
    if keep_best and best is not None:
        net.load_state_dict(best)
    net.eval()
    after = bias_scalars(net)
    return MaskedFit(curve, median(seconds), {name: (before[name], after[name]) for name in after})


def _groups(net: nn.Module, training: TrainingSettings) -> list[dict[str, Any]]:
    """Biases are never decayed, and learn at a rate of their own; what is no matrix is not decayed, nor embeddings."""
    own = {id(p) for part in net.modules() if isinstance(part, ElevationBias) for p in part.parameters()}
    host: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        kept = parameter.dim() < 2 or any(part in name for part in NOT_DECAYED)
        (biases if id(parameter) in own else plain if kept else host).append(parameter)
    groups = [
        {"params": host, "weight_decay": training.weight_decay, "lr": training.lr},
        {"params": plain, "weight_decay": 0.0, "lr": training.lr},
        {"params": biases, "weight_decay": 0.0, "lr": training.lr * training.lr_factor},
    ]
    return [group for group in groups if group["params"]]


def _shape(steps: int) -> Callable[[int], float]:
    """A rise over the first tenth, then a cosine."""
    rise = max(1, steps // WARM_UP_SHARE)

    def share(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + float(np.cos(np.pi * (step - rise) / max(1, steps - rise))))

    return share
