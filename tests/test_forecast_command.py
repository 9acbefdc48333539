"""`climax-elevation forecast` and `load_run`: values of Lightning's test loop, in a file that says what they are."""

import zipfile
from dataclasses import replace
from itertools import pairwise

import numpy as np
import prepare_data
import pytest
import torch
import xarray as xr
from pytorch_lightning import Trainer
from test_launch import forecasting, logged
from test_prepare import write_grib

from climax_elevation import InputError, bias_off, load_run
from climax_elevation.cli import main
from climax_elevation.data.prepare import prepare
from climax_elevation.diagnostics import open_run
from climax_elevation.forecast import forecast
from climax_elevation.forecast.loaded import LoadedRun
from climax_elevation.forecast.output import described
from climax_elevation.forecast.states import _read_times, open_states
from climax_elevation.host import StandInClimaX
from climax_elevation.host.metrics import latitude_weights
from climax_elevation.host.module import GlobalForecastModule
from climax_elevation.pretrained import describe
from climax_elevation.train import train

INPUTS = ["2m_temperature", "10m_u_component_of_wind", "10m_v_component_of_wind", "land_sea_mask", "orography"]
OUTPUTS = ["2m_temperature", "10m_u_component_of_wind"]
SHORT = {"2m_temperature": "t2m", "10m_u_component_of_wind": "u10"}
LAT, LON = np.arange(24.0, 16.0, -1), np.arange(-95.0, -83.0)
REGION = slice(4, 8), slice(6, 12)
"""SouthAmerica, to 20 N and from 270 E, as upstream finds it: mirrored, 21 to 24 N."""
STEPS, FIRST_OF_TEST = 40, 32
TEST_FROM = "2000-01-09"
HOSTS = ["stand-in", "ClimaX", "regional"]


def states():
    """Six-hourly, rows from north to south, columns west of Greenwich."""
    dataset = prepare_data.era5(steps=STEPS, height=8, width=12)
    # winds and temperatures that go on, so that a model learns something of them
    time = np.arange(STEPS)[:, None, None]
    wave = np.sin(0.3 * time + np.arange(8)[:, None] - 0.5 * np.arange(12))
    for name, mean, spread in (("t2m", 285.0, 8.0), ("u10", 2.0, 4.0), ("v10", -1.0, 4.0)):
        dataset[name] = dataset[name].copy(data=(mean + spread * wave).astype(np.float32))
    return dataset.assign_coords(latitude=LAT, longitude=LON)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The source, and the shards made from it."""
    out = tmp_path_factory.mktemp("forecast")
    prepare_data.write(states(), out / "states.nc")
    prepare(out / "states.nc", out / "shards", val_from="2000-01-07", test_from=TEST_FROM, predict_range=2)
    return out


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """Weights to start from with which attention matters: fresh ones are so small that no bias would show."""
    torch.manual_seed(0)
    net = StandInClimaX([*INPUTS, "lattitude"], img_size=[8, 12], patch_size=2, embed_dim=16, depth=2, num_heads=2)
    weights = {
        name: 10 * value if ".attn." in name or "head" in name else value for name, value in net.named_parameters()
    }
    path = tmp_path_factory.mktemp("lively") / "weights.ckpt"
    checkpoint = {"state_dict": {f"net.{n}": v.detach() for n, v in weights.items()}}
    describe(checkpoint, net)
    torch.save(checkpoint, path)
    return path


def trained(folder, out, host, climax, *further):
    """A run of an epoch, tested by its own script."""
    replaced = {
        "--model.net.init_args.default_vars": f"[{', '.join(INPUTS)}, lattitude]",
        "--model.net.init_args.img_size": "[8, 12]",
        "--data.root_dir": folder / "shards",
        "--data.variables": f"[{', '.join(INPUTS)}]",
        "--data.out_variables": f"[{', '.join(OUTPUTS)}]",
        "--data.batch_size": 4,
        "--model.lr": 1e-3,
    }
    if host == "regional":
        replaced["--model.net"] = "climax.regional_forecast.arch.RegionalClimaX"
        further = (*further, "--data.region=SouthAmerica")
    names = [given.partition("=")[0] for given in forecasting(folder, out)]
    arguments = [
        f"{name}={replaced[name]}" if name in replaced else given
        for name, given in zip(names, forecasting(folder, out), strict=True)
    ]
    arguments += ["--model.net.init_args.use_physics_mask=true", "--data.hrs_each_step=6", *further]
    train("regional_forecast" if host == "regional" else "global_forecast", climax, arguments)
    return out


@pytest.fixture(scope="module")
def runs(folder, lively, tmp_path_factory):
    """Runs by host, trained when first asked for."""
    made = {}

    def of(host, request):
        if host != "stand-in":
            pytest.importorskip("torchvision")
        climax = None if host == "stand-in" else request.getfixturevalue("climax")
        if host not in made:
            out = tmp_path_factory.mktemp(host)
            bias = "--model.net.init_args.bias_args={alpha_init: 4.0}"
            made[host] = trained(folder, out, host, climax, bias, f"--model.pretrained_path={lively}")
        return made[host]

    return of


@pytest.fixture
def run(runs, request, no_climax):
    return runs("stand-in", request)


def written(path):
    with xr.open_dataset(path, decode_timedelta=False) as dataset:
        return dataset.load()


def truth(name, valid):
    """What the source has at the times that are forecast, on the run's grid: latitude ascends."""
    return states()[SHORT[name]].sel(time=valid.ravel()).to_numpy()[:, ::-1].reshape(*valid.shape, 8, 12)


