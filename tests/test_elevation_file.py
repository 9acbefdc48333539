"""An elevation file lies on the data's grid as its coordinates say, or is refused in a sentence."""

import numpy as np
import pytest
import xarray

from climax_elevation import InputError
from climax_elevation.data.names import OROGRAPHY
from climax_elevation.terrain.elevation_file import ElevationField, read_elevation_file

LAT, LON = np.arange(-67.5, 90, 45.0), np.arange(0, 360, 90.0)  # four by four: nothing tells which is which
VALUES = np.arange(16.0).reshape(4, 4) * 100


def write(path, values=VALUES, dims=("latitude", "longitude"), units="m", lat=LAT, lon=LON, name="z", **attributes):
    coordinates = {"latitude": lat, "longitude": lon, "lat": lat, "lon": lon}
    known = {dim: coordinates[dim] for dim in dims if dim in coordinates}
    field = xarray.DataArray(values, known, dims, attrs={"units": units} | attributes)
    xarray.Dataset({name: field}).to_netcdf(path)
    return path


def on_data(path, lat=LAT, lon=LON, **options):
    return read_elevation_file(path, **options).on_grid((len(lat), len(lon)), lat, lon)


@pytest.mark.parametrize("dims", [("latitude", "longitude"), ("lat", "lon")])
def test_dimensions_are_known_by_name_not_by_place(tmp_path, dims):
    """WeatherBench 2 has longitude first; a square field would fit either way."""
    right = on_data(write(tmp_path / "a.nc", VALUES, dims))
    turned = on_data(write(tmp_path / "b.nc", VALUES.T, dims[::-1]))
    np.testing.assert_array_equal(right, VALUES)
    np.testing.assert_array_equal(turned, VALUES)


@pytest.mark.parametrize(("dims", "turned"), [(("y", "x"), False), (("x", "y"), True), (("lon", "lat"), True)])
def test_dimensions_without_coordinates_are_known_by_name_too(tmp_path, dims, turned):
    values = VALUES.T if turned else VALUES
    xarray.Dataset({"z": (dims, values, {"units": "m"})}).to_netcdf(tmp_path / "z.nc")
    np.testing.assert_array_equal(read_elevation_file(tmp_path / "z.nc").values, VALUES)


def test_coordinates_are_known_by_their_units_where_names_are_strange(tmp_path):
    field = xarray.DataArray(
        VALUES.T,
        {"breite": ("breite", LAT, {"units": "degrees_north"}), "laenge": ("laenge", LON, {"units": "degrees_east"})},
        ("laenge", "breite"),
        attrs={"units": "m"},
    )
    xarray.Dataset({"z": field}).to_netcdf(tmp_path / "z.nc")
    np.testing.assert_array_equal(on_data(tmp_path / "z.nc"), VALUES)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ({"units": "degree_north"}, {"units": "degree_east"}),
        ({"units": "degreesN"}, {"units": "degreesE"}),
        ({"standard_name": "latitude", "units": "degrees"}, {"standard_name": "longitude", "units": "degrees"}),
    ],
)
def test_coordinates_are_known_by_what_cf_says_of_them(tmp_path, rows, columns):
    coordinates = {"a": ("a", LON, columns), "b": ("b", LAT, rows)}
    xarray.Dataset({"z": (("a", "b"), VALUES.T, {"units": "m"})}, coordinates).to_netcdf(tmp_path / "z.nc")
    np.testing.assert_array_equal(on_data(tmp_path / "z.nc"), VALUES)


@pytest.mark.parametrize("dims", [("south_north", "west_east"), ("dim_0", "dim_1"), ("nlat", "nlon"), ("nlon", "nlat")])
def test_dimensions_whose_names_say_nothing_are_taken_as_they_lie(tmp_path, dims):
    values = VALUES.T if dims[0] == "nlon" else VALUES
    field = {"orography": (("Time", *dims), np.stack([values, values]), {"units": "m"})}
    xarray.Dataset(field).to_netcdf(tmp_path / "z.nc")
    np.testing.assert_array_equal(read_elevation_file(tmp_path / "z.nc").values, VALUES)


def test_two_dimensions_whose_names_say_nothing_are_enough(tmp_path):
    xarray.Dataset({"orography": (("dim_0", "dim_1"), VALUES, {"units": "m"})}).to_netcdf(tmp_path / "z.nc")
    np.testing.assert_array_equal(read_elevation_file(tmp_path / "z.nc").values, VALUES)


def test_points_that_are_no_grid_are_refused(tmp_path):
    points = {"lat": ("cell", LAT), "lon": ("cell", LON)}
    xarray.Dataset({"z": (("cell",), VALUES[0], {"units": "m"})}, points).to_netcdf(tmp_path / "z.nc")
    with pytest.raises(InputError, match="for each point along 'cell', and no grid"):
        read_elevation_file(tmp_path / "z.nc")


FINE_LAT, FINE_LON = np.arange(-88.75, 90, 2.5), np.arange(0, 360, 2.5)
FINE = np.random.default_rng(3).uniform(0, 3000, (72, 144))


