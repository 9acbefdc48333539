"""Station files: CF netCDF and CSV, and one sentence for what is wrong with one."""

import csv
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from climax_elevation.data.stations import read_stations
from climax_elevation.errors import InputError

NAMES, HEIGHT_M = ["A", "B", "C"], [200.0, 900.0, 2700.0]
VALUES = np.array([[1.0, 2, np.nan], [3, np.nan, 4], [5, 6, 7], [8, 9, 10]])
TIMES = np.arange("2004-01-01", "2004-01-05", dtype="datetime64[D]").astype("datetime64[ns]")


def dataset(**changes):
    given = {"names": NAMES, "height": HEIGHT_M, "lat": [46.0, 46.1, 46.5], "lon": [11.0, 11.1, 10.0]}
    given |= {"values": VALUES, "unit": "m", "kind": "timeSeries", "times": TIMES} | changes
    made = xr.Dataset(
        {"t2m": (("time", "station"), given["values"], {"units": "degC"})},
        {
            "time": given["times"],
            "station": ("station", np.array(given["names"]), {"cf_role": "timeseries_id"}),
            "lat": ("station", np.array(given["lat"])),
            "lon": ("station", np.array(given["lon"])),
            "elevation": ("station", np.array(given["height"], dtype=float), {"units": given["unit"]}),
        },
        {"featureType": given["kind"]},
    )
    if given["unit"] is None:
        del made["elevation"].attrs["units"]
    if given["kind"] is None:
        del made.attrs["featureType"]
    return made


def written(folder: Path, made: xr.Dataset) -> Path:
    made.to_netcdf(folder / "stations.nc")
    return folder / "stations.nc"


def as_csv(folder: Path, made: xr.Dataset, elevation="elevation (m)", factor=1.0) -> Path:
    path = folder / "stations.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["time", "station", "lat", "lon", elevation, "t2m [degC]"])
        for t, time in enumerate(made.time.values):
            for s, name in enumerate(made.station.values):
                value = made.t2m.values[t, s]
                place = (made.lat.values[s], made.lon.values[s], made.elevation.values[s] * factor)
                writer.writerow([str(time)[:10], name, *place, "" if np.isnan(value) else value])
    return path


def test_netcdf_and_csv_hold_the_same(tmp_path):
    for path in (written(tmp_path, dataset()), as_csv(tmp_path, dataset())):
        read = read_stations(path)
        assert (read.variable, read.unit, read.names) == ("t2m", "degC", ("A", "B", "C"))
        assert read.elevation_m.tolist() == HEIGHT_M
        assert np.array_equal(read.values, VALUES, equal_nan=True)
        assert np.array_equal(read.times, TIMES.astype("datetime64[s]"))


def test_feet_are_converted_where_the_unit_is_known(tmp_path):
    feet = [z / 0.3048 for z in HEIGHT_M]
    for unit in ("ft", "feet"):
        assert np.allclose(read_stations(written(tmp_path, dataset(height=feet, unit=unit))).elevation_m, HEIGHT_M)
    path = as_csv(tmp_path, dataset(), elevation="elevation (ft)", factor=1 / 0.3048)
    assert np.allclose(read_stations(path).elevation_m, HEIGHT_M)
    path = as_csv(tmp_path, dataset(), elevation="elevation", factor=1 / 0.3048)
    assert np.allclose(read_stations(path, units={"elevation": "ft"}).elevation_m, HEIGHT_M)


def test_feet_without_a_unit_are_refused_by_value(tmp_path):
    high = dataset(height=[600.0, 2900, 9100], unit=None)  # 2774 m
    with pytest.raises(
        InputError, match="of 'C' would be 9100 m, where no ground is .it names no unit.* are they feet"
    ):
        read_stations(written(tmp_path, high))


def test_stations_that_are_left_out(tmp_path):
    path = written(tmp_path, dataset(height=[200.0, np.nan, 2700]))
    with pytest.raises(InputError, match="no elevation of 'B'.* leave_out"):
        read_stations(path)
    assert read_stations(path, leave_out=["B"]).names == ("A", "C")
    with pytest.raises(InputError, match="leave_out names 'X'"):
        read_stations(path, leave_out=["X"])


