"""AdvectionBias: by hand, against a plain loop on the sphere, then what winds on a sphere have to obey."""

import math

import pytest
import torch
from terrains import global_terrain

from climax_elevation import InputError, Terrain, biased_attention
from climax_elevation.bias import AdvectionBias

RADIUS_M = 6.371e6


def equator(lons, u, hours=24.0, lat=0.0):
    """A row of patches under one eastward wind."""
    n = len(lons)
    wind = torch.full((1, n), u, dtype=torch.float64)
    return Terrain(
        torch.zeros(1, n, dtype=torch.float64),
        (1, n),
        u=wind,
        v=torch.zeros_like(wind),
        speed=wind.abs(),
        lat=torch.full((n,), lat, dtype=torch.float64),
        lon=torch.tensor(lons, dtype=torch.float64),
        lead_hours=torch.tensor([hours], dtype=torch.float64),
    )


def made(terrain, num_heads=4, **arguments):
    bias = AdvectionBias(num_heads, terrain.grid, **arguments).double()
    bias.prepare(terrain)
    return bias


def place(lat, lon):
    phi, lam = math.radians(lat), math.radians(lon)
    return [math.cos(phi) * math.cos(lam), math.cos(phi) * math.sin(lam), math.sin(phi)]


def departure(lat, lon, u, v, radians_per_m_s, fraction):
    """Rotate the place about the axis that is normal to it and its wind (Rodrigues), against the wind."""
    phi, lam = math.radians(lat), math.radians(lon)
    x = torch.tensor(place(lat, lon), dtype=torch.float64)
    east = torch.tensor([-math.sin(lam), math.cos(lam), 0], dtype=torch.float64)
    north = torch.tensor(
        [-math.sin(phi) * math.cos(lam), -math.sin(phi) * math.sin(lam), math.cos(phi)], dtype=torch.float64
    )
    wind = u * east + v * north
    if wind.norm() == 0:
        return x
    axis = torch.linalg.cross(x, wind / wind.norm())
    angle = -fraction * wind.norm() * radians_per_m_s
    return x * torch.cos(angle) + torch.linalg.cross(axis, x) * torch.sin(angle)


def loop_bias(terrain, kappa, fraction):
    heads, samples = len(kappa), []
    for b in range(len(terrain.u)):
        radians = terrain.lead_hours[b].item() * 3600 / RADIUS_M
        lat, lon = terrain.lat.tolist(), terrain.lon.tolist()
        places = [torch.tensor(place(*at), dtype=torch.float64) for at in zip(lat, lon, strict=True)]
        for h in range(heads):
            for i in range(len(lat)):
                origin = departure(lat[i], lon[i], terrain.u[b, i], terrain.v[b, i], radians, fraction[h])
                samples += [kappa[h] * ((x * origin).sum() - 1) for x in places]
    return torch.stack(samples).reshape(len(terrain.u), heads, len(lat), len(lat))