# ---- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_the_errors_are_those_of_the_runs_own_test(folder, runs, request, tmp_path, host):
    if host == "stand-in":
        request.getfixturevalue("no_climax")
    run = runs(host, request)
    out = tmp_path / "out.nc"
    given = [] if host == "stand-in" else ["--climax", str(request.getfixturevalue("climax"))]
    arguments = ["forecast", str(run), str(folder / "states.nc"), str(out), "--start", TEST_FROM, "2000-01-10T06"]
    assert main([*arguments, *given]) == 0
    made = written(out)
    rows, columns = REGION if host == "regional" else (slice(None), slice(None))
    assert made.sizes == {
        "time": STEPS - FIRST_OF_TEST - 2,
        "lead_time": 1,
        "latitude": len(range(8)[rows]),
        "longitude": len(range(12)[columns]),
    }
    np.testing.assert_array_equal(made.latitude, LAT[::-1][rows])
    np.testing.assert_array_equal(made.longitude, 360 + LON[columns])
    np.testing.assert_array_equal(made.lead_time, [12.0])
    np.testing.assert_array_equal(made.valid_time[:, 0], made.time + np.timedelta64(12, "h"))
    assert main([*arguments[:3], str(tmp_path / "plain.nc"), *arguments[4:], *given, "--bias-scale", "0"]) == 0
    weights = latitude_weights(made.latitude)[:, None]
    for name in OUTPUTS:
        lightning = pytest.approx(logged(run, f"test/w_rmse_{name}_12_hours")[0], rel=1e-5)
        for forecasts, same in ((made, True), (written(tmp_path / "plain.nc"), False)):
            apart = forecasts[name].to_numpy() - truth(name, made.valid_time.to_numpy())[..., rows, columns]
            errors = np.sqrt((weights * apart.astype(np.float64) ** 2).mean(axis=(1, 2, 3)))
            assert (errors.mean() == lightning) == same


def test_times_are_read_as_prepare_reads_them():
    """Hours that a float has rounded are whole, and a gap is none."""
    times = xr.DataArray(np.array(["2020-01-01T05:59:59.9999", "NaT"], "datetime64[ns]"), dims="time")
    assert _read_times(times[:1])[1] == ("2020-01-01T06:00:00",)
    with pytest.raises(InputError, match="the time coordinate has 1 missing values"):
        _read_times(times)


def test_every_pixel_is_that_of_lightnings_test_loop(folder, run, tmp_path):
    seen = []
    with open_run(run) as opened:
        inner = opened.module.net.forward

        def remember(*given, **named):
            result = inner(*given, **named)
            seen.append(result[1])
            return result

        opened.module.net.forward = remember
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, barebones=False)
        trainer.test(opened.module, datamodule=opened.datamodule, verbose=False)
        physical = opened.module.denormalize(torch.cat(seen)).numpy()
    done = forecast(run, folder / "states.nc", tmp_path / "out.nc", start=[TEST_FROM, "2000-01-10T06"])
    made = written(done.path)
    assert len(physical) == made.sizes["time"] == len(done.starts)
    for index, name in enumerate(OUTPUTS):
        np.testing.assert_allclose(made[name][:, 0], physical[:, index], rtol=1e-5, atol=1e-5)


