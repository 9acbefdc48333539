"""Places and directions on the Earth, taken as a sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from climax_elevation.errors import InputError
from climax_elevation.watch import judge, judged

EARTH_RADIUS_M = 6.371e6


def checked_latitudes(values: Tensor, lat: Tensor) -> Tensor:
    """`values`, which hold `lat`; InputError unless all of that is within [-90, 90] degrees."""
    return judged(values, torch.stack(lat.aminmax()), _check_latitudes)


@judge
def _check_latitudes(numbers: list[float]) -> None:
    low, high = numbers
    if not -90 <= low <= high <= 90:
        raise InputError(
            f"latitudes are degrees within [-90, 90], not {low:g} to {high:g}: are latitude and longitude exchanged?"
        )


def shorter_turn(degrees: Tensor) -> Tensor:
    """A difference of longitudes the shorter way around, in [-180, 180)."""
    return torch.remainder(degrees + 180, 360) - 180


def eastward(lon: Tensor) -> Tensor:
    """Longitudes without a jump: eastward from the far side of the widest gap between them, degrees, `[L]`.

    Where none lies between 180 W and 0, and the widest gap does, they stay as they are.
    """
    turned = torch.remainder(lon, 360)
    ordered = turned.sort().values
    gaps = torch.cat([ordered[1:], ordered[:1] + 360]) - ordered
    begin = ordered[(gaps.argmax() + 1) % len(ordered)]
    return torch.where(turned < begin, turned + 360, turned)


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


def upright(places: Tensor) -> Tensor:
    """A reflection that lays the third axis through the middle of some places.

    Seen so, places that are near each other differ little in the third axis, and have little of the others: products
    of them with differences between them are sums of small numbers, not differences of large ones.

    Args:
        places: Unit vectors, `[..., L, 3]`.

    Returns:
        `[..., 3, 3]`, symmetric and orthogonal; `places @ upright(places)` are the same places in the new axes.
    """
    up = torch.nn.functional.normalize(places.mean(dim=-2), dim=-1)
    third = torch.zeros_like(up)
    third[..., 2] = 1.0
    normal = up + torch.where(up[..., 2:] >= 0, third, -third)  # of Householder's plane, the longer of two
    outer = normal[..., :, None] * normal[..., None, :]
    return torch.eye(3, dtype=up.dtype, device=up.device) - 2 * outer / normal.square().sum(-1)[..., None, None]
