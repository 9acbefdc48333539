"""Where patches lie: on the Earth, or on the plane of a grid without latitudes."""

from __future__ import annotations

import torch
from torch import Tensor

from climax_elevation.errors import InputError
from climax_elevation.terrain.fields import Terrain
from climax_elevation.terrain.sphere import EARTH_RADIUS_M, checked_latitudes, unit_vectors


def place_fields(terrain: Terrain) -> frozenset[str]:
    """The optional fields of `terrain` that its places are told by: none on a plane."""
    return frozenset({"lat", "lon"}) if terrain.spacing_m is None else frozenset()


def positions(terrain: Terrain) -> Tensor:
    """Places in Earth radii, float64: unit vectors `[1, L, 3]`; on a plane eastward and northward `[1, L, 2]`."""
    if terrain.spacing_m is not None:
        places = torch.stack([terrain.columns, terrain.rows], dim=-1).double()
        return places[None] * (terrain.spacing_m / EARTH_RADIUS_M)
    lat, lon = checked_latitudes(terrain.lat.double(), terrain.lat), terrain.lon.double()  # type: ignore[union-attr, arg-type]
    return unit_vectors(lat, lon)[None]


def patch_angle(terrain: Terrain, side: int, who: str) -> float:
    """Distance between the centres of neighbouring patches, radians of the Earth.

    On the sphere it is the median along the meridian. Places that are no grid have no neighbours: there it is the
    `side`-th part of the square that is as wide as they are spread, which has a mean squared distance from its centre
    of a sixth of its side squared.

    Args:
        terrain: Of the whole grid, or of all places.
        side: Patches along the longer side of the grid that a bias was made for.
        who: Is named in errors.

    Raises:
        InputError: If the patches are a part of the grid, or all places are one.
    """
    if terrain.spacing_m is not None:
        return terrain.spacing_m / EARTH_RADIUS_M
    if terrain.points:
        places = positions(terrain)
        spread = float((places - places.mean(dim=1, keepdim=True)).square().sum(-1).mean().mul(6).sqrt())
        if not spread > 0:
            raise InputError(f"{who} needs places that lie apart, and these are all one: give more stations")
        return spread / side
    terrain.require_whole(who)
    centres = unit_vectors(terrain.lat.double(), terrain.lon.double()).unflatten(0, terrain.grid)  # type: ignore[union-attr]
    chords = centres.diff(dim=0 if terrain.grid[0] > 1 else 1).norm(dim=-1)
    return 2 * float(torch.asin(chords.median() / 2))
