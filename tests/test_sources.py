"""Files as people have them: what lands in the shards is what the source has."""

from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from anybodys_files import GRID, HEIGHT, LAT, LON, STEPS, T2M, TIMES, U10, V10, WIDTH, alps, ground, joined, values
from prepare_data import write

from climax_elevation.cli import main
from climax_elevation.data.prepare import prepare
from climax_elevation.errors import InputError


def same_as(out: Path, source: xr.Dataset) -> None:
    written = joined(out)
    np.testing.assert_array_equal(written[T2M], source["t2m"])
    np.testing.assert_allclose(written["orography"], np.broadcast_to(ground(), (STEPS, HEIGHT, WIDTH)), rtol=1e-6)


def test_two_versions_are_joined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = alps()
    final, preliminary = source["t2m"].where(source.time < TIMES[30]), source["t2m"].where(source.time >= TIMES[28]) + 1
    both = xr.concat([final, preliminary], dim=xr.DataArray([1, 5], dims="expver", name="expver"))
    versions = source.assign(t2m=both.transpose("time", "expver", *GRID).astype("f4").assign_attrs(units="K"))
    path = write(versions, tmp_path / "s.nc")
    written = joined(prepare(path, tmp_path / "out").out)[T2M]
    np.testing.assert_array_equal(written[:30], source["t2m"][:30])  # ERA5's where both are
    np.testing.assert_array_equal(written[30:], (source["t2m"] + 1)[30:].astype("f4"))
    assert "expver 1 (ERA5) and 5 (ERA5T) joined" in caplog.text
    with pytest.raises(InputError, match="missing values"):
        prepare(path, tmp_path / "one", select={"expver": "5"})


def test_new_layout_of_the_climate_data_store_in_an_archive(tmp_path: Path) -> None:
    source = alps()
    new = source.rename(time="valid_time", lat="latitude", lon="longitude").drop_vars("orography")
    new = new.assign_coords(number=0, expver=("valid_time", ["0001"] * 30 + ["0005"] * 10))
    t = values(250, 5, STEPS, 2, HEIGHT, WIDTH)
    levels = new.drop_vars("t2m").assign(
        t=(("valid_time", "pressure_level", "latitude", "longitude"), t, {"units": "K"})
    )
    write(new, tmp_path / "instant.nc")
    write(
        levels.assign_coords(pressure_level=("pressure_level", [850.0, 500.0], {"units": "hPa"})),
        tmp_path / "levels.nc",
    )
    archive = tmp_path / "download.nc"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("instant.nc", "levels.nc"):
            file.write(tmp_path / name, name)
    height = source[["orography"]].rename(lat="latitude", lon="longitude", orography="z") * 9.80665
    height["z"].attrs = {"units": "m**2 s**-2", "long_name": "Geopotential"}
    write(height.expand_dims(valid_time=TIMES[:1]).assign_coords(number=0), tmp_path / "z.nc")
    done = prepare(archive, tmp_path / "out", constants=tmp_path / "z.nc")
    same_as(done.out, source)
    np.testing.assert_array_equal(joined(done.out)["temperature_500"], t[:, 1])
    assert not prepare(archive, tmp_path / "out", constants=tmp_path / "z.nc").changed
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(InputError, match="is a zip archive that cannot be unpacked"):
        prepare(archive, tmp_path / "damaged", constants=tmp_path / "z.nc")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", ["s.zarr", "era5", "s.nc"])
