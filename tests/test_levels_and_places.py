"""What numbers mean: pressure and nothing else is a level, degrees are places, and a sentinel is no value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from anybodys_files import GRID, HEIGHT, LAT, LON, STEPS, T2M, TIMES, WIDTH, alps, ground, joined, values
from prepare_data import world, write

from climax_elevation.data.prepare import prepare
from climax_elevation.data.rotated import unrotate
from climax_elevation.data.sentinels import sentinel
from climax_elevation.data.winds import column_direction
from climax_elevation.errors import InputError

LAYERS = np.arange(1.0, 73.0)


def on_levels(levels: np.ndarray | list, name: str = "level", **attributes: str) -> xr.Dataset:
    t = values(250, 5, STEPS, len(levels), HEIGHT, WIDTH)
    source = alps(t=(("time", name, *GRID), t, {"units": "K"}))
    return source.assign_coords({name: (name, np.asarray(levels), attributes)})


@pytest.mark.parametrize(
    ("levels", "name", "attributes"),
    [
        ([50, 250, 500, 700], "level", {"units": "m", "long_name": "height above ground"}),
        ([50, 250, 500, 700], "level", {"long_name": "height above ground"}),
        ([50, 250, 500, 700], "lev", {"units": "km"}),
        (LAYERS, "level", {"units": "1", "long_name": "model_level_number"}),
        (LAYERS, "lev", {"units": "layer"}),
        (LAYERS, "lev", {}),
        ([0.05, 0.25, 0.5, 0.85], "lev", {"units": "sigma_level"}),
        ([0.05, 0.25, 0.5, 0.85], "lev", {}),
        ([50, 500], "level", {"standard_name": "atmosphere_hybrid_sigma_pressure_coordinate"}),
        ([300, 500], "lev", {"units": "K", "long_name": "potential temperature"}),
        ([50, 500], "lev", {"units": "hPa", "long_name": "hybrid level at midpoints (1000*(A+B))"}),
        ([10, 50, 100, 200], "level", {}),
    ],
)
def test_only_pressure_is_pressure(
    tmp_path: Path, levels: list, name: str, attributes: dict, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = on_levels(levels, name, **attributes)
    path = write(source, tmp_path / "s.nc")
    done = prepare(path, tmp_path / "out")
    assert done.variables == (T2M, "orography", "lattitude")
    assert f"not on pressure levels, which is what ClimaX's are: t on {name!r}" in caplog.text
    with pytest.raises(InputError, match="temperature_500 is on pressure levels, and 't' in the source is on"):
        prepare(path, tmp_path / "refused", variables=["temperature_500"])
    done = prepare(path, tmp_path / "named", variables=["t"], select={name: str(levels[1])})
    (own,) = done.variables[:-2]
    assert own.startswith(f"t_{name}{levels[1]:g}")
    np.testing.assert_array_equal(joined(done.out)[own], source["t"][:, 1])


def test_levels_without_a_unit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Low ones may be heights, and are asked about; what others are taken for is said."""
    low = write(on_levels([50, 100]), tmp_path / "low.nc")
    prepare(low, tmp_path / "out")
    assert "which has no unit: state it with the option units level=hPa if it is one" in caplog.text
    done = prepare(low, tmp_path / "hpa", units={"level": "hPa"})
    np.testing.assert_array_equal(joined(done.out)["temperature_50"], on_levels([50, 100])["t"][:, 0])
    high = write(on_levels([50, 500]), tmp_path / "high.nc")
    prepare(high, tmp_path / "high")
    assert "levels 50, 500 name no unit and are taken as hPa" in caplog.text
    done = prepare(high, tmp_path / "m", units={"level": "m"}, variables=["t"])
    assert done.variables[:2] == ("t_level50m", "t_level500m")


def test_every_level_that_is_no_pressure_under_its_own_name(tmp_path: Path) -> None:
    source = on_levels([50.0, 500.0], units="m")
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", variables=["t", "t2m"])
    assert done.variables[:3] == ("t_level50m", "t_level500m", T2M) or done.variables[:3] == (
        T2M,
        "t_level50m",
        "t_level500m",
    )
    for index, name in enumerate(("t_level50m", "t_level500m")):
        np.testing.assert_array_equal(joined(done.out)[name], source["t"][:, index])


