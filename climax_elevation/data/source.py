"""Opening a source: netCDF, Zarr or GRIB, one or many files, with coordinates under common names.

Afterwards the coordinates are called `time`, `level`, `lat` and `lon`, whatever the file calls them;
variables keep their own names. Nothing is read but metadata: values stay on the disk, or behind the URL.
"""

import glob
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import xarray as xr

from climax_elevation.data.names import find_variable
from climax_elevation.data.optional import require
from climax_elevation.errors import InputError

_COORDINATES = {
    "time": ("time", "valid_time"),
    "level": ("level", "pressure_level", "isobaricinhpa", "plev", "lev", "pressure"),
    "lat": ("lat", "latitude", "xlat", "nav_lat"),
    "lon": ("lon", "longitude", "xlong", "nav_lon"),
}
_GRIB_SUFFIXES = (".grib", ".grb", ".grib2", ".grb2")
_READ_WHOLE = 2**28
_SURFACE = "geopotential_at_surface"
SCALAR_TIME = "scalar_time"
"""Attribute of a data set of one state, without a time axis: the time that it states."""


def open_source(source: str) -> xr.Dataset:
    """Open `source` lazily.

    Args:
        source: A netCDF or GRIB file, a Zarr folder, a folder of netCDF files, a pattern such as
            `era5_*.nc`, or the URL of a Zarr store that fsspec opens.

    Returns:
        The data set; the caller closes it.

    Raises:
        InputError: If nothing is there, it is no such thing, or its files do not fit together.
    """
    if is_url(source):
        return _tidy(_open_zarr(source))
    path = Path(source)
    if _is_zarr(path):
        return _tidy(_open_zarr(source))
    if path.is_file():
        if path.suffix.lower() in _GRIB_SUFFIXES or _starts_with(path, b"GRIB"):
            return _open_grib(path)
        return _tidy(_open_netcdf(path))
    return _open_many(_files(source))


