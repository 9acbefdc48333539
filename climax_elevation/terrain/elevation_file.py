"""A static elevation field in metres, from a file, laid on the data's grid."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from climax_elevation.errors import InputError
from climax_elevation.files import load_npy, load_npz
from climax_elevation.terrain.units import HEIGHT, conversion

if TYPE_CHECKING:
    import xarray

logger = logging.getLogger(__name__)

SAME_SPACING = 0.99  # of the data's, above which a file is not finer
WHOLLY = 0.999  # of a pixel, covered by a file's cells
WIDEST_STEP = 1.9  # times the median step, above which rows or columns are missing; Gaussian grids have 1.01
ROUND = 360.0
AGAIN = "download or write it again"
LATITUDES, LONGITUDES = ("lat", "latitude"), ("lon", "longitude")
OF_LATITUDES, OF_LONGITUDES = (
    re.compile(f"degrees?_?{letter}(?!\\w)|degrees?_{word}", re.I) for letter, word in (("n", "north"), ("e", "east"))
)


@dataclass(frozen=True)
class ElevationField:
    """Elevation with the coordinates that its file gives.

    Attributes:
        values: Metres, `[H, W]`.
        lat, lon: Degrees, `[H]` and `[W]`, or None where the file has none.
        source: Where it is from, for messages.
    """

    values: np.ndarray
    lat: np.ndarray | None
    lon: np.ndarray | None
    source: str

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise InputError(f"{self.source} holds a field [latitude, longitude], not {list(self.values.shape)}")
        if self.lat is not None and self.lon is not None and (len(self.lat), len(self.lon)) != self.values.shape:
            raise InputError(
                f"{self.source} has {len(self.lat)} latitudes and {len(self.lon)} longitudes for a field of "
                f"{list(self.values.shape)}"
            )

    @property
    def has_coordinates(self) -> bool:
        return self.lat is not None and self.lon is not None

    def on_grid(self, shape: tuple[int, int], lat: np.ndarray | None, lon: np.ndarray | None) -> np.ndarray:
        """The field on the data's pixels: flipped, rolled or cut as its coordinates demand, averaged where it is finer.

        A finer field is averaged by area: a pixel reaches half way to its neighbours, and has of the file's cells as
        much as lies within it.

        Args:
            shape: Height and width of the data, pixels.
            lat, lon: The data's coordinates, degrees, `[H]` and `[W]`; None: unknown.

        Returns:
            Metres, `[H, W]`, float64.

        Raises:
            InputError: If the file lacks a place that the data has, is coarser than they are or, where either side
                has no coordinates, if the shape is not exactly the data's.
        """
        if self.lat is None or self.lon is None or lat is None or lon is None:
            if self.values.shape != shape:
                raise InputError(
                    f"{self.source} is {list(self.values.shape)} and the data {list(shape)}: without latitudes and "
                    "longitudes of both (in the file; lat.npy and lon.npy beside the statistics) they have to be equal"
                )
            logger.warning(
                "%s: used as it is, its first row as the data's first row (%s); give latitudes and longitudes to have "
                "it turned as the data are",
                self.source,
                "the file has no coordinates" if not self.has_coordinates else "the data's coordinates are unknown",
            )
            return self.values.astype(np.float64)
        rows = _shares(self.lat, np.asarray(lat, dtype=np.float64), "latitude", self.source, period=None)
        columns = _shares(self.lon, np.asarray(lon, dtype=np.float64), "longitude", self.source, period=ROUND)
        unknown = ~np.isfinite(self.values)
        if (rows @ unknown @ columns.T).any():
            raise InputError(
                f"{self.source} has values that are not finite where the data lie: fill them (0 m over sea)"
            )
        return rows @ np.where(unknown, 0.0, self.values).astype(np.float64) @ columns.T


def read_elevation_file(path: str | Path, variable: str = "orography") -> ElevationField:
    """Read a static elevation field.

    Args:
        path: netCDF, `.npz` (keys: `variable`, and lat and lon) or `.npy` (the bare field, metres).
        variable: Name of the field; in a netCDF file surface geopotential `z` is taken as well, by its units.

    Raises:
        InputError: If the file is absent, of another kind, without the field, or not in metres.
    """
    path = Path(path)
    if not path.is_file():
        came = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"elevation_file {path} {came}; give a .nc, .npz or .npy file with elevation in metres")
    source = f"elevation_file {path}"
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return ElevationField(load_npy(path, AGAIN), None, None, source)
    if suffix == ".npz":
        return _from_arrays(load_npz(path, AGAIN), variable, source)
    if suffix in (".nc", ".nc4", ".netcdf"):
        return _from_netcdf(path, variable, source)
    raise InputError(f"{source} is a .nc, .npz or .npy file, not {path.suffix!r}")


def _from_arrays(arrays: dict[str, np.ndarray], variable: str, source: str) -> ElevationField:
    if variable not in arrays:
        raise InputError(f"{source} holds {', '.join(arrays)}, and no {variable!r}; name the field so")
    return _field(np.squeeze(arrays[variable]), _first(arrays, LATITUDES), _first(arrays, LONGITUDES), source)


def _from_netcdf(path: Path, variable: str, source: str) -> ElevationField:
    import xarray

    try:
        with xarray.open_dataset(path, decode_times=False) as dataset:
            return _of_dataset(dataset.load(), variable, source)
    except InputError:
        raise
    except Exception as error:  # of netCDF4, h5netcdf or scipy, by what the file looks like
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{source} cannot be read as netCDF ({said}): {AGAIN}") from error


def _of_dataset(dataset: xarray.Dataset, variable: str, source: str) -> ElevationField:
    name = next((name for name in (variable, "orography", "z") if name in dataset.data_vars), None)
    if name is None:
        raise InputError(f"{source} holds {', '.join(map(str, dataset.data_vars))}, and no {variable!r} or 'z'")
    field = dataset[name]
    unit = field.attrs.get("units")
    remedy = "write its unit as the attribute units of the variable"
    factor, offset = conversion(HEIGHT, None if unit is None else str(unit), f"{source}: {name!r}", remedy)
    lat = _coordinate(field, LATITUDES, OF_LATITUDES)
    lon = _coordinate(field, LONGITUDES, OF_LONGITUDES)
    if lat is not None and lon is not None and lat.dims == lon.dims and lat.ndim == 1:
        raise InputError(
            f"{source} has a latitude and a longitude for each point along {lat.dims[0]!r}, and no grid: regrid it to "
            "rows and columns"
        )
    if (lat is not None and lat.ndim > 1) or (lon is not None and lon.ndim > 1):
        lat = lon = None  # a curvilinear grid, which is taken as it lies
    rows, columns = _dimension(field, lat, LATITUDES, "yj"), _dimension(field, lon, LONGITUDES, "xi")
    if rows is None or columns is None:
        rows, columns = _last_two(field, rows, columns, source)
    for dimension, size in field.sizes.items():
        if dimension not in (rows, columns) and size > 1:
            field = _the_same_along(field, str(dimension), source)
    field = field.squeeze([dimension for dimension in field.dims if dimension not in (rows, columns)], drop=True)
    values = field.transpose(rows, columns).values.astype(np.float64) * factor + offset
    return _field(values, None if lat is None else lat.values, None if lon is None else lon.values, source)


def _coordinate(field: xarray.DataArray, names: tuple[str, ...], unit: re.Pattern[str]) -> xarray.DataArray | None:
    """Latitudes or longitudes along the field, by name, or else by what CF says of them: standard name or unit."""
    along = {str(name): coordinate for name, coordinate in field.coords.items() if coordinate.ndim}
    for name, coordinate in along.items():
        if name.lower() in names:
            return coordinate
    for coordinate in along.values():
        standard = coordinate.attrs.get("standard_name")
        if standard in names or (standard is None and unit.match(str(coordinate.attrs.get("units", "")))):
            return coordinate
    return None


def _dimension(field: xarray.DataArray, along: xarray.DataArray | None, names: tuple[str, ...], letters: str) -> Any:
    """The dimension of a coordinate; where there is none, the one whose name says so, or None."""
    if along is not None:
        return along.dims[0]
    named = {name: str(name).lower().removeprefix("n") for name in field.dims}
    return next((name for name, lower in named.items() if lower in names or lower[:1] in letters), None)


def _last_two(field: xarray.DataArray, rows: Any, columns: Any, source: str) -> tuple[Any, Any]:
    """Rows and columns where names do not tell both: a file's last two dimensions, as CF recommends."""
    if field.ndim < 2:
        raise InputError(f"{source} holds a field [latitude, longitude], not {list(field.sizes.values())}")
    last = list(field.dims[-2:])
    for known in (rows, columns):
        if known is not None and known not in last:
            raise InputError(
                f"{source}: which of the dimensions {', '.join(map(str, field.dims))} of {field.name!r} are latitude "
                "and longitude is not known: name them so"
            )
    if rows is None and columns is None:
        return last[0], last[1]
    (other,) = [dimension for dimension in last if dimension not in (rows, columns)]
    return (rows, other) if columns is None else (other, columns)


