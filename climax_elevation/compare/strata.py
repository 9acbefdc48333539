"""Divides a grid's pixels by terrain: elevation bands, relief within a patch, lee and windward."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from climax_elevation.errors import InputError
from climax_elevation.terrain.sphere import EARTH_RADIUS_M, shorter_turn, unit_vectors

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]

ALL = "all"
LAND_ABOVE_M = 10.0  # the ripples that spectral models leave over the sea stay below


@dataclass(frozen=True)
class StrataSettings:
    """How pixels are divided.

    Args:
        elevation_m: Edges between elevation bands, metres, ascending; a band includes its lower edge.
        relief: Whether to divide by relief too.
        wind: Whether to divide by lee and windward too, where the data have wind.
        slope_wind_m_s: Wind along the slope, w . grad z, above which a pixel is windward, and below whose
            negative it is lee, m/s.
    """

    elevation_m: tuple[float, ...] = (200.0, 1000.0, 2000.0)
    relief: bool = True
    wind: bool = True
    slope_wind_m_s: float = 0.01

    def __post_init__(self) -> None:
        if list(self.elevation_m) != sorted(set(self.elevation_m)):
            raise InputError(f"strata.elevation_m is a list of ascending metres, not {list(self.elevation_m)}")
        if not self.slope_wind_m_s >= 0:
            raise InputError(f"strata.slope_wind_m_s is 0 or more, not {self.slope_wind_m_s}")


@dataclass(frozen=True)
class Strata:
    """Sets of pixels, by name; the first is all of them. Others may overlap, and none is empty everywhere.

    Attributes:
        fixed: Those that depend on the ground alone, `[H, W]` each.
        slope: dz/dx and dz/dy, `[2, H, W]`; None: lee and windward are not told apart.
        slope_wind_m_s: See `StrataSettings`.
    """

    fixed: dict[str, Mask]
    slope: Array | None
    slope_wind_m_s: float

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of `masks`."""
        return (*self.fixed, *(("windward", "lee", "neutral") if self.slope is not None else ()))

    def masks(self, u: Tensor | None, v: Tensor | None, samples: int) -> Tensor:
        """Which pixels are in which stratum.

            windward: w . grad z > t,     lee: w . grad z < -t,     neutral: the others

        Args:
            u, v: Wind along the rows and the columns at initial time, `[B, H, W]`, m/s; read if `slope`.
            samples: B.

        Returns:
            `[B, K, H, W]`, boolean.
        """
        fixed = torch.from_numpy(np.stack(list(self.fixed.values())))
        fixed = fixed.expand(samples, *fixed.shape)
        if self.slope is None or u is None or v is None:
            return fixed
        lift = u.double() * torch.from_numpy(self.slope[0]) + v.double() * torch.from_numpy(self.slope[1])
        up, down = lift > self.slope_wind_m_s, lift < -self.slope_wind_m_s
        return torch.cat([fixed, torch.stack([up, down, ~(up | down)], dim=1)], dim=1)


def divide(
    elevation_m: Array,
    lat: Array,
    lon: Array,
    patch_size: int,
    settings: StrataSettings,
    *,
    land: Mask | None = None,
    wind: bool,
) -> Strata:
    """Divide a grid.

    Relief is the standard deviation of elevation over the pixels of a patch, given to all of them. Its
    terciles are those of the patches that are half land or more; patches of less land are in none.

    Args:
        elevation_m: `[H, W]`, metres.
        lat, lon: Degrees, `[H]` and `[W]`, or both `[H, W]`.
        patch_size: Pixels; divides H and W.
        settings: What to divide by.
        land: Pixels that are land, `[H, W]`; None: those above `LAND_ABOVE_M`.
        wind: Whether the data have wind.
    """
    fixed = {ALL: np.ones(elevation_m.shape, dtype=bool), **_bands(elevation_m, settings.elevation_m)}
    if settings.relief:
        fixed |= _reliefs(elevation_m, elevation_m > LAND_ABOVE_M if land is None else land, patch_size)
    slope = gradient(elevation_m, lat, lon) if wind and settings.wind else None
    return Strata({name: mask for name, mask in fixed.items() if mask.any()}, slope, settings.slope_wind_m_s)


