"""Places and directions on the Earth, taken as a sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from climax_elevation.errors import InputError

EARTH_RADIUS_M = 6.371e6


def check_latitudes(lat: Tensor) -> None:
    """Raise InputError unless all of `lat` is within [-90, 90] degrees; a compiled graph takes it on trust."""
    if not torch.compiler.is_compiling() and not bool((lat.abs() <= 90).all()):
        raise InputError(
            f"latitudes are degrees within [-90, 90], not {lat.min().item():g} to {lat.max().item():g}: are latitude "
            "and longitude exchanged?"
        )


def shorter_turn(degrees: Tensor) -> Tensor:
    """A difference of longitudes the shorter way around, in [-180, 180)."""
    return torch.remainder(degrees + 180, 360) - 180


def unit_vectors(lat: Tensor, lon: Tensor) -> Tensor:
    """Places as vectors of length 1 from the Earth's centre: x to (0 N, 0 E), y to (0 N, 90 E), z to the pole.

    Args:
        lat, lon: Degrees, `[...]`.

    Returns:
        `[..., 3]`.
    """
    phi, lam = torch.deg2rad(lat), torch.deg2rad(lon)
    return torch.stack([phi.cos() * lam.cos(), phi.cos() * lam.sin(), phi.sin()], dim=-1)


def east_and_north(lat: Tensor, lon: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of the local east and north, `[..., 3]` each; at a pole as `lon` has them."""
    phi, lam = torch.deg2rad(lat), torch.deg2rad(lon)
    east = torch.stack([-lam.sin(), lam.cos(), torch.zeros_like(lam)], dim=-1)
    north = torch.stack([-phi.sin() * lam.cos(), -phi.sin() * lam.sin(), phi.cos()], dim=-1)
    return east, north
