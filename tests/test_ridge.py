"""RidgeBias: one wall by hand, a plain loop, the dateline, the poles, and what is kept on disk."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from terrains import global_terrain

from climax_elevation import InputError, PhysicsBias, Terrain
from climax_elevation.bias import RidgeBias, paths
from climax_elevation.bias.paths import path_excess


def flat_grid(z):
    """Terrain of rows of heights, without latitudes."""
    z = torch.tensor(z, dtype=torch.float64)
    return Terrain(z.reshape(1, -1), tuple(z.shape))


def ridge(terrain, **options):
    bias = RidgeBias(wind=False, **options).double()
    return bias(*bias.inputs(terrain))[0, 0]


def loop_highest_on_lines(z):
    """Highest patch on the line from cell to cell, sampled twice a patch or more, one pair at a time."""
    rows, columns = z.shape
    out = torch.zeros(rows * columns, rows * columns, dtype=torch.float64)
    for i in range(rows * columns):
        for j in range(rows * columns):
            (r1, c1), (r2, c2) = divmod(i, columns), divmod(j, columns)
            n = math.ceil(2 * math.hypot(r2 - r1, c2 - c1)) | 1
            cells = [
                (math.floor(r1 + s / n * (r2 - r1) + 0.5), math.floor(c1 + s / n * (c2 - c1) + 0.5))
                for s in range(n + 1)
            ]
            out[i, j] = max(z[cell] for cell in cells)
    return out


def place(lat, lon):
    phi, lam = math.radians(lat), math.radians(lon)
    return np.array([math.cos(phi) * math.cos(lam), math.cos(phi) * math.sin(lam), math.sin(phi)])


def loop_highest_on_circles(terrain):
    """Highest patch on the great circle, sampled twice a patch or more, nearest patch by latitude and longitude."""
    rows, columns = terrain.grid
    lats = terrain.lat.reshape(rows, columns)[:, 0].tolist()
    lons = terrain.lon.reshape(rows, columns)[0].tolist()
    z = terrain.elevation_m[0].reshape(rows, columns)
    spacing = min(abs(lats[1] - lats[0]), abs(lons[1] - lons[0]))
    out = torch.zeros(rows * columns, rows * columns, dtype=torch.float64)
    for i in range(rows * columns):
        for j in range(rows * columns):
            (r1, c1), (r2, c2) = divmod(i, columns), divmod(j, columns)
            a, b = place(lats[r1], lons[c1]), place(lats[r2], lons[c2])
            angle = math.atan2(float(np.linalg.norm(np.cross(a, b))), float(a @ b))
            n = math.ceil(2 * math.degrees(angle) / spacing - 1e-9) | 1
            heights = []
            for s in range(n + 1):
                share = s / n
                if angle < 1e-9:
                    x = a
                else:
                    x = (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)
                lat, lon = math.degrees(math.asin(max(-1, min(1, x[2])))), math.degrees(math.atan2(x[1], x[0]))
                row = min(range(rows), key=lambda r: abs(lats[r] - lat))
                column = min(range(columns), key=lambda c: abs((lons[c] - lon + 180) % 360 - 180))
                heights.append(z[row, column].item())
            out[i, j] = max(heights)
    return out


def test_one_wall_by_hand():
    # 0, 2000, 0, 500 m in a row: from the first to the third over 2000 m; to the fourth the same climb from 0
    terrain = flat_grid([[0.0, 2000.0, 0.0, 500.0]])
    seen_by_query = ridge(terrain)
    assert seen_by_query.tolist() == [
        [0, -2, -2, -2],
        [0, 0, 0, 0],
        [-2, -2, 0, -0.5],
        [-1.5, -1.5, 0, 0],
    ]
    # what comes from the key climbs from the key: the transpose
    assert torch.equal(ridge(terrain, direction="query_above"), seen_by_query.T)
    both = ridge(terrain, direction="both")
    assert torch.equal(both, seen_by_query + seen_by_query.T)
    assert torch.equal(both, both.T)


def test_two_basins_either_side_of_a_ridge_are_apart():
    """The endpoint difference, 0 between them, is no barrier."""
    terrain = flat_grid([[100.0, 3100.0, 100.0]])
    assert ridge(terrain)[0, 2] == -3
    assert PhysicsBias(wind=False)(terrain.elevation_m)[0, 0, 0, 2] == 0


def test_a_wall_does_not_stop_what_goes_past_its_end():
    terrain = flat_grid([[0.0, 1000.0, 0.0], [0.0, 1000.0, 0.0], [0.0, 0.0, 0.0]])
    values = ridge(terrain)
    assert values[0, 2] == -1
    assert values[6, 8] == 0
    assert values[3, 5] == -1


def test_on_a_slope_it_is_the_physics_bias():
    z = torch.arange(4.0).repeat(3, 1).double() * 100
    terrain = Terrain(z.reshape(1, -1), (3, 4))
    for direction in ("key_above", "query_above", "both"):
        assert torch.equal(
            ridge(terrain, direction=direction),
            PhysicsBias(wind=False, direction=direction).double()(terrain.elevation_m)[0, 0],
        )


@pytest.mark.parametrize("shape", [(1, 7), (4, 6), (5, 5)])
def test_equals_the_plain_loop_on_a_plane(shape):
    torch.manual_seed(0)
    z = torch.randint(0, 4000, shape).double()
    terrain = Terrain(z.reshape(1, -1), shape)
    highest = loop_highest_on_lines(z)
    expected = -(highest - z.flatten()[:, None]).clamp(min=0) / 1000
    torch.testing.assert_close(ridge(terrain), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", [(4, 8), (5, 7), (2, 12)])
@pytest.mark.parametrize("descending", [False, True])
def test_equals_the_plain_loop_on_the_globe(grid, descending):
    terrain = global_terrain(grid, seed=3)
    if descending:
        terrain = replace(terrain, lat=-terrain.lat)
    highest = loop_highest_on_circles(terrain)
    z = terrain.elevation_m[0]
    got = ridge(terrain)
    expected = -(highest - z[:, None]).clamp(min=0) / 1000
    opposite = antipodes(terrain)  # there every great circle is as short, and ours goes over the pole
    torch.testing.assert_close(got[~opposite], expected[~opposite], rtol=1e-12, atol=1e-12)


def antipodes(terrain):
    lat, lon = torch.deg2rad(terrain.lat), torch.deg2rad(terrain.lon)
    x = torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], -1)
    return x @ x.T < -1 + 1e-9


def test_the_dateline_is_no_wall_and_hides_none():
    # 36 patches around the equator; a wall at 180 E, next to which 170 E and 190 E lie
    z = torch.zeros(1, 36, dtype=torch.float64)
    z[0, 18] = 2000
    lon = torch.arange(36, dtype=torch.float64) * 10
    terrain = Terrain(z, (1, 36), lat=torch.zeros(36, dtype=torch.float64), lon=lon)
    values = ridge(terrain)
    assert values[17, 19] == -2
    assert values[35, 1] == 0  # across 0 E, where there is none
    rolled = Terrain(z.roll(5, 1), (1, 36), lat=terrain.lat, lon=(lon - 50) % 360)
    assert torch.equal(ridge(rolled), values.roll((5, 5), (0, 1)))


def test_the_shortest_way_at_high_latitude_goes_by_the_pole():
    """Two places at 67.5 N, 180 degrees apart: a wall along the circle of latitude is not on the way."""
    terrain = global_terrain((8, 16))
    z = torch.zeros(8, 16, dtype=torch.float64)
    z[6, 4] = 3000  # 56 N, half way along the parallel
    walled = replace(terrain, elevation_m=z.reshape(1, -1))
    assert ridge(walled)[6 * 16, 6 * 16 + 8] == 0
    z[7, 0] = 1000  # 79 N, on the way over the pole
    assert ridge(replace(terrain, elevation_m=z.reshape(1, -1)))[6 * 16, 6 * 16 + 8] == -1


def test_wind_modulates_as_in_physics():
    terrain = global_terrain()
    with_wind, without = RidgeBias(beta_init=0.375).double(), RidgeBias(wind=False).double()
    mean = (terrain.speed[:, :, None] + terrain.speed[:, None]) / 2
    expected = without(*without.inputs(terrain))[:, 0] * (1 - 0.375 * torch.sigmoid(mean - 5))
    torch.testing.assert_close(with_wind(*with_wind.inputs(terrain))[:, 0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["key_above", "query_above", "both"])
def test_froude_equals_the_plain_loop_with_its_gradient(direction):
    terrain = global_terrain((3, 4))
    bias = RidgeBias(form="froude", direction=direction, alpha_init=1.5).double()
    got = bias(*bias.inputs(terrain))
    highest, z = -ridge(terrain) * 1000 + terrain.elevation_m[0][:, None], terrain.elevation_m[0]
    alpha = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    rows = []
    for b in range(2):
        for i in range(12):
            for j in range(12):
                speed = (terrain.speed[b, i] + terrain.speed[b, j]) / 2
                climbs = {"key_above": [z[i]], "query_above": [z[j]], "both": [z[i], z[j]]}[direction]
                blocked = 0.0
                for start in climbs:
                    height = highest[i, j] - start
                    froude = speed / (0.01 * height) if height > 0 else math.inf
                    if froude < 1:  # the flow does not pass: what is below the dividing streamline
                        blocked = blocked + height * (1 - froude)
                rows.append(-alpha * blocked / 1000)
    expected = torch.stack([torch.as_tensor(row, dtype=torch.float64) for row in rows]).reshape(2, 1, 12, 12)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(expected)
    (a,) = torch.autograd.grad((got * weights).sum(), bias.elevation_alpha)
    (b,) = torch.autograd.grad((expected * weights).sum(), alpha)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_froude_lets_strong_wind_pass():
    # a wall of 1000 m, N = 0.01 /s: 10 m/s and more pass; 5 m/s leave 500 m
    terrain = flat_grid([[0.0, 1000.0, 0.0]])
    for speed, expected in ((0.0, -1.0), (5.0, -0.5), (10.0, 0.0), (20.0, 0.0)):
        windy = replace(terrain, speed=torch.full((1, 3), speed, dtype=torch.float64))
        bias = RidgeBias(form="froude").double()
        assert bias(*bias.inputs(windy))[0, 0, 0, 2].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.0])
def test_alpha_always_learns(alpha):
    bias = RidgeBias(wind=False, alpha_init=alpha).double()
    bias(*bias.inputs(flat_grid([[0.0, 8000.0, 0.0]]))).sum().backward()
    assert bias.elevation_alpha.grad.item() == pytest.approx(-8.0 * 4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), plane=st.booleans())
def test_excess_is_symmetric_never_negative_and_zero_next_door(seed, plane):
    terrain = global_terrain((4, 6), seed=seed)
    if plane:
        terrain = replace(terrain, lat=None, lon=None)
    excess = path_excess(terrain).half_metres
    assert torch.equal(excess, excess.T)
    assert (excess >= 0).all()
    assert (excess.diagonal() == 0).all()
    assert excess[1, 2] == excess[1, 7] == 0


def test_curved_grids_take_straight_lines_of_the_grid():
    terrain = global_terrain((4, 6))
    curved = replace(terrain, lat=terrain.lat + torch.linspace(0, 9, 24, dtype=torch.float64))
    plane = replace(terrain, lat=None, lon=None)
    assert torch.equal(path_excess(curved).half_metres, path_excess(plane).half_metres)
    assert not torch.equal(path_excess(terrain).half_metres, path_excess(plane).half_metres)


def test_eight_thousand_patches_in_under_a_minute_of_one_core():
    terrain = global_terrain((64, 128), dtype=torch.float32)
    started = time.process_time()  # whatever else the machine does
    excess = path_excess(terrain).half_metres
    assert time.process_time() - started < 60
    assert excess.dtype == torch.int16
    assert excess.shape == (8192, 8192)
    assert torch.equal(excess[:64, :64], excess[:64, :64].T)


def test_paths_are_kept_on_disk_and_found_by_grid_and_ground(tmp_path, monkeypatch):
    terrain = global_terrain(seed=11)
    expected = path_excess(terrain, tmp_path).half_metres
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("terrain_paths_")
    paths._known.clear()
    with monkeypatch.context() as patched:
        patched.setattr(paths, "excess_half_metres", None)  # it would be called, were the file not found
        assert torch.equal(path_excess(terrain, tmp_path).half_metres, expected)
    for other in (
        replace(terrain, elevation_m=terrain.elevation_m + 1),
        replace(terrain, lon=terrain.lon * 0.5),
        replace(terrain, lat=terrain.lat * 0.5),
    ):
        path_excess(other, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_broken_file_is_computed_again_and_an_unwritable_folder_is_no_obstacle(tmp_path, caplog):
    terrain = global_terrain(seed=12)
    expected = path_excess(terrain, tmp_path).half_metres
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for broken in (b"no archive at all", whole[: len(whole) // 2]):
        caplog.clear()
        file.write_bytes(broken)
        paths._known.clear()
        assert torch.equal(path_excess(terrain, tmp_path).half_metres, expected)
        assert "cannot be read" in caplog.text
    assert list(tmp_path.iterdir()) == [file]
    paths._known.clear()
    assert torch.equal(path_excess(terrain, tmp_path / "absent").half_metres, expected)
    assert "cannot be written" in caplog.text


def test_blocks_of_one_grid_share_their_paths():
    terrain = global_terrain(seed=13)
    first, second = RidgeBias(wind=False), RidgeBias(wind=False)
    first.prepare(terrain)
    second.prepare(terrain)
    assert first._paths is second._paths


def test_another_ground_is_noticed():
    terrain = global_terrain(batch=2, terrain_batch=1)
    bias = RidgeBias(wind=False)
    bias.prepare(terrain)
    moved = replace(terrain, elevation_m=terrain.elevation_m.roll(1, 1))
    with pytest.raises(InputError, match=r"paths of another ground, up to \d+ m from this one"):
        bias.inputs(moved)
    bias.prepare(moved)
    bias.inputs(moved)
    with pytest.raises(InputError, match="one elevation for all samples"):
        RidgeBias(wind=False).inputs(global_terrain(terrain_batch=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "froude", "wind": False}, "compares wind with height"),
        ({"form": "wall"}, "unknown form 'wall'; choose one of 'height', 'froude'"),
        ({"buoyancy_frequency_per_s": 0}, "buoyancy_frequency_per_s is a number of 1/s above 0"),
        ({"direction": "up"}, "unknown direction 'up'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        RidgeBias(**arguments)


def test_what_does_not_fit_is_refused():
    terrain = global_terrain()
    with pytest.raises(InputError, match="needs the whole grid of 4 x 8 patches once"):
        RidgeBias(wind=False).inputs(terrain.select([1, 2, 3]))
    with pytest.raises(InputError, match="a grid of 4 x 8 patches does not have 30 of them"):
        Terrain(torch.zeros(1, 30), (4, 8))
    with pytest.raises(InputError, match=r"excess is \[batch or 1, 4, 4\]"):
        RidgeBias(wind=False)(torch.zeros(1, 4), torch.zeros(1, 4, 3))
    assert "wind_beta" not in dict(RidgeBias(form="froude").named_parameters())


def on_the_globe(z, lat, lon):
    """Terrain of rows of heights at these latitudes and longitudes."""
    lat, lon = torch.meshgrid(torch.tensor(lat), torch.tensor(lon), indexing="ij")
    return replace(flat_grid(z), lat=lat.flatten().double(), lon=lon.flatten().double())


def test_between_antipodes_the_way_is_over_the_north_pole():
    lat, lon = [-60.0, -20.0, 20.0, 60.0], [0.0, 90.0, 180.0, 270.0]
    for wall, stands in (((3, 0), True), ((3, 2), True), ((3, 1), False), ((0, 0), False), ((0, 2), False)):
        z = [[0.0] * 4 for _ in lat]
        z[wall[0]][wall[1]] = 1000.0
        # from (20 N, 0) to (20 S, 180)
        assert ridge(on_the_globe(z, lat, lon))[8, 6] == (-1 if stands else 0), wall
    lat = [-75.0, -45.0, -15.0, 15.0, 45.0, 75.0]
    for column in (0, 2):
        z = [[0.0] * 4 for _ in lat]
        z[5][column] = 1000.0
        assert ridge(on_the_globe(z, lat, lon))[12, 10] == -1, column


def test_two_rows_are_sampled_as_finely_as_their_latitudes():
    # from the equator to (10 N, 90 E) the way is above 5 N from 30.1 E on, and in the first column up to 45 E
    z = [[0.0, 0.0], [1000.0, 0.0]]
    assert ridge(on_the_globe(z, [0.0, 10.0], [0.0, 90.0]))[0, 3] == -1


def test_two_columns_on_the_globe_are_joined_by_great_circles():
    z = [[0.0, 0.0], [1000.0, 1000.0]]
    # from (60 N, 0) to (60 N, 170 E) by way of 80 N and more
    assert ridge(on_the_globe(z, [60.0, 85.0], [0.0, 170.0]))[0, 1] == -1


def test_longitudes_that_are_rounded_are_evenly_spaced_all_the_same():
    terrain = global_terrain((8, 16))
    jitter = 0.05 * (torch.arange(128) % 3 - 1)  # degrees, of 22.5
    assert torch.equal(ridge(replace(terrain, lon=terrain.lon + jitter.double())), ridge(terrain))


def test_a_way_through_a_gap_in_the_globe_meets_what_lies_at_its_edge():
    lon = [40.0 * n for n in range(8)]  # none at 320: the shorter way from 0 to 280 is by there
    for wall in range(1, 7):
        z = [[0.0] * 8]
        z[0][wall] = 1000.0
        assert ridge(on_the_globe(z, [0.0], lon))[0, 7] == 0, wall


def test_a_path_of_three_samples_has_no_more():
    """1.5 patches, which rounding must not make a hair more."""
    _, _, count = paths.GreatCircles((0.0, 10.0), 15.0, False).cells(1)
    assert count[0] == 3


def test_samples_of_one_ground_know_the_paths_of_one():
    one, both = global_terrain(seed=17), global_terrain(seed=17)
    both = replace(both, elevation_m=both.elevation_m.repeat(2, 1))
    known = path_excess(one)
    assert path_excess(both) is known
    assert known.elevation_m.shape == (1, 32)


def test_ground_may_move_by_rounding_alone():
    terrain = global_terrain(seed=18)
    bias = RidgeBias(wind=False)
    bias.prepare(terrain)
    bias.inputs(replace(terrain, elevation_m=terrain.elevation_m + 0.9))
    with pytest.raises(InputError, match="up to 2 m from this one"):
        bias.inputs(replace(terrain, elevation_m=terrain.elevation_m + 1.5))


def test_defaults_are_those_of_physics():
    ours, theirs = RidgeBias(), PhysicsBias()
    assert dict(ours.named_parameters()) == dict(theirs.named_parameters())
    for name in ("direction", "height_scale_m", "wind_threshold_m_s", "wind"):
        assert getattr(ours, name) == getattr(theirs, name)
    with pytest.raises(InputError, match=r"elevation is \[batch or 1, tokens\]"):
        RidgeBias(wind=False)(torch.zeros(4), torch.zeros(1, 4, 4))
