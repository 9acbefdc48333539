"""Small files of the kinds that people have, made from one set of values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from prepare_data import read

from climax_elevation.data.format import PARTITIONS

STEPS, HEIGHT, WIDTH = 40, 6, 8
LAT, LON = 44 + 0.5 * np.arange(HEIGHT), 5 + 0.5 * np.arange(WIDTH)
TIMES = np.datetime64("2020-01-01", "ns") + np.arange(STEPS) * np.timedelta64(6, "h")
GRID = ("lat", "lon")
T2M, U10, V10 = "2m_temperature", "10m_u_component_of_wind", "10m_v_component_of_wind"


def values(mean: float = 280.0, spread: float = 5.0, *shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(mean, spread, shape or (STEPS, HEIGHT, WIDTH)).astype(np.float32)


def ground() -> NDArray[np.float32]:
    """Metres."""
    return np.random.default_rng(9).uniform(100, 3000, (HEIGHT, WIDTH)).astype(np.float32)


def alps(**further: Any) -> xr.Dataset:
    """2 m temperature and orography, rows from south to north; and what is given."""
    given = {"t2m": (("time", *GRID), values(), {"units": "K"}), "orography": (GRID, ground(), {"units": "m"})}
    return xr.Dataset({**given, **further}, coords={"time": TIMES, "lat": LAT, "lon": LON})


def joined(out: Path) -> dict[str, NDArray[np.float32]]:
    """All steps of all parts, `[N, H, W]` a variable."""
    parts = [read(out, part) for part in PARTITIONS]
    return {name: np.concatenate([part[name] for part in parts])[:, 0] for name in parts[0]}