def test_the_file_says_what_it_is(folder, run, tmp_path):
    assert main(["forecast", str(run), str(folder / "states.nc"), str(tmp_path / "out.nc"), "--bias-scale", "0.5"]) == 0
    made = written(tmp_path / "out.nc")
    assert made.attrs["Conventions"] == "CF-1.10"
    assert made.attrs["terrain_bias"].startswith("physics in blocks 0; block 0 elevation_alpha ")
    assert made.attrs["terrain_bias_scale"] == 0.5
    assert "stand-in host, which is not ClimaX" in made.attrs["source"]
    assert made["2m_temperature"].attrs["units"] == "K"
    assert made["2m_temperature"].attrs["standard_name"] == "air_temperature"
    assert made["10m_u_component_of_wind"].attrs["units"] == "m s-1"
    assert made.latitude.attrs["units"] == "degrees_north"
    assert made.lead_time.attrs == {"standard_name": "forecast_period", "units": "hours"}
    assert made.time.attrs["standard_name"] == "forecast_reference_time"
    assert str(made.time.values[0])[:13] == "2000-01-10T18"  # the last
    assert "valid_time" in made["2m_temperature"].coords


def test_what_the_bias_does(folder, run, tmp_path):
    def values(scale):
        done = forecast(run, folder / "states.nc", tmp_path / f"{scale}.nc", bias_scale=scale)
        return written(done.path)["2m_temperature"].to_numpy()[0, 0]

    loaded = load_run(run)
    fields = {name: values_of(name) for name in INPUTS}
    with bias_off(loaded.model):
        plain = loaded.forecast(fields)["2m_temperature"][-1]
    np.testing.assert_allclose(values(0.0), plain, rtol=1e-6)
    np.testing.assert_allclose(values(1.0), loaded.forecast(fields)["2m_temperature"][-1], rtol=1e-6)
    first, half = (
        np.abs(written(tmp_path / "1.0.nc")["2m_temperature"] - plain).max(),
        np.abs(values(0.5) - plain).max(),
    )
    assert first > 0.1
    assert 0.2 * first < half < 0.9 * first
    np.testing.assert_allclose(values(1.0 + 1e-12), written(tmp_path / "1.0.nc")["2m_temperature"][0, 0], rtol=1e-6)


def values_of(name, steps=slice(None)):
    """A variable of the source on the run's grid."""
    called = {"10m_v_component_of_wind": "v10", "land_sea_mask": "lsm", "orography": "orography"} | SHORT
    values = states()[called[name]]
    return (values[steps] if "time" in values.dims else values).to_numpy()[..., ::-1, :]


# ---- load_run --------------------------------------------------------------------------------------


def test_load_run_gives_model_statistics_and_terrain(folder, run):
    loaded = load_run(run)
    assert loaded.variables == tuple(INPUTS)
    assert loaded.out_variables == tuple(OUTPUTS)
    assert loaded.lead_hours == 12
    assert not loaded.model.training
    training = states()["t2m"].to_numpy()[: FIRST_OF_TEST - 8]
    np.testing.assert_allclose(loaded.statistics["2m_temperature"], (training.mean(), training.std()), rtol=1e-5)
    patches = values_of("orography").reshape(4, 2, 6, 2).mean(axis=(1, 3))
    x = loaded.standardise(np.stack([np.broadcast_to(values_of(n, [0]), (1, 8, 12)) for n in INPUTS], 1), INPUTS)
    terrain = loaded.terrain(x, torch.full((1,), 0.12), INPUTS)
    np.testing.assert_allclose(terrain.elevation_m[0], patches.ravel(), rtol=1e-4)
    with pytest.raises(InputError, match="the run's input has orography as well"):
        loaded.forecast({name: values_of(name) for name in INPUTS[:-1]})
    with pytest.raises(InputError, match=r"orography is \[40, 8, 12\] or \[8, 12\], not \[12, 8\]"):
        loaded.forecast({name: values_of(name) for name in INPUTS} | {"orography": np.zeros((12, 8))})