def gradient(elevation_m: Array, lat: Array, lon: Array) -> Array:
    """Slope along the rows and the columns of a grid, `[2, H, W]`, metres a metre.

    dz/dx[i, j] = (z[i, j+1] - z[i, j-1]) / d,   d: the great-circle distance of the two pixels

    x grows with longitude and y with latitude, whichever way the arrays run. On a regular grid that is
    eastward and northward; on a projected one it is along the grid, as winds are that are relative to it.
    At the edges the difference is one-sided, unless the grid goes once around the globe.
    """
    if lat.ndim == 1:
        lat, lon = np.meshgrid(lat, lon, indexing="ij")
    turn = shorter_turn(torch.from_numpy(np.asarray(lon[:, 1:] - lon[:, :-1]))).numpy()
    around = abs(abs(turn.mean()) * lon.shape[1] - 360) < abs(turn.mean()) / 2
    fields = [np.asarray(field, dtype=np.float64) for field in (elevation_m, lat, lon)]
    return np.stack([_slope(*fields, axis=1, around=bool(around)), _slope(*fields, axis=0, around=False)])


def _slope(z: Array, lat: Array, lon: Array, *, axis: int, around: bool) -> Array:
    after, before = ([_shifted(field, step, axis, around) for field in (z, lat, lon)] for step in (1, -1))
    places = [unit_vectors(torch.from_numpy(side[1]), torch.from_numpy(side[2])) for side in (after, before)]
    chord = (places[0] - places[1]).norm(dim=-1).numpy()
    distance = 2 * EARTH_RADIUS_M * np.arcsin(np.minimum(chord / 2, 1))
    ahead = after[1] - before[1] if axis == 0 else shorter_turn(torch.from_numpy(after[2] - before[2])).numpy()
    return np.sign(ahead) * (after[0] - before[0]) / np.where(distance > 0, distance, np.inf)


def _shifted(field: Array, step: int, axis: int, around: bool) -> Array:
    """The field's neighbours a step on; at an edge the pixel itself, unless it goes around."""
    index = np.arange(field.shape[axis]) + step
    index = index % field.shape[axis] if around else np.clip(index, 0, field.shape[axis] - 1)
    return np.take(field, index, axis=axis)


def _bands(elevation_m: Array, edges: tuple[float, ...]) -> dict[str, Mask]:
    if not edges:
        return {}
    names = [f"below {edges[0]:g} m"]
    names += [f"{low:g} to {high:g} m" for low, high in pairwise(edges)]
    names += [f"above {edges[-1]:g} m"]
    band = np.digitize(elevation_m, edges)
    return {name: band == index for index, name in enumerate(names)}


def _reliefs(elevation_m: Array, land: Mask, patch_size: int) -> dict[str, Mask]:
    tiles = _patches(elevation_m, patch_size)
    relief, on_land = tiles.std(axis=(1, 3)), _patches(land.astype(float), patch_size).mean(axis=(1, 3)) >= 0.5
    if not on_land.any():
        return {}
    low, high = np.quantile(relief[on_land], [1 / 3, 2 / 3])
    parts = {"low relief": relief <= low, "mid relief": (relief > low) & (relief <= high), "high relief": relief > high}
    return {name: np.kron(part & on_land, np.ones((patch_size, patch_size), bool)) for name, part in parts.items()}


def _patches(field: Array, patch_size: int) -> Array:
    """`[H, W]` to `[H / p, p, W / p, p]`."""
    rows, columns = field.shape
    return field.reshape(rows // patch_size, patch_size, columns // patch_size, patch_size)
