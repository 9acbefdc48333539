"""Time: gaps, which no pair crosses; steps that are not whole hours; calendars; forecast runs."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from anybodys_files import GRID, HEIGHT, LAT, LON, T2M, TIMES, WIDTH, alps, ground, joined, values
from prepare_data import shard_files, write

from climax_elevation.data.prepare import prepare
from climax_elevation.data.times import read_times, written_date
from climax_elevation.errors import InputError


def at(times: np.ndarray | list) -> xr.Dataset:
    fields = {"t2m": (("time", *GRID), values(280, 5, len(times), HEIGHT, WIDTH), {"units": "K"})}
    fields["orography"] = (GRID, ground(), {"units": "m"})
    return xr.Dataset(fields, coords={"time": times, "lat": LAT, "lon": LON})


def days(*spans: tuple[str, int]) -> np.ndarray:
    """Days from each date on, so many of them."""
    return np.concatenate([np.datetime64(first, "ns") + np.arange(n) * np.timedelta64(1, "D") for first, n in spans])


SUMMERS = days(("2018-06-01", 92), ("2019-06-01", 92), ("2020-06-01", 92))
HOURS = np.array([d + np.timedelta64(h, "h") for d in days(("2020-01-01", 20)) for h in (6, 9, 12)])
FORTNIGHTS = np.array(
    [np.datetime64(f"{y}-{m:02d}-{d:02d}", "ns") for y in range(2016, 2020) for m in range(1, 13) for d in (1, 15)]
)
WINTERS = np.array([np.datetime64(f"{y}-{m:02d}-01", "ns") for y in range(2000, 2010) for m in (1, 2, 3)])


@pytest.mark.parametrize(("times", "hours"), [(SUMMERS, 24), (HOURS, 3), (FORTNIGHTS, 14 * 24), (WINTERS, None)])
def test_no_pair_crosses_a_gap_and_all_others_are_there(tmp_path: Path, times: np.ndarray, hours: float | None) -> None:
    source = at(times)
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out")
    step = {
        i: j for i, j in pairwise(range(len(times))) if hours is None or times[j] - times[i] == hours * 3600 * 10**9
    }
    if hours is None:  # the months follow one another
        step = {i: j for i, j in step.items() if i % 3 != 2}
    bounds = len(times) * 8 // 10, len(times) * 9 // 10
    step = {i: j for i, j in step.items() if not any(i < bound <= j for bound in bounds)}
    t2m, found = source["t2m"].to_numpy(), set()
    for part in ("train", "val", "test"):
        for file in shard_files(done.out, part):
            shard = np.load(file)[T2M][:, 0]
            (first,) = [i for i in range(len(times)) if np.array_equal(t2m[i], shard[0])]
            np.testing.assert_array_equal(shard, t2m[first : first + len(shard)])
            found |= {(i, i + 1) for i in range(first, first + len(shard) - 1)}
    assert all(step.get(i) == j for i, j in found)
    lost = set(step.items()) - found
    # shards of a part are cut for several readers, which loses a pair at each cut; at gaps nothing else is lost
    cuts = sum(len(shard_files(done.out, part)) for part in ("train", "val", "test"))
    assert len(lost) <= cuts
    assert done.hours_per_step == pytest.approx(hours or 730, abs=0 if hours else 20)


def test_a_gap_is_told_and_what_is_too_short_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = at(np.delete(TIMES, [20, 22]))  # step 21 stands alone
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out")
    assert "2 gaps in time, the first after 2020-01-05T18:00:00" in caplog.text
    assert "of 38 steps, 1 are left out" in caplog.text
    assert sum(done.steps.values()) == 37
    alone = source["t2m"].to_numpy()[20]
    assert not (joined(done.out)[T2M] == alone).all(axis=(1, 2)).any()


def test_only_gaps(tmp_path: Path) -> None:
    source = write(at(WINTERS), tmp_path / "s.nc")
    with pytest.raises(InputError, match="train has 24 time steps, in 8 pieces without a gap, too few"):
        prepare(source, tmp_path / "out", predict_range=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("minutes", "every"), [(30, 2), (10, 6), (90, 2), (45, 4)])
def test_fractions_of_an_hour_are_refused_with_a_way_out(tmp_path: Path, minutes: int, every: int) -> None:
    source = at(TIMES[0] + np.arange(180) * np.timedelta64(minutes, "m"))
    path = write(source, tmp_path / "s.nc")
    with pytest.raises(InputError, match=rf"{minutes} min.*option every {every}$"):
        prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = prepare(path, tmp_path / "out", every=every)
    assert done.hours_per_step == minutes * every / 60
    np.testing.assert_array_equal(joined(done.out)[T2M], source["t2m"][::every])


def test_rounded_times(tmp_path: Path) -> None:
    # days since 1900 as floating point numbers miss the hour by microseconds
    days_since = (TIMES - np.datetime64("1900-01-01", "ns")) / np.timedelta64(1, "D") - 1e-9
    source = at(np.arange(40)).assign_coords(time=("time", days_since, {"units": "days since 1900-01-01"}))
    assert prepare(write(source, tmp_path / "s.nc"), tmp_path / "out").hours_per_step == 6
    with pytest.raises(InputError, match="3599 s"):
        read_times(xr.DataArray(TIMES[0] + np.arange(40) * np.timedelta64(3599, "s"), dims="time"))


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2000-01-02 06:00", "2000-01-02T06:00"),
        ("2000-01-02T06Z", "2000-01-02T06"),
        ("2000-01-02T06:00:00+00:00", "2000-01-02T06:00:00"),
        ("2000-02-30", "2000-02-30"),
        ("2000-01-02T06:00+01:00", None),
        ("2000-13", None),
        ("2000-01-02Z", None),
    ],
)
def test_dates_as_they_are_written(text: str, date: str | None) -> None:
    assert written_date(text) == date


def test_thirty_days_in_february(tmp_path: Path) -> None:
    times = xr.date_range("2000-01-01", periods=120, freq="D", calendar="360_day", use_cftime=True)
    source = at(times)
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", val_from="2000-02-30", test_from="2000-04-01")
    # 30 days of January, 29 of February; then the 30th and March
    assert done.steps == {"train": 59, "val": 31, "test": 30}
    np.testing.assert_array_equal(joined(done.out)[T2M], source["t2m"])


def run(steps: np.ndarray, runs: int = 1) -> xr.Dataset:
    """Forecasts every 12 hours, by the time at which each was made and its lead time."""
    made = TIMES[0] + np.arange(runs) * np.timedelta64(12, "h")
    fields = values(280, 5, runs, len(steps), HEIGHT, WIDTH)
    rain = np.abs(values(0, 1e-3, runs, len(steps), HEIGHT, WIDTH)).cumsum(axis=1)
    dims = ("time", "step", *GRID)
    leads = steps * np.timedelta64(3600 * 10**9, "ns")
    return xr.Dataset(
        {
            "t2m": (dims, fields, {"units": "K"}),
            "tp": (dims, rain, {"units": "m"}),
            "orography": (GRID, ground(), {"units": "m"}),
        },
        coords={
            "time": made,
            "step": leads,
            "valid_time": (("time", "step"), made[:, None] + leads[None]),
            "lat": LAT,
            "lon": LON,
        },
    )


def test_one_run_is_a_time_axis_and_sums_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = run(np.arange(0, 120, 3)).isel(time=0)
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out")
    np.testing.assert_array_equal(joined(done.out)[T2M], source["t2m"])
    np.testing.assert_array_equal(joined(done.out)["total_precipitation"], source["tp"])
    assert done.hours_per_step == 3
    assert next((done.out / "train").iterdir()).name == "00000_2020-01-01T00.npz" or done.shards["train"] > 1
    assert "tp: accumulated from the start of the forecast" in caplog.text


@pytest.mark.parametrize("layout", ["grib", "cds", "no valid time"])
def test_several_runs_are_chosen_from(tmp_path: Path, layout: str) -> None:
    source = run(np.array([6, 12, 18]), runs=30)
    step = "step"
    if layout == "cds":
        step = "forecast_period"
        source = source.rename(step=step, time="forecast_reference_time")
        source[step] = source[step] / np.timedelta64(1, "h")
        source[step].attrs = {"units": "hours"}
    elif layout == "no valid time":
        source = source.drop_vars("valid_time")
    path = write(source, tmp_path / "s.nc")
    with pytest.raises(InputError, match=rf"30 forecast runs .* of 3 lead times \(6, 12, 18 h\).*select {step}=6"):
        prepare(path, tmp_path / "out")
    done = prepare(path, tmp_path / "lead", select={step: "12h"})
    np.testing.assert_array_equal(joined(done.out)[T2M], source["t2m"][:, 1])
    assert done.hours_per_step == 12
    assert min(shard.name for shard in shard_files(done.out, "train")) == "00000_2020-01-01T12.npz"
    with pytest.raises(InputError, match=rf"select {step}=7: the source has {step} 6, 12, 18"):
        prepare(path, tmp_path / "none", select={step: "7"})


def test_one_of_several_runs(tmp_path: Path) -> None:
    source = run(np.arange(0, 120, 6), runs=3)
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", select={"time": "2020-01-01T12"})
    np.testing.assert_array_equal(joined(done.out)[T2M], source["t2m"][1])
    assert min(shard.name for shard in shard_files(done.out, "train")) == "00000_2020-01-01T12.npz"


def test_dates_and_names_that_are_not_there(tmp_path: Path) -> None:
    path = write(alps(), tmp_path / "s.nc")
    with pytest.raises(InputError, match="select names 'step', and the source has time, lat, lon"):
        prepare(path, tmp_path / "out", select={"step": "6"})
    done = prepare(path, tmp_path / "out", select={"time": "2020-01-02,2020-01-03,2020-01-04,2020-01-05,2020-01-06"})
    np.testing.assert_array_equal(joined(done.out)[T2M], alps()["t2m"][4:24])
