"""Values at stations that are hidden: who sees what, the methods by hand, and mistakes."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from climax_elevation.compare import compare
from climax_elevation.compare.infill import Arm, InfillTask, read_infill
from climax_elevation.errors import InputError
from climax_elevation.testbed.fit import TrainingSettings
from climax_elevation.testbed.infill import Infill, InfillModel, InfillSettings, Series, build_infill, read_series
from climax_elevation.testbed.interpolation import Places, fit_optimal, inverse_distance

STATIONS, DAYS = 12, 90
SMALL = InfillModel(embed_dim=16, depth=1)
QUICK = TrainingSettings(steps=4, batch_size=8, lr=2e-3, validations=2)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Air in two layers, each of its own mood: what is high follows what is high."""
    random = np.random.RandomState(0)
    path = tmp_path_factory.mktemp("stations") / "stations.csv"
    place = random.random_sample((STATIONS, 2))
    height_m = np.linspace(100, 2500, STATIONS)
    layers = random.standard_normal((DAYS, 2))
    with open(path, "w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["time", "station", "lat", "lon", "elevation (m)", "t2m"])
        for day in range(DAYS):
            for s in range(STATIONS):
                value = layers[day, int(height_m[s] > 1300)] + 0.1 * random.standard_normal()
                stamp = np.datetime64("2004-01-01") + day
                gap = (day + s) % 17 == 0
                writer.writerow([stamp, f"S{s}", 46 + place[s, 0], 11 + place[s, 1], height_m[s], "" if gap else value])
    return path


def settings(file: Path, **changes: Any) -> InfillSettings:
    given = {"stations": str(file), "val_from": "2004-02-15", "test_from": "2004-03-01", "year_harmonics": 0} | changes
    return InfillSettings(**given)


def at_work(series: Series, seed: int = 0, elevation_input: bool = False) -> Infill:
    return Infill(series, series.unseen(0.25, seed), elevation_input, series.days(None), series.terrain())


def trained(infill: Infill) -> torch.nn.Module:
    net = build_infill(SMALL, seed=0, bias_type="physics", bias_args={"wind": False})
    infill.fit(net, QUICK, 0.5, seed=0, keep_best=True, on_step=lambda error: None)
    return net


def test_parts_follow_each_other_and_anomalies_have_no_mean_before_test(file: Path) -> None:
    series = read_series(settings(file))
    assert [len(series.parts[part]) for part in ("train", "val", "test")] == [45, 15, 30]
    assert np.abs(np.nanmean(series.x[:60], axis=0)).max() < 1e-9
    assert np.isclose(np.nanstd(series.x[series.parts["train"]]), 1)
    assert len(series.days(9)) == 9


def test_never_seen_stations_are_a_quarter_of_all_heights_and_others_for_each_seed(file: Path) -> None:
    series = read_series(settings(file))
    sets = [series.unseen(0.25, seed) for seed in range(4)]
    assert all(mask.sum() == 3 and (mask.reshape(3, 4).sum(axis=1) == 1).all() for mask in sets)
    assert len({mask.tobytes() for mask in sets}) > 1


def test_what_is_hidden_or_never_seen_changes_nothing_that_is_inferred(file: Path) -> None:
    """Neither in training nor afterwards: the values that are scored could be anything."""
    series = read_series(settings(file))
    infill = at_work(series)
    net = trained(infill)
    inferred = infill.infer(net, "test")
    changed = series.x.copy()
    changed[:, infill.unseen] += 7
    test = series.parts["test"]
    changed[test] += 7 * series.hidden[test]
    other = at_work(Series(series.stations, changed, series.std, series.parts, series.hidden))
    assert np.array_equal(other.infer(trained(other), "test"), inferred)
    changed[test] += 7  # and what is visible does
    assert np.abs(other.infer(net, "test") - inferred).max() > 1e-3


def test_places_on_both_sides_of_the_dateline_are_near_each_other(file: Path) -> None:
    series, all_seen = read_series(settings(file)), np.ones(STATIONS, dtype=bool)
    lon = (series.stations.lon + 168.5 + 180) % 360 - 180
    assert (lon < 0).any()
    assert (lon > 0).any()
    turned = replace(series, stations=replace(series.stations, lon=lon))
    torch.testing.assert_close(turned.inputs(all_seen, True), series.inputs(all_seen, True), atol=1e-5, rtol=1e-5)


def test_heights_reach_the_network_through_its_input_or_not_at_all(file: Path) -> None:
    series = read_series(settings(file))
    seen = ~series.unseen(0.25, 0)
    given, withheld = (series.inputs(seen, told) for told in (True, False))
    assert torch.equal(given[:, :2], withheld[:, :2])
    assert given[:, 2].std() > 0.5
    assert (withheld[:, 2] == 0).all()


def test_methods_by_hand() -> None:
    # the first is hidden; of the others, 1 and 2 km away, the nearer says 1 and the farther 4
    places = Places(np.array([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]]), np.zeros((3, 3)))
    x, visible = np.array([[9.0, 1, 4]]), np.array([[False, True, True]])
    # (1 / 1 + 4 / 4) / (1 / 1 + 1 / 4)
    assert np.isclose(inverse_distance(x, visible, places, 2.0)[0, 0], 1.6)


