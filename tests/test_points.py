"""Tokens that are places and no grid: which biases can, which cannot, and what they see."""

from dataclasses import replace

import pytest
import torch
from terrains import EVERY_BIAS
from test_other_hosts import Elsewhere

from climax_elevation import InputError, Terrain, attach_blocks, bias_off, build_bias, terrain_given
from climax_elevation.terrain.controls import controlled, shuffled

# of three stations: a valley, a slope beside it, a far summit
LAT, LON, HEIGHT_M = (
    torch.tensor([46.0, 46.1, 46.5]),
    torch.tensor([11.0, 11.1, 10.0]),
    torch.tensor([200.0, 900, 2700]),
)
GRID_ONLY = {"advection", "relative_2d", "relative_3d", "ridge", "topoflow"}


def stations(number=5, seed=0, **winds):
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(3, number, generator=generator)
    return Terrain.of_points(3000 * place[0], 45 + place[1], 10 + 2 * place[2], **winds)


def windy(number=5):
    return stations(number, u=torch.full((2, number), 3.0), v=torch.full((2, number), 4.0))


def on_points(bias_type, **bias_args):
    torch.manual_seed(0)
    made = Elsewhere()
    attach_blocks(made, bias_type, stack="net.layers", blocks="all", points=True, bias_args=bias_args)
    return made


def test_a_bias_of_three_stations_by_hand():
    bias = build_bias("physics", num_heads=1, wind=False, alpha_init=2.0)
    terrain = Terrain.of_points(HEIGHT_M, LAT, LON)
    # the valley reads the summit, 2.5 km above: -2 * 2.5; the summit reads whatever it wants
    expected = torch.tensor([[0, -1.4, -5.0], [0, 0, -3.6], [0, 0, 0]])
    assert torch.allclose(bias(*bias.inputs(terrain))[0, 0], expected)


def test_wind_speed_is_that_of_its_components():
    assert torch.equal(windy().speed, torch.full((2, 5), 5.0))


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_each_bias_works_at_points_or_says_that_it_wants_a_grid(case):
    name, arguments = EVERY_BIAS[case]
    parts = set(name.split("+"))
    made = on_points(name, **arguments)
    x, terrain = torch.randn(2, 5, 32), windy()
    if parts & GRID_ONLY and arguments.get("coords") != "physical":
        with (
            pytest.raises(InputError, match="needs a grid of patches, .* choose structure, physics"),
            terrain_given(made, terrain),
        ):
            made(x)
        return
    with terrain_given(made, terrain):
        out = made(x)
        with bias_off(made):
            without = made(x)
    assert (out - without).abs().max() > 1e-4


def test_as_many_tokens_as_the_terrain_has_places():
    made = on_points("physics", wind=False)
    for number in (5, 3):  # other stations in training than in use
        with terrain_given(made, stations(number)):
            assert made(torch.randn(1, number, 32)).shape == (1, number, 32)
    with terrain_given(made, stations(5)), pytest.raises(InputError, match="got 4 tokens, .* has 5 places"):
        made(torch.randn(1, 4, 32))


def test_order_of_stations_does_not_matter():
    made, x, order = on_points("relative_3d", coords="physical"), torch.randn(1, 5, 32), torch.tensor([3, 0, 4, 1, 2])
    with terrain_given(made, stations()):
        out = made(x)
    with terrain_given(made, stations().select(order)):
        assert torch.allclose(made(x[:, order]), out[:, order], atol=1e-5)


def test_points_and_grids_are_not_taken_for_each_other():
    grid = Terrain(elevation_m=1000 * torch.rand(1, 6), grid=(2, 3))
    with (
        pytest.raises(InputError, match="tokens that are points, and the terrain is of a grid"),
        terrain_given(on_points("physics", wind=False), grid),
    ):
        pass
    made = Elsewhere()
    attach_blocks(made, "physics", stack="net.layers", grid=(2, 3), bias_args={"wind": False})
    with (
        pytest.raises(InputError, match="tokens that are a grid, and the terrain is of points"),
        terrain_given(made, stations(6)),
    ):
        pass
    with pytest.raises(InputError, match="not both"):
        attach_blocks(Elsewhere(), "physics", stack="net.layers", grid=(2, 3), points=True)


