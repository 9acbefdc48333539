"""Small sources for the tests of `prepare`, with values that can be true."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

UNITS = {
    "t2m": "K",
    "u10": "m s**-1",
    "v10": "m s**-1",
    "orography": "m",
    "lsm": "(0 - 1)",
    "z": "m**2 s**-2",
    "t": "K",
}


def era5(steps: int = 40, height: int = 7, width: int = 9) -> xr.Dataset:
    """ERA5 by its short names: 6-hourly, rows from north to south, an odd number of both."""
    random = np.random.default_rng(0)
    lat = (10.0 + 0.25 * np.arange(height))[::-1]
    lon = -70.0 + 0.25 * np.arange(width)

    def field(mean: float, spread: float) -> tuple[tuple[str, ...], NDArray[np.float32]]:
        values = random.normal(mean, spread, (steps, height, width)).astype(np.float32)
        return ("time", "latitude", "longitude"), values

    dataset = xr.Dataset(
        {
            "t2m": field(285, 5),
            "u10": field(2, 3),
            "v10": field(-1, 3),
            "orography": (
                ("latitude", "longitude"),
                random.uniform(0, 4000, (height, width)).astype(np.float32),
            ),
            "lsm": (("latitude", "longitude"), np.ones((height, width), dtype=np.float32)),
        },
        coords={
            "time": np.datetime64("2000-01-01T00", "ns") + np.arange(steps) * np.timedelta64(6, "h"),
            "latitude": lat,
            "longitude": lon,
        },
    )
    return with_units(dataset)


def world(steps: int = 20, height: int = 73, width: int = 144) -> xr.Dataset:
    """A global field with poles, known everywhere: t2m = 280 + 10 cos(latitude) cos(longitude)."""
    lat, lon = np.linspace(90, -90, height), np.arange(width) * 360 / width - 180
    wave = 280 + 10 * np.cos(np.deg2rad(lat))[:, None] * np.cos(np.deg2rad(lon))
    dims = ("time", "lat", "lon")
    dataset = xr.Dataset(
        {
            "t2m": (dims, np.repeat(wave[None], steps, axis=0).astype(np.float32)),
            "orography": (dims[1:], np.full((height, width), 500.0, dtype=np.float32)),
        },
        coords={
            "time": np.datetime64("2000-01-01", "ns") + np.arange(steps) * np.timedelta64(1, "D"),
            "lat": lat,
            "lon": lon,
        },
    )
    return with_units(dataset)


def with_units(dataset: xr.Dataset) -> xr.Dataset:
    for name, unit in UNITS.items():
        if name in dataset:
            dataset[name].attrs["units"] = unit
    return dataset


def write(dataset: xr.Dataset, path: Path) -> Path:
    dataset.to_netcdf(path)
    return path


def read(out: Path, partition: str) -> dict[str, NDArray[Any]]:
    """All steps of a partition, each once, shards joined in order, as ClimaX's format defines them."""
    listed = {
        shard["file"]: shard["repeats"] or 0 for shard in json.loads((out / "prepare.json").read_text())["shards"]
    }
    parts: dict[str, list[NDArray[Any]]] = {}
    for path in shard_files(out, partition):
        common = listed[f"{partition}/{path.name}"]
        for name, values in dict(np.load(path)).items():
            before = parts.setdefault(name, [])
            if common:
                np.testing.assert_array_equal(values[:common], np.concatenate(before)[-common:])
            before.append(values[common:])
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def shard_files(out: Path, partition: str) -> list[Path]:
    return sorted(path for path in (out / partition).glob("*.npz") if path.name != "climatology.npz")


def contents(out: Path) -> dict[str, bytes]:
    """All files but the configuration, which has the folder's own name."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "config.yaml")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}
