"""Upstream's own YAML files with their own lists of variables: what a user overrides is paths, device and sizes."""

import re

import numpy as np
import pytest
import xarray as xr
import yaml
from test_launch import ON, launched

from climax_elevation.data.format import RunningStatistics
from climax_elevation.files import save_npy, save_npz

FILES = {
    "global_forecast": "global_forecast_climax",
    "regional_forecast": "regional_forecast_climax",
    "climate_projection": "climate_projection",
    "pretrain": "pretrain_climax",
}
LAT, LON = np.linspace(-84.375, 84.375, 16), np.arange(32) * 11.25  # North America is whole patches of it
AHEAD = 72  # hours, of the forecasting files
PLAIN = ("land_sea_mask", "orography", "lattitude")  # of which pretraining has none


@pytest.fixture(scope="module")
def files(climax):
    """Upstream's configurations, by training script."""
    for needed in ("torchvision", "tensorboard", "rich", "dask"):
        pytest.importorskip(needed)
    found = {module: climax / "configs" / f"{name}.yaml" for module, name in FILES.items()}
    if not all(path.is_file() for path in found.values()):
        pytest.skip("this ClimaX is an installation, without upstream's configs")
    assert sorted(path.name for path in (climax / "configs").glob("*.yaml")) == sorted(p.name for p in found.values())
    return found


def ground(rng):
    return np.abs(rng.normal(500, 400, (len(LAT), len(LON)))).astype(np.float32)


def of_variable(name, steps, rng):
    """Values of a plausible size, `[steps, 1, 16, 32]`."""
    shape = (steps, 1, len(LAT), len(LON))
    if name == "lattitude":
        return np.broadcast_to(LAT[:, None], shape).astype(np.float32)
    if name == "land_sea_mask":
        return np.broadcast_to(rng.random(shape[2:]) < 0.4, shape).astype(np.float32)
    if name == "orography":
        return np.broadcast_to(ground(rng), shape).astype(np.float32)
    size = {"geopotential": 3e4, "temperature": 270, "2m": 280, "specific": 5e-3, "relative": 60}
    middle = next((value for start, value in size.items() if name.startswith(start)), 0.0)
    return (middle + (abs(middle) / 20 or 5) * rng.standard_normal(shape)).astype(np.float32)


def shards(root, variables, steps, parts):
    """Shards of ClimaX's format, of all these variables, some a part."""
    rng, statistics = np.random.default_rng(0), RunningStatistics()
    static = {name: of_variable(name, 1, rng) for name in PLAIN if name in variables}
    for part, count in parts.items():
        climatology = RunningStatistics()
        for number in range(count):
            arrays = {name: of_variable(name, steps, rng) for name in variables if name not in static}
            arrays |= {name: np.broadcast_to(values, (steps, *values.shape[1:])) for name, values in static.items()}
            save_npz(root / part / f"{number}.npz", arrays)
            climatology.update(arrays)
            statistics.update(arrays)
        if part != "train":
            save_npz(root / part / "climatology.npz", climatology.climatology())
    save_npz(root / "normalize_mean.npz", statistics.mean())
    save_npz(root / "normalize_std.npz", statistics.std())
    save_npy(root / "lat.npy", LAT)
    save_npy(root / "lon.npy", LON)
    np.savez(root / "ground.npz", orography=ground(rng), lat=LAT, lon=LON)


def climate_bench(root, forcings, scenarios):
    """The files of ClimateBench, for these simulations, with as many years as upstream counts on."""
    rng = np.random.default_rng(0)
    climate = ("tas", "pr", "pr90", "diurnal_temperature_range")
    for part, names in scenarios.items():
        (root / part).mkdir(parents=True)
        for name in {*names, "historical"}:
            years = np.arange(1850, 2015) if "hist" in name else np.arange(2015, 2037)
            place = {"time": years, "latitude": LAT, "longitude": LON}
            shape = (len(years), len(LAT), len(LON))
            forcing = {v: (tuple(place), rng.random(shape, np.float32)) for v in forcings}
            xr.Dataset(forcing, place).to_netcdf(root / part / f"inputs_{name}.nc")
            place = {"time": years, "member": [0, 1], "lat": LAT, "lon": LON}
            shape = (len(years), 2, *shape[1:])
            outputs = {v: (tuple(place), rng.random(shape, np.float32)) for v in climate}
            xr.Dataset(outputs, place | {"quantile": 0.9}).to_netcdf(root / part / f"outputs_{name}.nc")
    np.savez(root / "ground.npz", orography=ground(rng), lat=LAT, lon=LON)


