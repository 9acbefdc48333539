"""The horizontal grid: from the source's order of rows and columns to ClimaX's.

Rows go from south to north and columns from west to east, as in ClimaX's own files; a global grid
starts at 0 degrees east, because a pretrained position embedding belongs to places.
"""

import logging
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from climax_elevation.data.optional import require
from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)
Array = NDArray[np.floating]

SAME_PLACE_DEG = 1e-3
_AT_THE_POLE = 1e-3  # degrees that float32 may put a pole beyond 90
_LIKE_A_STEP = 0.1  # of a step, that a grid which goes round may miss
_ROUNDED = 1e-2  # of a step, to which longitudes at 0 degrees east are put there

CLIMAX_GRIDS_DEG = ("5.625", "2.8125", "1.40625")


@dataclass(frozen=True)
class Grid:
    """Where the source's values go.

    Attributes:
        dims: The source's dimensions, rows and columns.
        lat: Of each row, `[H]`, degrees north, ascending; of a 2-D grid the means of the rows.
        lon: Of each column, `[W]`, degrees east, ascending; of a 2-D grid the means of the columns.
        lat2d: Of each pixel, `[H, W]`.
        lon2d: Of each pixel, `[H, W]`, or None unless the source's grid is 2-D.
        flips: Whether rows and columns are turned round.
        roll: Columns to roll west to east, so that the first is the one at 0 degrees east.
        source: Latitudes and longitudes after turning and rolling, where regridding starts from.
        regridded: Whether `lat` and `lon` are another grid than `source`.
    """

    dims: tuple[str, str]
    lat: Array
    lon: Array
    lat2d: Array
    lon2d: Array | None
    flips: tuple[bool, bool]
    roll: int
    source: tuple[Array, Array]
    regridded: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """H and W of what is written."""
        return len(self.lat), len(self.lon)

    def place(self, values: Array) -> Array:
        """The source's `[N, H0, W0]` as ClimaX's `[N, H, W]`: turned, rolled, regridded, cropped."""
        values = values[:, :: -1 if self.flips[0] else 1, :: -1 if self.flips[1] else 1]
        values = np.roll(values, self.roll, axis=2) if self.roll else values
        if self.regridded:
            return self._regrid(values)
        return values[:, : self.shape[0], : self.shape[1]]

    def _regrid(self, values: Array) -> Array:
        here = xr.DataArray(values, dims=("time", "lat", "lon"), coords={"lat": self.source[0], "lon": self.source[1]})
        target = xr.Dataset(coords={"lat": self.lat, "lon": self.lon})
        # skipna=False: a missing value must stay one, so that it is found and refused.
        return here.regrid.conservative(target, latitude_coord="lat", skipna=False).to_numpy()


def read_grid(dataset: xr.Dataset, *, patch_size: int, regrid: str | None) -> Grid:
    """ClimaX's grid for a source whose coordinates are called `lat` and `lon`.

    Args:
        dataset: The source, 1-D or 2-D `lat` and `lon` in degrees.
        patch_size: H and W become multiples of it; the last rows and columns are dropped, said aloud.
        regrid: One of `CLIMAX_GRIDS_DEG`, or None to keep the source's grid.

    Returns:
        The grid.

    Raises:
        InputError: If coordinates are missing, not monotonic, not degrees, if the grid is smaller
            than a patch, or if regridding is impossible.
    """
    for name in ("lat", "lon"):
        if name not in dataset.coords:
            raise InputError(
                f"the source has no coordinate for {'latitude' if name == 'lat' else 'longitude'}: it has "
                f"{', '.join(map(str, dataset.coords)) or 'none'}; add latitude and longitude in degrees, 1-D, or 2-D "
                "on the grid"
            )
    lat, lon = (np.asarray(dataset[name].to_numpy(), dtype=np.float64) for name in ("lat", "lon"))
    for name, values, limit in (("latitude", lat, 90.0 + _AT_THE_POLE), ("longitude", lon, 540.0)):
        if not np.isfinite(values).all() or np.abs(values).max() > limit:
            raise InputError(
                f"{name} must be degrees, without gaps, from -{limit:.0f} to {limit:.0f}, and is {values.min():g} to "
                f"{values.max():g}: metres or kilometres on a plane are no places"
            )
    lat = np.clip(lat, -90, 90)
    if lat.ndim == lon.ndim == 1 and dataset["lat"].dims == dataset["lon"].dims:
        raise InputError(
            f"the source has a latitude and a longitude for each point along {dataset['lat'].dims[0]!r}, and ClimaX "
            "wants a grid of rows and columns: interpolate it to one"
        )
    if lat.ndim == lon.ndim == 1:
        grid = _regular(lat, lon, (str(dataset["lat"].dims[0]), str(dataset["lon"].dims[0])))
    elif lat.ndim == 2 and dataset["lat"].dims == dataset["lon"].dims:
        rows, columns = map(str, dataset["lat"].dims)
        grid = _curvilinear(lat, lon, (rows, columns))
    else:
        raise InputError(
            f"latitude and longitude must be both 1-D or both on the same two dimensions, "
            f"not {dataset['lat'].dims} and {dataset['lon'].dims}"
        )
    logger.info(
        "grid: %d x %d, latitude %g to %g, longitude %g to %g",
        *grid.shape,
        *(f(edge) for edge in (grid.lat2d, lon if grid.lon2d is None else grid.lon2d) for f in (np.min, np.max)),
    )
    if regrid is not None:
        grid = _target(grid, regrid)
    return _crop(grid, patch_size)


