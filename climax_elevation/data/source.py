"""Opening a source: netCDF, Zarr or GRIB, one or many files, with coordinates under common names.

Afterwards the coordinates are called `time`, `level`, `lat` and `lon`, whatever the file calls them; `level` is
pressure, `lat` and `lon` are degrees, winds go towards east and north, and of members and runs one is left. Variables
keep their own names. Nothing is read but metadata and orographies: values stay on the disk, or behind the URL.
"""

import glob
import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from climax_elevation.data.coordinates import KNOWN, in_degrees, name_coordinates
from climax_elevation.data.grib import MAGIC as GRIB
from climax_elevation.data.grib import SUFFIXES as GRIB_SUFFIXES
from climax_elevation.data.grib import open_grib
from climax_elevation.data.levels import NOT_PRESSURE, judged
from climax_elevation.data.members import one_member
from climax_elevation.data.names import CALLED, GROUND, LATITUDE_NAMES, find_variable, is_wanted
from climax_elevation.data.optional import require
from climax_elevation.data.rotated import with_places
from climax_elevation.data.runs import valid_times, with_durations
from climax_elevation.data.select import Selection
from climax_elevation.data.times import is_date
from climax_elevation.data.together import one_file, one_source
from climax_elevation.data.winds import partner, to_earth
from climax_elevation.data.wrf import with_wrf_coordinates
from climax_elevation.data.zipped import MAGIC as ZIP
from climax_elevation.data.zipped import Unpacked
from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

_NETCDF = (b"CDF", b"\x89HDF")
_READ_WHOLE = 2**28
_SURFACE = "geopotential_at_surface"
_ALWAYS = frozenset(("cosalpha", "sinalpha", *KNOWN))
"""Variables that others need, in lower case."""


def open_source(
    source: str | Sequence[str],
    *,
    variables: Sequence[str] | None = None,
    select: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    winds: str | None = None,
    orography: str | None = None,
    check_ground: bool = True,
) -> xr.Dataset:
    """Open `source` lazily.

    Args:
        source: A netCDF or GRIB file, a zip archive of such, a Zarr folder, a folder of these, a pattern such as
            `era5_*.nc`, the URL of a Zarr store that fsspec opens, or several of these.
        variables: What is wanted, by ClimaX's or the source's names. Of GRIB and of many files nothing else is looked
            at, so that it need not fit.
        select: Value by coordinate, see `climax_elevation.data.select`.
        units: Of latitude and longitude (`lat`, `lon`), where the source states none or a wrong one.
        winds: Whether winds go along the "grid" or the "earth"; None: as the source says.
        orography: The source's name of the orography, where it is none of the usual ones.
        check_ground: Whether files whose orographies differ are refused.

    Returns:
        The data set; the caller closes it.

    Raises:
        InputError: If nothing is there, it is no such thing, or its files do not fit together.
    """
    selection = Selection(select)
    wanted = None if variables is None else [*variables, *([] if orography is None else [orography])]
    sources = _each(source)
    files, unpacked = _unpack([file for one in sources for file in ([one] if is_url(one) else _files(one))])
    opened: list[xr.Dataset] = []
    whole: list[tuple[str, xr.Dataset]] = []
    names: dict[str, None] = {}
    for file in files:
        parts = _open(file, several=len(files) > 1)
        opened += parts
        names.update(dict.fromkeys(str(name) for part in parts for name in part.data_vars))
        # a part that is not wanted need not be one that can be read
        narrow = _keeps(wanted, orography) if len(parts) > 1 or (wanted is not None and len(files) > 1) else None
        asked = _Asked(selection, units or {}, wanted, orography)
        tidied = [_tidy(part, asked, narrow) for part in parts]
        usable = [part for part in tidied if part is not None]
        if usable:
            whole.append((str(file), one_file(str(file), usable)))
    selection.check()
    if not whole:
        has = ", ".join(names) or "nothing"
        raise InputError(f"{', '.join(sources)} has nothing that is wanted or that ClimaX knows: it has {has}")
    _check_wanted(variables, names)
    dataset = to_earth(one_source(whole, check_ground=check_ground), winds)
    dataset.set_close(_closing(opened, unpacked))
    return dataset