def is_url(source: str) -> bool:
    """Whether `source` is a URL and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]+:", source) is not None


def fingerprint(source: str, dataset: xr.Dataset) -> str:
    """A hash that changes when the source does.

    Up to 256 MiB the bytes themselves count; of a larger source, which would take too long to read
    twice, each file's size and time of change; of a URL the metadata and the coordinates.
    """
    digest = hashlib.sha256()
    if is_url(source):
        digest.update(source.encode())
        for name in sorted(map(str, dataset.variables)):
            variable = dataset[name]
            digest.update(repr((name, variable.dims, variable.shape, str(variable.dtype))).encode())
            digest.update(repr(sorted(variable.attrs.items())).encode())
        for name in ("time", "lat", "lon"):
            if name in dataset.coords:
                digest.update(dataset[name].to_numpy().astype(str).tobytes())
        return digest.hexdigest()
    files = _files(source)
    whole = sum(file.stat().st_size for file in files) <= _READ_WHOLE
    for file in files:
        place = file.relative_to(source) if Path(source).is_dir() else file.name
        digest.update(f"{place}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes() if whole else str(file.stat().st_mtime_ns).encode())
    return digest.hexdigest()


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found: Iterable[Path] = path.rglob("*" if _is_zarr(path) else "*.nc")
    else:
        found = map(Path, glob.glob(source, recursive=True))
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise InputError(f"no netCDF, Zarr or GRIB data at {source}: give a file, a folder, a pattern or a URL")
    return files


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zmetadata"))


def _starts_with(path: Path, *magics: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(8).startswith(magics)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _open_zarr(source: str) -> xr.Dataset:
    require("zarr", "zarr", "reading Zarr")
    try:
        return xr.open_zarr(source, chunks=None)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"cannot open {source} as Zarr: {_sentence(error)}") from error


def _open_netcdf(path: Path) -> xr.Dataset:
    if not _starts_with(path, b"CDF", b"\x89HDF"):
        raise InputError(f"{path} is neither netCDF nor GRIB, nor a Zarr folder")
    try:
        return xr.open_dataset(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot open {path} as netCDF: {_sentence(error)}") from error


def _open_grib(path: Path) -> xr.Dataset:
    cfgrib = require("cfgrib", "grib", "reading GRIB")
    try:
        # indexpath="": no index file left beside the source.
        parts = cfgrib.open_datasets(str(path), backend_kwargs={"indexpath": ""})
        return xr.merge([_tidy(part) for part in parts], join="exact", compat="no_conflicts")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"cannot open {path} as GRIB: {_sentence(error)}") from error


def _open_many(files: list[Path]) -> xr.Dataset:
    units: dict[str, tuple[str | None, str]] = {}

    def tidy(part: xr.Dataset) -> xr.Dataset:
        part = _tidy(part)
        for name, values in part.data_vars.items():
            unit, file = values.attrs.get("units"), part.encoding.get("source", "?")
            known, first = units.setdefault(str(name), (unit, file))
            if known != unit:
                raise InputError(
                    f"mixed units: {name} is in {known!r} in {first}, but in {unit!r} in {file}; convert one of them"
                )
        return part

    try:
        return xr.open_mfdataset(
            files,
            preprocess=tidy,
            combine="by_coords",
            join="exact",
            data_vars="minimal",
            coords="minimal",
            compat="override",
            combine_attrs="override",
        )
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"the {len(files)} files from {files[0]} to {files[-1]} do not fit together: {_sentence(error)}"
        ) from error


def _tidy(dataset: xr.Dataset) -> xr.Dataset:
    """Common names for coordinates and for the surface geopotential; no leftovers of length 1."""
    moments = [dataset[name].to_numpy() for name in ("valid_time", "time") if name in dataset.coords]
    dataset = _valid_time(_squeeze(dataset))
    names = {}
    for ours, theirs in _COORDINATES.items():
        # Some files keep 2-D latitude and longitude among the data; a variable `pressure` is no level.
        among = dataset.variables if ours in ("lat", "lon") else {**dataset.coords, **dataset.sizes}
        here = [str(name) for name in among if str(name).lower() in theirs]
        here = [name for name in here if name in dataset.dims] or here
        if here and ours not in here:
            names[here[0]] = ours
    dataset = dataset.rename(names)
    dataset = dataset.set_coords([name for name in ("lat", "lon") if name in dataset.data_vars])
    dataset = _static(dataset)
    kept = {"time", "level", "lat", "lon"}
    dataset = dataset.drop_vars([name for name in dataset.coords if name not in kept])
    scalar = [name for name in ("time", "lat", "lon") if name in dataset.coords and not dataset[name].dims]
    if "time" in scalar and moments[0].ndim == 0:
        dataset.attrs[SCALAR_TIME] = moments[0]
    dataset = dataset.drop_vars(scalar)
    return _surface(dataset)


def _squeeze(dataset: xr.Dataset) -> xr.Dataset:
    known = {name for names in _COORDINATES.values() for name in names}
    extra = {name: 0 for name, size in dataset.sizes.items() if size == 1 and str(name).lower() not in known}
    return dataset.isel(extra)


def _valid_time(dataset: xr.Dataset) -> xr.Dataset:
    for name in ("step", "expver", "number"):
        if dataset.sizes.get(name, 1) > 1:
            raise InputError(
                f"the source has {dataset.sizes[name]} values of {name!r}, ClimaX takes one: select one first"
            )
    # A forecast is filed under the time that it is for, not under the one at which it was made.
    if "valid_time" in dataset.coords and dataset["valid_time"].dims == ("time",):
        valid = dataset["valid_time"].to_numpy()
        return dataset.drop_vars("valid_time").assign_coords(time=("time", valid))
    return dataset


def _static(dataset: xr.Dataset) -> xr.Dataset:
    # Static fields are often filed under one meaningless date.
    if dataset.sizes.get("time") != 1:
        return dataset
    for name, values in dataset.data_vars.items():
        variable = find_variable(str(name), has_levels=False)
        if variable is not None and variable.name in ("orography", "land_sea_mask") and "time" in values.dims:
            dataset[name] = values.isel(time=0, drop=True)
    return dataset if any("time" in values.dims for values in dataset.data_vars.values()) else dataset.drop_dims("time")


def _surface(dataset: xr.Dataset) -> xr.Dataset:
    """Tell the two meanings of `z` apart before files are merged."""
    for name in ("z", "geopotential"):
        if name in dataset.data_vars and "level" not in dataset[name].coords and _SURFACE not in dataset:
            dataset = dataset.rename({name: _SURFACE})
    return dataset


def _sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