def test_controls_give_each_station_the_height_of_another():
    terrain = Terrain.of_points(HEIGHT_M, LAT, LON)
    # from west to east: 2700, 200, 900 m; mirrored 900, 200, 2700 m
    assert controlled(terrain, "mirrored", shuffled(3, 0)).elevation_m.tolist() == [[200, 2700, 900]]
    over_the_dateline = replace(terrain, lon=torch.tensor([179.0, -179, 178]))
    assert controlled(over_the_dateline, "mirrored", shuffled(3, 0)).elevation_m.tolist() == [[200, 2700, 900]]
    assert sorted(controlled(stations(9), "permuted", shuffled(9, 1)).elevation_m[0].tolist()) == sorted(
        stations(9).elevation_m[0].tolist()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": [200.0, float("nan"), 900]}, "elevation_m has values that are not finite"),
        ({"lat": [46.0, 146, 46.5]}, "latitudes are degrees within"),
        (
            {"lat": [46.0, 46, 46.5], "lon": [11.0, 11, 10], "height": [200.0, 200, 900]},
            "tokens 0 and 1 are the same place",
        ),
        (
            {"lat": [46.0, 46, 46.5], "lon": [-1.0, 359, 10], "height": [200.0, 200, 900]},
            "tokens 0 and 1 are the same place",
        ),
        (
            {"lat": [-90.0, -90, 46.5], "lon": [5.0, 6, 10], "height": [200.0, 200, 900]},
            "tokens 0 and 1 are the same place",
        ),
        ({"lat": [[46.0, 47, 48]]}, r"lat is \[patches\], not \[1, 3\]"),
        ({"height": 200.0}, r"elevation_m is \[batch or 1, patches\], not \[\]"),
        ({"lat": [46.0], "lon": [11.0], "height": [200.0]}, "between two places or more, not 1"),
        ({"lat": [46.0, 47.0]}, "lat has 2 patches, and elevation_m has 3"),
    ],
)
def test_bad_points_are_told_in_a_sentence(change, message):
    given = {"height": HEIGHT_M, "lat": LAT, "lon": LON} | {name: torch.tensor(v) for name, v in change.items()}
    with pytest.raises(InputError, match=message):
        Terrain.of_points(given["height"], given["lat"], given["lon"])


def test_what_is_no_tensor_is_named():
    with pytest.raises(InputError, match="elevation_m is a tensor, not ndarray: torch.as_tensor"):
        Terrain.of_points(HEIGHT_M.numpy(), LAT, LON)
    with pytest.raises(InputError, match="lat is a tensor, not list"):
        Terrain(HEIGHT_M[None], (1, 3), lat=LAT.tolist(), lon=LON)


@pytest.mark.parametrize("land", [80.0, float("nan")])
def test_land_that_is_handed_in_is_a_share(land):
    made, terrain = on_points("structure", land=True), stations(land=torch.tensor([0, 0, 1, 1, land]))
    with pytest.raises(InputError, match="share of land from the terrain that was handed in is .* not within 0 to 1"):
        terrain_given(made, terrain).__enter__()


def test_winds_that_are_handed_in_without_their_speed_are_looked_at():
    made = Elsewhere()
    attach_blocks(made, "physics", stack="net.layers", grid=(1, 2), bias_args={"wind": False})
    terrain = Terrain(torch.tensor([[0.0, 900]]), (1, 2), u=torch.full((1, 2), 900.0), v=torch.zeros(1, 2))
    with pytest.raises(InputError, match="wind speed reaches 900 m/s"):
        terrain_given(made, terrain).__enter__()
