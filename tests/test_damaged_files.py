"""The small files beside the shards, as full disks and strange hands leave them: a sentence each, from every reader."""

import numpy as np
import pytest
import tiny_data
import torch

from climax_elevation import InputError, TerrainReader
from climax_elevation.files import check_finite
from climax_elevation.host.shards import GlobalForecastDataModule
from climax_elevation.terrain.stats_dir import read_folder

FILES = ("normalize_mean.npz", "normalize_std.npz", "lat.npy", "lon.npy", "val/climatology.npz")
OF_READER = FILES[:4]
WINDS = ("10m_u_component_of_wind", "10m_v_component_of_wind")


def folder_read(root):
    read_folder(TerrainReader([8, 16], 4, elevation_variable="orography", wind_variables=WINDS), root)


def data_module(root):
    GlobalForecastDataModule(str(root), tiny_data.VARIABLES, 4, tiny_data.TARGETS, predict_range=2)


READERS = [(read, name) for read, names in ((folder_read, OF_READER), (data_module, FILES)) for name in names]


def changed(path, change):
    """The same file with other numbers."""
    found = np.load(path)
    if path.suffix == ".npy":
        np.save(path, change(found))
    else:
        np.savez(path, **{name: change(values) for name, values in found.items()})


@pytest.mark.parametrize(("read", "name"), READERS)
@pytest.mark.parametrize("damage", ["empty", "cut short", "text", "objects", "words", "another kind", "a folder"])
def test_what_is_no_file_of_numbers_is_named(tmp_path, read, name, damage):
    path = tiny_data.write(tmp_path) / name
    read(tmp_path)
    content = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut short":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif damage == "text":
        path.write_text("mean\n12\n")
    elif damage == "objects":
        changed(path, lambda values: np.array([{"mean": 1.0}], dtype=object))
    elif damage == "words":
        changed(path, lambda values: np.full(values.shape, "warm"))
    elif damage == "another kind":
        with open(path, "wb") as file:
            (np.savez if path.suffix == ".npy" else np.save)(file, np.ones(3))
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("read", "name"), READERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, read, name, value):
    path = tiny_data.write(tmp_path) / name
    changed(path, lambda values: np.full_like(values, value))
    with pytest.raises(InputError, match="not finite|finite number|above 0, not"):
        read(tmp_path)


def test_one_number_that_is_not_finite_is_enough(tmp_path):
    with pytest.raises(InputError, match="a.npz has values of 'y' that are not finite: mend it"):
        check_finite({"x": np.ones(2), "y": np.array([1.0, np.nan])}, tmp_path / "a.npz", "mend it")


@pytest.mark.parametrize("read", [folder_read, data_module])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_standard_deviation_is_above_zero(tmp_path, read, value):
    changed(tiny_data.write(tmp_path) / "normalize_std.npz", lambda values: np.full_like(values, value))
    with pytest.raises(InputError, match="standard deviation .* above 0"):
        read(tmp_path)


@pytest.mark.parametrize("read", [folder_read, data_module])
def test_latitudes_are_degrees(tmp_path, read):
    changed(tiny_data.write(tmp_path) / "lat.npy", lambda values: values * 30)
    with pytest.raises(InputError, match=r"within \[-90, 90\] degrees, not"):
        read(tmp_path)


@pytest.mark.parametrize("read", [folder_read, data_module])
@pytest.mark.parametrize("name", ["normalize_mean.npz", "normalize_std.npz"])
def test_statistics_have_one_number_a_variable(tmp_path, read, name):
    changed(tiny_data.write(tmp_path) / name, lambda values: np.ones(5))
    with pytest.raises(InputError, match=f"{name} has one number a variable, and of 'orography' 5"):
        read(tmp_path)


@pytest.mark.parametrize("read", [folder_read, data_module])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lat.npy", np.zeros_like, "latitudes .* are there once each, and some come again"),
        ("lon.npy", np.zeros_like, "longitudes .* are there once each, and some come again"),
        ("lon.npy", lambda values: values * 1e6, r"longitudes .* are within \[-360, 720\] degrees, not 0 to 3e\+07"),
    ],
)
def test_coordinates_that_name_no_places_are_refused(tmp_path, read, name, change, message):
    changed(tiny_data.write(tmp_path) / name, change)
    with pytest.raises(InputError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "others"), [("lat.npy", "lon.npy"), ("lon.npy", "lat.npy"), ("lat2d.npy", "lon2d.npy")]
)
def test_one_coordinate_alone_is_refused(tmp_path, name, others):
    path = tiny_data.write(tmp_path) / name
    (tmp_path / others).unlink(missing_ok=True)
    if not path.exists():
        np.save(path, np.zeros((8, 16)))
    with pytest.raises(InputError, match=f"has {name} alone of "):
        folder_read(tmp_path)


@pytest.mark.parametrize("name", ["normalize_mean.npz", "normalize_std.npz"])
@pytest.mark.parametrize("variable", ["orography", WINDS[1]])
def test_statistics_that_lack_a_variable_are_named_when_it_is_read(tmp_path, name, variable):
    path = tiny_data.write(tmp_path) / name
    found = dict(np.load(path))
    del found[variable]
    np.savez(path, **found)
    reader = TerrainReader([8, 16], 4, elevation_variable="orography", wind_variables=WINDS)
    read_folder(reader, tmp_path)  # an elevation_file would do without
    with pytest.raises(
        InputError, match=f"standardised '.*', to have it in .* \\(stats_dir .* has none of '{variable}'"
    ):
        reader(torch.zeros(1, 4, 8, 16), None, tiny_data.VARIABLES)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_climatology_is_of_the_datas_grid(tmp_path, part):
    changed(tiny_data.write(tmp_path) / part / "climatology.npz", lambda values: values[:, :-1])
    with pytest.raises(InputError, match=r"of shape \[1, 7, 16\], and the data have \[1, 8, 16\]"):
        data_module(tmp_path)
