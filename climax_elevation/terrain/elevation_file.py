"""A static elevation field in metres, from a file, laid on the data's grid."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
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
AGAIN = "download or write it again"
LATITUDES, LONGITUDES = ("lat", "latitude"), ("lon", "longitude")


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
        columns = _shares(self.lon, np.asarray(lon, dtype=np.float64), "longitude", self.source, period=360.0)
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
        raise InputError(
            f"elevation_file {path} does not exist; give a .nc, .npz or .npy file with elevation in metres"
        )
    source = f"elevation_file {path}"
    if path.suffix == ".npy":
        return ElevationField(load_npy(path, AGAIN), None, None, source)
    if path.suffix == ".npz":
        return _from_arrays(load_npz(path, AGAIN), variable, source)
    if path.suffix in (".nc", ".nc4", ".netcdf"):
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
    lat, lon = (
        _coordinate(field, names, unit) for names, unit in ((LATITUDES, "degrees_n"), (LONGITUDES, "degrees_e"))
    )
    if lat is not None and lat.ndim != 1:  # a curvilinear grid, which is taken as it lies
        lat = lon = None
    across = [_dimension(field, lat, LATITUDES, "yj"), _dimension(field, lon, LONGITUDES, "xi")]
    for dimension, size in field.sizes.items():
        if dimension not in across and size > 1:
            field = _the_same_along(field, str(dimension), source)
    field = field.squeeze([dimension for dimension in field.dims if dimension not in across], drop=True)
    if None not in across:
        field = field.transpose(*across)
    values = field.values.astype(np.float64) * factor + offset
    return _field(values, None if lat is None else lat.values, None if lon is None else lon.values, source)


def _coordinate(field: xarray.DataArray, names: tuple[str, ...], unit: str) -> xarray.DataArray | None:
    """Latitudes or longitudes, by name or else by their unit."""
    for name, coordinate in field.coords.items():
        if str(name).lower() in names or str(coordinate.attrs.get("units", "")).lower().startswith(unit):
            return coordinate if coordinate.ndim else None
    return None


def _dimension(field: xarray.DataArray, along: xarray.DataArray | None, names: tuple[str, ...], letters: str) -> Any:
    """The dimension of a coordinate; where there is none, the one whose name says so, or None."""
    if along is not None:
        return along.dims[0]
    return next((name for name in field.dims if str(name).lower() in names or str(name).lower()[:1] in letters), None)


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
    if np.ndim(lat) != 1 or np.ndim(lon) != 1:
        lat = lon = None
    if lat is not None and lon is not None:
        for name, degrees in (("latitudes", lat), ("longitudes", lon)):
            if not np.isfinite(degrees).all() or len(np.unique(degrees)) < np.size(degrees):
                raise InputError(f"{source}: its {name} are finite numbers, each there once: mend the file")
        if np.abs(lat).max() > 90 + 1e-6:
            raise InputError(f"{source}: its latitudes are within [-90, 90] degrees, not up to {np.abs(lat).max():g}")
    return ElevationField(values, lat, lon, source)


def _first(arrays: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((arrays[name] for name in names if name in arrays), None)


def _shares(have: np.ndarray, want: np.ndarray, axis: str, source: str, period: float | None) -> np.ndarray:
    """How much of each of the file's cells goes into each of the data's, `[wanted, had]`; rows sum to one."""
    have = np.asarray(have, dtype=np.float64)
    finer = _spacing(have, period) < SAME_SPACING * _spacing(want, period)
    return _overlaps(have, want, axis, source, period) if finer else _matches(have, want, axis, source, period)


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