def test_a_run_needs_its_statistics_and_no_shard(folder, run, tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    out = str(tmp_path / "out.nc")
    arguments = ["forecast", str(run), str(folder / "states.nc"), out, "--data", str(small)]
    assert main(arguments) == 2
    assert "lat.npy is missing: give the folder of the data that the run was trained on" in capsys.readouterr().err
    for name in ("lat.npy", "lon.npy", "normalize_mean.npz", "normalize_std.npz"):
        (small / name).write_bytes((folder / "shards" / name).read_bytes())
    assert main(arguments) == 0
    other = dict(np.load(small / "normalize_std.npz"))
    np.savez(small / "normalize_std.npz", **other | {"orography": 2 * other["orography"]})
    with pytest.raises(InputError, match="terrain.elevation_std from the checkpoint .* disagree"):
        load_run(run, data=small)


# ---- steps -----------------------------------------------------------------------------------------


def test_steps_are_fed_back(folder, run, tmp_path, caplog):
    with caplog.at_level("INFO", "climax_elevation"):
        done = forecast(run, folder / "states.nc", tmp_path / "out.nc", start=["2000-01-03"], steps=3, others="keep")
    assert "fed back: 2m_temperature, 10m_u_component_of_wind; the same at all times: land_sea_mask, orography" in (
        caplog.text
    )
    assert "not forecast, kept as at the start: 10m_v_component_of_wind" in caplog.text
    made = written(done.path)
    np.testing.assert_array_equal(made.lead_time, [12.0, 24.0, 36.0])
    assert made.attrs["not_forecast"] == "kept"
    loaded = load_run(run)
    fields = {name: values_of(name, slice(8, 12)) for name in INPUTS}
    for step in range(3):
        fields |= loaded.forecast(fields)
        for name in OUTPUTS:
            np.testing.assert_allclose(made[name][:, step], fields[name], rtol=1e-5)


def test_what_is_not_forecast_is_asked_for(folder, run, tmp_path):
    given = (run, folder / "states.nc", tmp_path / "out.nc")
    with pytest.raises(InputError, match="step 2 wants 10m_v_component_of_wind, which the run takes and does not"):
        forecast(*given, steps=2)
    with pytest.raises(InputError, match="step 2 from 2000-01-10T18:00:00 wants 10m_v_comp.* at 2000-01-11T06:00:00"):
        forecast(*given, steps=2, others="source")
    assert not (tmp_path / "out.nc").exists()
    made = written(forecast(*given, start=["2000-01-03"], steps=2, others="source").path)
    loaded = load_run(run)
    fields = {name: values_of(name, slice(8, 12)) for name in INPUTS}
    fields |= loaded.forecast(fields) | {"10m_v_component_of_wind": values_of("10m_v_component_of_wind", slice(10, 14))}
    np.testing.assert_allclose(made["2m_temperature"][:, 1], loaded.forecast(fields)["2m_temperature"], rtol=1e-5)


def test_a_region_is_fed_back_inside(folder, runs, request, climax, tmp_path):
    run = load_run(runs("regional", request), climax=climax)
    made = written(forecast(run, folder / "states.nc", tmp_path / "out.nc", steps=2, others="keep").path)
    fields = {name: np.array(values_of(name, [-1]) if name not in INPUTS[3:] else values_of(name)) for name in INPUTS}
    for name, values in run.forecast(fields).items():
        fields[name][(slice(None), *REGION)] = values
    np.testing.assert_allclose(made["2m_temperature"][:, 1], run.forecast(fields)["2m_temperature"], rtol=1e-5)


# ---- sources ---------------------------------------------------------------------------------------


def reference(folder, run, tmp_path, **options):
    path = tmp_path / "reference.nc"
    if not path.exists():
        forecast(run, folder / "states.nc", path, **options)
    return written(path)["2m_temperature"].to_numpy()


@pytest.mark.parametrize("start", ["2000-01-10T18", None])
def test_a_state_without_a_time_axis(folder, run, tmp_path, capsys, start):
    state = states().isel(time=-1, drop=start is not None)
    source = prepare_data.write(state, tmp_path / "state.nc")
    arguments = ["forecast", str(run), str(source), str(tmp_path / "out.nc")]
    if start is not None:
        assert main(arguments) == 2
        assert "states no time: say which one it is of with --start" in capsys.readouterr().err
        arguments += ["--start", start]
    assert main(arguments) == 0
    made = written(tmp_path / "out.nc")
    assert str(made.time.values[0])[:13] == "2000-01-10T18"
    np.testing.assert_allclose(made["2m_temperature"], reference(folder, run, tmp_path), rtol=1e-6)


@pytest.mark.parametrize("kind", ["folder", "files", "archive"])
def test_a_state_in_several_files(folder, run, tmp_path, kind):
    """One of which has one time, which is no dimension."""
    apart = tmp_path / "apart"
    apart.mkdir()
    state = states().isel(time=-1)
    files = [prepare_data.write(state[[name]], apart / f"{name}.nc") for name in ("t2m", "u10", "v10")]
    source = {"folder": [str(apart)], "files": list(map(str, files)), "archive": [str(tmp_path / "in.nc")]}[kind]
    with zipfile.ZipFile(tmp_path / "in.nc", "w") as archive:
        for file in files:
            archive.write(file, file.name)
    assert main(["forecast", str(run), *source, str(tmp_path / "out.nc")]) == 0
    made = written(tmp_path / "out.nc")
    assert str(made.time.values[0])[:13] == "2000-01-10T18"
    np.testing.assert_allclose(made["2m_temperature"], reference(folder, run, tmp_path), rtol=1e-6)


def test_the_thirtieth_of_february(run, tmp_path):
    times = xr.date_range("2000-02-01", periods=STEPS, freq="D", calendar="360_day", use_cftime=True)
    source = prepare_data.write(states().assign_coords(time=times), tmp_path / "days.nc")
    done = forecast(run, source, tmp_path / "out.nc", start=["2000-02-30"])
    assert done.starts == ("2000-02-30T00:00:00",)


def test_a_larger_grid_is_cut_and_another_refused(folder, run, tmp_path, caplog):
    larger = states().pad(latitude=(1, 2), longitude=(3, 1), mode="edge")
    larger = larger.assign_coords(latitude=np.arange(25.0, 14.0, -1), longitude=np.arange(262.0, 278.0))
    source = prepare_data.write(larger, tmp_path / "larger.nc")
    with caplog.at_level("INFO", "climax_elevation"):
        made = written(forecast(run, source, tmp_path / "out.nc").path)
    assert "cut from 11 x 16 to the run's 8 x 12 pixels" in caplog.text
    np.testing.assert_allclose(made["2m_temperature"], reference(folder, run, tmp_path), rtol=1e-6)
    finer = states().interp(latitude=np.arange(24.0, 16.5, -0.5), longitude=np.arange(-95.0, -83.5, 0.5))
    shifted = states().assign_coords(latitude=LAT + 0.5)
    for name, dataset in {"finer": finer, "shifted": shifted, "smaller": states().isel(latitude=slice(1, 8))}.items():
        with pytest.raises(InputError, match="is of another grid than the run: it has .*, and the run 8 x 12 pixels"):
            forecast(run, prepare_data.write(dataset, tmp_path / f"{name}.nc"), tmp_path / f"{name}-out.nc")
        assert not (tmp_path / f"{name}-out.nc").exists()


def test_ground_comes_from_the_runs_data_where_the_source_has_none(folder, run, tmp_path, caplog):
    source = prepare_data.write(states().drop_vars(["orography", "lsm"]), tmp_path / "bare.nc")
    with caplog.at_level("INFO", "climax_elevation"):
        made = written(forecast(run, source, tmp_path / "out.nc").path)
    assert "orography, land_sea_mask: not in the source, taken from the run's data" in caplog.text
    assert "orography from" not in caplog.text
    np.testing.assert_allclose(made["2m_temperature"], reference(folder, run, tmp_path), rtol=1e-6)
    without = replace(load_run(run), variables=("2m_temperature",), data=tmp_path)
    with open_states(without, str(source)) as opened:  # as with bias_args.elevation_file
        assert opened.read("2m_temperature", [0]).shape == (1, 8, 12)
    lower = states().assign(orography=states().orography - 20)
    with caplog.at_level("INFO", "climax_elevation"):
        forecast(run, source, tmp_path / "lower.nc", constants=prepare_data.write(lower, tmp_path / "ground.nc"))
    assert "orography is up to 20 m off that of the run's training" in caplog.text


def test_zarr(folder, run, tmp_path):
    pytest.importorskip("zarr")
    states().to_zarr(tmp_path / "states.zarr")
    made = written(forecast(run, tmp_path / "states.zarr", tmp_path / "out.nc").path)
    np.testing.assert_array_equal(made["2m_temperature"], reference(folder, run, tmp_path))


def test_one_member_of_several(folder, run, tmp_path, capsys):
    members = xr.concat([states() + 1, states()], dim="number").assign_coords(number=[0, 1])
    members = prepare_data.with_units(members[["t2m", "u10", "v10"]])
    source = prepare_data.write(members, tmp_path / "members.nc")
    arguments = ["forecast", str(run), str(source), str(tmp_path / "out.nc")]
    assert main(arguments) == 2
    assert "number" in capsys.readouterr().err
    assert main([*arguments, "--select", "number=1"]) == 0
    made = written(tmp_path / "out.nc")["2m_temperature"]
    np.testing.assert_allclose(made, reference(folder, run, tmp_path), rtol=1e-6)


def test_other_levels_and_variables_that_climax_does_not_know(run, tmp_path):
    source = states()
    levels = source.t2m.expand_dims(level=[300, 850, 1000], axis=1) - np.arange(3)[:, None, None]
    source = source.assign(t=levels.assign_attrs(units="K"), dew=source.t2m.assign_attrs(units="degF"))
    source.level.attrs["units"] = "hPa"
    path = prepare_data.write(source, tmp_path / "levels.nc")
    names = ("temperature_850", "temperature_300", "dew", "2m_temperature")
    wanted = replace(load_run(run), variables=names)
    with open_states(wanted, str(path)) as opened:
        for name, lower in zip(names, (1, 0, 0, 0), strict=True):
            np.testing.assert_allclose(opened.read(name, [3]), values_of("2m_temperature", [3]) - lower, rtol=1e-6)
        assert described("temperature_850", opened)["long_name"] == "temperature at 850 hPa"
        assert described("dew", opened) == {"long_name": "dew", "units": "degF"}
    with (
        pytest.raises(
            InputError, match="no level 200 hPa, only 300, 850, 1000: give a source that has the run's input"
        ),
        open_states(replace(wanted, variables=("2m_temperature", "temperature_200", "temperature_300")), str(path)),
    ):
        pass
    del source["t2m"].attrs["units"]
    path = prepare_data.write(source, tmp_path / "no_unit.nc")
    with pytest.raises(InputError, match="2m_temperature .* must come in one of"), open_states(wanted, str(path)):
        pass
    with open_states(wanted, str(path), units={"t2m": "K"}) as opened:
        np.testing.assert_allclose(opened.read("2m_temperature", [0]), values_of("2m_temperature", [0]))


def test_a_single_state_in_grib(run, tmp_path):
    pytest.importorskip("cfgrib")
    source = prepare_data.era5(steps=3).isel(time=[2])
    write_grib(source, tmp_path / "state.grib")
    names = ("2m_temperature", "orography", "temperature_850")
    lat, lon = source.latitude.to_numpy()[::-1][1:], source.longitude.to_numpy()[:6] + 360
    other = replace(load_run(run), variables=names, lat=lat, lon=lon)
    with open_states(other, str(tmp_path / "state.grib")) as opened:
        assert opened.stamps == ("2000-01-01T12:00:00",)
        expected = source.isel(latitude=slice(-2, None, -1), longitude=slice(0, 6))
        for name, called in zip(names, ("t2m", "orography", "t2m"), strict=True):
            values = np.broadcast_to(expected[called], (1, 6, 6))
            np.testing.assert_allclose(opened.read(name, [0]), values, atol=1e-2)
    assert {path.name for path in tmp_path.iterdir()} == {"state.grib"}


def test_a_finer_source_is_regridded_as_the_runs_data_were(run, tmp_path):
    pytest.importorskip("xarray_regrid")
    source = prepare_data.write(prepare_data.world(), tmp_path / "world.nc")
    data = prepare(source, tmp_path / "shards", regrid="5.625").out
    axes = {name: np.load(data / f"{name}.npy") for name in ("lat", "lon")}
    other = replace(load_run(run), variables=("2m_temperature", "orography"), data=data, **axes)
    with open_states(other, str(source)) as opened:
        expected = prepare_data.read(data, "train")["2m_temperature"][:2, 0]
        np.testing.assert_array_equal(opened.read("2m_temperature", [0, 1]), expected)


def test_a_grid_with_a_place_a_pixel(folder, run, tmp_path):
    lat2d, lon2d = np.meshgrid(LAT, LON, indexing="ij")
    lat2d, lon2d = lat2d + 0.01 * lon2d, lon2d - 0.02 * lat2d
    curved = states().rename(latitude="y", longitude="x").drop_vars(["y", "x"])
    curved = curved.assign_coords(latitude=(("y", "x"), lat2d), longitude=(("y", "x"), lon2d))
    source = prepare_data.write(curved, tmp_path / "curved.nc")
    other = replace(load_run(run), places=(lat2d[::-1], lon2d[::-1] + 360))
    made = written(forecast(other, source, tmp_path / "out.nc").path)
    assert made["2m_temperature"].dims == ("time", "lead_time", "y", "x")
    np.testing.assert_allclose(made.latitude, lat2d[::-1])
    assert "standard_name" not in made["10m_u_component_of_wind"].attrs  # it may be along the grid
    np.testing.assert_allclose(made["2m_temperature"], reference(folder, run, tmp_path), rtol=1e-6)
    around = {
        name: curved[name].pad(y=(1, 2), x=(3, 1), mode="reflect", reflect_type="odd")
        for name in ("latitude", "longitude")
    }
    larger = curved.drop_vars(list(around)).pad(y=(1, 2), x=(3, 1), mode="edge").assign_coords(around)
    made = written(forecast(other, prepare_data.write(larger, tmp_path / "larger.nc"), tmp_path / "cut.nc").path)
    np.testing.assert_allclose(made["2m_temperature"], reference(folder, run, tmp_path / "more"), rtol=1e-6)
    moved = replace(other, places=(lat2d[::-1] + 0.1, other.places[1]))
    with pytest.raises(InputError, match="is of another grid than the run"):
        forecast(moved, source, tmp_path / "none.nc")
    with pytest.raises(InputError, match="are on grids of two kinds"):
        forecast(run, source, tmp_path / "none.nc")


@pytest.mark.parametrize("calendar", ["standard", "noleap", "360_day"])
def test_months_go_by_the_calendar(run, tmp_path, calendar):
    times = xr.date_range("2000-01-16", periods=STEPS, freq="30D", calendar=calendar, use_cftime=calendar != "standard")
    if calendar != "360_day":
        first = [np.datetime64(f"200{i // 12}-{i % 12 + 1:02}-16") for i in range(STEPS)]
        times = (
            first
            if calendar == "standard"
            else [times[0].replace(year=2000 + i // 12, month=i % 12 + 1) for i in range(STEPS)]
        )
    source = prepare_data.write(states().assign_coords(time=times), tmp_path / "months.nc")
    monthly = replace(load_run(run), lead_hours=730)
    made = written(forecast(monthly, source, tmp_path / "out.nc", steps=2, others="keep", start=["2000-11"]).path)
    np.testing.assert_array_equal(made.lead_time, [730.0, 1460.0])
    assert [str(time)[:10] for time in made.valid_time.to_numpy()[0]] == ["2000-12-16", "2001-01-16"]
    assert "calendar months" in made.lead_time.attrs["comment"]
    assert written(forecast(monthly, source, tmp_path / "last.nc").path).time[0] == xr.open_dataset(source).time[-1]
    daily = replace(monthly, lead_hours=36)
    made = written(forecast(daily, source, tmp_path / "daily.nc", start=["2000-11"]).path)
    assert str(made.valid_time.to_numpy()[0, 0])[:13] in ("2000-11-17T12", "2000-11-17 12")


def test_middles_of_months(run, tmp_path):
    """As CMIP's monthly means have them: what is read next is the next month's, wherever its middle is."""
    begins = xr.date_range("2001-01-01", periods=STEPS + 1, freq="MS", calendar="noleap", use_cftime=True)
    middles = [begin + (end - begin) / 2 for begin, end in pairwise(begins)]
    source = prepare_data.write(states().assign_coords(time=middles), tmp_path / "months.nc")
    monthly = replace(load_run(run), lead_hours=730)
    options = {"steps": 3, "start": ["2001-01", "2001-02"], "others": "source"}
    made = written(forecast(monthly, source, tmp_path / "out.nc", **options).path)
    np.testing.assert_array_equal(made.valid_time[0], middles[1:4])
    last = written(forecast(monthly, source, tmp_path / "last.nc").path).valid_time.item()
    assert str(last) == "2004-05-16 12:00:00"  # beyond the source


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.drop_vars("u10"), "the source has no '10m_u_component_of_wind'"),
        (lambda d: d.assign(t2m=d.t2m.where(d.t2m.longitude > -94)), "at 2000-01-10T18:00:00 has 16 missing values"),
        (
            lambda d: d.assign(t2m=d.t2m.where(d.t2m.longitude > -94, -9999)),
            "stands for a gap, and ClimaX takes none: fill",
        ),
        (lambda d: d.assign(t2m=(d.t2m.dims, d.t2m.data - 273.15, {"units": "K"})), "outside 100 to 400 in ClimaX's"),
        (
            lambda d: d[["v10"]].rename(v10="gust"),
            "the source has no '2m_temperature', '10m_u_component_of_wind', '10m_v_component_of_wind'; it has",
        ),
        (lambda d: d[["orography"]], "the source has no '2m_temperature'"),
        (lambda d: d.isel(time=[0, 0]), "the time 2000-01-01T00:00:00 comes twice"),
        (lambda d: d.assign_coords(time=np.arange(STEPS)), "the time coordinate holds int64 and not dates"),
    ],
)
def test_a_wrong_source_is_one_sentence(run, tmp_path, capsys, change, sentence):
    source = prepare_data.write(change(states()), tmp_path / "wrong.nc")
    assert main(["forecast", str(run), str(source), str(tmp_path / "out.nc")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error
    assert "option variables" not in error  # which forecast has not
    assert {path.name for path in tmp_path.iterdir()} == {"wrong.nc"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--start", "1999"], "the source has no time 1999: its times are from 2000-01-01T00:00:00 to 2000-01-10T18"),
        (["--start", "yesterday"], "start is 'all', 'last', a year or an ISO date"),
        (["--start", "2000", "2001", "2002"], "start is a date, two of them"),
        (["--steps", "0"], "steps is 1 or more, not 0"),
        (["--bias-scale", "nan"], "bias_scale is a finite number, not nan"),
        (["--checkpoint", "none.ckpt"], "checkpoint none.ckpt does not exist"),
        (["--variable", "2m_temperature"], "--variable says what --picture draws"),
        (["--picture", "/dev/null/map"], "the folder of --picture /dev/null cannot be written to"),
        (["--picture", "map", "--variable", "t2m"], "unknown variable 't2m'; choose one of '2m_temperature'"),
        (["--units", "t2m"], "--units takes NAME="),
    ],
)
def test_wrong_options_are_one_sentence(folder, run, tmp_path, capsys, given, sentence):
    assert main(["forecast", str(run), str(folder / "states.nc"), str(tmp_path / "out.nc"), *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error
    assert not list(tmp_path.iterdir())


# ---- whole or not at all ---------------------------------------------------------------------------


def test_nothing_is_left_of_a_forecast_that_was_stopped(folder, run, tmp_path, monkeypatch, capsys):
    step, calls = LoadedRun.step, []

    def interrupted(self, x):
        calls.append(x)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(self, x)

    monkeypatch.setattr(LoadedRun, "step", interrupted)
    arguments = ["forecast", str(run), str(folder / "states.nc"), str(tmp_path / "out.nc"), "--others", "keep"]
    assert main([*arguments, "--steps", "3"]) == 130
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    request_again = [*arguments, "--steps", "3"]
    assert load_run(run) is not None
    (tmp_path / "out.nc").write_text("mine")
    assert main(request_again) == 2
    assert "exists: name another file, or remove it" in capsys.readouterr().err
    assert (tmp_path / "out.nc").read_text() == "mine"


def test_a_file_that_cannot_be_written_is_one_sentence(folder, run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .*file/out.nc"):
        forecast(run, folder / "states.nc", tmp_path / "file" / "out.nc")


def test_in_the_middle_of_a_training(folder, tmp_path, no_climax, monkeypatch):
    """From its folder as it is after an epoch and a half: a checkpoint, and the end still to come."""
    seen = []

    def on_train_batch_start(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 2:
            seen.append(forecast(tmp_path / "run", folder / "states.nc", tmp_path / "out.nc"))

    monkeypatch.setattr(GlobalForecastModule, "on_train_batch_start", on_train_batch_start)
    trained(folder, tmp_path / "run", "stand-in", None, "--trainer.max_epochs=2")
    assert len(seen) == 1
    assert "epoch=0" in seen[0].run.checkpoint.name
    assert np.isfinite(written(tmp_path / "out.nc")["2m_temperature"]).all()


def test_a_run_that_goes_on(folder, run, tmp_path, monkeypatch):
    """Half of a checkpoint, and one that was replaced by a better one since it was found."""
    (whole,) = (path for path in run.rglob("*.ckpt") if path.name != "last.ckpt")
    half = tmp_path / "half.ckpt"
    half.write_bytes(whole.read_bytes()[:-2000])
    with pytest.raises(InputError, match="half.ckpt is cut short, after"):
        load_run(run, checkpoint=half)
    monkeypatch.setattr("climax_elevation.forecast.loaded.choose_checkpoint", lambda *_: tmp_path / "gone.ckpt")
    with pytest.raises(InputError, match="gone.ckpt does not exist"):
        load_run(run)


def test_numbers_that_are_not_finite_are_no_forecast(folder, run, tmp_path):
    loaded = load_run(run)
    with torch.no_grad():
        loaded.model.head[-1].bias.fill_(float("nan"))
    with pytest.raises(InputError, match="step 1 from 2000-01-10T18:00:00 on forecasts numbers that are not finite"):
        forecast(loaded, folder / "states.nc", tmp_path / "out.nc")
    assert not list(tmp_path.iterdir())


# ---- pictures --------------------------------------------------------------------------------------


def test_the_pair_of_pictures(folder, run, tmp_path):
    pytest.importorskip("matplotlib")
    from climax_elevation.forecast.picture import picture

    given = [str(run), str(folder / "states.nc"), str(tmp_path / "out.nc"), "--picture", str(tmp_path / "map.png")]
    assert main(["forecast", *given]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out.nc", "map.png", "map.pdf"}
    plain = forecast(run, folder / "states.nc", tmp_path / "plain.nc", bias_scale=0.0)
    done = forecast(run, folder / "states.nc", tmp_path / "again.nc", show="")
    meshes = [axes.collections[0].get_array() for axes in picture(done).axes[:2]]
    values = [written(path)["2m_temperature"].to_numpy()[0, 0] for path in (done.path, plain.path)]
    np.testing.assert_allclose(meshes[0], values[0], rtol=1e-6)
    np.testing.assert_allclose(meshes[1], values[0] - values[1], atol=1e-4)
    assert np.abs(meshes[1]).max() > 0.1
    off = forecast(run, folder / "states.nc", tmp_path / "off.nc", show="10m_u_component_of_wind", bias_scale=0.0)
    assert off.shown.without is None
    assert len([axes for axes in picture(off).axes if axes.get_title()]) == 1