@pytest.mark.parametrize(
    ("levels", "name", "attributes"),
    [
        ([850, 500], "level", {}),
        ([850, 500], "level", {"units": "millibars", "long_name": "pressure_level"}),
        ([85000.0, 50000.0], "plev", {"units": "Pa", "standard_name": "air_pressure"}),
        ([850.0, 500.0], "pressure_level", {"units": "hPa"}),
        (np.array([850, 500], dtype="f4"), "lev", {"units": "hPa"}),
        ([85000.0, 50000.0], "isobaric", {}),
        ([850.0, 500.0], "isobaricInhPa", {"units": "hPa", "long_name": "pressure"}),
        ([850.0, 499.5], "lev", {"units": "mb"}),
    ],
)
def test_pressure_in_its_spellings(tmp_path: Path, levels: list, name: str, attributes: dict) -> None:
    source = on_levels(levels, name, **attributes)
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out")
    whole = abs(levels[1] - round(levels[1])) < 1e-3
    assert ("temperature_500" in done.variables) == whole
    np.testing.assert_array_equal(joined(done.out)["temperature_850"], source["t"][:, 0])


def placed(lat: np.ndarray, lon: np.ndarray, lat_unit: str | None, lon_unit: str | None) -> xr.Dataset:
    source = alps().assign_coords(lat=lat, lon=lon)
    for name, unit in (("lat", lat_unit), ("lon", lon_unit)):
        source[name].attrs = {} if unit is None else {"units": unit}
    return source


def test_radians(tmp_path: Path) -> None:
    lat, lon = np.deg2rad(LAT), np.deg2rad(LON)
    done = prepare(write(placed(lat, lon, "radians", "radian"), tmp_path / "said.nc"), tmp_path / "said")
    np.testing.assert_allclose(np.load(done.out / "lat.npy"), LAT)
    np.testing.assert_allclose(np.load(done.out / "lon.npy"), LON)
    path = write(placed(lat, lon, None, None), tmp_path / "unsaid.nc")
    with pytest.raises(InputError, match="name no unit and may be radians: .*lat=radians lon=radians"):
        prepare(path, tmp_path / "out")
    done = prepare(path, tmp_path / "out", units={"lat": "radians", "lon": "radians"})
    np.testing.assert_allclose(np.load(done.out / "lat.npy"), LAT)
    # and a region at 0 north, 0 east, that is one
    source = placed(np.linspace(-1.5, 1, HEIGHT), np.linspace(0, 4, WIDTH), "degrees_north", "degrees_east")
    done = prepare(write(source, tmp_path / "gulf.nc"), tmp_path / "gulf")
    np.testing.assert_array_equal(np.load(done.out / "lon.npy"), source["lon"])


@pytest.mark.parametrize("unit", ["km", "m", None])
def test_lengths_are_no_places(tmp_path: Path, unit: str | None) -> None:
    y, x = 3000.0 * np.arange(HEIGHT), 3000.0 * np.arange(WIDTH)
    if unit == "km":
        y, x = y / 1000, x / 1000
    path = write(placed(y, x, unit, unit), tmp_path / "s.nc")
    with pytest.raises(InputError, match="places are known by degrees" if unit else "metres or kilometres on a plane"):
        prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", [0.0, -0.5])
def test_a_plane_of_a_few_kilometres(tmp_path: Path, first: float) -> None:
    y, x = (3.0 * (np.arange(size) + first * (size - 1)) for size in (HEIGHT, WIDTH))
    path = write(placed(y, x, None, None), tmp_path / "s.nc")
    with pytest.raises(InputError, match="name no unit and may be lengths on a plane: .*lat=degrees lon=degrees"):
        prepare(path, tmp_path / "out")
    assert prepare(path, tmp_path / "out", units={"lat": "degrees", "lon": "degrees"}).shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize("shift", [-1e-4, 1e-5, 0.0, 359.9999])