def _the_same_along(field: xarray.DataArray, dimension: str, source: str) -> xarray.DataArray:
    """The field without a dimension along which nothing changes, such as the hours of a day."""
    first = field.isel({dimension: 0}, drop=True)
    if not bool(((field == first) | (field.isnull() & first.isnull())).all()):
        raise InputError(
            f"{source}: {field.name!r} changes along {dimension!r} ({field.sizes[dimension]} values), and the ground "
            "has one height a place: select one"
        )
    return first


def _field(values: np.ndarray, lat: Any, lon: Any, source: str) -> ElevationField:
    """A field whose coordinates are such; those of a curvilinear grid are left out."""
    if (lat is None) != (lon is None):
        has, lacks = ("latitudes", "longitudes") if lon is None else ("longitudes", "latitudes")
        raise InputError(f"{source} has {has} and no {lacks}: write both, or neither")
    if lat is None or np.ndim(lat) != 1 or np.ndim(lon) != 1:
        return ElevationField(values, None, None, source)
    for name, degrees in (("latitudes", lat), ("longitudes", lon)):
        if not np.size(degrees) or not np.isfinite(degrees).all() or len(np.unique(degrees)) < np.size(degrees):
            raise InputError(f"{source}: its {name} are finite numbers, each there once: mend the file")
    if np.abs(lat).max() > 90 + 1e-6:
        raise InputError(f"{source}: its latitudes are within [-90, 90] degrees, not up to {np.abs(lat).max():g}")
    field = ElevationField(values, lat, lon, source)
    return _without_the_column_that_comes_twice(field)


