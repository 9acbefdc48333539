"""Metres or an error: what numbers alone can tell of the unit that they are in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from climax_elevation.errors import InputError

LOWEST_M, HIGHEST_M = -500.0, 9000.0  # Dead Sea shore and Everest, with room
STANDARDISED_BELOW = 10.0  # standard deviations, and metres
STANDARDISED_SPREAD = (0.25, 2.5)  # patch means have less than the 1 of pixels, regions may have more


def values_known(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at without waiting for a device, and are there at all.

    Not on GPUs, nor on the meta device; nor while a graph is compiled or exported, nor under torch.func.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def looks_standardised(elevation: Tensor) -> bool:
    """Whether an elevation is plainly one of mean 0 and standard deviation 1: some of it below 0, none of it 10 away.

    Level ground, and ground that does not go below 0, never looks so.
    """
    low, high = elevation.min().item(), elevation.max().item()
    if not -STANDARDISED_BELOW < low < 0 < high < STANDARDISED_BELOW:
        return False
    smallest, largest = STANDARDISED_SPREAD
    return abs(elevation.mean().item()) < 1 and smallest < elevation.std(correction=0).item() < largest


def check_metres(elevation: Tensor, name: str, *, flat: bool, remedy: str) -> None:
    """Raise InputError unless `elevation` may be metres; where its numbers cannot be looked at, it is taken on trust.

    Args:
        elevation: Finite, of patches, of any shape.
        name: What it is called in messages.
        flat: That it looks standardised is meant.
        remedy: What to do where it looks so and is metres.
    """
    if not values_known(elevation):
        return
    elevation = elevation.detach().float()
    low, high = elevation.min().item(), elevation.max().item()
    if low < LOWEST_M or high > HIGHEST_M:
        raise InputError(
            f"{name} is {low:.0f} to {high:.0f} m, outside {LOWEST_M:.0f} to {HIGHEST_M:.0f} m: is it geopotential "
            "(divide by 9.80665)?"
        )
    if not flat and looks_standardised(elevation):
        raise InputError(
            f"{name} is {low:.2f} to {high:.2f} with a mean near 0 and a standard deviation near 1, which looks "
            f"standardised: give metres, or {remedy} if the ground is so flat"
        )


def check_finite(values: Tensor, name: str, unit: str) -> None:
    """Raise InputError unless `values` are real numbers, and finite where they can be looked at."""
    if values.is_complex() or values.dtype == torch.bool:
        raise InputError(f"{name} is real numbers, {unit}, not {values.dtype}")
    if values_known(values) and not bool(values.isfinite().all()):
        raise InputError(f"{name} has values that are not finite: give real numbers, {unit}")