def test_zarr_whatever_its_folder_is_called(tmp_path: Path, version: int, name: str) -> None:
    pytest.importorskip("zarr")
    source = alps()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source.to_zarr(tmp_path / "in" / name, zarr_format=version, consolidated=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_as(prepare(tmp_path / "in" / name, tmp_path / "out").out, source)
    same_as(prepare(tmp_path / "in", tmp_path / "folder").out, source)


def wrf() -> tuple[xr.Dataset, np.ndarray]:
    """A turned Lambert grid as WRF writes it, and the angle of its winds."""
    i, j = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    lat, lon = 45 + 0.25 * i + 0.05 * j, 8 + 0.35 * j - 0.07 * i
    angle = np.full((HEIGHT, WIDTH), 0.2) + 0.01 * j
    dims = ("Time", "south_north", "west_east")

    def always(field: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
        return dims, np.repeat(field[None].astype("f4"), STEPS, axis=0)

    times = np.array([str(time)[:19].replace("T", "_").encode() for time in TIMES], dtype="S19")
    minutes = ((TIMES - TIMES[0]) / np.timedelta64(1, "m")).astype("f4")
    return xr.Dataset(
        {
            "Times": (("Time",), times),
            "T2": (dims, values(), {"units": "K"}),
            "U10": (dims, values(5, 3, seed=1), {"units": "m s-1"}),
            "V10": (dims, values(0, 3, seed=2), {"units": "m s-1"}),
            "HGT": (*always(ground()), {"units": "m"}),
            "COSALPHA": always(np.cos(angle)),
            "SINALPHA": always(np.sin(angle)),
        },
        coords={
            "XLAT": (*always(lat), {"units": "degree_north"}),
            "XLONG": (*always(lon), {"units": "degree_east"}),
            "XTIME": ("Time", minutes, {"units": f"minutes since {str(TIMES[0])[:10]} 00:00:00"}),
        },
        attrs={"TITLE": " OUTPUT FROM WRF V4.2 MODEL"},
    ), angle


@pytest.mark.parametrize("stage", ["as written", "XTIME alone", "a file a week", "time renamed"])
def test_wrf(tmp_path: Path, stage: str) -> None:
    source, angle = wrf()
    given: Path = tmp_path / "in"
    given.mkdir()
    kept = source
    if stage == "XTIME alone":
        kept = source.drop_vars("Times")
    elif stage == "time renamed":
        kept = source.drop_vars(["Times", "XTIME"]).rename(Time="time").assign_coords(time=TIMES)
        kept = kept.assign_coords({name: kept[name][0].drop_vars("time") for name in ("XLAT", "XLONG")})
    for day in range(0, STEPS, 28 if stage == "a file a week" else STEPS):
        part = kept.isel({kept["T2"].dims[0]: slice(day, day + (28 if stage == "a file a week" else STEPS))})
        write(part, given / f"wrfout_d01_{str(TIMES[day])[:10]}_00:00:00")
    done = prepare(given, tmp_path / "out")
    written = joined(done.out)
    assert done.hours_per_step == 6
    np.testing.assert_array_equal(written[T2M], source["T2"])
    u, v = (source[name].to_numpy().astype(np.float64) for name in ("U10", "V10"))
    np.testing.assert_allclose(written[U10], u * np.cos(angle) - v * np.sin(angle), atol=1e-5)
    np.testing.assert_allclose(written[V10], u * np.sin(angle) + v * np.cos(angle), atol=1e-5)
    np.testing.assert_array_equal(written["orography"][0], ground())
    np.testing.assert_array_equal(np.load(done.out / "lat2d.npy"), source["XLAT"][0].astype(np.float64))


def test_a_nest_that_moves(tmp_path: Path) -> None:
    source, _ = wrf()
    source["XLAT"][20:] += 0.25
    with pytest.raises(InputError, match="XLAT changes in time, so the nest moves"):
        prepare(write(source, tmp_path / "wrfout"), tmp_path / "out")


def test_names_of_cmip(tmp_path: Path) -> None:
    height = values(5500, 50, STEPS, 2, HEIGHT, WIDTH)
    source = xr.Dataset(
        {
            "tas": (("time", *GRID), values(), {"units": "K"}),
            "uas": (("time", *GRID), values(3, 3, seed=1), {"units": "m s-1"}),
            "vas": (("time", *GRID), values(0, 3, seed=2), {"units": "m s-1"}),
            "psl": (("time", *GRID), values(101325, 500, seed=3), {"units": "Pa"}),
            "ta": (("time", "plev", *GRID), values(250, 5, STEPS, 2, HEIGHT, WIDTH), {"units": "K"}),
            "zg": (("time", "plev", *GRID), height, {"units": "m"}),
            "orog": (GRID, ground(), {"units": "m"}),
            "sftlf": (GRID, np.full((HEIGHT, WIDTH), 50.0, "f4"), {"units": "%"}),
        },
        coords={
            "time": xr.date_range("2001-01-01", periods=STEPS, freq="D", calendar="noleap", use_cftime=True),
            "plev": ("plev", [50000.0, 85000.0], {"units": "Pa"}),
            "height": 2.0,
            "lat": LAT,
            "lon": LON,
        },
    )
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out")
    written = joined(done.out)
    for name, called in ((T2M, "tas"), (U10, "uas"), (V10, "vas"), ("mean_sea_level_pressure", "psl")):
        np.testing.assert_array_equal(written[name], source[called])
    np.testing.assert_array_equal(written["temperature_850"], source["ta"][:, 1])
    np.testing.assert_allclose(written["geopotential_500"], height[:, 0].astype(np.float64) * 9.80665, rtol=1e-6)
    np.testing.assert_array_equal(written["land_sea_mask"], np.float32(0.5))
    np.testing.assert_array_equal(written["orography"][0], ground())


@pytest.mark.parametrize("name", ["HSURF", "topo", "oro", "elev", "HGT_M", "Orog"])
def test_names_of_orography(tmp_path: Path, name: str) -> None:
    same_as(prepare(write(alps().rename(orography=name), tmp_path / "s.nc"), tmp_path / "out").out, alps())


def test_orography_of_any_name(tmp_path: Path) -> None:
    source = alps().rename(orography="h")
    path = write(source, tmp_path / "s.nc")
    with pytest.raises(InputError, match=r"if it is one of h \[m\], say so with the option orography.*Geopotential"):
        prepare(path, tmp_path / "out")
    with pytest.raises(InputError, match="orography names 'hh', and the source has t2m, h"):
        prepare(path, tmp_path / "out", orography="hh")
    same_as(prepare(path, tmp_path / "out", orography="h").out, alps())
    own = write(source[["h"]], tmp_path / "h.nc")
    path = write(source[["t2m"]], tmp_path / "t2m.nc")
    same_as(prepare(path, tmp_path / "own", orography="h", constants=own, variables=["t2m"]).out, alps())
    source["h"].attrs["standard_name"] = "surface_altitude"
    same_as(prepare(write(source, tmp_path / "cf.nc"), tmp_path / "cf").out, alps())


def test_the_sea_at_0_m(tmp_path: Path) -> None:
    for sea in (np.nan, -9999.0):
        source = alps()
        source["orography"][:2, :3] = sea
        path = write(source, tmp_path / f"{sea}.nc")
        with pytest.raises(InputError, match='6 missing values.*sea_level_where_missing.*"Geopotential"'):
            prepare(path, tmp_path / "out")
        done = prepare(path, tmp_path / f"out{sea}", sea_level_where_missing=True)
        expected = ground()
        expected[:2, :3] = 0
        np.testing.assert_array_equal(joined(done.out)["orography"][5], expected)


def test_grounds_that_differ(tmp_path: Path) -> None:
    source, folder = alps(), tmp_path / "in"
    folder.mkdir()
    write(source.isel(time=slice(20)), folder / "a.nc")
    later = source.isel(time=slice(20, None)).copy(deep=True)
    later["orography"][2, 2] += 20
    write(later, folder / "b.nc")
    with pytest.raises(InputError, match=r"orography is not the same in .*a.nc and in .*b.nc .*differ by up to 20"):
        prepare(folder, tmp_path / "out")
    own = write(source[["orography"]], tmp_path / "ground.nc")
    same_as(prepare(folder, tmp_path / "out", constants=own).out, source)
    # along time: of one file that is in the middle of neither half
    moved = source.assign(orography=source["orography"].expand_dims(time=TIMES).copy())
    for index, part in enumerate((slice(0, 10), slice(10, 14), slice(14, 40))):
        piece = moved.isel(time=part).copy(deep=True)
        piece["orography"] += 30 * (index == 1)
        (tmp_path / "along").mkdir(exist_ok=True)
        write(piece, tmp_path / "along" / f"{index}.nc")
    with pytest.raises(InputError, match="should be a static field, but changes in time"):
        prepare(tmp_path / "along", tmp_path / "no")


@pytest.mark.parametrize("has", [0, 1])
def test_ground_in_one_of_several_files_in_time(tmp_path: Path, has: int) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index, part in enumerate((slice(20), slice(20, None))):
        write(alps().isel(time=part).drop_vars([] if index == has else ["orography"]), folder / f"{index}.nc")
    same_as(prepare(folder, tmp_path / "out").out, alps())


def test_ground_of_another_name_under_a_date_of_its_own(tmp_path: Path) -> None:
    own = alps().rename(orography="h")[["h"]].expand_dims(time=TIMES[:1])
    files = [write(alps()[["t2m"]], tmp_path / "t2m.nc"), write(own, tmp_path / "h.nc")]
    same_as(prepare(files, tmp_path / "out", orography="h").out, alps())


def test_a_file_a_time(tmp_path: Path) -> None:
    """Each says its time without a dimension of it."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(STEPS):
        write(alps().isel(time=index), folder / f"{index:02d}.nc")
    same_as(prepare(folder, tmp_path / "out").out, alps())


def test_two_grounds_in_one_file(tmp_path: Path) -> None:
    source = alps()
    source["HSURF"] = source["orography"] + 50
    source["HSURF"].attrs["units"] = "m"
    path = write(source, tmp_path / "s.nc")
    with pytest.raises(InputError, match="'orography' and 'HSURF' may both be the orography, and differ by up to 50 m"):
        prepare(path, tmp_path / "out")
    done = prepare(path, tmp_path / "out", orography="HSURF")
    np.testing.assert_allclose(joined(done.out)["orography"][0], ground() + 50, rtol=1e-6)


def test_what_a_low_geopotential_says_of_itself(tmp_path: Path) -> None:
    low = (ground() * 0.05 * 9.80665).astype("f4")  # at most 1470 m2 s-2, which passes for metres
    source = alps().drop_vars("orography").assign(phis=(GRID, low))
    done = prepare(write(source, tmp_path / "name.nc"), tmp_path / "name")
    np.testing.assert_allclose(joined(done.out)["orography"][0], low / 9.80665, rtol=1e-6)
    source = alps().drop_vars("orography").assign(z=(GRID, low, {"units": "m", "long_name": "Geopotential"}))
    with pytest.raises(InputError, match="says that it is geopotential, and that its unit is 'm'"):
        prepare(write(source, tmp_path / "lies.nc"), tmp_path / "out")
    feet = alps(orography=(GRID, ground() * 6))
    with pytest.raises(InputError, match="too much for metres, and feet or m2 s-2 are possible"):
        prepare(write(feet, tmp_path / "feet.nc"), tmp_path / "out")
    nameless = alps().drop_vars("orography").assign(z=(GRID, low))
    with pytest.raises(InputError, match=r"orography \('z' in the source\) .*, e.g. z=m"):
        prepare(write(nameless, tmp_path / "z.nc"), tmp_path / "out")


def test_members(tmp_path: Path) -> None:
    source = alps()
    members = xr.concat([source["t2m"], source["t2m"] + 1, source["t2m"] + 2], dim="number").transpose(
        "time", "number", ...
    )
    path = write(source.assign(t2m=members.assign_attrs(units="K")).assign_coords(number=[0, 1, 2]), tmp_path / "s.nc")
    with pytest.raises(InputError, match=r"3 values of 'number'.*select number=0 \(there are 0, 1, 2\)"):
        prepare(path, tmp_path / "out")
    done = prepare(path, tmp_path / "out", select={"number": "2"})
    np.testing.assert_array_equal(joined(done.out)[T2M], source["t2m"] + 2)


OF_GRIB = 20  # steps, as writing messages takes its time
MESSAGE = {"Ni": WIDTH, "Nj": HEIGHT, "iDirectionIncrementInDegrees": 0.5, "jDirectionIncrementInDegrees": 0.5}
CORNERS = {
    **{"latitudeOfFirstGridPointInDegrees": LAT[-1], "latitudeOfLastGridPointInDegrees": LAT[0]},
    **{"longitudeOfFirstGridPointInDegrees": LON[0], "longitudeOfLastGridPointInDegrees": LON[-1]},
}


def write_grib(path: Path, steps: range, fields: list[tuple[str, str, int, np.ndarray]], **keys: int) -> Path:
    """Messages of GRIB 1: short name, type of level, level, and values by step, rows from south to north."""
    eccodes = pytest.importorskip("eccodes")
    with open(path, "wb") as file:
        for step in steps:
            for short, kind, level, field in fields:
                message = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib1")
                day, hour = str(TIMES[step])[:10].replace("-", ""), int(str(TIMES[step])[11:13])
                own = {"dataDate": int(day), "dataTime": 100 * hour, "typeOfLevel": kind, "shortName": short, **keys}
                for key, value in {"centre": 98, **MESSAGE, **CORNERS, **own, "bitsPerValue": 24}.items():
                    eccodes.codes_set(message, key, value)
                if kind != "surface":
                    eccodes.codes_set(message, "level", level)
                eccodes.codes_set_values(message, field[step][::-1].astype(np.float64).ravel())
                eccodes.codes_write(message, file)
                eccodes.codes_release(message)
    return path


def grib_fields() -> list[tuple[str, str, int, np.ndarray]]:
    height = np.repeat(ground()[None] * 9.80665, STEPS, axis=0)
    return [
        ("2t", "surface", 0, values()),
        ("z", "surface", 0, height),
        ("t", "isobaricInhPa", 500, values(250, 5, seed=1)),
        ("t", "isobaricInhPa", 850, values(270, 5, seed=2)),
        ("u", "isobaricInhPa", 850, values(5, 5, seed=3)),  # not at 500
        ("t", "hybrid", 137, values(280, 5, seed=4)),
        ("tcc", "surface", 0, values(0.5, 0.01, seed=5)),
    ]


@pytest.mark.parametrize("given", ["folder", "pattern", "files", "file"])
def test_grib_of_mixed_levels_in_several_files(tmp_path: Path, given: str) -> None:
    pytest.importorskip("cfgrib")
    folder, fields = tmp_path / "in", grib_fields()
    folder.mkdir()
    if given == "file":
        write_grib(folder / "a.grib", range(OF_GRIB), fields)
    else:
        write_grib(folder / "a.grib", range(8), fields)
        write_grib(folder / "b", range(8, OF_GRIB), fields)
    before = sorted(path.name for path in folder.iterdir())
    source = {"folder": folder, "pattern": f"{folder}/*", "file": folder / "a.grib"}.get(
        given, sorted(folder.iterdir())
    )
    done = prepare(source, tmp_path / "out", shard_steps=8)
    assert sorted(path.name for path in folder.iterdir()) == before  # no index beside the source
    written = joined(done.out)
    expected = {T2M: 0, "temperature_500": 2, "temperature_850": 3, "u_component_of_wind_850": 4}
    assert set(done.variables) == {*expected, "orography", "lattitude"}
    for name, index in expected.items():
        np.testing.assert_allclose(written[name], fields[index][3][:OF_GRIB], atol=1e-4)  # packed into 24 bits
    np.testing.assert_allclose(written["orography"][0], ground(), atol=1e-2)
    assert given != "files" or not prepare(source, tmp_path / "out", shard_steps=8).changed


@pytest.mark.parametrize("apart", [False, True])
def test_grib_with_ground_of_another_name(tmp_path: Path, apart: bool) -> None:
    pytest.importorskip("cfgrib")
    height = np.repeat(ground()[None], STEPS, axis=0)
    fields = [("2t", "surface", 0, values()), ("lsm", "surface", 0, height * 0), ("mn2t", "surface", 0, height)]
    path = write_grib(tmp_path / "a.grib", range(OF_GRIB), fields[:1] if apart else fields)
    own = write_grib(tmp_path / "b.grib", range(1), fields[1:]) if apart else None
    done = prepare(path, tmp_path / "out", orography="mn2t", constants=own, units={"mn2t": "m"})
    np.testing.assert_allclose(joined(done.out)["orography"][0], ground(), atol=1e-2)


def test_grib_that_is_not_wanted_need_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("cfgrib")
    path = write_grib(tmp_path / "a.grib", range(OF_GRIB), grib_fields())
    # precipitation over 6 and 12 hours from each time: another shape than the rest
    rain = [("tp", "surface", 0, np.abs(values(0, 1e-3, seed=6)))]
    for end in (6, 12):
        write_grib(tmp_path / f"{end}.grib", range(OF_GRIB), rain, startStep=0, endStep=end)
    path.write_bytes(b"".join((tmp_path / name).read_bytes() for name in ("a.grib", "6.grib", "12.grib")))
    with pytest.raises(InputError, match=r"tp: 20 forecast runs .* of 2 lead times .* option variables"):
        prepare(path, tmp_path / "out")
    done = prepare(path, tmp_path / "out", variables=["2m_temperature", "t"], levels=[850])
    assert done.variables == (T2M, "temperature_850", "orography", "lattitude")
    with pytest.raises(InputError, match="the source has no 'q'; it has .*t2m"):
        prepare(path, tmp_path / "q", variables=["q"])


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_grib_is_one_line(tmp_path: Path, damage: str) -> None:
    pytest.importorskip("cfgrib")
    path = write_grib(tmp_path / "a.grib", range(3), grib_fields())
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-50], "garbage": b"GRIB" + b"\x07" * 5000, "empty": b""}[damage])
    command = [sys.executable, "-m", "climax_elevation", "prepare", str(path), str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 2
    assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr
    assert ran.stderr.startswith("error: cannot open")
    assert [file.name for file in tmp_path.iterdir()] == ["a.grib"]


def test_options_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = alps().rename(orography="h")
    source["h"][0, 0] = np.nan
    two = [write(source.isel(time=part), tmp_path / name) for part, name in ((slice(20), "a"), (slice(20, None), "b"))]
    out = tmp_path / "out"
    options = ["--orography", "h", "--sea-level-where-missing", "--every", "2", "--select", "lat=44,44.5,45,45.5"]
    assert main(["prepare", *map(str, two), str(out), *options]) == 0
    assert "4 x 8 pixels" in capsys.readouterr().out
    np.testing.assert_array_equal(joined(out)[T2M], source["t2m"][::2, :4])
    assert joined(out)["orography"][0, 0, 0] == 0
    assert main(["prepare", str(two[0]), str(tmp_path / "no"), "--select", "step"]) == 2
    assert "--select takes NAME=VALUE, such as step=6, not 'step'" in capsys.readouterr().err


def test_units_of_what_was_renamed_and_text(tmp_path: Path) -> None:
    source = alps().drop_vars("orography").assign(z=(GRID, (ground() * 9.80665).astype("f4") / 20))
    source["flag"] = (("time", *GRID), np.full((STEPS, HEIGHT, WIDTH), b"x"))
    path = write(source, tmp_path / "s.nc")
    with pytest.raises(InputError, match="it names no unit: state the unit with the option units"):
        prepare(path, tmp_path / "out")
    done = prepare(path, tmp_path / "out", units={"z": "m2 s-2"})
    np.testing.assert_allclose(joined(done.out)["orography"][0], ground() / 20, rtol=1e-6)
    with pytest.raises(InputError, match="'flag' in the source holds .* and no numbers"):
        prepare(path, tmp_path / "text", units={"z": "m2 s-2"}, variables=["flag", "t2m"])