@pytest.mark.parametrize("west", [0, -180])
def test_a_column_that_comes_twice_counts_once(tmp_path, west):
    lon = (FINE_LON - west) % 360 + west
    order = lon.argsort()
    once = on_data(write(tmp_path / "a.nc", FINE, lat=FINE_LAT, lon=FINE_LON))
    turned = np.concatenate([FINE[:, order], FINE[:, order[:1]]], axis=1)
    path = write(tmp_path / "b.nc", turned, lat=FINE_LAT, lon=np.append(lon[order], west + 360))
    np.testing.assert_allclose(on_data(path), once, rtol=1e-12)
    turned[:, -1] += 100
    with pytest.raises(InputError, match="has the meridian at .* twice, with other values"):
        on_data(write(tmp_path / "c.nc", turned, lat=FINE_LAT, lon=np.append(lon[order], west + 360)))


@pytest.mark.parametrize(("axis", "name"), [(0, "latitude"), (1, "longitude")])
def test_rows_and_columns_that_are_missing_or_out_of_order_are_refused(tmp_path, axis, name):
    coordinates = [FINE_LAT, FINE_LON]
    for places, message in (
        (np.delete(np.arange(len(coordinates[axis])), [30]), f"has no {name} between .* averages need all of them"),
        (np.arange(len(coordinates[axis])) ^ 1, f"sort the file by {name}"),  # neighbours exchanged
    ):
        taken = [*coordinates]
        taken[axis] = coordinates[axis][places]
        path = write(tmp_path / f"{message[4:7]}.nc", FINE.take(places, axis), lat=taken[0], lon=taken[1])
        with pytest.raises(InputError, match=message):
            on_data(path)


def test_data_of_one_row_take_the_row_that_they_name(tmp_path):
    path = write(tmp_path / "z.nc", FINE, lat=FINE_LAT, lon=FINE_LON)
    np.testing.assert_allclose(on_data(path, FINE_LAT[5:6], FINE_LON), FINE[5:6])
    with pytest.raises(InputError, match="has no latitude -76, which the data have"):
        on_data(path, np.array([-76.0]), FINE_LON)


