"""Real terrain without a network: the altitude map that the `pvlib` package carries.

pvlib's map is 1/12 degree (2160 x 4320, rows from north to south, columns from 180 W), one byte a cell:

    altitude = 28 m * byte - 450 m,    byte 255: no data, which is open water

What lies below the sea is set to 0 m, and with it the few dry places below sea level. Under the ice of
Antarctica and Greenland the map shows rock or nothing, so both are far too low in it; elsewhere its
area means agree with ERA5's orography (correlation above 0.999 from 60 S to 60 N).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import netCDF4
import numpy as np
from numpy.typing import NDArray

from climax_elevation.errors import InputError

Array = NDArray[np.float64]

METRES_A_STEP = 28.0
LOWEST_M = -450.0
NO_DATA = 255


@dataclass(frozen=True, eq=False)
class ElevationMap:
    """Elevation on a regular latitude-longitude grid.

    Args:
        lat: Cell centres, `[H]`, degrees north, evenly spaced and ascending.
        lon: Cell centres, `[W]`, degrees east, evenly spaced and ascending.
        elevation_m: Mean elevation of each cell, `[H, W]`, metres.

    Raises:
        InputError: If a grid is uneven or descending, leaves the sphere, or does not fit the elevation.
    """

    lat: Array
    lon: Array
    elevation_m: Array

    def __post_init__(self) -> None:
        for name, axis in (("latitude", self.lat), ("longitude", self.lon)):
            steps = np.diff(axis)
            if axis.ndim != 1 or axis.size < 2 or steps[0] <= 0 or not np.allclose(steps, steps[0], rtol=1e-3):
                raise InputError(f"{name} is an evenly spaced, ascending list of degrees, not {axis}")
        if np.abs(self.lat).max() + self.lat_step / 2 > 90.001 or self.lon.size * self.lon_step > 360.001:
            raise InputError("cells reach beyond a pole or once around the globe: give centres of cells")
        if self.elevation_m.shape != (self.lat.size, self.lon.size):
            raise InputError(
                f"elevation is {self.lat.size} latitudes by {self.lon.size} longitudes, "
                f"not {list(self.elevation_m.shape)}"
            )
        if not np.isfinite(self.elevation_m).all():
            raise InputError("elevation holds values that are not finite: fill them first")

    @property
    def lat_step(self) -> float:
        """Height of a cell, degrees."""
        return float(self.lat[-1] - self.lat[0]) / (self.lat.size - 1)

    @property
    def lon_step(self) -> float:
        """Width of a cell, degrees."""
        return float(self.lon[-1] - self.lon[0]) / (self.lon.size - 1)

    @property
    def periodic(self) -> bool:
        """Whether the grid goes once around the globe."""
        return abs(self.lon.size * self.lon_step - 360) < self.lon_step / 2


@dataclass(frozen=True)
class Region:
    """A box in degrees, and the size of the cells that it is divided into."""

    south: float
    north: float
    west: float
    east: float
    cell: float


# Every region has 2048 cells, in numbers that patches of 2, 4 and 8 divide.
REGIONS = {
    "asia": Region(15, 55, 60, 140, 1.25),
    "andes": Region(-48, 16, -90, -58, 1.0),
    "alps": Region(38, 54, -6, 26, 0.5),
    "north_america": Region(20, 60, -130, -50, 1.25),
    "global": Region(-90, 90, 0, 360, 5.625),
}


def region_elevation(region: str, shape: tuple[int, int] | None = None) -> ElevationMap:
    """Area-mean elevation of a named region.

    Args:
        region: One of `REGIONS`.
        shape: Rows and columns of cells; None: as many as the region's own cells.

    Raises:
        InputError: If the region is unknown or pvlib is not installed.
    """
    if region not in REGIONS:
        known = ", ".join(repr(name) for name in REGIONS)
        raise InputError(f"unknown region {region!r}; available: {known}")
    box = REGIONS[region]
    rows, columns = shape or (round((box.north - box.south) / box.cell), round((box.east - box.west) / box.cell))
    lat = box.south + (np.arange(rows) + 0.5) * (box.north - box.south) / rows
    lon = box.west + (np.arange(columns) + 0.5) * (box.east - box.west) / columns
    return ElevationMap(lat, lon, mean_elevation_m(lat, lon))


def mean_elevation_m(lat: Array, lon: Array) -> Array:
    """Area means of pvlib's altitude map on a grid of cells.

    Args:
        lat: Cell centres, `[H]`, degrees north, evenly spaced, in either order.
        lon: Cell centres, `[W]`, degrees east, evenly spaced, from any meridian.

    Returns:
        Mean elevation of each cell, `[H, W]`, metres, 0 on the sea.

    Raises:
        InputError: If pvlib is not installed.
    """
    fine = _altitude_m()
    fine_lat = np.linspace(90, -90, fine.shape[0] + 1)
    fine_lon = np.linspace(-180, 180, fine.shape[1] + 1)
    # On the sphere the area of a band of latitude goes as the difference of its edges' sines.
    rows = _overlap(np.sin(np.deg2rad(_edges(lat))), np.sin(np.deg2rad(fine_lat)))
    edges = _edges(lon)
    turns = range(int((edges.min() + 180) // 360), int((edges.max() + 180) // 360) + 1)
    columns = np.sum([_overlap(edges, fine_lon + 360 * turn) for turn in turns], axis=0)
    columns = columns / columns.sum(axis=1, keepdims=True)
    return (rows / rows.sum(axis=1, keepdims=True)) @ fine @ columns.T


def _edges(centres: Array) -> Array:
    half = (centres[-1] - centres[0]) / (len(centres) - 1) / 2
    return np.append(centres - half, centres[-1] + half)


def _overlap(coarse: Array, fine: Array) -> Array:
    """Length that each coarse interval shares with each fine one, `[coarse, fine]`; edges in any order."""
    low, high = np.minimum(coarse[:-1], coarse[1:]), np.maximum(coarse[:-1], coarse[1:])
    below, above = np.minimum(fine[:-1], fine[1:]), np.maximum(fine[:-1], fine[1:])
    shared = np.minimum(high[:, None], above) - np.maximum(low[:, None], below)
    return np.maximum(shared, 0)


def _altitude_m() -> Array:
    """The map itself, `[2160, 4320]`, metres, from the north, from 180 W, 0 on the sea."""
    with netCDF4.Dataset(str(_altitude_file())) as file:
        steps = np.asarray(file.variables["Altitude"][:])
    return np.where(steps == NO_DATA, 0, np.maximum(METRES_A_STEP * steps.astype(float) + LOWEST_M, 0))


def _altitude_file() -> Path:
    try:
        # By the distribution's files: importing pvlib itself takes seconds.
        path = Path(str(distribution("pvlib").locate_file("pvlib/data/Altitude.h5")))
    except PackageNotFoundError:
        path = Path("pvlib")
    if not path.is_file():
        raise InputError(
            "the terrain comes with the package pvlib, which is not installed: pip install 'climax-elevation[demo]'"
        )
    return path