@pytest.fixture(scope="module")
def roots(files, tmp_path_factory):
    """Data for each script, of all the variables that its file names."""
    made = {}
    for module, file in files.items():
        root, data = tmp_path_factory.mktemp(module), yaml.safe_load(file.read_text())["data"]
        if module == "climate_projection":
            simulations = {"train_val": data["list_train_simu"], "test": data["list_test_simu"]}
            climate_bench(root, data["variables"], simulations)
        elif module == "pretrain":
            shards(root, data["dict_in_variables"]["mpi-esm"], 28 + 6, {"train": 2})
        elif module == "global_forecast":
            assert data["predict_range"] == AHEAD
            shards(root, data["variables"], AHEAD + 4, {"train": 2, "val": 2, "test": 2})
        else:
            root = made["global_forecast"]
            assert set(np.load(root / "normalize_mean.npz")) == set(data["variables"])
        made[module] = root
    return made


def overrides(module, root, out, processes):
    """What a user writes on the command line, on a laptop; no list of variables, no region, no lead time."""
    trainer = {
        **{"accelerator": "cpu", "devices": processes, "precision": 32, "max_epochs": 1, "limit_train_batches": 2},
        **{"limit_val_batches": 1, "limit_test_batches": 1, "default_root_dir": out},
    }
    if module == "pretrain":
        del trainer["limit_val_batches"]  # which this file has
    net = {"img_size": [16, 32], "embed_dim": 16, "depth": 2, "num_heads": 2}
    data = {"batch_size": 2, "root_dir": root}
    model = {}
    if module == "pretrain":
        data["dict_root_dirs"] = f"{{mpi-esm: {data.pop('root_dir')}}}"
    if module == "climate_projection":
        model["pretrained_path"] = ""  # a URL
    parts = {"trainer": trainer, "model": model, "model.net.init_args": net, "data": data}
    return [f"--{part}.{name}={value}" for part, values in parts.items() for name, value in values.items()]


def switched_on(module, root):
    """The flag, and what it wants of data without orography or wind."""
    given = []
    if module in ("climate_projection", "pretrain"):
        given.append(f"--model.net.init_args.bias_args.elevation_file={root}/ground.npz")
    if module == "climate_projection":
        given.append("--model.net.init_args.bias_args.wind=false")
    return [ON, *given]


CASES = [
    pytest.param(module, on, processes, marks=[pytest.mark.slow] * (not on or processes > 1))
    for module in FILES
    for on in (False, True)
    for processes in (1, 2)
]


@pytest.mark.parametrize(("module", "on", "processes"), CASES)
def test_upstreams_file_trains_as_it_is(climax, files, roots, tmp_path, module, on, processes):
    """Strategy ddp, one worker, rich progress and TensorBoard, as upstream's files ask for."""
    given = ["--config", str(files[module]), *overrides(module, roots[module], tmp_path / "out", processes)]
    given += switched_on(module, roots[module]) if on else []
    # these files fall back to their authors' home folders
    folders = {name: str(tmp_path / "unused") for name in ("OUTPUT_DIR", "AMLT_OUTPUT_DIR")}
    done = launched(module, "--climax", str(climax), "--", *given, **folders)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").rglob("last*.ckpt"))
    assert not (tmp_path / "unused").exists()
    moved = re.search(r"elevation_alpha moved from 1 to (\S+)", done.stderr)
    assert bool(moved) == on, done.stderr
    if moved:  # the schedule of these files starts at a learning rate of 1e-8
        assert float(moved[1]) == pytest.approx(1, abs=1e-3)
    if processes > 1:
        assert "MEMBER: 2/2" in done.stderr
    # of upstream's files this one alone leaves embeddings without a use
    looks = done.stderr.count("ddp looks for parameters without a use")
    assert looks == (1 if module == "pretrain" else 0)