def test_files_without_values_or_with_half_of_the_coordinates_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", orography=np.zeros((0, 4)), lat=np.zeros(0), lon=LON)
    with pytest.raises(InputError, match="its latitudes are finite numbers"):
        read_elevation_file(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", orography=VALUES, lat=LAT)
    with pytest.raises(InputError, match="has latitudes and no longitudes: write both, or neither"):
        read_elevation_file(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", orography=VALUES, lat=np.linspace(-90, 90.5, len(LAT)), lon=LON)
    with pytest.raises(InputError, match=r"its latitudes are within \[-90, 90\] degrees, not up to 90.5"):
        read_elevation_file(tmp_path / "c.npz")


def test_a_folder_such_as_zarrs_is_said_to_be_one_and_suffixes_may_be_in_capitals(tmp_path):
    (tmp_path / "z.zarr").mkdir()
    with pytest.raises(InputError, match=r"z\.zarr is a folder; give a \.nc"):
        read_elevation_file(tmp_path / "z.zarr")
    np.testing.assert_array_equal(on_data(write(tmp_path / "Z.NC")), VALUES)


def test_what_does_not_change_along_a_dimension_is_the_ground_and_what_does_is_refused(tmp_path):
    several = np.stack([VALUES, VALUES])
    dims = ("time", "latitude", "longitude")
    np.testing.assert_array_equal(on_data(write(tmp_path / "a.nc", several, dims)), VALUES)
    with pytest.raises(InputError, match=r"'z' changes along 'level' \(2 values\)"):
        on_data(write(tmp_path / "b.nc", several * np.array([1, 2])[:, None, None], ("level", *dims[1:])))


@pytest.mark.parametrize("turn", [False, True])
def test_a_finer_file_is_averaged_by_area(tmp_path, turn):
    """Four cells of 45 degrees by hand: a belt of the sphere weighs by the difference of the sines of its edges."""
    lat, lon = np.arange(-78.75, 90, 22.5), np.arange(0, 360, 45.0)
    values = np.arange(8 * 8, dtype=float).reshape(8, 8) ** 2
    belt = np.diff(np.sin(np.deg2rad(np.arange(-90, 91, 22.5))))
    expected = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            # a pixel of 90 degrees around 90 j: the half of its neighbours' cells at j * 2 - 1 and j * 2 + 1
            rows = values[2 * i : 2 * i + 2] @ np.eye(8)
            across = 0.5 * rows[:, (2 * j - 1) % 8] / 2 + rows[:, 2 * j] / 2 + 0.5 * rows[:, (2 * j + 1) % 8] / 2
            weights = belt[2 * i : 2 * i + 2]
            expected[i, j] = (across * weights).sum() / weights.sum()
    if turn:  # north first, and longitudes from -180
        lat, values = lat[::-1], values[::-1]
        lon, values = (lon + 180) % 360 - 180, values
        order = lon.argsort()
        lon, values = lon[order], values[:, order]
    path = write(tmp_path / "z.nc", values, lat=lat, lon=lon)
    np.testing.assert_allclose(on_data(path), expected, rtol=1e-12)


def test_a_quarter_degree_file_on_one_degree_data_keeps_the_mean(tmp_path):
    """What was taken before, every fourth row and column, misses a peak of one cell."""
    lat, lon = np.arange(40.125, 50, 0.25), np.arange(0.125, 20, 0.25)
    values = np.zeros((len(lat), len(lon)))
    values[17, 31] = 1600.0
    data_lat, data_lon = np.arange(40.5, 50), np.arange(0.5, 20)
    found = on_data(write(tmp_path / "z.nc", values, lat=lat, lon=lon), data_lat, data_lon)
    assert found[4, 7] == pytest.approx(100.0, rel=0.01)
    found[4, 7] = 0
    assert not found.any()


def test_a_level_field_stays_level_whatever_the_grids():
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows, columns = rng.integers(20, 60, 2)
        field = ElevationField(
            np.full((rows, columns), 321.0),
            np.linspace(-90, 90, rows),
            np.arange(columns) * 360 / columns + rng.uniform(-200, 200),
            "a file",
        )
        lat, lon = np.linspace(80, -80, 7), np.arange(9) * 40.0 + rng.uniform(-180, 360)
        np.testing.assert_allclose(field.on_grid((7, 9), lat, lon), 321.0, rtol=1e-12)


def test_longitudes_that_float32_rounds_are_the_same(tmp_path):
    lon = np.array([359.99997, 90, 180, 269.99994], dtype=np.float32)
    np.testing.assert_array_equal(on_data(write(tmp_path / "z.nc"), lon=lon), VALUES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lat": [*LAT[:3], np.nan]}, "its latitudes are finite numbers, each there once"),
        ({"lat": np.full(4, np.nan)}, "its latitudes are finite numbers, each there once"),
        ({"lat": [-60.0, -60.0, 20.0, 60.0]}, "its latitudes are finite numbers, each there once"),
        ({"lon": [0.0, 90.0, np.inf, 270.0]}, "its longitudes are finite numbers, each there once"),
        ({"lat": [-135.0, -45.0, 45.0, 135.0]}, r"its latitudes are within \[-90, 90\] degrees, not up to 135"),
        ({"lat": LAT + 5}, "has no latitude -67.5, which the data have"),
        ({"lon": LON + 30}, "has no longitude 0, which the data have"),
        ({"units": "furlong"}, "must come in one of 'm', .*'km'.* but its unit 'furlong' is not one of them"),
        ({"values": np.where(VALUES == 500, np.nan, VALUES)}, "has values that are not finite where the data lie"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        on_data(write(tmp_path / "z.nc", **changes))


def test_a_coarser_or_smaller_file_is_refused(tmp_path):
    path = write(tmp_path / "z.nc")
    with pytest.raises(InputError, match="has no latitude .* regrid it to the data's grid, or give a finer one"):
        on_data(path, np.arange(-78.75, 90, 22.5), np.arange(0, 360, 45.0))
    part = write(tmp_path / "part.nc", np.zeros((40, 40)), lat=np.arange(0.5, 40), lon=np.arange(0.5, 40))
    with pytest.raises(InputError, match="does not cover the pixel at latitude -67.5"):
        on_data(part)


@pytest.mark.parametrize("unit", list(OROGRAPHY.units))
def test_every_unit_of_prepares_table_is_known(tmp_path, unit):
    factor, _ = OROGRAPHY.units[unit]
    path = write(tmp_path / "z.nc", VALUES / factor, units=unit)
    np.testing.assert_allclose(on_data(path), VALUES, rtol=1e-12)


@pytest.mark.parametrize("suffix", ["npy", "npz", "nc"])
@pytest.mark.parametrize("damage", ["empty", "cut short", "text", "pickle", "another kind", "a folder"])
def test_damaged_files_are_named_in_a_sentence(tmp_path, suffix, damage):
    path = tmp_path / f"z.{suffix}"
    if suffix == "npy":
        np.save(path, VALUES)
    elif suffix == "npz":
        np.savez(path, orography=VALUES)
    else:
        write(path)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "text":
        path.write_text("height\n12\n")
    elif damage == "pickle":
        np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object))
        (tmp_path / "o.npy").replace(path)
    elif damage == "another kind":
        if suffix == "npy":
            np.savez(tmp_path / "o.npz", orography=VALUES)
            (tmp_path / "o.npz").replace(path)
        else:
            np.save(tmp_path / "o.npy", VALUES)
            (tmp_path / "o.npy").replace(path)
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(InputError) as caught:
        read_elevation_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_packed_values_with_a_fill_value_are_read_as_what_they_mean(tmp_path):
    field = xarray.DataArray(
        VALUES, {"latitude": LAT, "longitude": LON}, ("latitude", "longitude"), attrs={"units": "m"}
    )
    packing = {"dtype": "int16", "scale_factor": 0.5, "add_offset": 100.0, "_FillValue": -32767}
    xarray.Dataset({"z": field}).to_netcdf(tmp_path / "z.nc", encoding={"z": packing})
    np.testing.assert_array_equal(on_data(tmp_path / "z.nc"), VALUES)