def test_optimal_interpolation_finds_the_layers_that_distance_does_not_know(file: Path) -> None:
    series = read_series(settings(file))
    at = series.stations
    places = Places.of(at.lat, at.lon, at.elevation_m)
    x, covered = series.x[:60], series.hidden[:60]
    known = np.isfinite(x)
    errors = []
    for heights in (False, True):
        method = fit_optimal(x, known & ~covered, known & covered, places, heights=heights)
        errors.append(np.square(method.infer(x, known & ~covered, places) - x)[known & covered].mean())
    assert errors[1] < 0.5 * errors[0]


def written(folder: Path, file: Path, **changes: Any) -> Path:
    given = {
        "task": "infill",
        "data": {
            "stations": str(file),
            "val_from": "2004-02-15",
            "test_from": "2004-03-01",
            "year_harmonics": 0,
        },
        "model": {"embed_dim": 16, "depth": 1},
        "training": {"steps": 4, "batch_size": 8, "validations": 2},
        "training_days": ["all", 9],
        "seeds": [0, 1],
        "variants": {
            "none": None,
            "structure": {"bias_type": "structure"},
            "mirrored": {"bias_type": "structure", "bias_args": {"control": "mirrored"}},
        },
        "statistics": {"resamples": 20, "block": 5},
    }
    for name, value in changes.items():
        given[name] = {**given[name], **value} if isinstance(given.get(name), dict) and name != "variants" else value  # type: ignore[dict-item]
    path = folder / "infill.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def test_each_seed_shuffles_heights_anew(file: Path, tmp_path: Path) -> None:
    control = {"none": None, "permuted": {"bias_type": "structure", "bias_args": {"control": "permuted"}}}
    configuration = read_infill(written(tmp_path, file, variants=control))
    series, variant = read_series(configuration.data), configuration.variants[1]
    heights = [
        InfillTask(tmp_path, variant, seed, Arm(False), QUICK, True, {}, configuration.data, SMALL).on(series).terrain
        for seed in (0, 1)
    ]
    assert not torch.equal(heights[0].elevation_m, heights[1].elevation_m)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"data": {"hidden": 1.0}}, "data.hidden is a share .* with all hidden there is nothing to infer from"),
    ({"data": {"unseen": 0.95}}, "data.unseen 0.95 leaves 1 to train on"),
    ({"data": {"test_from": "2009-01-01"}}, "no time of test has values at two stations"),
    ({"data": {"val_from": "2004-03-05"}}, "data.val_from is before test_from"),
    ({"data": {"val_from": "soon"}}, "data.val_from is a year or an ISO date of UTC"),
    ({"data": {"year_harmonics": 2}}, "are no year: set data.year_harmonics: 0"),
    ({"data": {"transform": "log"}}, "transform: log is of values above 0"),
    ({"data": {"leave_out": [f"S{n}" for n in range(11)]}}, "has 1 station: a value is inferred"),
    ({"training_days": 0}, "training_days is a list of different numbers of days"),
    ({"training_days": [60]}, "training_days is at most the 45 days"),
    (
        {"variants": {"none": None, "r": {"bias_type": "ridge"}}},
        "variant 'r': a path across the ground needs a grid of patches",
    ),
    ({"variants": {"none": None, "p": {"bias_type": "physics"}}}, "variant 'p': the physics bias needs wind"),
    (
        {"variants": {"none": None, "p": {"bias_type": "physics", "bias_args": {"elevation_file": "x.nc"}}}},
        "variant 'p': elevation_file is for grids",
    ),
    ({"strata": {}}, "unknown key 'strata' in the configuration"),
    ({"task": "infil"}, "unknown task 'infil'; choose one of 'forecast', 'infill'"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda value: None if isinstance(value, dict) else value)
def test_mistakes_are_told_before_anything_is_trained(
    file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare(written(tmp_path, file, **changes), out=tmp_path / "out")
    assert not list(tmp_path.glob("out/*/runs/*/*"))


def test_half_a_year_of_values_tells_no_climatology_of_the_year(tmp_path: Path) -> None:
    """It would be extrapolated, by tens of degrees, to the months without one."""
    path, days = tmp_path / "stations.csv", np.arange(800)
    lines = ["time,station,lat,lon,elevation (m),t2m"]
    for station in range(4):
        for day in days:
            gap = station == 3 and day < 731 and 120 < day % 365.25 < 300
            value = "" if gap else 10 * np.cos(2 * np.pi * day / 365.25) + station
            lines.append(f"{np.datetime64('2003-01-01') + day},S{station},46.{station},11,{100 * station},{value}")
    path.write_text("\n".join(lines) + "\n")
    given = {"val_from": "2004-06-01", "test_from": "2005-01-01", "year_harmonics": 2}
    with pytest.raises(InputError, match=r"gaps of up to 0.25 years, .* longer ones at 'S3' \(0.49\): name them in"):
        read_series(settings(path, **given))
    assert read_series(settings(path, **given, leave_out=("S3",))).std < 1


@pytest.mark.parametrize("name", ["trentino_daily", "trentino_hourly", "germany_pm10"])
def test_committed_configurations_are_right(name: str) -> None:
    read = read_infill(Path(__file__).parents[1] / "configs" / "compare" / f"{name}.yaml")
    assert len(read.seeds) == 5
    assert {arm.name for arm in read.arms} == {"withheld", "given", "withheld_60_days", "given_60_days"}
    for variant in read.variants:
        build_infill(read.model, seed=0, bias_type=variant.bias_type, bias_args=variant.bias_args)
