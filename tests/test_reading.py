"""The terrain reader at the edges of what it takes, and what `attach` gives it where nothing is said."""

import numpy as np
import pytest
from test_attach import batch, model, predict, strong
from test_terrain import LAT, LON, MEAN, STD, VARIABLES, WINDS, physical_batch, reader, reader_with_statistics

from climax_elevation import InputError, attach
from climax_elevation.terrain.controls import level
from climax_elevation.terrain.elevation_file import ElevationField


def test_what_attach_does_where_nothing_is_said():
    made = model()
    attach(made)
    terrain = made.terrain
    assert (terrain.elevation_variable, terrain.wind_variables) == ("orography", tuple(WINDS))
    assert not terrain.static_terrain
    assert not terrain.terrain_is_flat
    assert (terrain.spacing_m, terrain.patch_order, terrain.control) == (None, "raster", "none")
    assert [hasattr(block, "terrain_inputs") for block in made.blocks] == [True, False, False]
    assert made.blocks[0].attn.engine == "auto"


def test_statistics_of_one_wind_component_are_of_no_use():
    read = reader()
    read.set_statistics({"orography": 400.0, WINDS[0]: 1.0}, {"orography": 800.0, WINDS[0]: 5.0}, "a test")
    assert set(read.sources) == {"elevation_mean", "elevation_std"}
    read = reader()
    read.set_statistics(MEAN, {"orography": 800.0}, "a test")
    assert set(read.sources) == {"elevation_mean", "elevation_std"}


@pytest.mark.parametrize("statistic", ["mean", "std"])
def test_one_component_that_disagrees_is_enough(statistic):
    read, given = reader_with_statistics(), {"mean": dict(MEAN), "std": dict(STD)}
    given[statistic][WINDS[1]] += 1.0
    with pytest.raises(InputError, match=f"terrain.wind_{statistic} from a test .* and from another .* disagree"):
        read.set_statistics(given["mean"], given["std"], "another")


def test_the_same_grid_may_come_twice_and_longitudes_in_either_count():
    read = reader()
    read.set_grid(LAT, LON, "a test")
    read.set_grid(LAT, LON, "a second one")
    read.set_grid(LAT, LON - 360, "a third")
    with pytest.raises(InputError, match=r"terrain.lon from a third .* and from a fourth"):
        read.set_grid(LAT, LON + 1, "a fourth")


@pytest.mark.parametrize(("by", "refused"), [(0.02, False), (0.08, True), (-0.02, False), (-0.08, True)])
def test_statistics_agree_to_one_in_ten_thousand(by, refused):
    read = reader_with_statistics()
    again = MEAN | {"orography": MEAN["orography"] + by}  # of 400 m
    if refused:
        with pytest.raises(InputError, match="disagree"):
            read.set_statistics(again, STD, "another")
    else:
        read.set_statistics(again, STD, "another")


def test_a_depth_without_spread_is_no_standardised_channel():
    read = reader(wind_variables=None, elevation_file=ElevationField(np.full((4, 6), -20.0), None, None, "a test"))
    assert read(physical_batch()[:, 1:2], None, VARIABLES[1:2]).elevation_m.max() == -20


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_ground_is_not_finite(value):
    values = np.linspace(0, 4000, 24).reshape(4, 6)
    values[1, 1] = value
    read = reader(wind_variables=None, elevation_file=ElevationField(values, None, None, "a test"))
    with pytest.raises(InputError, match="not finite"):
        read(physical_batch()[:, 1:2], None, VARIABLES[1:2])


@pytest.mark.parametrize(("height", "refused"), [(4.5, True), (5.5, False), (9.9, False)])
def test_low_hills_are_ground_from_a_spread_of_five_metres_on(height, refused):
    values = np.repeat(np.tile([height, -height, height], (4, 1)), 2, axis=1)
    read = reader(wind_variables=None, elevation_file=ElevationField(values, None, None, "a test"))
    x = physical_batch()[:, 1:2]
    if refused:
        with pytest.raises(InputError, match="looks standardised"):
            read(x, None, VARIABLES[1:2])
    else:
        assert read(x, None, VARIABLES[1:2]).elevation_m.abs().max() == pytest.approx(height)


def test_biases_are_prepared_for_the_ground_that_replaces_theirs():
    made = model(use_physics_mask=True, bias_type="ridge", bias_args={"static_terrain": True})
    made.terrain.set_statistics(MEAN, STD, "a test")
    x, lead_times = batch()
    hills = predict(strong(made), x, lead_times)
    with made.terrain.replaced(level):
        assert (predict(made, x, lead_times) - hills).abs().max() > 1e-4


def test_paths_are_found_in_the_whole_grid_before_a_region_is_cut():
    made = model(use_physics_mask=True, bias_type="ridge", bias_args={"static_terrain": True})
    made.terrain.set_statistics(MEAN, STD, "a test")
    x, lead_times = batch()
    whole = made.terrain.for_blocks(made.blocks, x, lead_times, VARIABLES)[0]["bias_inputs"]
    other = model(use_physics_mask=True, bias_type="ridge", bias_args={"static_terrain": True})
    other.terrain.set_statistics(MEAN, STD, "a test")
    elevation, excess, _ = other.terrain.for_blocks(other.blocks, x, lead_times, VARIABLES, [9, 10, 18])[0][
        "bias_inputs"
    ]
    assert elevation.tolist() == whole[0][:, [9, 10, 18]].tolist()
    assert excess.tolist() == whole[1][:, [9, 10, 18]][:, :, [9, 10, 18]].tolist()
