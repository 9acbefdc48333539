"""`climax-elevation compare` with task infill, end to end on the smallest networks."""

import shutil

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml

from climax_elevation.cli import main

DAYS, STATIONS = 240, 12


def configuration(folder, **changes):
    """A file of stations whose values depend on height, and the settings of a comparison there."""
    rng = np.random.RandomState(0)
    height = np.linspace(100, 2400, STATIONS)
    day = rng.standard_normal((2, DAYS, 1))
    values = day[0] + day[1] * (height - 1200) / 1200 + 0.1 * rng.standard_normal((DAYS, STATIONS))
    xr.Dataset(
        {"t2m": (("time", "station"), values, {"units": "degC"})},
        {
            "time": pd.date_range("2004-01-01", periods=DAYS),
            "station": ("station", [f"S{i}" for i in range(STATIONS)], {"cf_role": "timeseries_id"}),
            "lat": ("station", 46 + rng.random_sample(STATIONS)),
            "lon": ("station", 11 + rng.random_sample(STATIONS)),
            "elevation": ("station", height, {"units": "m"}),
        },
        {"featureType": "timeSeries"},
    ).to_netcdf(folder / "stations.nc")
    data = {"stations": str(folder / "stations.nc"), "year_harmonics": 0}
    data |= {"val_from": "2004-05-01", "test_from": "2004-06-15"} | changes
    given = {
        "task": "infill",
        "out": str(folder / "out"),
        "data": data,
        "model": {"embed_dim": 8, "depth": 1, "num_heads": 2},
        "training": {"steps": 4, "batch_size": 8, "validations": 2},
        "seeds": [0, 1],
        "baseline": "none",
        "variants": {"none": None, "physics": {"bias_type": "physics", "bias_args": {"wind": False}}},
        "statistics": {"resamples": 20},
    }
    path = folder / "infill.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def test_both_arms_and_what_weather_services_use_are_reported_and_runs_are_kept(tmp_path, capsys):
    command = ["compare", str(configuration(tmp_path)), "--jobs", "1"]
    assert main(command) == 0
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(table.arm) == {"withheld", "given"}
    assert set(table.stratum.dropna()) == {"all", "seen in training", "never seen"}
    assert {"none", "physics", "climatology", "inverse distance"} <= set(table.variant)
    assert np.isfinite(table[table.metric == "rmse"].value).all()
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/runs/*/seed*/run.json")}
    assert len(runs) == 8  # two variants, two seeds, two arms
    capsys.readouterr()
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    # methods of other data that are still there are told of before training, not after it
    for arm in ("withheld", "given"):
        shutil.rmtree(tmp_path / "out" / arm)
    assert main(["compare", str(configuration(tmp_path, hidden=0.4)), "--jobs", "1"]) == 2
    assert "methods/all/seed0 is of other data or settings" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "out").glob("*/runs/*/*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 1.0}, "with all hidden there is nothing to infer from"),
        ({"val_from": "2009-01-01", "test_from": "2010-01-01"}, "choose other dates"),
        ({"unseen": 0.95}, "to train on: give two or more"),
        ({"val_from": "today"}, "data.val_from is a year or an ISO date of UTC such as 2000-06-01, not 'today'"),
        ({"test_from": "20040615"}, "data.test_from is a year or an ISO date of UTC"),
        ({"val_from": "2004-06-15T00:00Z"}, "data.val_from is before test_from"),
    ],
)
def test_what_cannot_be_inferred_is_told_before_training(tmp_path, capsys, changes, message):
    assert main(["compare", str(configuration(tmp_path, **changes))]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob("run.json"))