ALONE = np.array([[1.0, np.nan, np.nan], [np.nan, 2, np.nan], [np.nan, np.nan, 3], [4, np.nan, np.nan]])
AGAIN = TIMES[[0, 1, 1, 2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["A", "B", "A"]}, "the station 'A' more than once"),
        (
            {"lat": [46.0, 46.0, 46.5], "lon": [11.0, 11, 10], "height": [200.0, 200, 9]},
            "'A' and 'B' are at the same place",
        ),
        ({"lat": [46.0, 146.1, 46.5]}, "lat of 'B' is not within"),
        ({"unit": "fathom"}, "its unit 'fathom' is not one of them"),
        ({"height": [200.0, 900, 27000]}, "'C' would be 27000 m, where no ground is"),
        ({"kind": None}, "has no featureType: a station file has featureType 'timeSeries'"),
        ({"kind": "trajectory"}, "featureType 'trajectory'"),
        ({"values": ALONE}, "times do not overlap"),
        ({"times": AGAIN}, "times ascend and come once each"),
        ({"times": np.where(TIMES[1] == TIMES, np.datetime64("NaT"), TIMES)}, "1 of 4 times are missing"),
        ({"values": np.where(VALUES == 3, np.inf, VALUES)}, "t2m of 'A' is infinite"),
        ({"values": VALUES.astype(str)}, "t2m holds .* and not numbers"),
        ({"names": ["A", "", "C"]}, "one of its 3 stations has no name"),
        (
            {"lat": [46.0, 46, 46.5], "lon": [-1.0, 359, 10], "height": [200.0, 200, 9]},
            "'A' and 'B' are at the same place",
        ),
        (
            {"lat": [90.0, 90, 46.5], "lon": [11.0, 12, 10], "height": [200.0, 200, 9]},
            "'A' and 'B' are at the same place",
        ),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_stations(written(tmp_path, dataset(**changes)))


def test_the_height_of_an_instrument_is_not_that_of_the_ground(tmp_path):
    """CF's scalar `height` of 2 m, one a station, and a variable that is called like a height."""
    for dims, above in ((), 2.0), (("station",), np.full(3, 2.0)):
        made = dataset().assign_coords(height=(dims, above, {"units": "m", "standard_name": "height"}))
        first = made[["height", *(name for name in made.variables if name != "height")]]
        assert read_stations(written(tmp_path, first)).elevation_m.tolist() == HEIGHT_M
    made = dataset().rename(t2m="z")
    assert read_stations(written(tmp_path, made[["z"]])).elevation_m.tolist() == HEIGHT_M
    made = dataset().drop_vars("elevation").assign_coords(height=((), 2.0))
    with pytest.raises(InputError, match=r"has no elevation over .station., and .* height .one number."):
        read_stations(written(tmp_path, made))
    over_time = dataset().assign_coords(elevation=(("time", "station"), np.tile(HEIGHT_M, (4, 1))))
    with pytest.raises(InputError, match=r"has no elevation over .station., and .* elevation .time, station."):
        read_stations(written(tmp_path, over_time))


def test_numbers_that_stand_for_gaps_are_gaps(tmp_path):
    marked = np.where(np.isnan(VALUES), -9999, VALUES)
    for path in (written(tmp_path, dataset(values=marked)), as_csv(tmp_path, dataset(values=marked))):
        assert np.array_equal(read_stations(path).values, VALUES, equal_nan=True)


def test_stations_one_after_another_are_named(tmp_path):
    """CF's ragged arrays: contiguous, and by index."""
    for name, mark, dimension in ("row_size", "sample_dimension", "station"), ("index", "instance_dimension", "obs"):
        made = dataset().drop_vars(["t2m", "time"])
        count = np.array([3, 2, 4]) if dimension == "station" else np.repeat([0, 1, 2], [3, 2, 4])
        made[name] = (dimension, count, {mark: "obs"})
        made["t2m"] = ("obs", np.arange(9.0))
        with pytest.raises(InputError, match=f"a ragged array, by '{name}'.: lay its variables out over time and"):
            read_stations(written(tmp_path, made))


def test_one_station_is_too_few(tmp_path):
    with pytest.raises(InputError, match="has 1 station: a value is inferred from others"):
        read_stations(written(tmp_path, dataset().isel(station=[0])))


