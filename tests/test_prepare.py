"""`prepare` by values: every number written is compared with the number in the source."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from prepare_data import contents, era5, read, shard_files, world, write

from climax_elevation.data.format import PARTITIONS
from climax_elevation.data.prepare import prepare

WIND_U, WIND_V = "10m_u_component_of_wind", "10m_v_component_of_wind"


def joined(out: Path) -> dict[str, np.ndarray]:
    parts = [read(out, partition) for partition in PARTITIONS]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_round_trip_value_by_value(tmp_path: Path) -> None:
    source = era5()
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", patch_size=2, shard_steps=7)
    # 7 x 9 from north to south: turned round, then the last (northernmost) row and last column go.
    expected = source.isel(latitude=slice(None, None, -1)).isel(latitude=slice(6), longitude=slice(8))
    written = joined(done.out)
    assert done.variables == ("2m_temperature", WIND_U, WIND_V, "land_sea_mask", "orography", "lattitude")
    assert tuple(written) == done.variables
    for name, called in (("2m_temperature", "t2m"), (WIND_U, "u10"), (WIND_V, "v10")):
        assert written[name].dtype == np.float32
        np.testing.assert_array_equal(written[name][:, 0], expected[called].to_numpy())
    for name, called in (("orography", "orography"), ("land_sea_mask", "lsm")):
        assert written[name].shape == (40, 1, 6, 8)
        np.testing.assert_array_equal(written[name], np.broadcast_to(expected[called].to_numpy(), (40, 1, 6, 8)))
    np.testing.assert_array_equal(np.load(done.out / "lat.npy"), expected.latitude)
    # counted from 0 to 360, as in ClimaX's regions
    np.testing.assert_array_equal(np.load(done.out / "lon.npy"), expected.longitude + 360)
    np.testing.assert_array_equal(written["lattitude"][3, 0, :, 5], expected.latitude.astype(np.float32))
    assert done.shape == (6, 8)
    assert done.hours_per_step == 6
    assert done.steps == {"train": 32, "val": 4, "test": 4}


def test_shards_are_balanced_and_outlast_predict_range(tmp_path: Path) -> None:
    source = write(era5(), tmp_path / "s.nc")
    done = prepare(source, tmp_path / "out", shard_steps=10, predict_range=3)
    # 29 pairs, at most 10 - 3 a shard: 5 shards of 5 or 6; 4 steps of validation and test in one shard each.
    assert [len(np.load(path)["orography"]) for path in shard_files(done.out, "train")] == [8, 9, 9, 9, 9]
    assert done.shards == {"train": 5, "val": 1, "test": 1}
    # at most 5 - 3 a shard: 15 shards, which begin with the 3 steps that the one before ends with
    done = prepare(source, tmp_path / "short", shard_steps=5, predict_range=3)
    lengths = [len(np.load(path)["orography"]) for path in shard_files(done.out, "train")]
    assert sorted(lengths) == [4] + 14 * [5]
    assert done.steps["train"] == 32
    assert len(read(done.out, "train")["orography"]) == 32


def test_statistics_are_those_of_training_alone(tmp_path: Path) -> None:
    source = era5()
    source["t2m"][32:] += 30  # validation and test are another climate, which must not leak in
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", shard_steps=7)
    train = read(done.out, "train")
    mean, std = (dict(np.load(done.out / f"normalize_{name}.npz")) for name in ("mean", "std"))
    for name, values in train.items():
        exact = values.astype(np.float64)
        assert mean[name].shape == std[name].shape == (1,)
        # Shards are summed one by one in float64, numpy sums all at once: rounding differs.
        np.testing.assert_allclose(mean[name], exact.mean(), rtol=1e-12)
        for partition in ("val", "test"):
            climatology = np.load(done.out / partition / "climatology.npz")[name]
            assert climatology.dtype == np.float32
            # Means in float64, rounded to float32 once.
            np.testing.assert_allclose(climatology, exact.mean(axis=0), rtol=6e-8)
        if name != "land_sea_mask":
            np.testing.assert_allclose(std[name], exact.std(), rtol=1e-12)
    assert std["land_sea_mask"] == 1.0  # land everywhere: normalised, it must not be 0 / 0


def test_split_by_years_and_dates(tmp_path: Path) -> None:
    source = era5(steps=36)
    source["time"] = [np.datetime64(f"{1998 + month // 12}-{month % 12 + 1:02d}-01", "ns") for month in range(36)]
    write(source, tmp_path / "s.nc")
    done = prepare(tmp_path / "s.nc", tmp_path / "years", val_from="1999", test_from="2000")
    assert done.steps == {"train": 12, "val": 12, "test": 12}
    np.testing.assert_array_equal(
        read(done.out, "val")["2m_temperature"][0, 0],
        source["t2m"].isel(time=12, latitude=slice(None, None, -1))[:6, :8],
    )
    done = prepare(tmp_path / "s.nc", tmp_path / "dates", val_from="1999-03", test_from="2000-06-01")
    assert done.steps == {"train": 14, "val": 15, "test": 7}


@pytest.mark.parametrize(
    ("name", "unit", "change"),
    [
        ("t2m", "degC", lambda values: values - 273.15),
        ("u10", "knots", lambda values: values * 3600 / 1852),
        ("v10", "km h-1", lambda values: values * 3.6),
        ("orography", "m**2 s**-2", lambda values: values * 9.80665),
        ("lsm", "%", lambda values: values * 100),
    ],
)
def test_units_become_climax_s(tmp_path: Path, name: str, unit: str, change: object) -> None:
    source = era5()
    plain = prepare(write(source, tmp_path / "plain.nc"), tmp_path / "plain").out
    source[name] = change(source[name].astype(np.float64)).assign_attrs(units=unit)  # type: ignore[operator]
    other = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out").out
    for key, values in joined(plain).items():
        # One float32 rounding of the converted value; winds cross zero, where only absolute error counts.
        np.testing.assert_allclose(joined(other)[key], values, rtol=2e-7, atol=1e-6)


def test_surface_geopotential_gives_metres(tmp_path: Path) -> None:
    source = era5()
    metres = source["orography"]
    source["z"] = (metres.astype(np.float64) * 9.80665).assign_attrs(units="m**2 s**-2").expand_dims(time=source.time)
    done = prepare(write(source.drop_vars("orography"), tmp_path / "s.nc"), tmp_path / "out")
    expected = metres.to_numpy()[::-1][:6, :8]
    # Multiplied and divided in float64, rounded once.
    np.testing.assert_allclose(read(done.out, "train")["orography"][0, 0], expected, rtol=1e-6)


def test_pressure_levels_and_weatherbench_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    plain = era5()
    levels = [1000, 850, 500, 50]
    offsets = xr.DataArray(np.array(levels) / 100, dims="level", coords={"level": levels})
    # WeatherBench 2 stores longitude before latitude, and latitude rising.
    second = (
        xr.Dataset(
            {
                "2m_temperature": plain["t2m"],
                "temperature": (plain["t2m"] + offsets).assign_attrs(units="K").astype(np.float32),
                "geopotential_at_surface": (plain["orography"] * 9.80665).assign_attrs(units="m**2 s**-2"),
                "sea_ice_cover": plain["t2m"] * 0,
            }
        )
        .isel(latitude=slice(None, None, -1))
        .transpose("time", "level", "longitude", "latitude")
    )
    done = prepare(write(second, tmp_path / "wb2.nc"), tmp_path / "wb2")
    assert done.variables == (
        *("2m_temperature", "temperature_50", "temperature_500", "temperature_850"),
        *("orography", "lattitude"),
    )
    assert "sea_ice_cover" in caplog.text
    assert "temperature has no level 250, 600, 700, 925 hPa" in caplog.text
    source = second["temperature"].sel(level=500).transpose("time", "latitude", "longitude")[:, :6, :8]
    np.testing.assert_array_equal(joined(done.out)["temperature_500"][:, 0], source)
    # WeatherBench 1: short names, the rest the same; levels by option.
    first = second.rename(
        {
            "2m_temperature": "t2m",
            "temperature": "t",
            "geopotential_at_surface": "z",
            "latitude": "lat",
            "longitude": "lon",
        }
    )
    done = prepare(write(first, tmp_path / "wb1.nc"), tmp_path / "wb1", levels=[1000, 500])
    assert "temperature_1000" in done.variables
    np.testing.assert_array_equal(joined(done.out)["temperature_500"][:, 0], source)


def test_one_variable_a_level_and_other_names_of_coordinates(tmp_path: Path) -> None:
    source = era5()
    source["temperature_850"] = source["t2m"]
    source["r"] = source["t2m"].expand_dims(pressure_level=[85000.0], axis=1) * 0 + 0.5
    source["r"].attrs["units"] = "1"
    source["pressure_level"].attrs["units"] = "Pa"
    source = source.rename(time="valid_time").assign_coords(number=0).expand_dims("expver")
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", variables=["temperature_850", "r"])
    assert done.variables == ("temperature_850", "relative_humidity_850", "orography", "lattitude")
    assert (read(done.out, "train")["relative_humidity_850"] == 50).all()


def test_chosen_variable_that_climax_does_not_know_is_taken_as_it_is(tmp_path: Path) -> None:
    source = era5()
    source["d2m"] = (source["t2m"] - 5).assign_attrs(units="K")
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", variables=["t2m", "d2m"])
    assert done.variables == ("2m_temperature", "d2m", "orography", "lattitude")
    np.testing.assert_array_equal(joined(done.out)["d2m"][:, 0], source["d2m"].to_numpy()[:, ::-1][:, :6, :8])


def test_many_files_and_a_file_of_constants(tmp_path: Path) -> None:
    source = era5()
    whole = prepare(write(source, tmp_path / "s.nc"), tmp_path / "whole").out
    folder = tmp_path / "files"
    folder.mkdir()
    for index, part in enumerate((slice(0, 15), slice(15, 40))):
        write(source[["t2m"]].isel(time=part), folder / f"t{index}.nc")
        write(source[["u10", "v10"]].isel(time=part), folder / f"w{index}.nc")
    # Static fields are often filed under one date, and in another order of rows.
    constants = (
        source[["orography", "lsm"]].isel(latitude=slice(None, None, -1)).expand_dims(time=[source.time[0].item()])
    )
    write(constants, tmp_path / "constants.nc")
    for given in (folder, f"{folder}/*.nc"):
        out = tmp_path / f"out{len(str(given))}"
        done = prepare(given, out, constants=tmp_path / "constants.nc")
        for name, values in joined(whole).items():
            np.testing.assert_array_equal(joined(done.out)[name], values)


def test_zarr_by_path_and_by_url(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    source = era5()
    plain = prepare(write(source, tmp_path / "s.nc"), tmp_path / "plain").out
    source.chunk(time=6).to_zarr(tmp_path / "s.zarr")
    for given, out in ((tmp_path / "s.zarr", "path"), ((tmp_path / "s.zarr").as_uri(), "url")):
        done = prepare(given, tmp_path / out)
        for name, values in joined(plain).items():
            np.testing.assert_array_equal(joined(done.out)[name], values)
        assert not prepare(given, tmp_path / out).changed


def write_grib(source: xr.Dataset, path: Path) -> None:
    """2 m temperature and surface geopotential as GRIB 2 messages, one a time."""
    eccodes = pytest.importorskip("eccodes")
    geopotential = (source["orography"] * 9.80665).expand_dims(time=source.time)
    with open(path, "wb") as file:
        for short, kind, level, values in (
            ("2t", "heightAboveGround", 2, source["t2m"]),
            ("z", "surface", 0, geopotential),
            ("t", "isobaricInhPa", 850, source["t2m"]),
        ):
            for field in values:
                message = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib2")
                stamp = field.time.dt
                keys = {
                    **{"Ni": field.sizes["longitude"], "Nj": field.sizes["latitude"]},
                    "latitudeOfFirstGridPointInDegrees": float(field.latitude[0]),
                    "latitudeOfLastGridPointInDegrees": float(field.latitude[-1]),
                    "longitudeOfFirstGridPointInDegrees": float(field.longitude[0] % 360),
                    "longitudeOfLastGridPointInDegrees": float(field.longitude[-1] % 360),
                    "iDirectionIncrementInDegrees": 0.25,
                    "jDirectionIncrementInDegrees": 0.25,
                    **{"dataDate": int(stamp.strftime("%Y%m%d")), "dataTime": int(stamp.strftime("%H%M"))},
                    **{"shortName": short, "typeOfLevel": kind, "level": level, "bitsPerValue": 24},
                }
                for key, value in keys.items():
                    eccodes.codes_set(message, key, value)
                eccodes.codes_set_values(message, field.to_numpy().astype(np.float64).ravel())
                eccodes.codes_write(message, file)
                eccodes.codes_release(message)


def test_grib(tmp_path: Path) -> None:
    pytest.importorskip("cfgrib")
    source = era5(steps=20)
    write_grib(source, tmp_path / "s.grib")
    done = prepare(tmp_path / "s.grib", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"s.grib", "out"}  # no index beside the source
    assert done.variables == ("2m_temperature", "temperature_850", "orography", "lattitude")
    expected = source.isel(latitude=slice(None, None, -1))
    # GRIB packs a field into 24 bits over its range, here about 40 K and 4000 m.
    for name in ("2m_temperature", "temperature_850"):
        np.testing.assert_allclose(joined(done.out)[name][:, 0], expected["t2m"][:, :6, :8], atol=1e-4)
    np.testing.assert_allclose(joined(done.out)["orography"][0, 0], expected["orography"][:6, :8], atol=1e-2)


def test_calendar_without_leap_days(tmp_path: Path) -> None:
    source = era5(steps=80)
    source["time"] = xr.date_range("2000-02-01", periods=80, freq="D", calendar="noleap", use_cftime=True)
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", val_from="2000-03-20", test_from="2000-04-01")
    # 28 days of February, 19 of March, although 2000 is a leap year elsewhere.
    assert done.steps == {"train": 47, "val": 12, "test": 21}


def test_global_grid_starts_at_greenwich_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = world()
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out")
    lon = np.load(done.out / "lon.npy")
    np.testing.assert_array_equal(lon, np.arange(144) * 2.5)
    # 280 + 10 cos cos is largest at the equator (row 36 from the south pole) and Greenwich.
    field = read(done.out, "train")["2m_temperature"][0, 0]
    assert np.unravel_index(field.argmax(), field.shape) == (36, 0)
    assert "mirrored latitudes" in caplog.text


@pytest.mark.parametrize("grid", ["5.625", "2.8125"])
def test_regridding_gives_means_by_area(tmp_path: Path, grid: str) -> None:
    pytest.importorskip("xarray_regrid")
    source = world(height=181, width=360)
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", regrid=grid)
    step = float(grid)
    lat, lon = np.load(done.out / "lat.npy"), np.load(done.out / "lon.npy")
    np.testing.assert_allclose(lat, np.arange(-90 + step / 2, 90, step))
    np.testing.assert_allclose(lon, np.arange(0, 360, step))
    # The mean over a cell by area: in latitude the integral of cos^2 over that of cos, in longitude a sinc.
    edges = np.deg2rad(np.append(lat - step / 2, 90))
    in_lat = np.diff(edges / 2 + np.sin(2 * edges) / 4) / np.diff(np.sin(edges))
    in_lon = np.cos(np.deg2rad(lon)) * np.sinc(step / 360)
    exact = 280 + 10 * in_lat[:, None] * in_lon
    got = read(done.out, "train")["2m_temperature"][0, 0]
    # Source cells of 1 degree count as constant, and the caps at the poles, half a cell, as whole ones:
    # 0.005 K and 0.02 K were seen; the fields differ by 20 K, and a shift by one source cell makes 0.17 K.
    assert np.abs(got - exact).max() < 0.03
    np.testing.assert_allclose(read(done.out, "train")["orography"], 500, rtol=1e-6)  # weights sum to 1


def test_andes(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = data / "andes_era5_monthly.nc"
    caplog.set_level("INFO")
    done = prepare(path, tmp_path / "out", val_from="2000", test_from="2010", patch_size=8)
    assert "cropped from 89 x 81 to 88 x 80" in caplog.text
    assert done.steps == {"train": 480, "val": 120, "test": 132}
    with xr.open_dataset(path) as source:
        expected = source.isel(latitude=slice(None, 0, -1), longitude=slice(80)).load()
    for name, called in (("2m_temperature", "t2m"), (WIND_U, "u10"), (WIND_V, "v10")):
        np.testing.assert_array_equal(joined(done.out)[name][:, 0], expected[called])
    np.testing.assert_array_equal(read(done.out, "test")["orography"][-1, 0], expected["orography"])
    assert (np.diff(np.load(done.out / "lat.npy")) > 0).all()


def test_hrrr_on_its_two_dimensional_grid(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = data / "hrrr_idaho_hourly.nc"
    caplog.set_level("INFO")
    done = prepare(path, tmp_path / "out")
    assert done.shape == (78, 40)
    assert "cosine of the row mean" in caplog.text
    assert "d2m" in caplog.text
    lat, lon, lat2d, lon2d = (np.load(done.out / f"{name}.npy") for name in ("lat", "lon", "lat2d", "lon2d"))
    with xr.open_dataset(path) as source:
        source.load()
    turned = bool(source.latitude.mean("x")[0] > source.latitude.mean("x")[-1])
    expected = source.isel(y=slice(None, None, -1 if turned else 1), x=slice(40))
    np.testing.assert_array_equal(lat2d, expected.latitude)
    np.testing.assert_array_equal(lon2d, expected.longitude + 360)
    np.testing.assert_allclose(lat, lat2d.mean(axis=1))
    np.testing.assert_allclose(lon, lon2d.mean(axis=0))
    assert (np.diff(lat) > 0).all()
    assert len(np.cos(np.deg2rad(lat))) == 78  # what ClimaX's metrics do with it
    for name, called in (("2m_temperature", "t2m"), (WIND_U, "u10"), ("surface_pressure", "sp")):
        np.testing.assert_array_equal(joined(done.out)[name][:, 0], expected[called])
    np.testing.assert_array_equal(joined(done.out)["orography"][0, 0], expected["orography"])
    np.testing.assert_array_equal(joined(done.out)["lattitude"][0, 0], lat2d.astype(np.float32))


def test_upstream_s_own_reader(tmp_path: Path, climax: Path) -> None:
    # Its file alone: it needs nothing else of ClimaX, and today's versions cannot import the rest.
    path = next(climax.glob("**/climax/pretrain/dataset.py"))
    spec = importlib.util.spec_from_file_location("upstream_dataset", path)
    assert spec is not None
    assert spec.loader is not None
    upstream = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(upstream)
    source = era5()
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", predict_range=2, shard_steps=16)
    files = sorted(map(str, (done.out / "train").iterdir()))
    variables = list(done.variables)
    reader = upstream.NpyReader(files, 0, 1, variables, ["2m_temperature"])
    batches = list(upstream.Forecast(reader, max_predict_range=2, hrs_each_step=6))
    t2m = source["t2m"].to_numpy()[:, ::-1][:, :6, :8]
    for index, (inputs, outputs, lead_times, _, _) in enumerate(batches):
        start = 10 * index
        assert inputs.shape == (10, len(variables), 6, 8)
        np.testing.assert_array_equal(inputs[:, 0], t2m[start : start + 10])
        np.testing.assert_array_equal(outputs[:, 0], t2m[start + 2 : start + 12])
        np.testing.assert_allclose(lead_times, 0.12, rtol=1e-6)  # 12 hours over 100
    assert len(batches) == 3  # 30 pairs of 32 steps: none is lost between shards


def test_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write(era5(), tmp_path / "s.nc")
    first, second = (prepare(source, tmp_path / name).out for name in ("a", "b"))
    assert contents(first) == contents(second)
    assert shard_files(first, "train")
