"""StructureBias: by hand, against a plain loop, then what distances on a sphere and heights have to obey."""

import math
from dataclasses import replace

import pytest
import torch
from terrains import global_terrain

from climax_elevation import InputError, Terrain, biased_attention
from climax_elevation.bias import StructureBias
from climax_elevation.host import StandInClimaX
from climax_elevation.terrain.controls import level, mirrored, permuted

RADIUS_M = 6.371e6


def made(terrain, num_heads=4, **arguments):
    bias = StructureBias(num_heads, terrain.grid, **arguments).double()
    bias.prepare(terrain)
    return bias


def row(lats, lons, heights):
    return Terrain(
        torch.tensor([heights], dtype=torch.float64),
        (1, len(lats)),
        lat=torch.tensor(lats, dtype=torch.float64),
        lon=torch.tensor(lons, dtype=torch.float64),
    )


def plane(rows, columns, spacing_m, seed=0):
    heights = torch.rand(1, rows * columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3000
    return Terrain(heights, (rows, columns), spacing_m=spacing_m)


def chord(lat_i, lon_i, lat_j, lon_j):
    """Straight distance in Earth radii, from the haversine of the angle: no difference of unit vectors."""
    phi_i, phi_j = math.radians(lat_i), math.radians(lat_j)
    haversine = math.sin((phi_j - phi_i) / 2) ** 2
    haversine += math.cos(phi_i) * math.cos(phi_j) * math.sin(math.radians(lon_j - lon_i) / 2) ** 2
    return 2 * math.sqrt(haversine)


def loop_bias(terrain, elevation, length, height):
    """As the equation has it, a pair and a head at a time; `length` in Earth radii."""
    lat, lon = terrain.lat.tolist(), terrain.lon.tolist()
    values = []
    for z in elevation:
        for h in range(len(length)):
            for i in range(len(lat)):
                for j in range(len(lat)):
                    b = -(chord(lat[i], lon[i], lat[j], lon[j]) ** 2) / (2 * length[h] ** 2)
                    if height is not None:
                        b = b - (z[i] - z[j]) ** 2 / (2 * height[h] ** 2)
                    values.append(b)
    return torch.stack(values).reshape(len(elevation), len(length), len(lat), len(lat))


def test_three_places_by_hand():
    # 0, 60 and 90 E on the equator: chords 2 sin 30 = 1 and 2 sin 45 = sqrt 2, and 2 sin 15 between the last two.
    # With L of one Earth radius and V of 500 m, heights 0, 500 and 1500 m:
    # b(0, 1) = -1/2 - (500/500)^2 / 2 = -1;   b(0, 2) = -2/2 - (1500/500)^2 / 2 = -5.5
    terrain = row([0.0, 0.0, 0.0], [0.0, 60.0, 90.0], [0.0, 500.0, 1500.0])
    bias = made(terrain, num_heads=1)
    with torch.no_grad():
        bias.log_length.copy_(-bias.patch_rad.log())
        bias.log_height.fill_(math.log(500.0))
    values = bias(*bias.inputs(terrain))[0, 0]
    assert values[0].tolist() == pytest.approx([0.0, -1.0, -5.5], rel=1e-6, abs=1e-12)
    assert values[1, 2].item() == pytest.approx(-2 * math.sin(math.radians(15)) ** 2 - 2, rel=1e-6)


@pytest.mark.parametrize("vertical", [True, False])
@pytest.mark.parametrize("terrain_batch", [1, 2])
def test_equals_the_plain_loop_with_every_gradient(vertical, terrain_batch):
    terrain = global_terrain((3, 4), terrain_batch=terrain_batch)
    bias = made(terrain, num_heads=3, vertical=vertical)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in bias.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    position, *_ = bias.inputs(terrain)
    elevation = terrain.elevation_m.clone().requires_grad_()
    got = bias(position, elevation) if vertical else bias(position)
    learned = [parameter.detach().clone().requires_grad_() for parameter in bias.parameters()]
    length = learned[0].exp() * bias.patch_rad
    height = learned[1].exp() if vertical else None
    expected = loop_bias(terrain, elevation if vertical else elevation[:1], length, height)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(expected)
    other = [elevation] if vertical else []
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), [*bias.parameters(), *other]),
        torch.autograd.grad((expected * weights).sum(), [*learned, *other]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("terrain", "arguments", "rank"),
    [
        (global_terrain(terrain_batch=2), {}, 5),
        (global_terrain(), {"vertical": False}, 3),
        (plane(4, 8, 12e3), {}, 5),
        (plane(4, 8, 12e3), {"vertical": False}, 3),
    ],
)
def test_factors_leave_out_what_softmax_ignores_and_have_every_gradient(terrain, arguments, rank):
    bias = made(terrain, **arguments)
    inputs = bias.inputs(terrain)
    f, g = bias.factors(*inputs)
    assert f.shape == (len(inputs[-1]), 4, 32, rank)
    assert g.shape == (len(inputs[-1]), 1, 32, rank)
    values, product = bias(*inputs), f @ g.transpose(-1, -2)
    difference = values - product
    torch.testing.assert_close(difference, difference[..., :1].expand_as(difference), rtol=1e-9, atol=1e-9)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    learned = list(bias.parameters())
    for a, b in zip(
        torch.autograd.grad((values.softmax(-1) * weights).sum(), learned),
        torch.autograd.grad((product.softmax(-1) * weights).sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_flat_ground_is_distance_alone():
    terrain = level(global_terrain())
    with_height, without = made(terrain), made(terrain, vertical=False)
    assert torch.equal(with_height(*with_height.inputs(terrain)), without(*without.inputs(terrain)))
    assert [name for name, _ in without.named_parameters()] == ["log_length"]
    high = replace(terrain, elevation_m=terrain.elevation_m + 3000)
    assert torch.equal(with_height(*with_height.inputs(high)), without(*without.inputs(terrain)))


def test_it_does_not_matter_from_where_heights_are_counted():
    terrain = global_terrain()
    bias = made(terrain)
    raised = replace(terrain, elevation_m=terrain.elevation_m + 2000)
    torch.testing.assert_close(bias(*bias.inputs(raised)), bias(*bias.inputs(terrain)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("turn", [90.0, 180.0, 359.0, -720.0])
def test_turning_the_globe_turns_nothing(turn):
    terrain = global_terrain()
    bias = made(terrain)
    turned = replace(terrain, lon=terrain.lon + turn)
    torch.testing.assert_close(bias(*bias.inputs(turned)), bias(*bias.inputs(terrain)), rtol=1e-9, atol=1e-9)


def test_over_the_dateline_and_the_pole_the_shorter_way():
    # 179 E and 179 W are 2 degrees apart, 89 N on opposite meridians too, and at the pole all longitudes are one place
    lats = [0.0, 0.0, 0.0, 0.0, 89.0, 89.0, 90.0, 90.0]
    lons = [179.0, -179.0, 0.0, 2.0, 10.0, 190.0, 0.0, 123.0]
    terrain = row(lats, lons, [0.0] * 8)
    bias = made(terrain)
    values = bias(*bias.inputs(terrain))[0, 0]
    torch.testing.assert_close(values[0, 1], values[2, 3], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values[4, 5], values[2, 3], rtol=1e-9, atol=1e-12)
    assert values[6, 7].item() == pytest.approx(0.0, abs=1e-12)
    assert values[2, 3] < 0


def test_on_a_plane_by_hand():
    # 12 km apart, L two patches, V 600 m: two columns and one row apart and 900 m higher is -5/8 - 9/8
    terrain = plane(2, 3, 12e3)
    terrain = replace(terrain, elevation_m=torch.tensor([[100.0, 0, 0, 0, 0, 1000]], dtype=torch.float64))
    bias = made(terrain, num_heads=1)
    with torch.no_grad():
        bias.log_length.fill_(math.log(2))
        bias.log_height.fill_(math.log(600))
    assert bias(*bias.inputs(terrain))[0, 0, 0, 5].item() == pytest.approx(-5 / 8 - 9 / 8, rel=1e-6)


def test_a_small_plane_and_a_small_patch_of_sphere_agree():
    rows, columns, step = 5, 6, 0.1
    flat = plane(rows, columns, math.radians(step) * RADIUS_M)
    lat = (torch.arange(rows, dtype=torch.float64) - 2) * step
    lon = (torch.arange(columns, dtype=torch.float64) - 2.5) * step
    round_ = replace(flat, spacing_m=None, lat=lat.repeat_interleave(columns), lon=lon.repeat(rows))
    on_plane, on_sphere = made(flat), made(round_)
    torch.testing.assert_close(
        on_plane(*on_plane.inputs(flat)), on_sphere(*on_sphere.inputs(round_)), rtol=1e-4, atol=1e-4
    )


def test_heads_start_with_all_heights_and_from_a_patch_to_a_quarter_of_the_grid():
    bias = StructureBias(8, (32, 64))
    assert bias.heights_m.tolist() == pytest.approx([300, 600, 150, 1e4] * 2, rel=1e-6)
    lengths = bias.log_length.exp().tolist()
    assert (lengths[0], lengths[-1]) == (1.0, pytest.approx(16.0))
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 8
    alone = StructureBias(1, (32, 64))
    assert alone.log_length.exp().item() == pytest.approx(4.0)
    assert alone.heights_m.tolist() == pytest.approx([300])
    for parameter in StructureBias(5, (4, 4)).parameters():
        assert parameter.shape == (5,)
    assert StructureBias(3, (4, 4)).log_length.exp().max().item() == pytest.approx(2.0)


def test_lengths_keep_their_kilometres_on_another_grid():
    coarse, fine = global_terrain((4, 8)), global_terrain((8, 16))
    trained = made(coarse)
    assert trained.lengths_m[0].item() == pytest.approx(math.radians(45) * RADIUS_M, rel=1e-6)
    other = StructureBias(4, fine.grid).double()
    other.load_state_dict(trained.state_dict())
    other.prepare(fine)
    assert torch.equal(other.lengths_m, trained.lengths_m)
    assert torch.equal(other.heights_m, trained.heights_m)
    assert not torch.equal(made(fine).lengths_m, trained.lengths_m)


@pytest.mark.parametrize("engine", ["sdpa", "tiled"])
@pytest.mark.parametrize("spacing_deg", [0.25, 0.03])
def test_float32_keeps_short_lengths_and_high_ground(spacing_deg, engine):
    """1 / L^2 is up to 4e6 here and z^2 / 2 V^2 reaches 700: products of raw coordinates in float32 would be noise."""
    n = 24
    lat = 45 + spacing_deg * torch.arange(n, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    terrain = Terrain(
        (torch.rand(1, n * n, generator=generator) * 5600).round(),
        (n, n),
        lat=lat.repeat_interleave(n),
        lon=lat.repeat(n),
    )
    exact, single = made(terrain), StructureBias(4, terrain.grid)
    single.prepare(terrain)
    with torch.no_grad():
        for bias in (exact, single):
            bias.log_height.fill_(math.log(150))
            bias.log_length[0] = 0
    expected = exact(*exact.inputs(terrain))
    assert ((terrain.elevation_m.max() / 150) ** 2 / 2).item() > 600
    torch.testing.assert_close(
        single(*single.inputs(terrain)).softmax(-1).double(), expected.softmax(-1), rtol=2e-3, atol=1e-6
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, n * n, 8) for _ in range(3))
    got = biased_attention(q, k, v, single, single.inputs(terrain), engine=engine)
    dense = biased_attention(q.double(), k.double(), v.double(), exact, exact.inputs(terrain), engine="dense")
    torch.testing.assert_close(got.double(), dense, rtol=1e-3, atol=1e-3)


def stations(lats, lons, heights):
    return Terrain.of_points(*(torch.tensor(values, dtype=torch.float64) for values in (heights, lats, lons)))


def test_stations_are_weighed_as_patches_are():
    grid = global_terrain()
    patches = made(grid)
    places = stations(grid.lat.tolist(), grid.lon.tolist(), grid.elevation_m[0].tolist())
    bias = StructureBias(4, (8, 8)).double()
    bias.load_state_dict(patches.state_dict())
    bias.prepare(places)
    assert torch.equal(bias(*bias.inputs(places)), patches(*patches.inputs(grid)))


def test_lengths_of_stations_begin_as_shares_of_the_square_that_they_are_spread_over():
    # a lattice of 60 x 60 places over 6 x 6 degrees at the equator: the square has a side of 6 degrees
    axis = (torch.arange(60, dtype=torch.float64) + 0.5) / 10 - 3
    lat, lon = axis.repeat_interleave(60), axis.repeat(60)
    bias = StructureBias(4, (8, 8)).double()
    bias.prepare(Terrain.of_points(torch.zeros(3600, dtype=torch.float64), lat, lon))
    side = math.radians(6) * RADIUS_M
    assert bias.lengths_m[0].item() == pytest.approx(side / 8, rel=1e-3)
    assert bias.lengths_m[-1].item() == pytest.approx(side / 4, rel=1e-3)
    with pytest.raises(InputError, match="needs places that lie apart, and these are all one"):
        StructureBias(4, (8, 8)).prepare(stations([1.0, 1.0], [2.0, 2.0], [0.0, 100.0]))


def with_land(terrain, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return replace(terrain, land=torch.rand(terrain.elevation_m.shape, generator=generator, dtype=torch.float64))


def test_the_share_of_land_is_a_third_term():
    terrain = with_land(global_terrain())
    both, heights = made(terrain, land=True), made(terrain)
    with torch.no_grad():
        both.log_land.copy_(torch.tensor([0.25, 0.5, 1.0, 2.0]).log())
    values = both(*both.inputs(terrain))
    for h, share in enumerate((0.25, 0.5, 1.0, 2.0)):
        for i, j in ((0, 1), (5, 30), (17, 17)):
            apart = (terrain.land[0, i] - terrain.land[0, j]).item()
            expected = heights(*heights.inputs(terrain))[0, h, i, j].item() - apart**2 / (2 * share**2)
            assert values[0, h, i, j].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    f, g = both.factors(*both.inputs(terrain))
    assert f.shape[-1] == 7
    torch.testing.assert_close((f @ g.transpose(-1, -2)).softmax(-1), values.softmax(-1), rtol=1e-9, atol=1e-12)
    values.square().sum().backward()
    assert (both.log_land.grad != 0).all()
    only_land = made(terrain, land=True, vertical=False)
    assert [name for name, _ in only_land.named_parameters()] == ["log_length", "log_land"]
    with pytest.raises(InputError, match="needs the share of land, and this terrain has none: give a channel"):
        both.inputs(replace(terrain, land=None))


def test_controls_are_of_the_land_too():
    terrain = with_land(global_terrain())
    assert torch.equal(mirrored(terrain).land.unflatten(1, (4, 8)), terrain.land.unflatten(1, (4, 8)).flip(2))
    assert torch.equal(
        mirrored(terrain).elevation_m.unflatten(1, (4, 8)), terrain.elevation_m.unflatten(1, (4, 8)).flip(2)
    )
    order = torch.randperm(32)
    assert torch.equal(permuted(terrain, order).land, terrain.land[:, order])
    assert (level(terrain).land == 1).all()
    assert torch.equal(terrain.select([3, 1]).land, terrain.land[:, [3, 1]])
    places = Terrain.of_points(terrain.elevation_m[0], terrain.lat, terrain.lon, land=terrain.land[0])
    assert torch.equal(places.land, terrain.land)


def host(**bias_args):
    names = ["orography", "land_sea_mask"]
    arguments = {"blocks": "all", "land": True, **bias_args}
    flags = {"use_physics_mask": True, "bias_type": "structure", "bias_args": arguments}
    made = StandInClimaX(names, [8, 16], patch_size=2, embed_dim=32, depth=1, decoder_depth=1, num_heads=4, **flags)
    made.terrain.set_statistics(
        {"orography": 800.0, "land_sea_mask": 0.3}, {"orography": 900.0, "land_sea_mask": 0.4}, "a"
    )
    made.terrain.set_grid(torch.linspace(-70, 70, 8).numpy(), torch.arange(0, 360, 22.5).numpy(), "a")
    return made, names


def test_a_model_reads_the_share_of_land_from_its_channel():
    model, names = host()
    share = torch.rand(2, 8, 16)
    x = torch.stack([torch.rand(2, 8, 16) * 3, (share - 0.3) / 0.4], dim=1)
    terrain = model.terrain(x, torch.zeros(2), names)
    torch.testing.assert_close(terrain.land, torch.nn.functional.avg_pool2d(share[:, None], 2).flatten(1))
    model(x, None, torch.zeros(2), names, names, None, None)[1].square().sum().backward()
    assert (model.blocks[0].attn.bias.log_land.grad != 0).all()
    assert {"terrain.land_mean", "terrain.land_std"} <= set(model.state_dict())
    assert host(land=False)[0].terrain(x, None, names).land is None
    assert not any("land" in key for key in host(land=False)[0].state_dict())
    with pytest.raises(InputError, match="the share of land from channel 'land_sea_mask' is .* in per cent"):
        model.terrain(torch.stack([x[:, 0], 100 * x[:, 1]], dim=1), torch.zeros(2), names)
    with pytest.raises(InputError, match="needs the share of land, and the model's default_vars .* lack 'lsm'"):
        host(land_variable="lsm")
    with pytest.raises(InputError, match="land_variable names a channel"):
        host(land_variable="")


def test_land_that_is_said_to_be_static_is_the_same_for_all_samples():
    model, names = host(static_terrain=True)
    ground, share = torch.rand(8, 16) * 3, (torch.rand(8, 16) - 0.3) / 0.4
    x = torch.stack([ground, share]).repeat(2, 1, 1, 1)
    assert model.terrain(x, torch.zeros(2), names).land.shape == (1, 32)
    x[1, 1, 3, 5] += 0.05 / 0.4
    with pytest.raises(InputError, match="static_terrain is true, and the share of land .* differs .* by up to 0.05"):
        model.terrain(x, torch.zeros(2), names)


def test_what_does_not_fit_is_refused():
    terrain = global_terrain()
    bias = made(terrain)
    position, elevation = bias.inputs(terrain)
    with pytest.raises(InputError, match="the structure bias does not know its grid yet"):
        StructureBias(2, terrain.grid)(position, elevation)
    with pytest.raises(InputError, match="needs latitudes and longitudes"):
        StructureBias(2, terrain.grid).inputs(replace(terrain, lat=None))
    with pytest.raises(InputError, match="needs the whole grid of 4 x 8 patches once, and got 2 of them"):
        StructureBias(2, terrain.grid).inputs(terrain.select([0, 1]))
    for wrong in (position[0], position[..., :1]):
        with pytest.raises(InputError, match=r"position is \[batch or 1, tokens, 3\]"):
            bias(wrong, elevation)
    with pytest.raises(InputError, match=r"elevation is \[batch or 1, tokens\]"):
        bias(position, elevation[0])
    with pytest.raises(InputError, match="takes position and elevation, not 1 tensors"):
        bias(position)
    without = made(terrain, vertical=False)
    with pytest.raises(InputError, match="vertical=False and land=False takes position, not 2 tensors"):
        without(position, elevation)
    with pytest.raises(InputError, match="vertical is true or false, not 1"):
        StructureBias(2, terrain.grid, vertical=1)
    with pytest.raises(InputError, match=r"within \[-90, 90\]"):
        bias.inputs(replace(terrain, lat=terrain.lon))