def test_the_wind_of_one_patch_by_hand():
    # 0, 10, 20 E on the equator; wind so fast that 24 h carry air by 10 degrees: the kernel of full fraction at
    # 10 E is centred on 0 E. p = 10 degrees = 0.17453; kappa = 1 / p^2 = 32.83.
    # b(10 E -> 20 E): 20 degrees from the centre: 32.83 (cos 20 - 1) = -1.980
    speed = math.radians(10) * RADIUS_M / (24 * 3600)
    terrain = equator([0.0, 10.0, 20.0], speed)
    bias = made(terrain, num_heads=1)
    with torch.no_grad():
        bias.log_kappa.fill_(0.0)
        bias.fraction.fill_(1.0)
    values = bias(*bias.inputs(terrain))[0, 0, 1]
    p = math.radians(10)
    assert values.tolist() == pytest.approx(
        [0.0, (math.cos(p) - 1) / p**2, (math.cos(2 * p) - 1) / p**2], rel=1e-9, abs=1e-9
    )
    assert values[2].item() == pytest.approx(-1.980, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_plain_loop_with_every_gradient(seed):
    terrain = global_terrain((3, 4), seed=seed, speed_m_s=30.0, hours=48.0)
    torch.manual_seed(seed)
    bias = made(terrain, num_heads=3)
    with torch.no_grad():
        bias.log_kappa.add_(torch.randn(3) * 0.3)
        bias.fraction.add_(torch.randn(3) * 0.3)
    log_kappa = bias.log_kappa.detach().clone().requires_grad_()
    fraction = bias.fraction.detach().clone().requires_grad_()
    spacing = math.radians(60.0)
    expected = loop_bias(terrain, log_kappa.exp() / spacing**2, fraction)
    got = bias(*bias.inputs(terrain))
    # patch_rad passed through float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), [bias.log_kappa, bias.fraction]),
        torch.autograd.grad((expected * weights).sum(), [log_kappa, fraction]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_factors_are_of_rank_three_and_leave_out_what_softmax_ignores():
    terrain = global_terrain()
    bias = made(terrain)
    inputs = bias.inputs(terrain)
    f, g = bias.factors(*inputs)
    assert f.shape == (2, 4, 32, 3)
    assert g.shape == (1, 1, 32, 3)
    difference = bias(*inputs) - f @ g.transpose(-1, -2)
    torch.testing.assert_close(difference, difference[..., :1].expand_as(difference), rtol=1e-9, atol=1e-9)


def test_calm_air_stays_where_it_is():
    terrain = equator([0.0, 10.0, 20.0, 30.0], 0.0)
    values = made(terrain)(*made(terrain).inputs(terrain))
    assert (values.argmax(-1) == torch.arange(4)).all()
    torch.testing.assert_close(values, values.transpose(-1, -2))


def test_a_west_wind_looks_west_and_further_in_more_time():
    lons = [10.0 * n for n in range(36)]
    looks = []
    for hours in (24.0, 48.0, 72.0):
        terrain = equator(lons, math.radians(10) * RADIUS_M / (24 * 3600), hours)
        bias = made(terrain)
        with torch.no_grad():
            bias.fraction.fill_(1.0)
        looks.append(bias(*bias.inputs(terrain))[0, 0].argmax(-1))
    here = torch.arange(36)
    for patches, found in zip((1, 2, 3), looks, strict=True):
        assert torch.equal(found, (here - patches) % 36)  # over the dateline too


def test_a_southerly_goes_over_the_pole():
    """Air at 85 N that came north by 10 degrees across the pole is from 85 N on the other side."""
    lats, lons = [85.0, 85.0], [0.0, 180.0]
    speed = math.radians(10) * RADIUS_M / (24 * 3600)
    terrain = Terrain(
        torch.zeros(1, 2, dtype=torch.float64),
        (1, 2),
        u=torch.zeros(1, 2, dtype=torch.float64),
        v=torch.full((1, 2), -speed, dtype=torch.float64),  # northerly: from the pole
        speed=torch.full((1, 2), speed),
        lat=torch.tensor(lats, dtype=torch.float64),
        lon=torch.tensor(lons, dtype=torch.float64),
        lead_hours=torch.tensor([24.0], dtype=torch.float64),
    )
    bias = made(terrain)
    with torch.no_grad():
        bias.fraction.fill_(1.0)
    values = bias(*bias.inputs(terrain))[0, 0]
    assert values[0, 1].item() == pytest.approx(0.0, abs=1e-9)
    assert values[0, 0].item() < -0.1


@pytest.mark.parametrize("turn", [90.0, 180.0, 359.0])
def test_turning_the_globe_turns_nothing(turn):
    from dataclasses import replace

    terrain = global_terrain()
    bias = made(terrain)
    turned = replace(terrain, lon=terrain.lon + turn)
    torch.testing.assert_close(bias(*bias.inputs(terrain)), bias(*bias.inputs(turned)), rtol=1e-9, atol=1e-9)


def test_heads_start_with_every_fraction_and_every_width():
    grid = (32, 64)
    bias = AdvectionBias(16, grid)
    widths = sorted({round(value, 3) for value in (-bias.log_kappa / 2).exp().tolist()})
    assert widths[0] == 1.0
    assert widths[-1] == 16.0  # patches: a quarter of the longer side
    assert sorted({round(value, 6) for value in bias.fraction.tolist()}) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert len(set(zip(bias.log_kappa.tolist(), bias.fraction.tolist(), strict=True))) == 16
    for heads in (1, 2, 3, 5, 7, 8, 12):
        some = AdvectionBias(heads, grid)
        assert len(set(zip(some.log_kappa.tolist(), some.fraction.tolist(), strict=True))) == heads
        assert some.fraction.max().item() == 1.0


def test_a_kernel_keeps_its_kilometres_on_another_grid():
    coarse, fine = global_terrain((4, 8)), global_terrain((8, 16))
    trained = made(coarse)
    other = AdvectionBias(4, fine.grid).double()
    other.load_state_dict(trained.state_dict())
    other.prepare(fine)
    assert other.patch_rad == trained.patch_rad
    width = lambda bias: ((-bias.log_kappa / 2).exp() * bias.patch_rad).tolist()  # noqa: E731
    assert width(other) == width(trained)
    assert width(made(fine)) != width(trained)


def plane(rows, columns, u, v, spacing_m, hours):
    n = rows * columns
    return Terrain(
        torch.zeros(1, n, dtype=torch.float64),
        (rows, columns),
        u=torch.full((1, n), u, dtype=torch.float64),
        v=torch.full((1, n), v, dtype=torch.float64),
        speed=torch.full((1, n), math.hypot(u, v), dtype=torch.float64),
        lead_hours=torch.tensor([hours], dtype=torch.float64),
        spacing_m=spacing_m,
    )


def test_on_a_plane_by_hand_and_of_rank_three():
    # patches 12 km apart, wind 10 m/s from the south-west for 1 h: 25.5 km back along both axes
    terrain = plane(5, 6, 10.0, 10.0, 12e3, 1.0)
    bias = made(terrain, num_heads=1)
    with torch.no_grad():
        bias.log_kappa.fill_(0.0)
        bias.fraction.fill_(1.0)
    inputs = bias.inputs(terrain)
    values = bias(*inputs)[0, 0]
    for i in range(30):
        for j in range(30):
            dx = (j % 6) * 12e3 - ((i % 6) * 12e3 - 36e3)
            dy = (j // 6) * 12e3 - ((i // 6) * 12e3 - 36e3)
            expected = -((dx / 12e3) ** 2 + (dy / 12e3) ** 2) / 2
            assert values[i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    f, g = bias.factors(*inputs)
    assert f.shape[-1] == g.shape[-1] == 3
    torch.testing.assert_close((f @ g.transpose(-1, -2)).softmax(-1), bias(*inputs).softmax(-1), rtol=1e-9, atol=1e-12)


def test_a_small_plane_and_a_small_patch_of_sphere_agree():
    """Around (0 N, 0 E) 0.1 degrees apart, the sphere is flat to a millionth."""
    rows, columns, step = 5, 6, 0.1
    spacing = math.radians(step) * RADIUS_M
    flat = plane(rows, columns, 7.0, -4.0, spacing, 1.0)
    lat = (torch.arange(rows, dtype=torch.float64) - 2) * step
    lon = (torch.arange(columns, dtype=torch.float64) - 2.5) * step
    from dataclasses import replace

    round_ = replace(flat, spacing_m=None, lat=lat.repeat_interleave(columns), lon=lon.repeat(rows))
    on_plane, on_sphere = made(flat), made(round_)
    torch.testing.assert_close(
        on_plane(*on_plane.inputs(flat)), on_sphere(*on_sphere.inputs(round_)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("spacing_deg", [0.25, 0.03])
def test_float32_keeps_narrow_kernels_on_fine_grids(spacing_deg):
    """kappa is 5e4 and 4e6 here: products of unit vectors in float32 would be off by tens of per cent."""
    n = 24
    lat = 45 + spacing_deg * torch.arange(n, dtype=torch.float64)
    terrain = Terrain(
        torch.zeros(1, n * n),
        (n, n),
        u=torch.full((1, n * n), 3.0),
        v=torch.full((1, n * n), -2.0),
        speed=torch.full((1, n * n), 3.6),
        lat=lat.repeat_interleave(n),
        lon=lat.repeat(n),
        lead_hours=torch.tensor([1.0]),
    )
    exact = made(terrain)
    single = AdvectionBias(4, terrain.grid)
    single.prepare(terrain)
    expected = exact(*exact.inputs(terrain)).softmax(-1)
    torch.testing.assert_close(single(*single.inputs(terrain)).softmax(-1).double(), expected, rtol=5e-3, atol=1e-6)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, n * n, 8) for _ in range(3))
    fused = biased_attention(q, k, v, single, single.inputs(terrain), engine="sdpa")
    dense = biased_attention(q.double(), k.double(), v.double(), exact, exact.inputs(terrain), engine="dense")
    torch.testing.assert_close(fused.double(), dense, rtol=1e-3, atol=1e-3)


def test_a_month_of_wind_is_refused():
    # 10 m/s for 730 hours are 26280 km
    terrain = equator([0.0, 90.0, 180.0, 270.0], 10.0, hours=730.0)
    bias = AdvectionBias(2, terrain.grid)
    with pytest.raises(InputError, match=r"reaches 26280 km, past half way around the Earth.*a month's"):
        bias.inputs(terrain)


def test_coordinates_and_states_that_do_not_fit_are_refused():
    from dataclasses import replace

    terrain = global_terrain()
    with pytest.raises(InputError, match="does not know its grid yet"):
        AdvectionBias(2, terrain.grid)(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))
    bias = made(terrain)
    for position, travel in (((1, 4, 4), (1, 4, 4)), ((1, 4, 3), (1, 4, 2)), ((4, 3), (4, 3))):
        with pytest.raises(InputError, match=r"position and travel are \[batch or 1, tokens, 3\]"):
            bias(torch.zeros(position), torch.zeros(travel))
    with pytest.raises(InputError, match=r"within \[-90, 90\]"):
        bias.inputs(replace(terrain, lat=terrain.lon))
    with pytest.raises(InputError, match="needs the whole grid of 4 x 8 patches once, and got 2 of them"):
        AdvectionBias(2, terrain.grid).inputs(terrain.select([0, 1]))
    with pytest.raises(InputError, match="width_scale is a number of widths above 0"):
        AdvectionBias(2, terrain.grid, width_scale=0)


def test_few_heads_and_small_grids_start_as_they_should():
    # one width for fewer than four heads, the square root of the widest; that is two patches on grids up to 8 long
    for heads in (1, 2, 3):
        widths = (-AdvectionBias(heads, (4, 4)).log_kappa / 2).exp()
        torch.testing.assert_close(widths, torch.full((heads,), 2**0.5))
    assert (-AdvectionBias(4, (4, 4)).log_kappa / 2).exp().max().item() == pytest.approx(2.0)


def test_what_is_missing_is_said_when_it_is_prepared():
    from dataclasses import replace

    terrain = global_terrain()
    for name in ("u", "lead_hours", "lat"):
        with pytest.raises(InputError, match="the advection bias needs"):
            AdvectionBias(2, terrain.grid).prepare(replace(terrain, **{name: None}))


def test_one_gust_of_a_month_is_enough_to_refuse():
    from dataclasses import replace

    terrain = equator([0.0, 90.0, 180.0, 270.0], 1.0, hours=730.0)
    u = terrain.u.clone()
    u[0, 2] = 10.0
    with pytest.raises(InputError, match="reaches 26280 km"):
        AdvectionBias(2, terrain.grid).inputs(replace(terrain, u=u))


def test_samples_on_planes_of_their_own():
    bias = made(plane(3, 4, 5.0, 2.0, 12e3, 1.0)).double()
    inputs = [bias.inputs(plane(3, 4, 5.0, 2.0, spacing, 1.0)) for spacing in (12e3, 24e3)]
    together = bias(*(torch.cat(pair) for pair in zip(*inputs, strict=True)))
    torch.testing.assert_close(together, torch.cat([bias(*one) for one in inputs]), rtol=1e-9, atol=1e-9)


def test_directions_of_a_field_of_places_are_those_of_each():
    from climax_elevation.terrain.sphere import east_and_north, unit_vectors

    lat, lon = torch.tensor([[10.0, -40.0], [70.0, 0.0]]), torch.tensor([[20.0, 200.0], [-80.0, 90.0]])
    for got, each in zip(
        (unit_vectors(lat, lon), *east_and_north(lat, lon)),
        (unit_vectors(lat.flatten(), lon.flatten()), *east_and_north(lat.flatten(), lon.flatten())),
        strict=True,
    ):
        assert torch.equal(got, each.reshape(2, 2, 3))
