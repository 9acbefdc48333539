"""Runs of ClimaX's regional forecasting, opened again: the errors are the script's own, and maps are of the region."""

import numpy as np
import pytest
import tiny_data
from test_launch import ON, forecasting, logged

from climax_elevation.cli import main
from climax_elevation.diagnostics import effects, open_run
from climax_elevation.diagnostics.view import error_field, ground_field, view_from
from climax_elevation.files import save_npy
from climax_elevation.train import train

ROWS, COLUMNS = slice(0, 6), slice(4, 16)
"""SouthAsia, from 15 S to 45 N and from 25 E, as upstream finds it in the latitudes below: mirrored."""
LAT, LON = np.linspace(50.0, 22.0, 8), np.linspace(20.0, 50.0, 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tiny_data.write(tmp_path_factory.mktemp("data"))
    save_npy(folder / "lat.npy", LAT)
    save_npy(folder / "lon.npy", LON)
    return folder


@pytest.fixture(scope="module")
def folder(climax, root, tmp_path_factory):
    pytest.importorskip("torchvision")
    out = tmp_path_factory.mktemp("regional")
    net = "--model.net=climax.regional_forecast.arch.RegionalClimaX"
    arguments = [net if given.startswith("--model.net=") else given for given in forecasting(root, out)]
    train("regional_forecast", climax, [*arguments, ON, "--data.region=SouthAsia"])
    return out


@pytest.fixture(scope="module")
def run(folder, climax):
    with open_run(folder, climax=climax) as opened:
        yield opened


def test_the_errors_are_those_of_the_runs_own_test(run, folder):
    found = effects(run.module, run.datamodule, "test")
    for name, error in found.trained.items():
        assert error == pytest.approx(logged(folder, f"test/w_rmse_{name}_2_hours")[0], rel=1e-5)
    assert found.changed["elevation permuted"] != found.trained


def test_doctor_examines_it(folder, climax, capsys):
    assert main(["doctor", str(folder), "--climax", str(climax)]) == 0
    printed = capsys.readouterr().out
    assert "The bias is " in printed
    assert "elevation permuted" in printed


def test_maps_are_of_the_region(run):
    for field in (error_field(run, "test", None)[0], ground_field(run, "test")):
        np.testing.assert_array_equal(field.lat, LAT[ROWS])
        np.testing.assert_array_equal(field.lon, LON[COLUMNS])
        assert field.values.shape == (6, 12)
    orography = tiny_data.fields(0, 1)["orography"][0, 0]
    np.testing.assert_allclose(ground_field(run, "test").values, orography[ROWS, COLUMNS], rtol=1e-4)
    view = view_from(run, None)
    patches = orography.reshape(4, 2, 8, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(view.elevation_m, patches[:3, 2:], rtol=1e-4)
    np.testing.assert_allclose(view.with_bias.sum(), 1, rtol=1e-5)
    assert view.lon.shape == (3, 6)
    np.testing.assert_allclose(view.lon[0], LON[COLUMNS].reshape(6, 2).mean(axis=1), rtol=1e-5)