def degrees_apart(here: Array, there: Array) -> Array:
    """How far latitudes or longitudes are from others, degrees, the shorter way round; shapes broadcast."""
    apart = np.abs(np.asarray(here, dtype=np.float64) - np.asarray(there, dtype=np.float64))
    return np.minimum(apart % 360, -apart % 360)


def same_places(here: Array, there: Array) -> NDArray[np.bool_]:
    """Where latitudes or longitudes are the same but for rounding; shapes broadcast."""
    return degrees_apart(here, there) < SAME_PLACE_DEG


def is_global(grid: Grid) -> bool:
    """Whether the grid goes all the way round and from pole to pole."""
    return _goes_round(grid.lon) and float(grid.lat[-1] - grid.lat[0]) > 165


def _goes_round(lon: Array) -> bool:
    """Whether one more step after the last column would be the first."""
    if len(lon) < 2:
        return False
    span = float(lon[-1] - lon[0])
    return abs(span * len(lon) / (len(lon) - 1) - 360) < _LIKE_A_STEP * span / (len(lon) - 1)


def _without_rounding(lon: Array) -> Array:
    """Longitudes with those at 0 degrees east exactly there: in float32, 360 may be 359.9999 and 0 -0.0001."""
    if len(lon) < 2:
        return lon
    turns = 360 * np.round(lon / 360)
    return np.where(np.abs(lon - turns) < _ROUNDED * abs(float(lon[-1] - lon[0])) / (len(lon) - 1), turns, lon)


def _regular(lat: Array, lon: Array, dims: tuple[str, str]) -> Grid:
    lon = _without_rounding(np.unwrap(lon, period=360))
    for name, values in (("latitude", lat), ("longitude", lon)):
        steps = np.diff(values)
        if not ((steps > 0).all() or (steps < 0).all()):
            raise InputError(f"{name} must rise or fall all along: sort the source by {name}")
    flips = len(lat) > 1 and lat[0] > lat[-1], len(lon) > 1 and lon[0] > lon[-1]
    if flips[0]:
        logger.info("rows turned round: latitude rises from south to north in ClimaX's files")
    if flips[1]:
        logger.info("columns turned round: longitude rises from west to east in ClimaX's files")
    lat, lon = lat[:: -1 if flips[0] else 1], lon[:: -1 if flips[1] else 1]
    if lon[-1] - lon[0] > 360 - 0.5 * (lon[1] - lon[0] if len(lon) > 1 else 0):
        raise InputError(f"longitude runs from {lon[0]:g} to {lon[-1]:g}: drop the column that comes twice")
    roll = 0
    if _goes_round(lon):
        # Rounded: -1e-14 must not become 360 and go to the far end.
        lon = np.round(lon, 9) % 360
        roll = -int(np.argmin(lon))
        lon = np.roll(lon, roll)
        if roll:
            logger.info("columns rolled: a global grid starts at 0 degrees east in ClimaX's files")
    lon = lon + _turn(lon)
    lat2d = np.repeat(lat[:, None], len(lon), axis=1)
    return Grid(dims, lat, lon, lat2d, None, (bool(flips[0]), bool(flips[1])), roll, (lat, lon))