def test_longitudes_in_float32(tmp_path: Path, shift: float) -> None:
    source = world(steps=20, height=9, width=1440 // 8)
    lon = (np.arange(180) * 2.0 - 180).astype("f4")
    lon[90] = shift  # where 0 is meant
    source = source.assign_coords(lon=lon)
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out")
    np.testing.assert_allclose(np.load(done.out / "lon.npy"), np.arange(180) * 2.0)
    np.testing.assert_array_equal(joined(done.out)[T2M], np.roll(source["t2m"].to_numpy()[:, ::-1], -90, axis=2)[:, :8])


def test_a_quarter_degree_in_float32_goes_round(tmp_path: Path) -> None:
    source = world(steps=10, height=9, width=1440)
    source = source.assign_coords(lon=(np.arange(1440) * np.float32(0.24999))).drop_vars("orography")
    source["orography"] = (("lat", "lon"), np.full((9, 1440), 5.0), {"units": "m"})
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", val_from="2000-01-07", test_from="2000-01-09")
    assert np.load(done.out / "lon.npy")[0] == 0
    region = alps().assign_coords(lon=np.array([359.9999, 0.5, 1, 1.5, 2, 2.5, 3, 3.5], dtype="f4"))
    done = prepare(write(region, tmp_path / "r.nc"), tmp_path / "region")
    np.testing.assert_array_equal(np.load(done.out / "lon.npy"), 0.5 * np.arange(8))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("cloud", -9999.0),
        ("cloud", 9.96921e36),
        ("z_500", -9999.0),
        ("z_500", 1e20),
        ("tisr", -32767.0),
        ("cloud", 1e15),
        ("cloud", -1e34),
        ("cloud", 3.4e38),
        ("cloud", 9999.0),
        ("cloud", -99.99),
        ("cloud", 65535.0),
        ("tisr", -99.0),
    ],
)
def test_sentinels_in_any_variable(tmp_path: Path, number: float, name: str) -> None:
    field = values(500, 50)
    field[33, 2, 3] = number
    unit = {"cloud": "1", "z_500": "m2 s-2", "tisr": "J m-2"}[name]
    source = alps(**{name: (("time", *GRID), field, {"units": unit})})
    with pytest.raises(
        InputError, match=r"is (-?[\d.e+]+) at 1 places, the first at 2020-01-09T06:00, which stands for a gap"
    ):
        prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", variables=[name, "t2m"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "honest",
    [np.append(np.linspace(0, 9000, 50), 9999.0), np.append(np.zeros(50), 99.0), np.linspace(-99, 99, 50), [9999.0]],
)
def test_numbers_that_may_be_true_are_no_sentinels(honest: np.ndarray) -> None:
    assert sentinel(np.asarray(honest)) is None


def test_sentinels_are_seen_before_they_are_averaged(tmp_path: Path) -> None:
    pytest.importorskip("xarray_regrid")
    source = world(height=181, width=360)
    source["snow"] = source["t2m"].copy()
    source["snow"][3, 90, 90] = -999
    with pytest.raises(InputError, match="snow.*is -999 at 1 places"):
        prepare(write(source, tmp_path / "s.nc"), tmp_path / "out", variables=["snow"], regrid="5.625")


def vectors(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    phi, lam = np.deg2rad(lat), np.deg2rad(lon)
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])


def test_a_rotated_grid_is_turned_and_nothing_else() -> None:
    rlat, rlon = np.array([-20.0, 0.0, 30.0]), np.array([-25.0, 0.0, 10.0])
    lat, lon = unrotate(rlat, rlon, 39.25, -162.0)
    # its origin lies 90 degrees from its pole (39.25 N, 162 W), on the meridian opposite: 50.75 N, 18 E; east is east
    assert (lat[1, 1], lon[1, 1]) == pytest.approx((50.75, 18.0))
    assert lon[1, 2] > 18 > lon[1, 0]
    assert lat[2, 1] > 50.75 > lat[0, 1]
    inside, outside = vectors(*np.meshgrid(rlat, rlon, indexing="ij")), vectors(lat, lon)
    for points in (inside, outside):
        points.shape = 3, 9
    np.testing.assert_allclose(outside.T @ outside, inside.T @ inside, atol=1e-12)
    turned = unrotate(rlat, rlon + 30.0, 39.25, -162.0, turn=30.0)
    np.testing.assert_allclose(turned, (lat, lon))


