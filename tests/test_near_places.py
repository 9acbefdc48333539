"""Factors in float32 of places that are near each other: their differences must not drown in what they share."""

import pytest
import torch

from climax_elevation import Terrain, build_bias
from climax_elevation.terrain.sphere import unit_vectors, upright

SIDE = 24


def small_grid(km, lat, lon):
    """Patches so many km apart, in the middle latitudes or at a pole."""
    step = km / 111.195
    rows = lat + step * torch.arange(SIDE, dtype=torch.float64)
    columns = lon + step / max(0.1, abs(torch.cos(torch.deg2rad(rows[SIDE // 2])))) * torch.arange(SIDE)
    wind = torch.full((1, SIDE**2), 5.0, dtype=torch.float64)
    return Terrain(
        torch.zeros(1, SIDE**2, dtype=torch.float64),
        (SIDE, SIDE),
        u=wind,
        v=wind,
        speed=wind,
        lat=rows.repeat_interleave(SIDE),
        lon=columns.double().repeat(SIDE),
        lead_hours=torch.ones(1, dtype=torch.float64) * km / 36,  # 5 m/s carry air by half a patch
    )


@pytest.mark.parametrize("lat", [46.0, -46.0, 0.0])
@pytest.mark.parametrize("lon", [8.0, -179.9, 120.0])
@pytest.mark.parametrize("km", [12.0, 1.0])
@pytest.mark.parametrize("name", ["advection", "structure"])
def test_in_single_precision_they_are_exact_to_a_ten_thousandth(name, km, lat, lon):
    terrain = small_grid(km, lat, lon)
    exact = build_bias(name, num_heads=4, grid=terrain.grid).double()
    single = build_bias(name, num_heads=4, grid=terrain.grid)
    logits = []
    for bias in (exact, single):
        bias.prepare(terrain)
        f, g = bias.factors(*bias.inputs(terrain))
        logits.append((f @ g.transpose(-1, -2)).double())
    apart = logits[1] - logits[0]
    apart = apart - apart.mean(dim=-1, keepdim=True)  # what a row shares, softmax ignores
    assert logits[0].abs().max() > 100
    assert apart.abs().max() < 4e-4


def test_upright_axes_keep_distances_and_put_the_middle_on_the_third():
    random = torch.Generator().manual_seed(0)
    for lat, lon in ((46.0, 8.0), (-80.0, 120.0), (90.0, 0.0), (-90.0, 0.0), (0.0, 180.0)):
        spread = torch.rand(2, 50, generator=random, dtype=torch.float64) * 5
        places = unit_vectors((lat + spread[0]).clamp(-90, 90), lon + spread[1])
        axes = upright(places)
        torch.testing.assert_close(axes @ axes.T, torch.eye(3, dtype=torch.float64))
        middle = (places @ axes).mean(dim=0)
        assert middle[:2].abs().max() < 1e-12
        assert middle[2].abs() > 0.9


def test_places_all_around_have_no_middle_and_any_axes_serve():
    places = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    axes = upright(places)
    torch.testing.assert_close(axes @ axes.T, torch.eye(3, dtype=torch.float64))
