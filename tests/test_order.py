"""Wind scanning: the order itself, that carrying everything along changes nothing, and what was published."""

import math
from dataclasses import replace

import pytest
import torch
from terrains import EVERY_BIAS, global_terrain
from test_attach import MEAN, STD, VARIABLES, strong
from test_every_bias import LAT, LON, model, predict

from climax_elevation import InputError, Terrain
from climax_elevation.host import StandInClimaX
from climax_elevation.terrain.order import published_order, wind_order


def windy(u, v, grid=(2, 3), lat=None):
    n = grid[0] * grid[1]
    wind = torch.tensor([[u], [v]]).float().expand(2, n)
    return Terrain(torch.zeros(1, n), grid, u=wind[:1], v=wind[1:], lat=lat)


def test_six_patches_by_hand():
    # a west wind reaches the western column first, an east wind the eastern; rows go north, a south wind reaches the
    # first. Three bands of two each, in raster order within: a north wind's are (3, 4), (5, 0) and (1, 2).
    assert wind_order(windy(5, 0)).tolist() == [[0, 3, 1, 4, 2, 5]]
    assert wind_order(windy(-5, 0)).tolist() == [[2, 5, 1, 4, 0, 3]]
    assert wind_order(windy(0, 5)).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert wind_order(windy(0, -5)).tolist() == [[3, 4, 0, 5, 1, 2]]
    southward = torch.tensor([10.0] * 3 + [0.0] * 3)
    assert wind_order(windy(0, 5, lat=southward)).tolist() == [[3, 4, 0, 5, 1, 2]]
    # a quarter of a degree apart
    assert wind_order(windy(0, 5, lat=southward / 40)).tolist() == [[3, 4, 0, 5, 1, 2]]
    assert wind_order(windy(0, 5, lat=-southward / 40)).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert wind_order(windy(0, 5, (2, 1), torch.tensor([10.0, 0.0]))).tolist() == [[1, 0]]
    # a region whose patches come in another order has its rows where they are
    grid = Terrain(torch.zeros(1, 12), (4, 3), u=torch.zeros(1, 12), v=torch.ones(1, 12), lat=torch.arange(12) // 3.0)
    assert wind_order(grid.select([9, 10, 11, 0, 1, 2])).tolist() == [[3, 4, 5, 0, 1, 2]]


@pytest.mark.parametrize("sectors", [4, 16])
def test_every_order_is_a_permutation_in_bands_along_the_wind(sectors):
    terrain = global_terrain((6, 8), batch=5)
    order = wind_order(terrain, sectors)
    assert torch.equal(order.sort(dim=1).values, torch.arange(48).expand(5, -1))
    for b in range(5):
        angle = math.atan2(terrain.v[b].mean(), terrain.u[b].mean())
        angle = round(angle / (2 * math.pi / sectors)) * 2 * math.pi / sectors
        along = math.cos(angle) * terrain.columns + math.sin(angle) * terrain.rows
        bands = along[order[b]].reshape(8, 6)  # as many bands as the longer side has patches
        assert (bands[1:].amin(1) >= bands[:-1].amax(1) - 1e-3).all()
        assert (order[b].reshape(8, 6).diff(dim=1) > 0).all()  # raster order within


def test_winds_of_a_sector_share_their_order_and_samples_have_their_own():
    near = torch.stack([wind_order(windy(5, v, (4, 6)))[0] for v in (-0.5, 0.0, 0.5)])
    assert torch.equal(near[0], near[1])
    assert torch.equal(near[1], near[2])
    assert not torch.equal(near[0], wind_order(windy(0, 5, (4, 6)))[0])


@pytest.mark.parametrize("order", [wind_order, published_order])
@pytest.mark.parametrize("region", [None, [7, 8, 13, 14]])
def test_no_number_is_looked_at(order, region):
    """On a GPU a look waits; on the meta device there is nothing to look at."""
    terrain = global_terrain((4, 6))
    meta = {name: getattr(terrain, name).to("meta") for name in ("elevation_m", "u", "v", "lat", "lon")}
    terrain = replace(terrain, **meta)
    terrain = terrain if region is None else terrain.select(region)
    assert order(terrain).shape == terrain.u.shape


def published_loop(u, v, height, width):
    """The published description, a patch at a time, with Python's own sorting."""
    heading = math.atan2(v, u) % (2 * math.pi)
    sector = int(heading / (2 * math.pi) * 16) % 16
    cos, sin = math.cos(2 * math.pi * sector / 16), math.sin(2 * math.pi * sector / 16)
    places = [(row, column) for row in range(height) for column in range(width)]
    places = sorted(places, key=lambda place: place[0] * sin + place[1] * cos)
    bands = max(height, width)
    size = len(places) // bands
    order = []
    for number in range(bands):
        last = number == bands - 1
        band = places[number * size :] if last else places[number * size : (number + 1) * size]
        in_order = sorted(band, key=lambda place: sum(place) % 2 * 1000 + place[0] * width + place[1])
        order += [row * width + column for row, column in in_order]
    return order


@pytest.mark.parametrize("grid", [(2, 3), (4, 6), (6, 4), (1, 5), (5, 1), (8, 16), (32, 40), (40, 32)])
def test_the_published_order_is_that_of_a_plain_loop(grid):
    """Larger grids have more than 1000 patches, from which on odd ones no longer come after all even ones."""
    n = grid[0] * grid[1]
    angles = [math.pi / 8 * k + turn for k in range(-8, 8) for turn in (1e-3, 0.2, 0.39)]
    u, v = ([5 * function(angle) for angle in angles] for function in (math.cos, math.sin))
    wind = (torch.tensor(w, dtype=torch.float64)[:, None].expand(-1, n) for w in (u, v))
    got = published_order(Terrain(torch.zeros(1, n), grid, **dict(zip("uv", wind, strict=True))))
    assert got.tolist() == [published_loop(*one, *grid) for one in zip(u, v, strict=True)]


def test_the_published_order_by_hand():
    # a west wind over 2 x 4 patches: bands are columns of two, and in each the even patch (row + column) is first
    assert published_order(windy(5, 0, (2, 4))).tolist() == [[0, 4, 5, 1, 2, 6, 7, 3]]
    # v points to higher rows, whatever the latitudes say; four bands of two cut the rows in halves
    assert published_order(windy(0, 5, (2, 4))).tolist() == [[0, 1, 2, 3, 5, 4, 7, 6]]
    southward = torch.tensor([10.0] * 4 + [0.0] * 4)
    assert published_order(windy(0, 5, (2, 4), southward)).tolist() == published_order(windy(0, 5, (2, 4))).tolist()
    # 22.4 degrees belong to the sector that begins at 0, not to the nearest
    turned = math.radians(22.4)
    near = published_order(windy(5 * math.cos(turned), 5 * math.sin(turned), (2, 4)))
    assert near.tolist() == published_order(windy(5, 0, (2, 4))).tolist()


def test_the_published_order_of_a_region_is_that_of_a_grid_of_its_own():
    terrain = global_terrain((6, 8))
    region = terrain.select([9, 10, 11, 17, 18, 19])
    alone = Terrain(region.elevation_m, (2, 3), u=region.u, v=region.v)
    assert torch.equal(published_order(region), published_order(alone))


@pytest.mark.parametrize("case", EVERY_BIAS)
@pytest.mark.parametrize("blocks", [[0], "all"])
def test_reordering_with_everything_carried_along_changes_nothing(case, blocks):
    raster, wind = (strong(model(case, blocks, patch_order=order)) for order in ("raster", "wind"))
    torch.testing.assert_close(predict(wind), predict(raster), rtol=1e-4, atol=1e-4)
    gradients = []
    for made in (raster, wind):
        predict(made).square().mean().backward()
        gradients.append([p.grad for p in made.blocks.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_as_published_positions_stay_behind_and_predictions_change():
    raster = strong(model("physics"))
    published = strong(model("physics", patch_order="wind_as_published"))
    assert set(published.state_dict()) == set(raster.state_dict())
    assert (predict(published) - predict(raster)).abs().max() > 1e-3
    with torch.no_grad():
        for made in (raster, published):
            made.pos_embed.zero_()
    torch.testing.assert_close(predict(published), predict(raster), rtol=1e-4, atol=1e-4)


def test_as_published_is_the_literal_reordering_of_tokens():
    """Tokens without positions reordered, positions added in raster order, blocks, and back before the head."""
    torch.manual_seed(0)
    published = strong(model("physics without wind", patch_order="wind_as_published"))
    x = torch.randn(2, 4, 8, 16)
    x[:, 0] = torch.rand(8, 16) * 4 - 0.5
    lead_times = torch.tensor([0.06, 0.24])
    got = published.forward_encoder(x, lead_times, VARIABLES)
    terrain = published.terrain(x, lead_times, VARIABLES)
    order = published_order(terrain)
    batch = torch.arange(2)[:, None]
    tokens = published._tokens(x, lead_times, VARIABLES) - published.pos_embed
    tokens = tokens[batch, order] + published.pos_embed
    elevation = terrain.elevation_m.expand(2, -1)[batch, order]
    for block in published.blocks:
        tokens = block(tokens, elevation)
    back = torch.empty_like(tokens)
    back[batch, order] = tokens
    torch.testing.assert_close(got, published.norm(back), rtol=1e-4, atol=1e-4)


def test_published_order_survives_copies_and_trains_the_position_embedding():
    import copy
    import pickle

    made = model("physics", patch_order="wind_as_published")
    predict(made).square().mean().backward()
    assert made.pos_embed.grad.abs().max() > 0
    before = predict(made.eval())
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(predict(other), before)
        with torch.no_grad():
            other.pos_embed.mul_(5)
        changed = predict(other)
        other.terrain.host = (made,)
        assert not torch.equal(predict(other), changed)  # it was reading its own
    assert torch.equal(predict(made), before)


def test_a_region_is_ordered_among_itself():
    terrain = global_terrain((6, 8)).select([9, 10, 17, 18])
    assert torch.equal(wind_order(terrain).sort(dim=1).values, torch.arange(4).expand(2, -1))


@pytest.mark.parametrize(
    ("bias_args", "message"),
    [
        (
            {"patch_order": "spiral"},
            "unknown patch_order 'spiral'; choose one of 'raster', 'wind', 'wind_as_published'",
        ),
        ({"patch_order": "wind_as_published", "blocks": [1]}, "it needs block 0 among blocks"),
        ({"patch_order": "wind", "wind_variables": ["a", "b"]}, "lack 'a'"),
        ({"grid_spacing_m": -3}, "grid_spacing_m is a number of metres above 0"),
    ],
)
def test_mistakes_are_one_sentence(bias_args, message):
    with pytest.raises(InputError, match=message):
        model("physics", **({"blocks": "all"} | bias_args))


def test_without_wind_there_is_no_order():
    terrain = global_terrain()
    with pytest.raises(InputError, match="patch_order: wind needs wind, and this terrain has none"):
        wind_order(replace(terrain, u=None, v=None))
    with pytest.raises(InputError, match="patch_order: wind_as_published needs wind, and this terrain has none"):
        published_order(replace(terrain, u=None, v=None))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_plane_grid_reaches_the_bias(patch_size):
    torch.manual_seed(0)
    made = StandInClimaX(
        VARIABLES,
        [8, 16],
        patch_size,
        embed_dim=32,
        depth=1,
        num_heads=4,
        use_physics_mask=True,
        bias_type="advection",
        bias_args={"grid_spacing_m": 3000.0, "static_terrain": True},
    )
    made.terrain.set_statistics(MEAN, STD, "a test")
    assert predict(made.eval()).isfinite().all()
    # the side of a patch, in Earth radii
    assert made.blocks[0].attn.bias.patch_rad.item() == pytest.approx(3000 * patch_size / 6.371e6)
    made.terrain.set_grid(LAT, LON, "a test")