def _without_the_column_that_comes_twice(field: ElevationField) -> ElevationField:
    """Files made for maps go on to the meridian that they began with, which would count twice."""
    lon = np.asarray(field.lon, dtype=np.float64)
    if len(lon) < 3 or abs(abs(lon[-1] - lon[0]) - ROUND) > 0.01 * abs(lon[1] - lon[0]):
        return field
    first, last = field.values[:, 0], field.values[:, -1]
    if not np.allclose(first, last, atol=1.0, equal_nan=True):
        raise InputError(
            f"{field.source} has the meridian at {lon[0]:g} degrees twice, with other values at {lon[-1]:g}: mend the "
            "file"
        )
    return replace(field, values=field.values[:, :-1], lon=lon[:-1])


def _first(arrays: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((arrays[name] for name in names if name in arrays), None)


def _shares(have: np.ndarray, want: np.ndarray, axis: str, source: str, period: float | None) -> np.ndarray:
    """How much of each of the file's cells goes into each of the data's, `[wanted, had]`; rows sum to one."""
    have = np.asarray(have, dtype=np.float64)
    steps = np.diff(have if period is None else np.unwrap(have, period=period))
    if not ((steps > 0).all() or (steps < 0).all()):
        raise InputError(f"{source}: its {axis}s rise or fall all along, and these do not: sort the file by {axis}")
    if len(want) == 1 or not _spacing(have, period) < SAME_SPACING * _spacing(want, period):
        return _matches(have, want, axis, source, period)
    skips = np.abs(steps) > WIDEST_STEP * np.median(np.abs(steps))
    if skips.any():
        before, after = have[:-1][skips][0], have[1:][skips][0]
        raise InputError(
            f"{source} has no {axis} between {before:g} and {after:g}, and elsewhere one every "
            f"{np.median(np.abs(steps)):g} degrees: averages need all of them; give a file without gaps"
        )
    return _overlaps(have, want, axis, source, period)


def _spacing(degrees: np.ndarray, period: float | None) -> float:
    """Between neighbours; infinite for one alone."""
    if len(degrees) == 1:
        return math.inf
    steps = np.abs(np.diff(degrees))
    return float(np.median(steps if period is None else np.minimum(steps, period - steps)))


def _overlaps(have: np.ndarray, want: np.ndarray, axis: str, source: str, period: float | None) -> np.ndarray:
    """By area: along a meridian that of a belt of the sphere."""
    of_have, of_want = _edges(have, period), _edges(want, period)
    if period is None:
        of_have, of_want = (np.sin(np.deg2rad(np.clip(edges, -90, 90))) for edges in (of_have, of_want))
    turns = (0.0,) if period is None else (-2 * period, -period, 0.0, period, 2 * period)
    shares = np.zeros((len(want), len(have)))
    for turn in turns:
        ends = np.minimum(of_want[:, None, 1], of_have[None, :, 1] + turn)
        starts = np.maximum(of_want[:, None, 0], of_have[None, :, 0] + turn)
        shares += (ends - starts).clip(min=0)
    covered = shares.sum(axis=1) / (of_want[:, 1] - of_want[:, 0])
    if (covered < WHOLLY).any():
        raise InputError(
            f"{source} does not cover the pixel at {axis} {want[covered < WHOLLY][0]:g}, which the data have; it has "
            f"{have.min():g} to {have.max():g} degrees: give a file of the whole region"
        )
    return shares / shares.sum(axis=1, keepdims=True)


def _edges(degrees: np.ndarray, period: float | None) -> np.ndarray:
    """Of the cell of each: half way to its neighbours, and as far on the outside; lower and upper, `[n, 2]`."""
    straight = degrees if period is None else np.unwrap(degrees, period=period)
    order = straight.argsort()
    middles = straight[order]
    between = (middles[1:] + middles[:-1]) / 2
    outside = [middles[:1] - (between[0] - middles[0]), between, middles[-1:] + (middles[-1] - between[-1])]
    edges = np.concatenate(outside)
    found = np.empty((len(degrees), 2))
    found[order] = np.stack([edges[:-1], edges[1:]], axis=1)
    return found


def _matches(have: np.ndarray, want: np.ndarray, axis: str, source: str, period: float | None) -> np.ndarray:
    """One where a coordinate is the wanted one, to a hundredth of the spacing."""
    apart = np.abs(want[:, None] - have[None, :])
    if period is not None:
        apart = np.minimum(apart % period, -apart % period)
    spacing = _spacing(np.sort(have), None) if len(have) > 1 else 1.0
    missed = apart.min(axis=1) > max(0.01 * spacing, 1e-3)
    if missed.any():
        raise InputError(
            f"{source} has no {axis} {want[missed][0]:g}, which the data have; it has {have.min():g} to "
            f"{have.max():g} degrees, {spacing:g} apart: regrid it to the data's grid, or give a finer one"
        )
    shares = np.zeros((len(want), len(have)))
    shares[np.arange(len(want)), apart.argmin(axis=1)] = 1
    return shares
