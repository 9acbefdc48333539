"""A small folder in ClimaX's shard format: weather that drifts over a mountain."""

from pathlib import Path

import numpy as np

from climax_elevation.data.format import RunningStatistics
from climax_elevation.files import save_npy, save_npz

VARIABLES = ["orography", "2m_temperature", "10m_u_component_of_wind", "10m_v_component_of_wind"]
TARGETS = ["2m_temperature", "10m_u_component_of_wind"]
LAT, LON = np.linspace(10.0, -4.0, 8), np.linspace(0.0, 30.0, 16)


def fields(start: int, steps: int) -> dict[str, np.ndarray]:
    """Physical values, `[steps, 1, 8, 16]`; the first pixel's temperature is 280 K + the time step."""
    time = np.arange(start, start + steps)[:, None, None, None]
    rows, columns = np.meshgrid(np.arange(8), np.arange(16), indexing="ij")
    orography = 2000 + 1500 * np.sin(columns / 3.0) * np.cos(rows / 4.0)
    wave = np.sin(0.4 * time - 0.5 * columns + rows)
    temperature = 290 - 0.0065 * orography + 5 * wave
    temperature[:, 0, 0, 0] = 280 + time[:, 0, 0, 0]
    values = [orography + 0 * wave, temperature, 6 + 4 * wave, -2 + 3 * np.cos(0.2 * time + rows)]
    full = {name: np.broadcast_to(value, wave.shape) for name, value in zip(VARIABLES, values, strict=True)}
    return {name: value.astype(np.float32) for name, value in full.items()}


def write(
    root: Path, train: tuple[int, ...] = (7, 5, 6), val: tuple[int, ...] = (5,), test: tuple[int, ...] = (5,)
) -> Path:
    """Write shards of so many time steps each, which follow each other in time; returns root."""
    start, statistics = 0, RunningStatistics()
    for part, shards in {"train": train, "val": val, "test": test}.items():
        climatology = RunningStatistics()
        for number, steps in enumerate(shards):
            arrays = fields(start, steps)
            save_npz(root / part / f"{number}.npz", arrays)
            climatology.update(arrays)
            if part == "train":
                statistics.update(arrays)
            start += steps
        if part != "train" and shards:
            save_npz(root / part / "climatology.npz", climatology.climatology())
    save_npz(root / "normalize_mean.npz", statistics.mean())
    save_npz(root / "normalize_std.npz", statistics.std())
    save_npy(root / "lat.npy", LAT)
    save_npy(root / "lon.npy", LON)
    return root
