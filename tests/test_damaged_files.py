"""The small files beside the shards, as full disks and strange hands leave them: a sentence each, from every reader."""

import numpy as np
import pytest
import tiny_data

from climax_elevation import InputError, TerrainReader
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


def test_statistics_have_one_number_a_variable(tmp_path):
    changed(tiny_data.write(tmp_path) / "normalize_mean.npz", lambda values: np.ones(5))
    with pytest.raises(InputError, match="one number a variable, and of 'orography' 5"):
        folder_read(tmp_path)
