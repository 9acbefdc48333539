"""Terrain from pvlib's altitude map."""

from pathlib import Path

import numpy as np
import pytest

from climax_elevation.errors import InputError
from climax_elevation.testbed import altitude
from climax_elevation.testbed.altitude import REGIONS, ElevationMap, mean_elevation_m, region_elevation

pytest.importorskip("pvlib", reason="terrain comes from the package pvlib, which is not installed")
DATA = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.mark.parametrize("region", sorted(REGIONS))
def test_every_region_has_real_relief_and_tiles(region: str) -> None:
    ground = region_elevation(region)
    assert ground.elevation_m.size == 2048
    assert all(size % 8 == 0 for size in ground.elevation_m.shape)
    assert 1500 < ground.elevation_m.max() < 6600
    assert ground.elevation_m.min() >= 0  # the sea is 0 m, not the map's lowest code
    assert ground.periodic == (region == "global")


def test_known_places() -> None:
    # half a degree around: the open Pacific, Lhasa (3650 m, among mountains), the Amazon at Manaus (90 m)
    for lat, lon, low, high in [(0, -150, 0, 0), (29.65, 91.1, 3700, 5500), (-3, -60, 20, 150)]:
        cell = mean_elevation_m(np.array([lat - 0.5, lat, lat + 0.5]), np.array([lon - 0.5, lon, lon + 0.5]))
        assert low <= cell[1, 1] <= high


def test_area_means_agree_with_plain_sums() -> None:
    """Two cells of 2 x 2 degrees: 24 x 24 map cells each, weighted by the cosine of their latitude."""
    fine = altitude._altitude_m()
    lat, lon = np.array([46.0, 48.0]), np.array([8.0, 10.0])
    means = mean_elevation_m(lat, lon)
    fine_lat = 90 - (np.arange(2160) + 0.5) / 12
    fine_lon = -180 + (np.arange(4320) + 0.5) / 12
    for i in range(2):
        for j in range(2):
            block = fine[np.abs(fine_lat - lat[i]) < 1][:, np.abs(fine_lon - lon[j]) < 1]
            weight = np.cos(np.deg2rad(fine_lat[np.abs(fine_lat - lat[i]) < 1]))
            # sines of edges against cosines of centres: the same up to rounding on an even grid
            assert means[i, j] == pytest.approx((block.mean(axis=1) * weight).sum() / weight.sum(), rel=1e-9)


def test_meridians_and_order_of_rows_do_not_matter() -> None:
    lat, lon = np.arange(-87.0, 90, 6), np.arange(0.0, 360, 6)
    field = mean_elevation_m(lat, lon)
    np.testing.assert_allclose(mean_elevation_m(lat[::-1], lon), field[::-1], atol=1e-9)
    np.testing.assert_allclose(mean_elevation_m(lat, lon - 180), np.roll(field, 30, axis=1), atol=1e-9)
    area = np.cos(np.deg2rad(lat))[:, None] * np.ones(lon.size)
    fine = altitude._altitude_m()
    fine_area = np.cos(np.deg2rad(90 - (np.arange(2160) + 0.5) / 12))[:, None] * np.ones(4320)
    # nothing is counted twice or left out: the mean of the globe is kept
    assert (field * area).sum() / area.sum() == pytest.approx((fine * fine_area).sum() / fine_area.sum(), rel=1e-9)


def test_agrees_with_era5() -> None:
    path = DATA / "era5_orography_1.40625deg.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with np.load(path) as era5:
        # the map has no ice sheets, so Antarctica and Greenland are left out
        rows = np.abs(era5["lat"]) < 60
        ours = mean_elevation_m(era5["lat"].astype(float), era5["lon"].astype(float))[rows]
        assert np.corrcoef(ours.ravel(), era5["orography"][rows].ravel())[0, 1] > 0.99


def test_mistakes_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown region 'mars'; available: 'asia'"):
        region_elevation("mars")
    with pytest.raises(InputError, match="ascending"):
        ElevationMap(np.array([2.0, 1.0]), np.array([0.0, 1.0]), np.zeros((2, 2)))
    with pytest.raises(InputError, match="2 latitudes by 2 longitudes"):
        ElevationMap(np.array([1.0, 2.0]), np.array([0.0, 1.0]), np.zeros((3, 2)))
    with pytest.raises(InputError, match="beyond a pole"):
        ElevationMap(np.array([0.0, 90.0]), np.array([0.0, 1.0]), np.zeros((2, 2)))

    def absent(name: str) -> None:
        raise altitude.PackageNotFoundError(name)

    monkeypatch.setattr(altitude, "distribution", absent)
    with pytest.raises(InputError, match=r"pip install 'climax-elevation\[demo\]'"):
        region_elevation("asia")