def _curvilinear(lat2d: Array, lon2d: Array, dims: tuple[str, str]) -> Grid:
    lon2d = np.unwrap(np.unwrap(lon2d, period=360, axis=0), period=360, axis=1)
    lat, lon = lat2d.mean(axis=1), lon2d.mean(axis=0)
    flips = bool(lat[0] > lat[-1]), bool(lon[0] > lon[-1])
    rows, columns = (slice(None, None, -1 if flip else 1) for flip in flips)
    lat, lon, lat2d, lon2d = lat[rows], lon[columns], lat2d[rows, columns], lon2d[rows, columns]
    if not ((np.diff(lat) > 0).all() and (np.diff(lon) > 0).all()):
        raise InputError(
            "the 2-D grid is turned so far that its rows do not go from south to north on average, "
            "nor its columns from west to east: regrid it to latitude and longitude first"
        )
    turn = _turn(lon)
    lon, lon2d = lon + turn, lon2d + turn
    weights = np.cos(np.deg2rad(lat))
    true = np.cos(np.deg2rad(lat2d))
    logger.info(
        "2-D grid: lat.npy and lon.npy hold the means of rows and columns, lat2d.npy and lon2d.npy every "
        "pixel; ClimaX weighs its loss by the cosine of the row mean, which is off by up to %.2g %% within a "
        "row and varies by %.2g %% over the grid, although the cells of a projected grid are nearly equal in "
        "area",
        100 * float(np.abs(weights[:, None] / true - 1).max()),
        100 * float(weights.max() / weights.min() - 1),
    )
    if any(flips):
        logger.info("turned round so that mean latitude and longitude rise: rows %s, columns %s", *flips)
    return Grid(dims, lat, lon, lat2d, lon2d, flips, 0, (lat, lon))


def _turn(lon: Array) -> float:
    """Degrees to add, a multiple of 360, so that a region's longitudes are from 0 to 360 as ClimaX's regions are."""
    first, last = np.floor(np.round(lon[[0, -1]], 9) / 360)
    if first != last:
        logger.info(
            "longitude runs from %g to %g, across 0 degrees east: ClimaX's regions, from 0 to 360, hold only the part "
            "that lies there",
            lon[0],
            lon[-1],
        )
        return 0.0
    if first:
        logger.info("longitude is counted from 0 to 360 degrees east, as in ClimaX's regions")
    return -360.0 * float(first)


def _target(grid: Grid, regrid: str) -> Grid:
    if regrid not in CLIMAX_GRIDS_DEG:
        raise InputError(f"unknown grid {regrid!r}; ClimaX's are {', '.join(CLIMAX_GRIDS_DEG)} degrees")
    if grid.lon2d is not None or not is_global(grid):
        raise InputError(
            f"regridding to ClimaX's global {regrid} degrees needs a global source with 1-D latitude and "
            f"longitude, this one covers {grid.lat[0]:g} to {grid.lat[-1]:g} north, "
            f"{grid.lon[0]:g} to {grid.lon[-1]:g} east"
        )
    # Imported for its effect: it gives arrays the accessor `regrid`.
    require("xarray-regrid", "regrid", "regridding")
    step = float(regrid)
    lat = -90 + step * (np.arange(round(180 / step)) + 0.5)
    lon = step * np.arange(round(360 / step))
    logger.info("regridded conservatively from %d x %d to %d x %d", *map(len, grid.source), len(lat), len(lon))
    lat2d = np.repeat(lat[:, None], len(lon), axis=1)
    return replace(grid, lat=lat, lon=lon, lat2d=lat2d, regridded=True)


def _crop(grid: Grid, patch_size: int) -> Grid:
    height, width = (size // patch_size * patch_size for size in grid.shape)
    if not height or not width:
        raise InputError(f"the grid of {grid.shape[0]} x {grid.shape[1]} is smaller than a patch of {patch_size}")
    if (height, width) == grid.shape:
        return grid
    logger.info(
        "cropped from %d x %d to %d x %d, a multiple of patch_size %d: dropped latitudes %s and longitudes %s",
        *grid.shape,
        height,
        width,
        patch_size,
        _listed(grid.lat[height:]),
        _listed(grid.lon[width:]),
    )
    lat2d = grid.lat2d[:height, :width]
    if grid.lon2d is None:
        return replace(grid, lat=grid.lat[:height], lon=grid.lon[:width], lat2d=lat2d)
    lon2d = grid.lon2d[:height, :width]
    # Means over what is left, not over what was dropped.
    return replace(grid, lat=lat2d.mean(axis=1), lon=lon2d.mean(axis=0), lat2d=lat2d, lon2d=lon2d)


def _listed(values: Array) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"