def rotated(named: str, places: bool) -> xr.Dataset:
    rlat, rlon = -5 + 0.5 * np.arange(HEIGHT), -12 + 0.5 * np.arange(WIDTH)
    lat, lon = unrotate(rlat, rlon, 39.25, -162.0)
    pole = {"grid_mapping_name": "rotated_latitude_longitude", "grid_north_pole_latitude": 39.25}
    pole["grid_north_pole_longitude"] = -162.0
    dims = ("time", "rlat", "rlon")
    source = xr.Dataset(
        {
            "T_2M": (dims, values(), {"units": "K"}),
            "U_10M": (dims, values(5, 3, seed=1), {"units": "m s-1", "standard_name": f"{named}eastward_wind"}),
            "V_10M": (dims, values(0, 3, seed=2), {"units": "m s-1", "standard_name": f"{named}northward_wind"}),
            "HSURF": (dims[1:], ground(), {"units": "m"}),
            "rotated_pole": ((), b"", pole),
        },
        coords={
            "time": TIMES,
            "rlat": ("rlat", rlat, {"standard_name": "grid_latitude", "units": "degrees"}),
            "rlon": ("rlon", rlon, {"standard_name": "grid_longitude", "units": "degrees"}),
        },
    )
    if places:
        source = source.assign_coords(lat=(dims[1:], lat), lon=(dims[1:], lon))
    return source


def bearing(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """Angle from east to the rotated system's east, by its pole: the classic formula, on its own."""
    pole = np.deg2rad(39.25), np.deg2rad(-162.0)
    phi, dlon = np.deg2rad(lat), np.deg2rad(lon) - pole[1]
    # the direction to the rotated pole is rotated north; its azimuth, clockwise from north
    azimuth = np.arctan2(-np.sin(dlon), np.cos(phi) * np.tan(pole[0]) - np.sin(phi) * np.cos(dlon))
    return -azimuth


@pytest.mark.parametrize("places", [True, False])
def test_rotated_grid_and_its_winds(tmp_path: Path, places: bool) -> None:
    source = rotated("grid_", places)
    done = prepare(write(source, tmp_path / "s.nc"), tmp_path / "out")
    written = joined(done.out)
    lat, lon = unrotate(source["rlat"].to_numpy(), source["rlon"].to_numpy(), 39.25, -162.0)
    np.testing.assert_allclose(np.load(done.out / "lat2d.npy"), lat, atol=1e-6)
    angle = bearing(lat, lon)
    assert np.abs(np.rad2deg(angle)).max() > 5
    u, v = (source[name].to_numpy().astype(float) for name in ("U_10M", "V_10M"))
    # the direction along rows by differences of places is exact on circles, but for rounding and the ends of rows
    np.testing.assert_allclose(written["10m_u_component_of_wind"], u * np.cos(angle) - v * np.sin(angle), atol=1e-3)
    np.testing.assert_allclose(written["10m_v_component_of_wind"], u * np.sin(angle) + v * np.cos(angle), atol=1e-3)
    np.testing.assert_array_equal(written[T2M], source["T_2M"])
    np.testing.assert_array_equal(written["orography"][0], source["HSURF"])


def test_winds_that_go_east_already_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = rotated("", True)
    path = write(source, tmp_path / "s.nc")
    np.testing.assert_array_equal(
        joined(prepare(path, tmp_path / "out").out)["10m_u_component_of_wind"], source["U_10M"]
    )
    for name in ("U_10M", "V_10M"):
        source[name].attrs.pop("standard_name")
    path = write(source, tmp_path / "silent.nc")
    as_is = joined(prepare(path, tmp_path / "silent").out)["10m_u_component_of_wind"]
    assert "does not say whether they go along the grid" in caplog.text
    np.testing.assert_array_equal(as_is, source["U_10M"])
    turned = joined(prepare(path, tmp_path / "grid", winds="grid").out)["10m_u_component_of_wind"]
    assert np.abs(turned - as_is).max() > 0.5
    # one of the two alone is turned with the other all the same
    alone = joined(prepare(path, tmp_path / "one", winds="grid", variables=["U_10M"]).out)
    np.testing.assert_array_equal(alone["10m_u_component_of_wind"], turned)


def test_direction_of_columns_on_a_meridian_grid() -> None:
    lat, lon = np.meshgrid(LAT, LON, indexing="ij")
    cosine, sine = column_direction(lat, lon)
    # a parallel is a circle too: straight east
    np.testing.assert_allclose(cosine, 1, atol=1e-6)
    np.testing.assert_allclose(sine, 0, atol=1e-3)


def test_points_are_no_grid(tmp_path: Path) -> None:
    # as reduced Gaussian grids and stations are filed
    source = alps().stack(values=GRID).reset_index("values")
    with pytest.raises(InputError, match="for each point along 'values', and ClimaX wants a grid"):
        prepare(write(source, tmp_path / "s.nc"), tmp_path / "out")
