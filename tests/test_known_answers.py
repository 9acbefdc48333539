"""Worlds whose answer is known: a wall that nothing crosses, and flat ground on which a bias has nothing to say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from climax_elevation.compare import Comparison, compare
from climax_elevation.data.format import RunningStatistics
from climax_elevation.files import save_npy, save_npz
from climax_elevation.testbed.altitude import ElevationMap
from climax_elevation.testbed.tracer import TracerSimulator

ROWS, COLUMNS = 8, 20
WALL = slice(8, 10)  # two columns: one patch wide
HOURS = 24.0


def write_basins(root: Path, elevation_m: np.ndarray) -> None:
    """Each sample: clouds of tracer anywhere, and what still air makes of them in a day, by diffusion alone.

    Diffusion is quick enough to mix a basin; up a wall of 6000 m passes a share of exp(-20).
    """
    ground = ElevationMap(np.arange(ROWS) - 3.5, 10.0 + np.arange(COLUMNS), elevation_m)
    simulator = TracerSimulator(ground, height_scale_m=300.0, diffusivity_m2_s=2e7)
    random = np.random.default_rng(7)
    statistics = RunningStatistics()
    for part, samples in {"train": 96, "val": 24, "test": 24}.items():
        first = random.exponential(1.0, (samples, ROWS, COLUMNS))
        first[:, :, : WALL.start] *= 2 * random.random((samples, 1, 1))
        first[:, :, WALL.stop :] *= 2 * random.random((samples, 1, 1))
        still = np.zeros_like(first)
        later = simulator.advance(first, still, still, HOURS)
        for number in range(samples):
            tracer = np.stack([first[number], later[number]])[:, None].astype(np.float32)
            orography = np.broadcast_to(elevation_m.astype(np.float32), tracer.shape)
            shard = {"orography": orography, "tracer": tracer}
            save_npz(root / part / f"{number:03d}.npz", shard)
            if part == "train":
                statistics.update(shard)
        if part != "train":
            save_npz(root / part / "climatology.npz", statistics.climatology())
    std = {name: np.where(value > 0, value, 1.0) for name, value in statistics.std().items()}
    save_npz(root / "normalize_mean.npz", statistics.mean())
    save_npz(root / "normalize_std.npz", std)
    save_npy(root / "lat.npy", ground.lat)
    save_npy(root / "lon.npy", ground.lon)


def run(
    tmp_path: Path,
    elevation_m: np.ndarray,
    variants: dict[str, Any],
    *,
    steps: int,
    seeds: list[int],
    drop_rate: float = 0.0,
) -> Comparison:
    write_basins(tmp_path / "data", elevation_m)
    configuration = {
        "data": {
            "root_dir": str(tmp_path / "data"),
            "variables": ["orography", "tracer"],
            "out_variables": ["tracer"],
            "hrs_each_step": int(HOURS),
        },
        "host": "stand-in",
        "accelerator": "cpu",
        "model": {"patch_size": 2, "embed_dim": 32, "drop_rate": drop_rate},
        "training": {"steps": steps, "validations": 2},
        "seeds": seeds,
        "variants": {"none": None, **variants},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration))
    return compare(tmp_path / "config.yaml", out=tmp_path / "out")


def record(done: Comparison, variant: str, seed: int) -> dict[str, Any]:
    return json.loads((done.out / "runs" / variant / f"seed{seed}" / "run.json").read_text())


def test_a_wall_is_learned(tmp_path: Path) -> None:
    """Ridge starts without effect and with the sign open; what crosses the wall is none of the other side's."""
    elevation_m = np.zeros((ROWS, COLUMNS))
    elevation_m[:, WALL] = 6000.0
    ridge = {"wind": False, "direction": "both", "alpha_init": 0.0, "static_terrain": True}
    done = run(tmp_path, elevation_m, {"ridge": {"bias_type": "ridge", "bias_args": ridge}}, steps=100, seeds=[0, 1, 2])
    for seed in (0, 1, 2):
        start, end = record(done, "ridge", seed)["scalars"]["blocks.0.elevation_alpha"]
        assert start == 0.0
        assert end > 0.1
    rows = done.differences.query("metric == 'rmse_standardised' and variable == 'mean' and stratum == 'all'")
    assert list(rows.verdict) == ["better", "better"]
    assert (rows.percent_high < -40).all()  # -56 and -54 when it was written


def test_flat_ground_changes_nothing(tmp_path: Path) -> None:
    """Training is the same but for rounding, since a mask of zeros takes another path through fused attention.

    Dropout is on: data, order and chance were the same. alpha has a gradient of exactly 0.
    """
    flat = {"wind": False, "static_terrain": True, "terrain_is_flat": True}
    physics_alone = {"physics": {"bias_type": "physics", "bias_args": flat}}
    done = run(tmp_path, np.zeros((ROWS, COLUMNS)), physics_alone, steps=30, seeds=[0], drop_rate=0.1)
    none, physics = (record(done, name, 0) for name in ("none", "physics"))
    assert physics["scalars"]["blocks.0.elevation_alpha"] == [1.0, 1.0]
    np.testing.assert_allclose(physics["curve"], none["curve"], rtol=1e-5)
    rows = done.differences.query("metric == 'rmse' and variable == 'tracer'")
    assert len(rows) == 4
    assert rows.percent.abs().max() < 1e-3
    # what another order of the data would have changed
    other = run(tmp_path, np.zeros((ROWS, COLUMNS)), {}, steps=30, seeds=[1], drop_rate=0.1)
    assert abs(record(other, "none", 1)["curve"][-1][1] / none["curve"][-1][1] - 1) > 1e-3
