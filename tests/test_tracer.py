"""The simulated tracer: its arithmetic, its invariants and its data set."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from climax_elevation.data.format import PARTITIONS
from climax_elevation.errors import InputError
from climax_elevation.testbed.altitude import ElevationMap
from climax_elevation.testbed.tracer import (
    EARTH_RADIUS_M,
    TRACER_VARIABLES,
    TracerSettings,
    TracerSimulator,
    draw_winds,
    floor,
    tracer_simulator,
    write_tracer_dataset,
)

RANDOM = np.random.default_rng(5)


def _ground(elevation: np.ndarray, step: float = 1.0, south: float = 20.0) -> ElevationMap:
    rows, columns = elevation.shape
    return ElevationMap(south + step * np.arange(rows), 10 + step * np.arange(columns), elevation.astype(float))


def _globe(rows: int = 8, relief_m: float = 3000.0) -> ElevationMap:
    step = 180 / rows
    lat, lon = -90 + step * (np.arange(rows) + 0.5), step * np.arange(2 * rows)
    return ElevationMap(lat, lon, relief_m * RANDOM.random((rows, 2 * rows)))


def _fields(ground: ElevationMap, episodes: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (episodes, *ground.elevation_m.shape)
    return RANDOM.random(shape), RANDOM.normal(0, 10, shape), RANDOM.normal(0, 10, shape)


def test_three_cells_by_hand() -> None:
    """Wind of 10 m/s along 3 cells in a row at the equator, the middle one 1000 m up, H = 1000 m.

    A row above of the same, so that the grid has two; no wind across. Cells are 1 degree, 111 195 m, and
    the rows lie at -0.5 and 0.5 degrees, so that both are as wide: width = 111 195 m * cos(0.5) = 111 190 m.
    In one second, cells of concentration (1, 2, 4) send eastwards, as shares of their content:
        1 -> 2, uphill:    10 / 111 190 * exp(-1) * 1 = 3.3086e-05
        2 -> 3, downhill:  10 / 111 190 * 2           = 1.7987e-04
    and nothing leaves the third, whose eastern side is closed. (A cell's area is its height times its
    width up to 1e-5, the flatness of one degree.)
    """
    ground = _ground(np.array([[0, 1000, 0], [0, 1000, 0]]), south=-0.5)
    c = np.array([[[1.0, 2.0, 4.0]] * 2])
    after = TracerSimulator(ground).advance(c, np.full_like(c, 10), np.zeros_like(c), hours=1 / 3600)
    uphill, downhill = 3.3086e-05, 1.7987e-04
    expected = [1 - uphill, 2 + uphill - downhill, 4 + downhill]
    np.testing.assert_allclose(after[0] - c[0], np.subtract([expected] * 2, c[0]), rtol=2e-4)


def _plain_step(simulator: TracerSimulator, c: np.ndarray, u: np.ndarray, v: np.ndarray, dt: float) -> np.ndarray:
    """One Euler step of one episode, cell by cell and face by face."""
    ground, z = simulator.ground, simulator.ground.elevation_m
    rows, columns = z.shape
    phi, dphi, dlam = np.deg2rad(ground.lat), np.deg2rad(ground.lat_step), np.deg2rad(ground.lon_step)
    after = c.copy()
    for i in range(rows):
        area = EARTH_RADIUS_M**2 * dlam * (np.sin(phi[i] + dphi / 2) - np.sin(phi[i] - dphi / 2))
        for j in range(columns):
            for di, dj in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                ni, nj = i + di, (j + dj) % columns
                if not 0 <= ni < rows or (not ground.periodic and not 0 <= j + dj < columns):
                    continue
                if dj:
                    wind = dj * (u[i, j] + u[ni, nj]) / 2
                    length, distance = EARTH_RADIUS_M * dphi, EARTH_RADIUS_M * np.cos(phi[i]) * dlam
                else:
                    wind = di * (v[i, j] + v[ni, nj]) / 2
                    length = EARTH_RADIUS_M * np.cos(phi[i] + di * dphi / 2) * dlam
                    distance = EARTH_RADIUS_M * dphi
                rise = z[ni, nj] - z[i, j]
                flux = wind * c[i, j] if wind > 0 else wind * c[ni, nj]
                flux *= np.exp(-max(0, rise if wind > 0 else -rise) / simulator.height_scale_m)
                spread = np.exp(-abs(rise) / simulator.height_scale_m) * simulator.diffusivity_m2_s / distance
                after[i, j] -= dt / area * length * (flux + spread * (c[i, j] - c[ni, nj]))
            after[i, j] -= dt * simulator.decay_per_day / 86400 * c[i, j]
            if simulator.source_per_hour is not None:
                after[i, j] += dt / 3600 * simulator.source_per_hour[i, j]
    return after


@pytest.mark.parametrize("kind", ["region", "globe"])
def test_equals_plain_loops(kind: str) -> None:
    ground = _globe() if kind == "globe" else _ground(3000 * RANDOM.random((5, 7)))
    source = RANDOM.random(ground.elevation_m.shape)
    simulator = TracerSimulator(ground, 800.0, diffusivity_m2_s=1e5, decay_per_day=0.5, source_per_hour=source)
    c, u, v = _fields(ground)
    seconds = 60.0
    after = simulator.advance(c, u, v, seconds / 3600)
    for episode in range(2):
        expected = _plain_step(simulator, c[episode], u[episode], v[episode], seconds)
        np.testing.assert_allclose(after[episode], expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["region", "globe"])
def test_mass_is_kept(kind: str) -> None:
    ground = _globe() if kind == "globe" else _ground(3000 * RANDOM.random((9, 12)))
    simulator = TracerSimulator(ground, diffusivity_m2_s=1e5)
    c, u, v = _fields(ground)
    after = simulator.advance(c, u, v, hours=100)
    assert np.abs(after - c).max() > 0.1
    # rounding of a few hundred steps
    np.testing.assert_allclose(simulator.mass(after), simulator.mass(c), rtol=1e-12)


def test_sources_and_decay_change_the_mass_as_they_should() -> None:
    ground = _ground(np.zeros((4, 5)))
    c = np.ones((1, 4, 5))
    calm = np.zeros_like(c)
    emitted = TracerSimulator(ground, source_per_hour=np.full((4, 5), 0.25)).advance(c, calm, calm, hours=8)
    np.testing.assert_allclose(emitted, 3.0, rtol=1e-12)
    wind = np.full_like(c, 10.0)
    simulator = TracerSimulator(ground, decay_per_day=1.0)
    after = simulator.advance(c, wind, calm, hours=24)
    # Euler's steps of about two hours for exp(-1)
    np.testing.assert_allclose(simulator.mass(after) / simulator.mass(c), np.exp(-1), rtol=0.06)


def test_area_is_the_spheres() -> None:
    ground = _globe()
    total = TracerSimulator(ground).area_m2.sum() * ground.lon.size
    assert total == pytest.approx(4 * np.pi * EARTH_RADIUS_M**2, rel=1e-12)


def test_stays_positive_in_any_wind() -> None:
    ground = _globe()
    c, u, v = _fields(ground, 3)
    c[:, ::2] = 0
    after = TracerSimulator(ground, 300.0, 1e5, 2.0).advance(c, 8 * u, 8 * v, hours=200)
    assert after.min() >= 0
    assert np.isfinite(after).all()


def test_nothing_crosses_a_wall() -> None:
    """A ridge of 1000 scale heights: exp(-1000) of a flux is 0."""
    elevation = np.zeros((4, 9))
    elevation[:, 4] = 1e6
    ground = _ground(elevation)
    c = np.zeros((1, 4, 9))
    c[:, :, :4] = 1.0
    wind = np.full_like(c, 10.0)
    after = TracerSimulator(ground, 1000.0, diffusivity_m2_s=1e5).advance(c, wind, wind / 3, hours=240)
    assert (after[:, :, 4:] == 0).all()
    level = TracerSimulator(_ground(np.zeros((4, 9)))).advance(c, wind, wind / 3, hours=240)
    assert level[:, :, 4:].sum() > 1


def test_flat_ground_hinders_nothing_at_any_height_scale() -> None:
    c, u, v = _fields(_ground(np.zeros((5, 6))))
    low, high = (
        TracerSimulator(_ground(np.full((5, 6), 4000.0)), scale, 1e5).advance(c, u, v, hours=20) for scale in (1.0, 1e9)
    )
    np.testing.assert_array_equal(low, high)
    uneven = TracerSimulator(_ground(4000 * RANDOM.random((5, 6))), 1000.0, 1e5).advance(c, u, v, hours=20)
    assert np.abs(uneven - low).max() > 0.01


def test_an_episode_does_not_depend_on_its_company() -> None:
    ground = _globe()
    simulator = TracerSimulator(ground, diffusivity_m2_s=1e5)
    c, u, v = _fields(ground, 3)
    u[2] *= 5  # one that needs many more steps
    together = simulator.advance(c, u, v, hours=50)
    for episode in range(3):
        one = slice(episode, episode + 1)
        np.testing.assert_array_equal(simulator.advance(c[one], u[one], v[one], hours=50), together[one])


def test_winds_are_smooth_of_the_asked_speed_and_hardly_converge() -> None:
    ground = _ground(np.zeros((32, 64)))
    winds = draw_winds(ground, [np.random.default_rng(i) for i in range(8)], speed_m_s=9.0, turn_hours=100.0)
    u, v = winds.at(0.0)
    np.testing.assert_allclose(np.sqrt((u**2 + v**2).mean(axis=(1, 2))), 9.0)
    # a wave has 12 cells or more: neighbours differ little beside the field's own size
    assert np.abs(np.diff(u, axis=2)).mean() < 0.2 * np.abs(u).mean()
    calm = np.ones((8, 32, 64))
    after = TracerSimulator(ground).advance(calm, u, v, hours=12)
    # carried over some 3.5 cells, an even tracer stays even: the discrete divergence is small
    assert np.abs(after - 1)[:, 4:-4, 4:-4].mean() < 0.05
    u_later, v_later = winds.at(10.0)
    # a tenth of a radian: sin(0.1) of a second field of the same speed, within its chance resemblance
    assert np.sqrt(((u_later - u) ** 2 + (v_later - v) ** 2).mean()) == pytest.approx(9.0 * np.sin(0.1), rel=0.1)


SETTINGS = TracerSettings(steps=3, spin_up_steps=1)
EPISODES = {"train": 5, "val": 2, "test": 3}


@pytest.fixture(scope="module")
def ground() -> ElevationMap:
    y, x = np.mgrid[0:16, 0:24]
    return _ground(4000 * np.exp(-((x - 12) ** 2 + (y - 8) ** 2) / 20))


@pytest.fixture(scope="module")
def dataset(ground: ElevationMap, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tracer")
    write_tracer_dataset(out, ground, episodes=EPISODES, seed=3, settings=SETTINGS)
    return out


def _shards(out: Path, partition: str) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(path)) for path in sorted((out / partition).glob("episode_*.npz"))]


def test_shards_have_climax_format_and_units(dataset: Path, ground: ElevationMap) -> None:
    for partition in PARTITIONS:
        shards = _shards(dataset, partition)
        assert len(shards) == EPISODES[partition]
        for shard in shards:
            assert tuple(shard) == TRACER_VARIABLES
            for values in shard.values():
                assert values.shape == (3, 1, 16, 24)
                assert values.dtype == np.float32
            np.testing.assert_array_equal(shard["orography"][2, 0], ground.elevation_m.astype(np.float32))
            np.testing.assert_array_equal(shard["lattitude"][1, 0, :, 5], ground.lat.astype(np.float32))
            assert shard["tracer"].min() >= 0
        assert (dataset / partition / "climatology.npz").exists() == (partition != "train")
    assert np.load(dataset / "lat.npy").shape == (16,)
    assert np.load(dataset / "lon.npy").shape == (24,)


def test_statistics_are_those_of_training_alone(dataset: Path) -> None:
    train = _shards(dataset, "train")
    mean, std = (np.load(dataset / f"normalize_{name}.npz") for name in ("mean", "std"))
    climatology = np.load(dataset / "test" / "climatology.npz")
    for name in TRACER_VARIABLES:
        values = np.stack([shard[name] for shard in train]).astype(np.float64)
        # the winds' means are all but zero
        np.testing.assert_allclose(mean[name], [values.mean()], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(std[name], [values.std()], rtol=1e-9)
        np.testing.assert_allclose(climatology[name], values.mean(axis=(0, 1)), rtol=1e-9, atol=1e-9)


def test_episodes_are_independent_and_each_is_one_shard(dataset: Path) -> None:
    """Steps of a shard follow from each other, and no two episodes are alike, in or across partitions."""
    first = [shard["10m_u_component_of_wind"][0, 0] for part in PARTITIONS for shard in _shards(dataset, part)]
    for i in range(len(first)):
        for j in range(i):
            assert abs(np.corrcoef(first[i].ravel(), first[j].ravel())[0, 1]) < 0.9
    for shard in _shards(dataset, "train"):
        wind = shard["10m_u_component_of_wind"][:, 0].reshape(3, -1)
        # one radian in turn_steps = 10 steps: cos(0.1), and the second field's chance resemblance
        assert np.corrcoef(wind[0], wind[1])[0, 1] > 0.95


def test_same_seed_same_data_whatever_the_number_of_episodes(
    dataset: Path, ground: ElevationMap, tmp_path: Path
) -> None:
    write_tracer_dataset(tmp_path, ground, episodes={**EPISODES, "train": 2}, seed=3, settings=SETTINGS)
    for name in ("train/episode_00001.npz", "test/episode_00002.npz"):
        again, before = np.load(tmp_path / name), np.load(dataset / name)
        for variable in TRACER_VARIABLES:
            np.testing.assert_array_equal(again[variable], before[variable])
    write_tracer_dataset(tmp_path, ground, episodes=EPISODES, seed=4, settings=SETTINGS)
    other = np.load(tmp_path / "train/episode_00001.npz")["tracer"]
    assert np.abs(other - np.load(dataset / "train/episode_00001.npz")["tracer"]).max() > 0.01


def test_writing_again_leaves_no_episode_of_before(ground: ElevationMap, tmp_path: Path) -> None:
    for count in (3, 1):
        write_tracer_dataset(tmp_path, ground, episodes=dict.fromkeys(PARTITIONS, count), seed=1, settings=SETTINGS)
    assert len(_shards(tmp_path, "train")) == 1


def test_floor_lies_below_persistence(dataset: Path, ground: ElevationMap) -> None:
    simulator = tracer_simulator(ground, seed=3, settings=SETTINGS)
    for lead in (1, 2):
        result = floor(dataset, simulator, hours=SETTINGS.hours(ground), predict_range=lead)
        # recorded winds interpolated, shards in float32: all but exact
        assert result.true_wind < 0.01 * result.persistence
        assert result.true_wind < result.initial_wind < 0.5 * result.persistence


def test_floor_is_zero_when_winds_stand_still(ground: ElevationMap, tmp_path: Path) -> None:
    still = replace(SETTINGS, turn_steps=1e9)
    simulator = write_tracer_dataset(tmp_path, ground, episodes=dict.fromkeys(PARTITIONS, 1), seed=1, settings=still)
    # the shards are float32
    assert floor(tmp_path, simulator, hours=still.hours(ground)).initial_wind < 1e-6


def test_persistence_is_weighted_by_latitude(dataset: Path, ground: ElevationMap) -> None:
    weight = np.cos(np.deg2rad(ground.lat))[:, None] / np.cos(np.deg2rad(ground.lat)).mean()
    expected = np.mean(
        [
            np.sqrt((weight * np.square(shard["tracer"][t + 1, 0] - shard["tracer"][t, 0])).mean())
            for shard in _shards(dataset, "test")
            for t in range(2)
        ]
    )
    simulator = tracer_simulator(ground, seed=3, settings=SETTINGS)
    # float32 differences
    assert floor(dataset, simulator, hours=1).persistence == pytest.approx(expected, rel=1e-5)


def test_mistakes_are_one_sentence(ground: ElevationMap, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="above 0, not 0"):
        TracerSimulator(ground, height_scale_m=0)
    with pytest.raises(InputError, match="not negative"):
        TracerSimulator(ground, decay_per_day=-1)
    with pytest.raises(InputError, match="a source is"):
        TracerSimulator(ground, source_per_hour=np.ones((2, 2)))
    with pytest.raises(InputError, match="tracer, u and v are"):
        TracerSimulator(ground).advance(np.ones((16, 24)), np.ones((16, 24)), np.ones((16, 24)), 1)
    with pytest.raises(InputError, match="at least 1 for each"):
        write_tracer_dataset(tmp_path, ground, episodes={"train": 3}, seed=0)
    with pytest.raises(InputError, match="a seed is 0 or more"):
        write_tracer_dataset(tmp_path, ground, episodes=EPISODES, seed=-1)
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="name another folder"):
        write_tracer_dataset(tmp_path, ground, episodes=EPISODES, seed=0)
    with pytest.raises(InputError, match="too few"):
        floor(dataset, tracer_simulator(ground, seed=3, settings=SETTINGS), hours=1, predict_range=3)
    with pytest.raises(InputError, match="no episodes"):
        floor(tmp_path, tracer_simulator(ground, seed=3, settings=SETTINGS), hours=1)