def is_url(source: str) -> bool:
    """Whether `source` is a URL and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]+:", source) is not None and not Path(source).exists()


def _each(source: str | Sequence[str]) -> Sequence[str]:
    return [source] if isinstance(source, str) else source


def fingerprint(source: str | Sequence[str], dataset: xr.Dataset) -> str:
    """A hash that changes when the source does.

    Up to 256 MiB the bytes themselves count; of a larger source, which would take too long to read
    twice, each file's size and time of change; of a URL the metadata and the coordinates.
    """
    digest = hashlib.sha256()
    for one in _each(source):
        _update(digest, one, dataset)
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", source: str, dataset: xr.Dataset) -> None:
    if is_url(source):
        digest.update(source.encode())
        for name in sorted(map(str, dataset.variables)):
            variable = dataset[name]
            digest.update(repr((name, variable.dims, variable.shape, str(variable.dtype))).encode())
            digest.update(repr(sorted(variable.attrs.items())).encode())
        for name in ("time", "lat", "lon"):
            if name in dataset.coords:
                digest.update(dataset[name].to_numpy().astype(str).tobytes())
        return
    files = [file for found in _files(source) for file in ([found] if found.is_file() else _below(found))]
    whole = sum(file.stat().st_size for file in files) <= _READ_WHOLE
    for file in files:
        place = file.relative_to(source) if Path(source).is_dir() else file.name
        digest.update(f"{place}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes() if whole else str(file.stat().st_mtime_ns).encode())


def _files(source: str) -> list[Path]:
    """Files and Zarr folders that `source` means."""
    path = Path(source)
    if path.is_file() or _is_zarr(path):
        return [path]
    found: Iterable[Path] = _within(path) if path.is_dir() else map(Path, glob.glob(source, recursive=True))
    # what lies in a folder need not be data; what a pattern names is meant
    files = sorted(
        file for file in found if _is_zarr(file) or (file.is_file() and (not path.is_dir() or _is_data(file)))
    )
    if not files:
        raise InputError(f"no netCDF, Zarr or GRIB data at {source}: give a file, a folder, a pattern or a URL")
    return files


def _within(folder: Path) -> Iterable[Path]:
    """Everything below, but not below a Zarr folder, nor what is hidden."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not _is_zarr(path):
            yield from _within(path)
        else:
            yield path


def _below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zmetadata"))


def _is_data(path: Path) -> bool:
    """By its first bytes: names of data files have all suffixes, and none."""
    return path.suffix.lower() in GRIB_SUFFIXES or _starts_with(path, *_NETCDF, GRIB, ZIP)


def _starts_with(path: Path, *magics: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(8).startswith(magics)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _unpack(files: Sequence[str | Path]) -> tuple[list[str | Path], list[Unpacked]]:
    """Files, those of archives in the place of the archives."""
    found: list[str | Path] = []
    unpacked = []
    for file in files:
        if isinstance(file, Path) and file.is_file() and _starts_with(file, ZIP):
            archive = Unpacked(file)
            unpacked.append(archive)
            found += _files(str(archive.folder))
        else:
            found.append(file)
    return found, unpacked


def _open(file: str | Path, *, several: bool) -> list[xr.Dataset]:
    """What is in one file: a part, or of GRIB one a variable."""
    if isinstance(file, str) or _is_zarr(file):
        return [_open_zarr(str(file), several=several)]
    if file.suffix.lower() in GRIB_SUFFIXES or _starts_with(file, GRIB):
        return open_grib(file)
    return [open_netcdf(file, chunks={} if several else None)]


def _open_zarr(source: str, *, several: bool) -> xr.Dataset:
    require("zarr", "zarr", "reading Zarr")
    try:
        with warnings.catch_warnings():
            # without consolidated metadata it is only slower
            warnings.filterwarnings("ignore", message=".*consolidated", category=RuntimeWarning)
            return xr.open_zarr(source, chunks={} if several else None)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"cannot open {source} as Zarr: {_sentence(error)}") from error


