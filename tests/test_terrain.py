"""The units contract: metres and m/s, or an error that says what to do."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from climax_elevation import InputError, PhysicsBias, Terrain, downsample_elevation
from climax_elevation.block import TerrainBlock, timm_block
from climax_elevation.seam import TerrainSeam
from climax_elevation.terrain.elevation_file import ElevationField, read_elevation_file

VARIABLES = ("orography", "2m_temperature", "10m_u_component_of_wind", "10m_v_component_of_wind")
WINDS = ("10m_u_component_of_wind", "10m_v_component_of_wind")
MEAN = {"orography": 400.0, "2m_temperature": 280.0, WINDS[0]: -1.0, WINDS[1]: 0.5}
STD = {"orography": 800.0, "2m_temperature": 20.0, WINDS[0]: 5.0, WINDS[1]: 4.0}


def reader(**options):
    defaults = {"elevation_variable": "orography", "wind_variables": WINDS}
    return TerrainSeam([4, 6], 2, **(defaults | options))


def physical_batch(batch=2, seed=0):
    """Fields in their own units, `[B, 4, 4, 6]`."""
    torch.manual_seed(seed)
    scale = torch.tensor([3000.0, 20.0, 10.0, 10.0])[:, None, None]
    offset = torch.tensor([0.0, 280.0, -5.0, -5.0])[:, None, None]
    x = torch.rand(batch, 4, 4, 6) * scale + offset
    x[:, 0] = x[:1, 0]
    return x


def standardised(x):
    mean = torch.tensor([MEAN[name] for name in VARIABLES])[:, None, None]
    std = torch.tensor([STD[name] for name in VARIABLES])[:, None, None]
    return (x - mean) / std


def test_patch_means_by_hand():
    field = torch.arange(8.0).reshape(1, 2, 4)  # rows 0 1 2 3 / 4 5 6 7
    assert downsample_elevation(field, 2).tolist() == [[(0 + 1 + 4 + 5) / 4, (2 + 3 + 6 + 7) / 4]]
    assert downsample_elevation(field, 1).tolist() == [list(range(8))]
    tall = torch.arange(8.0).reshape(1, 4, 2)  # row-major: the upper patch is first
    assert downsample_elevation(tall, 2).tolist() == [[1.5, 5.5]]
    assert downsample_elevation(field.long(), 2).tolist() == [[2.5, 4.5]]


@pytest.mark.parametrize(("shape", "patch"), [((2, 4), 2), ((1, 3, 4), 2), ((1, 4, 4), 0)])
def test_patches_that_do_not_fit_are_refused(shape, patch):
    with pytest.raises(InputError):
        downsample_elevation(torch.zeros(shape), patch)


def test_a_standardised_channel_comes_back_in_metres_and_m_s():
    read, x = reader(), physical_batch()
    read.set_statistics(MEAN, STD, "a test")
    terrain = read(standardised(x), torch.tensor([0.72, 0.06]), VARIABLES)
    # float32 statistics: 1e-3 m in 3000 m
    torch.testing.assert_close(terrain.elevation_m, downsample_elevation(x[:, 0], 2), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(terrain.u, downsample_elevation(x[:, 2], 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        terrain.speed, downsample_elevation(torch.hypot(x[:, 2], x[:, 3]), 2), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(terrain.lead_hours, torch.tensor([72.0, 6.0]))
    assert terrain.grid == (2, 3)


@pytest.mark.parametrize("order", ["file first", "statistics first"])
def test_low_geopotential_beside_the_channels_statistics(order):
    """In a range that heights have too: nothing but the channel tells that it is 9.8 times as much."""
    low = np.linspace(0, 300, 24).reshape(4, 6)
    fields = {scale: ElevationField(low * scale, LAT, LON, "a file") for scale in (1.0, 9.80665)}
    statistics = {"orography": 150.0}, {"orography": float(low.std())}
    for scale, field in fields.items():
        read = reader(wind_variables=None, elevation_file=field)
        steps = [
            lambda read=read: read.set_grid(LAT, LON, "lat.npy"),
            lambda read=read: read.set_statistics(*statistics, "data"),
        ]
        with pytest.raises(InputError, match="is it geopotential") if scale > 1 else nullcontext():
            for step in steps if order == "file first" else steps[::-1]:
                step()


def test_autocast_rounds_no_metre_away():
    read, x = reader(), physical_batch()
    read.set_statistics(MEAN, STD, "a test")
    plain = read(standardised(x), None, VARIABLES)
    with torch.autocast("cpu", torch.bfloat16):
        cast = read(standardised(x), None, VARIABLES)
    assert torch.equal(cast.elevation_m, plain.elevation_m)
    assert torch.equal(cast.speed, plain.speed)


def test_speed_is_the_mean_of_speeds_not_of_winds():
    x = physical_batch(1)
    x[:, 2], x[:, 3] = torch.tensor([3.0, -3.0]).repeat(3), 4.0  # eddies: mean u is 0
    read = reader()
    read.set_statistics(MEAN, STD, "a test")
    terrain = read(standardised(x), None, VARIABLES)
    torch.testing.assert_close(terrain.speed, torch.full((1, 6), 5.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terrain.u, torch.zeros(1, 6), rtol=0, atol=1e-5)


def test_variables_may_come_in_any_order():
    x, order = physical_batch(), [3, 0, 2, 1]
    read = reader()
    read.set_statistics(MEAN, STD, "a test")
    expected = read(standardised(x), None, VARIABLES)
    got = read(standardised(x)[:, order], None, [VARIABLES[i] for i in order])
    assert torch.equal(got.elevation_m, expected.elevation_m)
    assert torch.equal(got.v, expected.v)


def test_unknown_units_are_an_error_that_says_what_to_do():
    with pytest.raises(InputError, match=r"TerrainCallback.*stats_dir.*elevation_file"):
        reader()(standardised(physical_batch()), None, VARIABLES)
    read = reader()
    read.set_statistics({"orography": 400.0}, {"orography": 800.0}, "a test")
    with pytest.raises(InputError, match=r"standardised '10m_u_component_of_wind', .* set bias_args.wind: false"):
        read(standardised(physical_batch()), None, VARIABLES)


def test_missing_channels_are_named():
    read = reader()
    read.set_statistics(MEAN, STD, "a test")
    x = standardised(physical_batch())
    with pytest.raises(InputError, match="reads 'orography', and the input has only 2m_temperature"):
        read(x[:, 1:], None, VARIABLES[1:])
    with pytest.raises(InputError, match="reads '10m_v_component_of_wind'"):
        read(x[:, :3], None, VARIABLES[:3])
    with pytest.raises(InputError, match=r"the input is \[batch, 4 variables, 4, 6\]"):
        read(x[:, :3], None, VARIABLES)


def test_standardised_elevation_called_metres_is_caught():
    """Mean 0 and standard deviation 1 is what prior code took for metres."""
    read = reader(wind_variables=None)
    read.set_statistics({"orography": 0.0}, {"orography": 1.0}, "a test")
    x = standardised(physical_batch())
    with pytest.raises(InputError, match="looks standardised"):
        read(x, None, VARIABLES)
    flat = reader(wind_variables=None, terrain_is_flat=True)
    flat.set_statistics({"orography": 0.0}, {"orography": 1.0}, "a test")
    assert flat(x, None, VARIABLES).elevation_m.abs().max() < 10


def test_flat_high_ground_is_not_mistaken_for_a_standardised_channel():
    field = ElevationField(np.full((4, 6), 1500.0), None, None, "a test")
    assert reader(wind_variables=None, elevation_file=field)(physical_batch()[:, 1:2], None, VARIABLES[1:2])


@pytest.mark.parametrize(
    ("scale", "message"), [(9.80665, "is it geopotential"), (math.nan, "not finite"), (-0.5, "outside -500 to 9000 m")]
)
def test_impossible_elevations_are_caught(scale, message):
    field = ElevationField(np.linspace(0, 4000, 24).reshape(4, 6) * scale, None, None, "a test")
    with pytest.raises(InputError, match=message):
        reader(wind_variables=None, elevation_file=field)(physical_batch()[:, 1:2], None, VARIABLES[1:2])


def test_impossible_winds_are_caught():
    read = reader()
    read.set_statistics(MEAN, STD | {WINDS[0]: 500.0}, "a test")
    with pytest.raises(InputError, match="wind speed reaches"):
        read(standardised(physical_batch()), None, VARIABLES)


def test_static_terrain_is_read_once_a_batch_and_verified():
    x = physical_batch()
    read = reader(static_terrain=True)
    read.set_statistics(MEAN, STD, "a test")
    assert read(standardised(x), None, VARIABLES).elevation_m.shape == (1, 6)
    assert reader_with_statistics()(standardised(x), None, VARIABLES).elevation_m.shape == (2, 6)
    x[1, 0] += 100
    read = reader(static_terrain=True)
    read.set_statistics(MEAN, STD, "a test")
    with pytest.raises(InputError, match="static_terrain is true"):
        read(standardised(x), None, VARIABLES)


def test_a_control_changes_the_ground_alone_and_is_said(caplog):
    x = standardised(physical_batch())
    true = reader_with_statistics()(x, None, VARIABLES)
    with caplog.at_level("INFO"):
        flat, mirrored = (reader_with_statistics(control=name)(x, None, VARIABLES) for name in ("flat", "mirrored"))
    assert not flat.elevation_m.any()
    # two rows of three patches
    assert mirrored.elevation_m.tolist() == true.elevation_m[:, [2, 1, 0, 5, 4, 3]].tolist()
    assert true.elevation_m.tolist() != mirrored.elevation_m.tolist()
    for other in (flat, mirrored):
        assert torch.equal(other.speed, true.speed)
        assert torch.equal(other.u, true.u)
    assert "control: biases see it mirrored" in caplog.text


def test_a_region_of_a_mirrored_ground_is_that_of_the_whole():
    x = standardised(physical_batch())
    read = reader_with_statistics(control="mirrored")
    part = for_a_block(read, x, [0, 4])
    assert part.elevation_m.tolist() == read(x, None, VARIABLES).elevation_m[:, [0, 4]].tolist()


def for_a_block(read, x, patch_ids=None):
    """The terrain that a block is given."""

    class Block(TerrainBlock):
        def terrain_inputs(self, terrain, order=None):
            return {"terrain": terrain}

    block = Block(timm_block(8, 2, 4.0, drop=0.0), PhysicsBias())
    return read.for_blocks([block], x, torch.tensor([0.5, 0.5]), VARIABLES, patch_ids)[0]["terrain"]


def test_permuted_heights_are_the_same_heights_in_one_order_for_all():
    x = standardised(physical_batch())
    true = reader_with_statistics()(x, None, VARIABLES).elevation_m
    seen = [
        reader_with_statistics(control="permuted", control_seed=seed)(x, None, VARIABLES).elevation_m
        for seed in (0, 0, 1)
    ]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], true[:, [5, 2, 1, 3, 0, 4]])  # by hand from the committed order of seed 0
    assert torch.equal(seen[0].sort(dim=1).values, true.sort(dim=1).values)
    state = torch.random.get_rng_state()
    reader(control="permuted", control_seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "control_order" not in reader(control="permuted").state_dict()


def reader_with_statistics(**options):
    read = reader(**options)
    read.set_statistics(MEAN, STD, "a test")
    return read


def test_a_file_replaces_the_channel_and_has_to_be_of_the_same_ground():
    x = physical_batch()
    field = ElevationField(x[0, 0].numpy(), None, None, "a file")
    read = reader(elevation_file=field)
    read.set_statistics(MEAN, STD, "a test")
    terrain = read(standardised(x), None, VARIABLES)
    torch.testing.assert_close(terrain.elevation_m, downsample_elevation(x[:1, 0], 2))
    turned = reader(elevation_file=ElevationField(x[0, 0].numpy()[::-1, ::-1], None, None, "a file"))
    turned.set_statistics(MEAN, STD, "a test")
    with pytest.raises(InputError, match=r"correlate by .*flipped, rolled"):
        turned(standardised(x), None, VARIABLES)


LAT, LON = np.array([-15.0, -5.0, 5.0, 15.0]), np.arange(6) * 60.0


@pytest.mark.parametrize("turn", ["as is", "flipped", "rolled", "larger"])
def test_a_file_with_coordinates_is_turned_as_the_data_are(turn):
    values = np.random.default_rng(0).uniform(0, 3000, (4, 6))
    lat, lon, given = LAT, LON, values
    if turn == "flipped":
        lat, given = LAT[::-1], values[::-1]
    if turn == "rolled":  # the same meridians called -180 to 120
        lon, given = np.roll((LON + 180) % 360 - 180, 3), np.roll(values, 3, axis=1)
    if turn == "larger":
        lat, given = np.append(LAT, 25.0), np.vstack([values, np.zeros((1, 6))])
    read = reader(wind_variables=None, elevation_file=ElevationField(given, lat, lon, "a file"))
    read.set_grid(LAT, LON, "the data")
    terrain = read(physical_batch()[:, 1:2], None, VARIABLES[1:2])
    torch.testing.assert_close(terrain.elevation_m, downsample_elevation(torch.tensor(values)[None], 2).float())
    torch.testing.assert_close(terrain.lat, torch.tensor([-10.0, -10, -10, 10, 10, 10]))
    torch.testing.assert_close(terrain.lon[:2], torch.tensor([30.0, 150.0]))


def test_a_file_that_lacks_a_place_is_refused():
    field = ElevationField(np.zeros((3, 6)), LAT[:3], LON, "a file")
    with pytest.raises(InputError, match="a file has no latitude 15, which the data have"):
        reader(elevation_file=field).set_grid(LAT, LON, "the data")


def test_without_coordinates_the_shape_is_exact_and_the_orientation_stated(caplog):
    with pytest.raises(InputError, match="they have to be equal"):
        reader(elevation_file=ElevationField(np.zeros((5, 6)), None, None, "a file"))
    reader(elevation_file=ElevationField(np.zeros((4, 6)), None, None, "a file"))
    assert "its first row as the data's first row" in caplog.text


def test_a_patch_across_the_dateline_lies_on_it():
    read = reader(wind_variables=None)
    read.set_grid(np.arange(4.0), np.array([179.0, -179.0, 0, 5, 10, 20]), "the data")
    assert abs(read.lon[0].item()) == pytest.approx(180.0, abs=1e-4)


def test_sources_that_disagree_are_both_named():
    read = reader_with_statistics()
    read.set_statistics(MEAN, STD, "a second one")
    with pytest.raises(InputError, match=r"terrain.elevation_mean from a second one \(400\) and from the other \(0\)"):
        read.set_statistics(MEAN | {"orography": 0.0}, STD, "the other")
    with pytest.raises(InputError, match="is above 0, not 0"):
        reader().set_statistics(MEAN, STD | {"orography": 0.0}, "a test")
    with pytest.raises(InputError, match="img_size is"):
        read.set_grid(LAT[:3], LON, "the data")
    with pytest.raises(InputError, match="within"):
        read.set_grid(LAT * 10, LON, "the data")


def test_the_checkpoint_keeps_what_was_learned():
    x = standardised(physical_batch())
    trained = reader_with_statistics()
    expected = trained(x, None, VARIABLES)
    fresh = reader()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x, None, VARIABLES).elevation_m, expected.elevation_m)
    assert fresh.sources["elevation_mean"] == "the checkpoint"
    with pytest.raises(InputError, match=r"from the checkpoint \(400\) and from a module \(0\)"):
        fresh.set_statistics(MEAN | {"orography": 0.0}, STD, "a module")


def test_an_unset_checkpoint_does_not_wipe_what_is_set_and_a_different_one_is_an_error():
    read = reader_with_statistics()
    read.load_state_dict(reader().state_dict())
    assert read.elevation_mean.item() == 400
    other = reader()
    other.set_statistics(MEAN | {"orography": 0.0}, STD, "another run")
    before = copy.deepcopy(read.state_dict())
    with pytest.raises(InputError, match=r"from a test \(400\) and from the checkpoint \(0\)"):
        read.load_state_dict(other.state_dict())
    assert all(torch.equal(read.state_dict()[key], value) or value.isnan().all() for key, value in before.items())


def test_a_static_field_in_a_checkpoint_needs_no_file():
    field = ElevationField(physical_batch()[0, 0].numpy(), None, None, "a file")
    trained = reader(wind_variables=None, elevation_file=field)
    fresh = reader(wind_variables=None)
    fresh.load_state_dict(trained.state_dict())
    x = physical_batch()[:, 1:2]
    assert torch.equal(fresh(x, None, VARIABLES[1:2]).elevation_m, trained(x, None, VARIABLES[1:2]).elevation_m)


def test_half_precision_models_keep_metres():
    read = reader_with_statistics()
    read.set_statistics(MEAN | {"orography": 400.0}, STD, "a test")
    read.half()
    assert read.elevation_mean.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terrain = read(standardised(physical_batch()), None, VARIABLES)
    expected = reader_with_statistics()(standardised(physical_batch()), None, VARIABLES)
    assert torch.equal(terrain.elevation_m, expected.elevation_m)


def test_a_region_is_the_same_terrain_cut():
    read = reader_with_statistics()
    x = standardised(physical_batch())
    read.set_grid(LAT, LON, "the data")
    whole = read(x, torch.tensor([0.5, 0.5]), VARIABLES)
    part = for_a_block(read, x, [1, 2, 5])
    assert torch.equal(part.elevation_m, whole.elevation_m[:, [1, 2, 5]])
    assert torch.equal(part.speed, whole.speed[:, [1, 2, 5]])
    assert torch.equal(part.lat, whole.lat[[1, 2, 5]])
    assert part.patch_ids.tolist() == [1, 2, 5]
    assert part.select([2]).patch_ids.tolist() == [5]
    assert part.grid == whole.grid
    assert torch.equal(part.lead_hours, whole.lead_hours)


def test_terrain_validates_itself():
    with pytest.raises(InputError, match="a grid of 2 x 3 patches does not have 5"):
        Terrain(torch.zeros(1, 5), (2, 3))
    with pytest.raises(InputError, match="speed has 5 patches"):
        Terrain(torch.zeros(1, 6), (2, 3), speed=torch.zeros(1, 5))
    with pytest.raises(InputError, match=r"elevation_m is \[batch or 1, patches\]"):
        Terrain(torch.zeros(6), (2, 3))


def test_files_of_every_kind(tmp_path):
    import xarray

    values = np.random.default_rng(0).uniform(0, 3000, (4, 6))
    np.save(tmp_path / "z.npy", values)
    np.savez(tmp_path / "z.npz", orography=values, lat=LAT, lon=LON)
    for name, field, units in (("m", values, "m"), ("phi", values * 9.80665, "m**2 s**-2")):
        xarray.Dataset(
            {"z": (("time", "latitude", "longitude"), field[None], {"units": units})},
            {"time": [0], "latitude": LAT, "longitude": LON},
        ).to_netcdf(tmp_path / f"{name}.nc")
    for name in ("z.npy", "z.npz", "m.nc", "phi.nc"):
        field = read_elevation_file(tmp_path / name)
        np.testing.assert_allclose(field.values, values, rtol=1e-12)
        assert field.has_coordinates == (name != "z.npy")


def test_files_that_do_not_serve(tmp_path):
    import xarray

    with pytest.raises(InputError, match="does not exist"):
        read_elevation_file(tmp_path / "none.nc")
    (tmp_path / "z.txt").write_text("0")
    with pytest.raises(InputError, match=r"is a \.nc, \.npz or \.npy file"):
        read_elevation_file(tmp_path / "z.txt")
    np.savez(tmp_path / "z.npz", height=np.zeros((4, 6)))
    with pytest.raises(InputError, match="holds height, and no 'orography'"):
        read_elevation_file(tmp_path / "z.npz")
    np.savez(tmp_path / "z.npz", orography=np.zeros((4, 6)), lat=LAT[:2], lon=LON)
    with pytest.raises(InputError, match="2 latitudes and 6 longitudes for a field of"):
        read_elevation_file(tmp_path / "z.npz")
    xarray.Dataset({"height": (("y", "x"), np.zeros((4, 6)))}).to_netcdf(tmp_path / "height.nc")
    with pytest.raises(InputError, match="holds height, and no 'orography' or 'z'"):
        read_elevation_file(tmp_path / "height.nc")
    xarray.Dataset({"z": (("y", "x"), np.zeros((4, 6)))}).to_netcdf(tmp_path / "z.nc")
    with pytest.raises(InputError, match=r"must come in one of 'm', .* but it names no unit: write"):
        read_elevation_file(tmp_path / "z.nc")
