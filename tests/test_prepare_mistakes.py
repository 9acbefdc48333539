"""`prepare` when something is wrong: one sentence, nothing half written; and going on afterwards."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from prepare_data import contents, era5, with_units, world, write

from climax_elevation.data import optional
from climax_elevation.data.prepare import RECORD, prepare
from climax_elevation.errors import InputError


def nothing_but(folder: Path, *names: str) -> bool:
    return {path.name for path in folder.iterdir()} == set(names)


def missing_value(source: xr.Dataset) -> xr.Dataset:
    source["u10"][35, 2, 3] = np.nan
    return source


def infinite_value(source: xr.Dataset) -> xr.Dataset:
    source["u10"][2, 2, 3] = np.inf
    return source


def celsius_from_the_middle(source: xr.Dataset) -> xr.Dataset:
    source["t2m"][20:] -= 273.15
    return source


def hole_in_orography(source: xr.Dataset) -> xr.Dataset:
    source["orography"][3, 3] = np.nan
    return source


def unsorted(source: xr.Dataset) -> xr.Dataset:
    return source.isel(time=[*range(20), 25, *range(20, 25), *range(26, 40)])


def duplicate(source: xr.Dataset) -> xr.Dataset:
    return source.isel(time=[*range(20), 19, *range(20, 40)])


def unit(name: str, value: str | None) -> Callable[[xr.Dataset], xr.Dataset]:
    def change(source: xr.Dataset) -> xr.Dataset:
        source[name].attrs = {} if value is None else {"units": value}
        return source

    return change


def high_orography(source: xr.Dataset) -> xr.Dataset:
    source["orography"] = (source["orography"] * 9.80665).assign_attrs(units="m")
    return source


def moving_orography(source: xr.Dataset) -> xr.Dataset:
    ramp = xr.DataArray(np.linspace(0, 1, 40), dims="time")
    source["orography"] = (source["orography"] * ramp).assign_attrs(units="m")
    return source


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (missing_value, {}, r"10m_u_component_of_wind .* 1 missing values, the first at 2000-01-09T18"),
        (infinite_value, {}, "missing values, the first at 2000-01-01T12"),
        (celsius_from_the_middle, {}, r"2m_temperature .* outside 100 to 400 .* misstated or mixed"),
        (hole_in_orography, {}, "orography .* has 1 missing values"),
        (unsorted, {}, "times are not sorted, 2000-01-06T00:00:00 comes after 2000-01-07T06:00:00"),
        (duplicate, {}, "the time 2000-01-05T18:00:00 comes twice"),
        (lambda source: source.drop_vars("orography"), {}, "no orography.*option constants"),
        (lambda source: source.drop_vars("latitude"), {}, "no coordinate for latitude"),
        (lambda source: source.isel(time=slice(1)), {}, "time"),
        (lambda source: source.isel(time=0, drop=True), {}, "no time coordinate"),
        (lambda source: source.assign_coords(time=np.arange(40)), {}, "holds int64 and not dates"),
        (lambda source: source[["orography"]].expand_dims(time=source.time), {}, "none of .* changes in time"),
        (lambda source: source.assign({"2m_temperature": source["t2m"]}), {}, "in the source twice, as 't2m'"),
        (lambda source: source.expand_dims(expver=[1, 7]), {}, "2 values of 'expver'.*select expver=1"),
        (lambda source: source.isel(latitude=[0, 2, 1, 3, 4, 5, 6]), {}, "latitude must rise or fall"),
        (unit("t2m", "furlongs"), {}, "'furlongs' is not one of them: state the unit with the option units"),
        (unit("u10", None), {}, r"'u10' .* names no unit: state the unit with the option units"),
        (unit("orography", None), {}, r"orography .* names no unit: state the unit with the option units"),
        (high_orography, {}, "orography .* outside -500 to 9000"),
        (moving_orography, {}, "should be a static field"),
        (None, {"units": {"t2x": "K"}}, "units names 't2x'"),
        (None, {"levels": [500]}, r"nothing on pressure levels: leave out the option levels \[500\]"),
        (None, {"variables": ["t2m", "q"]}, "the source has no 'q'"),
        (None, {"predict_range": 4}, "val has 4 time steps, too few for predict_range 4"),
        (None, {"predict_range": 3, "shard_steps": 3}, "longer than predict_range 3"),
        (None, {"predict_range": 0}, "predict_range must be at least 1"),
        (None, {"patch_size": 16}, "smaller than a patch of 16"),
        (None, {"val_from": "2000-01-05"}, "go together"),
        (None, {"val_from": "2000-01-08", "test_from": "2000-01-05"}, "leave one of them empty"),
        (None, {"val_from": "2001", "test_from": "2002"}, "leave one of them empty"),
        (None, {"val_from": "spring", "test_from": "2002"}, "'spring' is not a year or an ISO date"),
        (None, {"val_from": "2000-13", "test_from": "2002"}, "'2000-13' is not a year or an ISO date"),
        (None, {"regrid": "1"}, "unknown grid '1'"),
        (None, {"regrid": "5.625"}, "needs a global source"),
    ],
)
def test_mistake_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, change: Callable[[xr.Dataset], xr.Dataset] | None, options: dict, sentence: str
) -> None:
    source = era5() if change is None else change(era5())
    path = write(source, tmp_path / "s.nc")
    with pytest.raises(InputError, match=sentence) as caught:
        prepare(path, tmp_path / "out", shard_steps=options.pop("shard_steps", 5), **options)
    assert "\n" not in str(caught.value)
    assert nothing_but(tmp_path, "s.nc")


def test_levels_asked_for_must_be_there(tmp_path: Path) -> None:
    source = era5()
    source["t"] = source["t2m"].expand_dims(level=[500], axis=1)
    with pytest.raises(InputError, match="temperature has no level 850 hPa, only 500"):
        prepare(write(with_units(source), tmp_path / "s.nc"), tmp_path / "out", levels=[500, 850])


def test_units_by_option_and_by_height(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = era5()
    source["orography"].attrs = {}
    path = write(source, tmp_path / "s.nc")
    done = prepare(path, tmp_path / "metres", units={"orography": "m"})
    metres = np.load(next((done.out / "val").glob("0*.npz")))["orography"]
    source["orography"] = source["orography"] * 9.80665  # reaches 39000: cannot be metres
    done = prepare(write(source, tmp_path / "z.nc"), tmp_path / "geopotential")
    assert "taken as a geopotential in m2 s-2" in caplog.text
    # Float32 multiplied, divided in float64, rounded.
    np.testing.assert_allclose(np.load(next((done.out / "val").glob("0*.npz")))["orography"], metres, rtol=3e-7)


def test_mixed_units_across_files(tmp_path: Path) -> None:
    source, folder = era5(), tmp_path / "files"
    folder.mkdir()
    write(source.isel(time=slice(20)), folder / "a.nc")
    late = source.isel(time=slice(20, None))
    late["t2m"] = (late["t2m"] - 273.15).assign_attrs(units="degC")
    write(late, folder / "b.nc")
    with pytest.raises(InputError, match=r"mixed units: t2m is in 'K' in .*a.nc, but in 'degC' in .*b.nc"):
        prepare(folder, tmp_path / "out")


def test_constants_on_another_grid(tmp_path: Path) -> None:
    source = era5()
    write(source[["orography"]].assign_coords(latitude=source.latitude + 1), tmp_path / "constants.nc")
    path = write(source.drop_vars("orography"), tmp_path / "s.nc")
    with pytest.raises(InputError, match="another grid than the source: their lat differ"):
        prepare(path, tmp_path / "out", constants=tmp_path / "constants.nc")


@pytest.mark.parametrize("content", [None, b"", b"not a netCDF file", b"\x89HDF\r\n\x1a\n broken"])
def test_source_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "s.nc"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError):
        prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(optional, "import_module", refuse)
    (tmp_path / "s.grib").write_bytes(b"GRIB")
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "zarr.json").write_text("{}")
    for source, extra, options in (
        (tmp_path / "s.grib", "grib", {}),
        (tmp_path / "s.zarr", "zarr", {}),
        (write(world(), tmp_path / "s.nc"), "regrid", {"regrid": "5.625"}),
    ):
        with pytest.raises(InputError, match=rf"pip install 'climax-elevation\[{extra}\]'"):
            prepare(source, tmp_path / "out", **options)


def test_folder_of_other_data_is_left_alone(tmp_path: Path) -> None:
    source, out = write(era5(), tmp_path / "s.nc"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other data"):
        prepare(source, out)
    assert nothing_but(out, "thesis.tex")
    with pytest.raises(InputError, match="must be a folder"):
        prepare(source, out / "thesis.tex")


def test_second_run_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source, out = write(era5(), tmp_path / "s.nc"), tmp_path / "out"
    assert prepare(source, out).changed
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    os.utime(source)  # touched, but the same bytes
    again = prepare(source, out)
    assert not again.changed
    assert again.shards_written == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "nothing changed" in caplog.text


def test_other_source_or_options_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(write(era5(), tmp_path / "s.nc"), out)
    before = contents(out)
    with pytest.raises(InputError, match=r"other options.*patch_size 2, not 3"):
        prepare(tmp_path / "s.nc", out, patch_size=3)
    changed = era5()
    changed["t2m"][3, 3, 3] += 1
    with pytest.raises(InputError, match="another source"):
        prepare(write(changed, tmp_path / "other.nc"), out)
    assert contents(out) == before


class Stop(Exception):
    pass


@pytest.mark.parametrize("files", [1, 3, 9, 10, 12])
def test_going_on_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    source, out = write(era5(), tmp_path / "s.nc"), tmp_path / "out"
    clean = prepare(source, tmp_path / "clean", shard_steps=6).out
    synced, fsync = [0], os.fsync

    def stop(descriptor: int) -> None:
        synced[0] += 1
        if synced[0] > files:
            raise Stop
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        with pytest.raises(Stop):
            prepare(source, out, shard_steps=6)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/0*.npz")}
    assert len(kept) == min(files, 9)  # 7 shards of training, one of validation, one of test
    assert not list(tmp_path.rglob("*.partial"))
    # What a run that was killed outright would have left besides.
    (out / ".train-00001_x.npz.partial").write_bytes(b"half")
    (tmp_path / ".out-lat.npy.partial").write_bytes(b"half")
    done = prepare(source, out, shard_steps=6)
    assert done.shards_written == 9 - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(out) == contents(clean)
    assert nothing_but(tmp_path, "s.nc", "clean", "out")


def test_killed_outright(tmp_path: Path) -> None:
    source, out = write(era5(), tmp_path / "s.nc"), tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from climax_elevation.data.prepare import prepare\n"
        "fsync = os.fsync\n"
        "def kill(descriptor):\n"
        "    fsync(descriptor)\n"
        "    if list((__import__('pathlib').Path(sys.argv[2])).glob('train/*')):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.fsync = kill\n"
        "prepare(sys.argv[1], sys.argv[2], shard_steps=18)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(source), str(out)], check=False, timeout=120)
    assert killed.returncode == -9
    assert list(out.glob(".train-*.partial"))
    assert len(list(out.glob("train/*"))) == 1
    prepare(source, out, shard_steps=18)
    assert contents(out) == contents(prepare(source, tmp_path / "clean", shard_steps=18).out)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    source, out = write(era5(), tmp_path / "s.nc"), tmp_path / "out"
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if list(out.glob("train/*")):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="no space left on the disk"):
            prepare(source, out)
    assert {str(path.relative_to(out)) for path in out.rglob("*.npz")} == {"train/00000_2000-01-01T00.npz"}
    assert (out / RECORD).is_file()
    prepare(source, out)
    assert contents(out) == contents(prepare(source, tmp_path / "clean").out)


def test_too_small_a_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"the shards need .* free"):
        prepare(write(era5(), tmp_path / "s.nc"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_runs_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write(era5(), tmp_path / "s.nc"), tmp_path / "out"
    fsync, refused = os.fsync, []

    def start_another(descriptor: int) -> None:
        if not refused:
            with pytest.raises(InputError, match="another run is writing") as caught:
                prepare(source, out)
            refused.append(caught)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", start_another)
    prepare(source, out)
    assert refused
    assert contents(out) == contents(prepare(source, tmp_path / "clean").out)


def test_hundred_metre_wind_is_not_a_level(tmp_path: Path) -> None:
    source = era5()
    source["u100"] = source["u10"]
    assert "u_component_of_wind_100" not in prepare(write(source, tmp_path / "s.nc"), tmp_path / "out").variables


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    source, out = write(era5(), tmp_path / "s.nc"), tmp_path / "out"
    prepare(source, out)
    shard = next((out / "train").iterdir())
    shard.write_bytes(b"half")
    (out / "lat.npy").unlink()
    with pytest.raises(InputError, match=r"is damaged .*: remove it and repeat the command"):
        prepare(source, out)
    shard.unlink()
    assert prepare(source, out).shards_written == 1
    assert contents(out) == contents(prepare(source, tmp_path / "clean").out)
