"""Winds along the axes of a turned grid, to winds towards east and north."""

from __future__ import annotations

import logging

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from climax_elevation.data.names import VARIABLES, find_variable
from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

WINDS = ("grid", "earth")
_ALONG_THE_GRID = ("grid_eastward_wind", "grid_northward_wind", "x_wind", "y_wind")
_ALONG_THE_EARTH = ("eastward_wind", "northward_wind")
_TURNED_DEG = 0.5  # below it, an angle turns a wind of 10 m/s by less than 0.1 m/s
_BLOCK_STEPS = 64


def to_earth(dataset: xr.Dataset, winds: str | None) -> xr.Dataset:
    """`dataset` with winds towards east and north.

        u_east = u cos a - v sin a,   v_north = u sin a + v cos a

    a is the angle, anticlockwise, from east to the direction in which columns are counted, at each pixel: WRF's
    COSALPHA and SINALPHA where they are, else from the 2-D latitudes and longitudes.

    Args:
        dataset: The source, coordinates named `lat` and `lon`.
        winds: "grid" or "earth": along what they are; None: as the file says, by its attributes or by WRF's names.

    Raises:
        InputError: If `winds` is neither, or a pair lacks one, or its two have not the same unit.
    """
    if winds is not None and winds not in WINDS:
        raise InputError(f"unknown winds {winds!r}; choose one of {', '.join(map(repr, WINDS))}")
    if winds == "earth" or "lat" not in dataset.coords or dataset["lat"].ndim != 2:
        if winds == "grid":
            raise InputError("winds 'grid' is for grids with 2-D latitudes and longitudes: leave out the option winds")
        return dataset
    turned, along_grid = dataset, []
    for u, v in _pairs(dataset):
        if _along_grid(dataset, u, v, winds):
            along_grid.append((u, v))
        elif not _says(dataset, u, v, _ALONG_THE_EARTH):
            logger.warning(
                "%s, %s: the file does not say whether they go along the grid or towards east and north; written as "
                "they are; say which with the option winds (grid or earth)",
                u,
                v,
            )
    if not along_grid:
        return dataset
    cosine, sine = _angle(dataset)
    largest = float(np.rad2deg(np.abs(np.arctan2(sine, cosine))).max())
    for u, v in along_grid:
        turned = _turn(turned, u, v, cosine, sine)
        logger.info("%s, %s: turned from along the grid to east and north, by up to %.3g degrees", u, v, largest)
    return turned


def partner(called: str) -> str | None:
    """ClimaX's name of the other wind of a pair, or None for what is no wind."""
    for levels in (True, False):
        variable = find_variable(called, has_levels=levels)
        if variable is not None and "component_of_wind" in variable.name:
            old, new = ("u_", "v_") if "u_component" in variable.name else ("v_", "u_")
            return variable.name.replace(f"{old}component", f"{new}component")
    return None


def _pairs(dataset: xr.Dataset) -> list[tuple[str, str]]:
    """Names of eastward and northward winds that belong together, as the source calls them."""
    pairs = []
    for variable in VARIABLES:
        if "u_component_of_wind" not in variable.name:
            continue
        names = {variable.name, *variable.aliases}
        for called in map(str, dataset.data_vars):
            if called.lower() in names:
                other = _other(dataset, called, str(partner(called)))
                pairs += [(called, other)] if other is not None else []
    return pairs


def _other(dataset: xr.Dataset, called: str, wanted: str) -> str | None:
    for name in map(str, dataset.data_vars):
        for levels in (True, False):
            variable = find_variable(name, has_levels=levels)
            if variable is not None and variable.name == wanted and dataset[name].dims == dataset[called].dims:
                return name
    return None


def _along_grid(dataset: xr.Dataset, u: str, v: str, winds: str | None) -> bool:
    if winds is not None:
        return winds == "grid"
    relative = [dataset[name].attrs.get("GRIB_uvRelativeToGrid") for name in (u, v)]
    if None not in relative:
        return bool(relative[0])
    return _says(dataset, u, v, _ALONG_THE_GRID) or ((u, v) in (("U10", "V10"), ("U", "V")) and is_wrf(dataset))


def is_wrf(dataset: xr.Dataset) -> bool:
    """Whether it is WRF's own output, whose winds go along the grid."""
    return "WRF" in str(dataset.attrs.get("TITLE", "")) or {"south_north", "west_east"} <= set(dataset.dims)


def _says(dataset: xr.Dataset, u: str, v: str, standard_names: tuple[str, ...]) -> bool:
    return all(dataset[name].attrs.get("standard_name") in standard_names for name in (u, v))


def _angle(dataset: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """Cosine and sine of the angle from east to the direction of columns, at each pixel."""
    lat = dataset["lat"]
    given = [dataset[name] for name in ("COSALPHA", "SINALPHA") if name in dataset]
    if len(given) == 2:
        cosine, sine = (array.isel(time=0, drop=True) if "time" in array.dims else array for array in given)
        return cosine.reset_coords(drop=True).load(), sine.reset_coords(drop=True).load()
    lon = dataset["lon"].transpose(*lat.dims)
    cosine, sine = column_direction(lat.to_numpy(), lon.to_numpy())
    return xr.DataArray(cosine, dims=lat.dims), xr.DataArray(sine, dims=lat.dims)


def column_direction(lat: NDArray, lon: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """East and north components of the unit vector along rows, in which columns are counted.

    The points are vectors on the sphere; their central difference along a row is tangent to it, exactly where the row
    is a circle of even steps, as on a rotated grid.

    Args:
        lat, lon: Degrees, `[H, W]`.

    Raises:
        InputError: If there are fewer than three columns.
    """
    if lat.shape[1] < 3:
        raise InputError(f"winds are turned on a grid of at least 3 columns, not {lat.shape[1]}: give a larger one")
    phi, lam = (np.deg2rad(values.astype(np.float64)) for values in (lat, lon))
    points = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])
    along = np.gradient(points, axis=2, edge_order=2)
    east = np.stack([-np.sin(lam), np.cos(lam), np.zeros_like(lam)])
    north = np.stack([-np.sin(phi) * np.cos(lam), -np.sin(phi) * np.sin(lam), np.cos(phi)])
    components = (along * east).sum(axis=0), (along * north).sum(axis=0)
    length = np.hypot(*components)
    return components[0] / length, components[1] / length


def _turn(dataset: xr.Dataset, u: str, v: str, cosine: xr.DataArray, sine: xr.DataArray) -> xr.Dataset:
    units = [dataset[name].attrs.get("units") for name in (u, v)]
    if units[0] != units[1]:
        raise InputError(f"{u} is in {units[0]!r} and {v} in {units[1]!r}: winds are turned in one unit, convert one")
    blocks = {"time": _BLOCK_STEPS} if "time" in dataset[u].dims else {}
    # computed block by block when it is read, never at once
    along, across = (dataset[name].chunk(blocks) for name in (u, v))
    dims = dataset[u].dims
    east = (along * cosine - across * sine).transpose(*dims).astype(dataset[u].dtype)
    north = (along * sine + across * cosine).transpose(*dims).astype(dataset[v].dtype)
    return dataset.assign({u: east.assign_attrs(dataset[u].attrs), v: north.assign_attrs(dataset[v].attrs)})