def open_netcdf(path: Path, chunks: Mapping[str, int] | None = None) -> xr.Dataset:
    """Open a netCDF file lazily, as it is; InputError if it is none. The caller closes it."""
    if not _starts_with(path, *_NETCDF):
        raise InputError(f"{path} is neither netCDF nor GRIB, nor a Zarr folder")
    try:
        return xr.open_dataset(path, chunks=chunks, decode_timedelta=False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot open {path} as netCDF: {_sentence(error)}") from error


@dataclass(frozen=True)
class _Asked:
    """Options of `open_source`, as it takes them."""

    selection: Selection
    units: Mapping[str, str]
    wanted: Sequence[str] | None
    orography: str | None

    def is_ground(self, name: str) -> bool:
        """Whether a variable without levels is the same at all times."""
        variable = find_variable(name, has_levels=False)
        return name == self.orography or (variable is not None and variable.name in GROUND)


def _tidy(part: xr.Dataset, asked: _Asked, keeps: Callable[[str], bool] | None) -> xr.Dataset | None:
    """Common names for coordinates and for the surface geopotential; no leftovers of length 1.

    Returns:
        The part; None where nothing of it is wanted or chosen.
    """
    part = with_durations(with_wrf_coordinates(part))
    if keeps is not None:
        part = _narrow(part, keeps)
        if not part.data_vars:
            return None
    chosen = asked.selection(judged(part, asked.units))
    if chosen is None:
        return None
    part = valid_times(_squeeze(one_member(chosen)))
    part = in_degrees(name_coordinates(with_places(part)), asked.units)
    part = _static(_along_its_time(part, asked), asked)
    along = {name for array in part.data_vars.values() for name in array.dims}
    kept = {"time", "level", "lat", "lon", NOT_PRESSURE, *along}
    scalar = {name for name in ("time", "lat", "lon") if name in part.coords and not part[name].dims}
    part = part.drop_vars([name for name in part.coords if name not in kept or name in scalar])
    return _surface(part)


def _narrow(part: xr.Dataset, keeps: Callable[[str], bool]) -> xr.Dataset:
    """Without variables that are not wanted, and without dimensions that nothing else has."""
    part = part.drop_vars([name for name, array in part.data_vars.items() if array.dims and not keeps(str(name))])
    along = {name for array in (*part.data_vars.values(), *_places(part)) for name in array.dims}
    return part.drop_dims([name for name in part.dims if name not in along])


def _places(part: xr.Dataset) -> list[xr.DataArray]:
    return [array for array in part.coords.values() if array.ndim > 1]


def _keeps(wanted: Sequence[str] | None, orography: str | None) -> Callable[[str], bool]:
    """Whether a variable is wanted, or needed for what is: the ground, places, the other wind of a pair."""

    def keeps(name: str) -> bool:
        static = find_variable(name, has_levels=False)
        other = partner(name)
        return (
            is_wanted(name, wanted)
            or name == orography
            or name.lower() in _ALWAYS
            or (static is not None and static.name in GROUND)
            or (other is not None and wanted is not None and is_wanted(other, wanted))
        )

    return keeps


def _check_wanted(variables: Sequence[str] | None, names: Iterable[str]) -> None:
    """Refuse a name that no file has, although what was not wanted was left out."""
    static = (*GROUND, *LATITUDE_NAMES, _SURFACE)
    unmet = [
        name
        for name in variables or ()
        if name not in static and not any(is_wanted(called, [name]) for called in names)
    ]
    if unmet:
        raise InputError(f"the source has no {', '.join(map(repr, unmet))}; it has {', '.join(names)}")


def _squeeze(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.isel(
        {name: 0 for name, size in dataset.sizes.items() if size == 1 and str(name).lower() not in KNOWN}
    )


def _along_its_time(dataset: xr.Dataset, asked: _Asked) -> xr.Dataset:
    """States of one time, which is a coordinate without a dimension, along a time axis."""
    moments = [dataset[name] for name in ("valid_time", "time") if name in dataset.coords and not dataset[name].dims]
    if "time" in dataset.dims or not moments or not is_date(moments[0].to_numpy()[()]):
        return dataset
    changing = {
        name: array
        for name, array in dataset.data_vars.items()
        if array.dims and ("level" in array.coords or not asked.is_ground(str(name)))
    }
    if not any(is_wanted(str(name), asked.wanted) for name in changing):
        return dataset  # static fields are often filed under one meaningless date
    time = np.atleast_1d(moments[0].to_numpy())
    dataset = dataset.drop_vars([moment.name for moment in moments])
    # in chunks, so that nothing is read yet
    return dataset.assign({name: dataset[name].chunk().expand_dims(time=time) for name in changing})


def _static(dataset: xr.Dataset, asked: _Asked) -> xr.Dataset:
    # Static fields are often filed under one meaningless date.
    if dataset.sizes.get("time") != 1:
        return dataset
    for name, values in dataset.data_vars.items():
        if asked.is_ground(str(name)) and "time" in values.dims and "level" not in values.coords:
            dataset[name] = values.isel(time=0, drop=True)
    return dataset if any("time" in values.dims for values in dataset.data_vars.values()) else dataset.drop_dims("time")


def _surface(dataset: xr.Dataset) -> xr.Dataset:
    """Tell the two meanings of `z` apart before files are merged."""
    for name in ("z", "geopotential"):
        if name not in dataset.data_vars or _SURFACE in dataset:
            continue
        if "level" not in dataset[name].coords and len(set(dataset[name].dims) - {"time"}) == 2:
            dataset = dataset.rename({name: _SURFACE})
            dataset[_SURFACE] = dataset[_SURFACE].assign_attrs({CALLED: name})
    return dataset


def _closing(opened: Sequence[xr.Dataset], unpacked: Sequence[Unpacked]) -> Callable[[], None]:
    def close() -> None:
        for part in opened:
            part.close()
        for archive in unpacked:
            archive.remove()

    return close


def _sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