def test_a_grid_is_no_station_file(tmp_path):
    made = dataset().rename(station="x")
    with pytest.raises(InputError, match="has no 'tmin'|several|it has no"):
        read_stations(written(tmp_path, made), "tmin")
    with pytest.raises(InputError, match="does not exist"):
        read_stations(tmp_path / "none.nc")
    (tmp_path / "no.nc").write_text("text")
    with pytest.raises(InputError, match="is neither netCDF"):
        read_stations(tmp_path / "no.nc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,station,lat,lon,t2m\n", "has no column 'elevation'"),
        ("time,station,lat,lon,elevation,t2m\nyesterday,A,46,11,200,1\n", "row 2: time is an ISO date"),
        ("time,station,lat,lon,elevation,t2m\n2004-01-01,A,46,11,200,warm\n", "row 2: t2m is a number"),
        ("time,station,lat,lon,elevation,t2m\n2004-01-01,A,46,11,200\n", "row 2: 5 fields, and the header has 6"),
        ("time,station,lat,lon,elevation,t2m\n2004-01-01,A,46,11,2,1\n2004-01-01,A,46,11,2,1\n", "row 3: .* twice"),
        ("time,station,lat,lon,elevation,t2m\n2004-01-01,A,46,11,2,1\n2004-01-02,A,46,11,3,1\n", "elevation 3, and 2"),
        ("", "has no column 'time'"),
        ("time,station,lat,lon,elevation,t2m\n\n  \n2004-01-01,A,46,11,2,warm\n", "row 4: t2m is a number"),
        ("time,station,lat,lon,elevation,t2m\n20040101,A,46,11,2,1\n", "row 2: time is an ISO date of UTC"),
        ("time,station,lat,lon,elevation,t2m\ntoday,A,46,11,2,1\n", "row 2: time is an ISO date of UTC"),
        (
            "time,station,lat,lon,elevation,t2m\n2004-01-01T06:00+02:00,A,46,11,2,1\n",
            "row 2: time is an ISO date of UTC",
        ),
        ("time,station,lat,lon,elevation,t2m\n2004-02-30,A,46,11,2,1\n", "row 2: time is an ISO date of UTC"),
        ("time,station,lat,lon,elevation,t2m\n2004-01-01,A,46,11,2,inf\n", "row 2: t2m is a number"),
        ("time,station,lat,lon,elevation,t2m\n2004-01-01,A,46,11,2,1_0\n", "row 2: t2m is a number"),
        ("time;station;lat;lon;elevation;t2m\n2004-01-01;A;46,5;11;2;1\n", "row 2: lat is a number with a decimal po"),
        ("time,station,lat,lon,elevation,t2m\n2004-01-01,,46,11,2,1\n", "row 2: no station is named"),
    ],
)
def test_a_damaged_csv_is_told_by_its_row(tmp_path, text, message):
    path = tmp_path / "stations.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_stations(path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (",", ";"),
        (",", "\t"),
        ("\n", "\r\n"),
        ("time,", "\ufefftime,"),
        ("A", '"A"'),
        ("2004-01-01,", "2004-01-01T00:00:00.000Z,"),
    ],
)
def test_a_csv_as_other_programs_write_it(tmp_path, before, after):
    path = as_csv(tmp_path, dataset())
    path.write_bytes(path.read_text().replace(before, after).encode())
    read = read_stations(path)
    assert read.names == ("A", "B", "C")
    assert read.times[0] == TIMES[0]
    assert np.array_equal(read.values, VALUES, equal_nan=True)


def test_a_column_without_a_name_is_no_variable(tmp_path):
    """pandas writes its index so."""
    path = as_csv(tmp_path, dataset())
    path.write_text("".join(f"{i or ''},{line}" for i, line in enumerate(path.read_text().splitlines(keepends=True))))
    assert read_stations(path).variable == "t2m"
    path.write_bytes("time,station\n2004,Z\u00fcrich\n".encode("latin1"))
    with pytest.raises(InputError, match="is no text in UTF-8 .* save it as that"):
        read_stations(path)


@pytest.mark.parametrize("name", ["trentino_tmin_daily", "trentino_t_hourly", "germany_pm10_daily"])
def test_real_station_files_are_read(data, name):
    read = read_stations(data / "stations" / f"{name}.nc")
    assert len(read) in (52, 34, 69)
    assert read.elevation_m.min() < 100
    assert read.elevation_m.max() > 1000
    assert 0.8 < np.isfinite(read.values).mean() < 1
