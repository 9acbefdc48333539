"""The files beside ClimaX's shards that say how channels were standardised and where pixels lie."""

from __future__ import annotations

from pathlib import Path

from climax_elevation.errors import InputError
from climax_elevation.files import load_npy, load_scalars
from climax_elevation.terrain.reader import TerrainReader

REMEDY = "copy it again from the data that the model was trained on, or name another stats_dir"


def read_folder(reader: TerrainReader, folder: str | Path) -> None:
    """Give `reader` the statistics, latitudes and longitudes that lie in `folder`.

    Args:
        reader: Where they go.
        folder: Has normalize_mean.npz and normalize_std.npz, and may have lat.npy and lon.npy.

    Raises:
        InputError: If the statistics are absent or damaged, or disagree with what the reader knows.
    """
    folder = Path(folder)
    for name in ("normalize_mean.npz", "normalize_std.npz"):
        if not (folder / name).is_file():
            raise InputError(f"stats_dir {folder} has no {name}; give the folder that holds it, beside train/ and val/")
    source = f"stats_dir {folder}"
    reader.set_statistics(
        load_scalars(folder / "normalize_mean.npz", REMEDY), load_scalars(folder / "normalize_std.npz", REMEDY), source
    )
    # a curvilinear grid has its true coordinates in two dimensions, beside lat.npy's means of rows
    for lat, lon in (("lat2d.npy", "lon2d.npy"), ("lat.npy", "lon.npy")):
        there = [name for name in (lat, lon) if (folder / name).exists()]
        if len(there) == 1:
            raise InputError(f"stats_dir {folder} has {there[0]} alone of {lat} and {lon}: {REMEDY}")
        if there:
            reader.set_grid(load_npy(folder / lat, REMEDY), load_npy(folder / lon, REMEDY), source=source)
            return
