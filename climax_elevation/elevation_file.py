"""A static elevation field in metres, from a file, laid on the data's grid."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

STANDARD_GRAVITY_M_S2 = 9.80665
METRES = {"m", "metre", "metres", "meter", "meters"}
GEOPOTENTIAL = {"m2s-2", "m2/s2", "m^2s^-2", "m^2/s^2", "m**2s**-2", "m**2/s**2"}
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
        """The field on the data's pixels: flipped, rolled or cut as its coordinates demand.

        Args:
            shape: Height and width of the data, pixels.
            lat, lon: The data's coordinates, degrees, `[H]` and `[W]`; None: unknown.

        Returns:
            Metres, `[H, W]`, float64.

        Raises:
            InputError: If the file lacks a place that the data has or, where either side has no
                coordinates, if the shape is not exactly the data's.
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
        rows = _matches(self.lat, lat, "latitude", self.source, period=None)
        columns = _matches(self.lon, lon, "longitude", self.source, period=360.0)
        return self.values[np.ix_(rows, columns)].astype(np.float64)


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
        return ElevationField(np.load(path), None, None, source)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return _from_arrays(dict(arrays), variable, source)
    if path.suffix in (".nc", ".nc4", ".netcdf"):
        return _from_netcdf(path, variable, source)
    raise InputError(f"{source} is a .nc, .npz or .npy file, not {path.suffix!r}")


def _from_arrays(arrays: dict[str, np.ndarray], variable: str, source: str) -> ElevationField:
    if variable not in arrays:
        raise InputError(f"{source} holds {', '.join(arrays)}, and no {variable!r}; name the field so")
    return ElevationField(np.squeeze(arrays[variable]), _first(arrays, LATITUDES), _first(arrays, LONGITUDES), source)


def _from_netcdf(path: Path, variable: str, source: str) -> ElevationField:
    import xarray

    with xarray.open_dataset(path) as dataset:
        name = next((name for name in (variable, "orography", "z") if name in dataset.data_vars), None)
        if name is None:
            raise InputError(f"{source} holds {', '.join(map(str, dataset.data_vars))}, and no {variable!r} or 'z'")
        field = dataset[name].squeeze(drop=True)
        for time in ("time", "valid_time"):
            if time in field.dims:
                field = field.isel({time: 0})
        units = str(field.attrs.get("units", "")).replace(" ", "")
        if units in GEOPOTENTIAL:
            field = field / STANDARD_GRAVITY_M_S2
        elif units not in METRES:
            raise InputError(f"{source}: {name!r} is in metres or m2 s-2 by its attribute units, not {units!r}")
        coordinates: dict[str, Any] = {str(key): value.values for key, value in field.coords.items()}
        lat, lon = _first(coordinates, LATITUDES), _first(coordinates, LONGITUDES)
        if lat is not None and lat.ndim != 1:
            lat, lon = None, None
        return ElevationField(field.values, lat, lon, source)


def _first(arrays: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((arrays[name] for name in names if name in arrays), None)


def _matches(have: np.ndarray, want: np.ndarray, axis: str, source: str, period: float | None) -> np.ndarray:
    """For each wanted coordinate the index of the file's, which is the same to a hundredth of the spacing."""
    apart = np.abs(np.asarray(want, dtype=np.float64)[:, None] - np.asarray(have, dtype=np.float64)[None, :])
    if period is not None:
        apart = np.minimum(apart % period, -apart % period)
    nearest = apart.argmin(axis=1)
    spacing = np.diff(np.sort(have)).min() if len(have) > 1 else 1.0
    missed = apart.min(axis=1) > max(0.01 * float(spacing), 1e-3)
    if missed.any():
        raise InputError(
            f"{source} has no {axis} {np.asarray(want)[missed][0]:g}, which the data have; it has {np.min(have):g} to "
            f"{np.max(have):g} degrees, {spacing:g} apart: regrid it to the data's grid"
        )
    return nearest
