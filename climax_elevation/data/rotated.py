"""Rotated grids without 2-D latitudes and longitudes: computed from the place of the grid's pole."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

_POLE_LAT, _POLE_LON, _TURN = "grid_north_pole_latitude", "grid_north_pole_longitude", "north_pole_grid_longitude"


def with_places(part: xr.Dataset) -> xr.Dataset:
    """`part` with 2-D coordinates `lat` and `lon`, where it has a rotated pole and its own coordinates only."""
    pole = next((array for array in part.variables.values() if _POLE_LAT in array.attrs), None)
    rows, columns = (_coordinate(part, name) for name in ("grid_latitude", "grid_longitude"))
    if pole is None or rows is None or columns is None or _has_places(part):
        return part
    lat, lon = unrotate(
        part[rows].to_numpy(),
        part[columns].to_numpy(),
        float(pole.attrs[_POLE_LAT]),
        float(pole.attrs.get(_POLE_LON, 0.0)),
        float(pole.attrs.get(_TURN, 0.0)),
    )
    part = part.rename({name: f"rotated_{name}" for name in (rows, columns) if name.lower() in ("lat", "lon")})
    dims = tuple(f"rotated_{name}" if name.lower() in ("lat", "lon") else name for name in (rows, columns))
    places = {"lat": (dims, lat, {"units": "degrees_north"}), "lon": (dims, lon, {"units": "degrees_east"})}
    return part.assign_coords(places)


def unrotate(
    rlat: NDArray, rlon: NDArray, pole_lat: float, pole_lon: float, turn: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latitudes and longitudes of a rotated grid, degrees, `[H, W]`.

    Args:
        rlat, rlon: Of rows and columns in the rotated system, degrees, `[H]` and `[W]`.
        pole_lat, pole_lon: The place of the rotated system's north pole, degrees.
        turn: Longitude of the true north pole in the rotated system, degrees.

    Source: CF conventions, appendix F, rotated pole.
    """
    phi, lam = np.meshgrid(np.deg2rad(rlat.astype(np.float64)), np.deg2rad(rlon - turn), indexing="ij")
    up, around = np.deg2rad(pole_lat), np.deg2rad(pole_lon)
    # vectors in the rotated system, whose first axis points to its longitude 0
    x, y, z = np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)
    lat = np.arcsin(np.clip(np.cos(up) * x + np.sin(up) * z, -1, 1))
    lon = around + np.arctan2(-y, np.cos(up) * z - np.sin(up) * x)
    return np.rad2deg(lat), (np.rad2deg(lon) + 180) % 360 - 180


def _coordinate(part: xr.Dataset, standard_name: str) -> str | None:
    short = {"grid_latitude": "rlat", "grid_longitude": "rlon"}[standard_name]
    for name, coordinate in part.coords.items():
        if coordinate.ndim == 1 and (coordinate.attrs.get("standard_name") == standard_name or name == short):
            return str(name)
    return None


def _has_places(part: xr.Dataset) -> bool:
    return any(array.ndim == 2 and str(name).lower() in ("lat", "latitude") for name, array in part.variables.items())
