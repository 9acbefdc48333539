"""Pixels by terrain: by hand, and against plain loops."""

import numpy as np
import pytest
import torch

from climax_elevation.compare.strata import StrataSettings, divide, gradient
from climax_elevation.errors import InputError
from climax_elevation.terrain.sphere import EARTH_RADIUS_M

RANDOM = np.random.default_rng(6)
A_DEGREE_M = EARTH_RADIUS_M * np.pi / 180


def _plain_gradient(z: np.ndarray, lat: np.ndarray, lon: np.ndarray, around: bool) -> np.ndarray:
    """On a regular grid: along the parallel by the chord's great circle, along the meridian exactly."""
    slope = np.zeros((2, *z.shape))
    rows, columns = z.shape
    for i in range(rows):
        for j in range(columns):
            east = (j + 1) % columns if around else min(j + 1, columns - 1)
            west = (j - 1) % columns if around else max(j - 1, 0)
            turn = np.deg2rad((lon[east] - lon[west] + 180) % 360 - 180)
            chord = 2 * np.cos(np.deg2rad(lat[i])) * np.sin(abs(turn) / 2)
            slope[0, i, j] = np.sign(turn) * (z[i, east] - z[i, west]) / (2 * EARTH_RADIUS_M * np.arcsin(chord / 2))
            up, down = min(i + 1, rows - 1), max(i - 1, 0)
            slope[1, i, j] = (z[up, j] - z[down, j]) / (A_DEGREE_M * (lat[up] - lat[down]))
    return slope


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("globe", [False, True])
def test_gradient_equals_plain_loops(descending: bool, globe: bool) -> None:
    lat = np.linspace(-60, 60, 7)[:: -1 if descending else 1]
    lon = np.arange(12) * (30.0 if globe else 2.0) + 350 - 360 * globe
    z = 3000 * RANDOM.random((7, 12))
    np.testing.assert_allclose(gradient(z, lat, lon), _plain_gradient(z, lat, lon, globe), rtol=1e-9)


def test_a_projected_grid_has_slopes_along_itself() -> None:
    """A grid turned by 20 degrees on a plane that rises along its columns: x alone has a slope."""
    x, y = np.meshgrid(np.arange(6) * 0.03, np.arange(5) * 0.03)
    turn = np.deg2rad(20)
    lat, lon = x * np.sin(turn) + y * np.cos(turn), x * np.cos(turn) - y * np.sin(turn)
    slope = gradient(100 * x / 0.03, lat, lon)
    np.testing.assert_allclose(slope[0], 100 / (0.03 * A_DEGREE_M), rtol=1e-5)
    np.testing.assert_allclose(slope[1], 0, atol=1e-12)


def test_bands_by_hand() -> None:
    z = np.array([[0.0, 199.9, 200.0, 999.0], [1000.0, 1999.0, 2000.0, 5000.0]])
    strata = divide(z, np.arange(2.0), np.arange(4.0), 1, StrataSettings(relief=False), wind=False)
    assert strata.names == ("all", "below 200 m", "200 to 1000 m", "1000 to 2000 m", "above 2000 m")
    masks = strata.masks(None, None, 3)
    assert masks.shape == (3, 5, 2, 4)
    assert masks[0, 1:].flatten(1).int().tolist() == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]
    assert masks[:, 0].all()


def test_relief_by_hand() -> None:
    """Patches of 2 x 2 with a spread of 0 (sea), 10, 20 and 40 m about 100 m: three on land, one a tercile."""
    spread = [0, 10, 20, 40]
    z = np.concatenate([np.array([[-s, s], [s, -s]]) + 100.0 * (s > 0) for s in spread], axis=1)
    settings = StrataSettings(elevation_m=())
    strata = divide(z, np.arange(2.0), np.arange(8.0), 2, settings, wind=False)
    assert strata.names == ("all", "low relief", "mid relief", "high relief")
    masks = strata.masks(None, None, 1)[0, 1:].int()
    expected = torch.repeat_interleave(torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), 2, dim=1)
    assert (masks == expected[:, None]).all()
    everything = divide(z, np.arange(2.0), np.arange(8.0), 2, settings, land=np.ones(z.shape, bool), wind=False)
    assert everything.masks(None, None, 1)[0, 1].sum() == 8  # the flat one counts as land now, and as low


def test_windward_is_where_the_wind_climbs() -> None:
    """Ground that rises by 1000 m a degree to the east: slope 0.009 at the equator, so 9 m/s lift by 0.08 m/s."""
    z = np.broadcast_to(1000.0 * np.arange(4), (2, 4))
    settings = StrataSettings(elevation_m=(), relief=False, slope_wind_m_s=0.05)
    strata = divide(z, np.array([-0.5, 0.5]), np.arange(4.0), 1, settings, wind=True)
    assert strata.names == ("all", "windward", "lee", "neutral")
    u = torch.tensor([9.0, -9.0, 1.0])[:, None, None].expand(3, 2, 4)
    masks = strata.masks(u, torch.full((3, 2, 4), 20.0), 3)  # across the slope there is nothing to climb
    assert masks[:, 1:, 0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert (masks[:, 1:].sum(dim=1) == 1).all()


def test_strata_without_pixels_are_left_out() -> None:
    sea = np.zeros((4, 4))
    strata = divide(sea, np.arange(4.0), np.arange(4.0), 2, StrataSettings(), wind=False)
    assert strata.names == ("all", "below 200 m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"elevation_m": (200.0, 100.0)}, "ascending metres"),
        ({"slope_wind_m_s": -1.0}, "0 or more"),
    ],
)
def test_mistakes(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        StrataSettings(**arguments)
