"""A simulated tracer: carried by changing winds, hindered by rising ground. A test bed, not a forecast.

Concentration c (arbitrary units) of each cell of a latitude-longitude grid, cell area A (m2):

    A dc/dt = -sum over faces of F + A (s - k c)

s is a source (units an hour), k a decay (per day). F is the outward flux through a face of length l (m)
between this cell and its neighbour n, with face wind U (m/s, the mean of the two cells', positive
outwards), heights z (m), diffusivity D (m2/s) and distance of centres d (m):

    F = l (  max(U, 0) p(z_n - z) c  -  max(-U, 0) p(z - z_n) c_n  +  D/d exp(-|z_n - z| / H) (c - c_n)  )
    p(rise) = exp(-max(0, rise) / H)

First-order upwind: what flows uphill is thinned by p, what flows downhill or level is not. H
(`height_scale_m`) is the rise between two cells that lets through a share of 1/e. Each flux leaves one
cell and enters the next, so the mass, the sum of A c, changes by sources and decay alone. A cell's area
is proportional to the cosine of its latitude. A grid once around the globe is periodic in longitude;
every other boundary is closed.

Time steps are Euler's, short enough that no cell gives away more than `COURANT` of what it holds in
one: c stays positive. The scheme spreads the tracer numerically, as first-order upwind does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from climax_elevation.data.format import PARTITIONS, RunningStatistics
from climax_elevation.errors import InputError
from climax_elevation.files import check_folder, check_own, save_npy, save_npz
from climax_elevation.terrain.sphere import EARTH_RADIUS_M
from climax_elevation.testbed.altitude import ElevationMap

Array = NDArray[np.float64]
Winds = tuple[Array, Array]

SECONDS_AN_HOUR = 3600.0
COURANT = 0.8
CHUNK = 32  # episodes simulated at once: their fields stay in the processor's cache
WIND_UPDATES = 6  # a step of the data set; the wind is held constant between two

WIND_VARIABLES = ("10m_u_component_of_wind", "10m_v_component_of_wind")
RECIPE = "tracer.json"  # in the data set's folder, out of the way of ClimaX's readers
TRACER_VARIABLES = ("orography", "lattitude", *WIND_VARIABLES, "tracer")


@dataclass(frozen=True, eq=False)
class TracerSimulator:
    """The transport above, on one terrain, for any number of independent episodes at once.

    Args:
        ground: Grid and elevation.
        height_scale_m: H, metres, > 0.
        diffusivity_m2_s: D, m2/s, >= 0.
        decay_per_day: k, >= 0.
        source_per_hour: s, `[H, W]`, units an hour, >= 0; none: no sources.

    Raises:
        InputError: If a number is out of its range or the source is not on the grid.
    """

    ground: ElevationMap
    height_scale_m: float = 1000.0
    diffusivity_m2_s: float = 0.0
    decay_per_day: float = 0.0
    source_per_hour: Array | None = None

    def __post_init__(self) -> None:
        if not self.height_scale_m > 0:
            raise InputError(f"height_scale_m is a rise in metres above 0, not {self.height_scale_m}")
        if not (self.diffusivity_m2_s >= 0 and self.decay_per_day >= 0):
            raise InputError("diffusivity and decay are not negative")
        source, shape = self.source_per_hour, self.ground.elevation_m.shape
        if source is not None and (source.shape != shape or not (source >= 0).all()):
            raise InputError(f"a source is {list(shape)} values of 0 or more")

    def advance(self, tracer: ArrayLike, u: ArrayLike, v: ArrayLike, hours: float) -> Array:
        """The tracer after `hours` of a constant wind.

        Args:
            tracer: c, `[E, H, W]`, E independent episodes.
            u: Eastward wind, `[E, H, W]`, m/s.
            v: Northward wind, `[E, H, W]`, m/s.
            hours: How long, > 0.

        Returns:
            c, `[E, H, W]`. Each episode is stepped as if it were alone.

        Raises:
            InputError: If a shape does not fit the grid.
        """
        c, u, v = (np.array(field, dtype=np.float64) for field in (tracer, u, v))
        if not (c.ndim == 3 and c.shape == u.shape == v.shape and c.shape[1:] == self.ground.elevation_m.shape):
            raise InputError(
                f"tracer, u and v are [episodes, {self.ground.lat.size}, {self.ground.lon.size}], "
                f"not {list(c.shape)}, {list(u.shape)} and {list(v.shape)}"
            )
        faces = self._faces(u, v)
        rate = self._fastest_loss(*faces)
        steps = np.maximum(np.ceil(hours * SECONDS_AN_HOUR * rate / COURANT), 1).astype(int)
        for count in np.unique(steps):
            alike = steps == count
            c[alike] = self._run(c[alike], [face[alike] for face in faces], hours, count)
        return c

    def mass(self, tracer: Array) -> Array:
        """Sum of A c over the grid, `[...]`, units m2."""
        return (tracer * self.area_m2[:, None]).sum(axis=(-2, -1))

    @property
    def area_m2(self) -> Array:
        """A, `[H]`, m2."""
        north, south = np.deg2rad(self._lat_edges[1:]), np.deg2rad(self._lat_edges[:-1])
        return EARTH_RADIUS_M**2 * np.deg2rad(self.ground.lon_step) * (np.sin(north) - np.sin(south))

    @property
    def _lat_edges(self) -> Array:
        return np.append(self.ground.lat, self.ground.lat[-1] + self.ground.lat_step) - self.ground.lat_step / 2

    def _faces(self, u: Array, v: Array) -> list[Array]:
        """Volume a second (m2/s) through each cell's east and north face, in each direction.

        Out to the east, in from the east, out to the north, in from the north: each multiplies the
        concentration of the cell that it comes from. The last is `[E, H - 1, W]`, as is the one before.
        """
        ground = self.ground
        height = EARTH_RADIUS_M * np.deg2rad(ground.lat_step)
        turn = EARTH_RADIUS_M * np.deg2rad(ground.lon_step)
        width = turn * np.cos(np.deg2rad(ground.lat))[:, None]
        edge = turn * np.cos(np.deg2rad(self._lat_edges[1:-1]))[:, None]

        rise_east = np.roll(ground.elevation_m, -1, axis=1) - ground.elevation_m
        east = self._exchange((u + np.roll(u, -1, axis=2)) / 2, rise_east, height, width)
        if not ground.periodic:
            for face in east:
                face[:, :, -1] = 0
        rise_north = np.diff(ground.elevation_m, axis=0)
        north = self._exchange((v[:, 1:] + v[:, :-1]) / 2, rise_north, edge, height)
        return [*east, *north]

    def _exchange(
        self, wind: Array, rise: Array, length: Array | float, distance: Array | float
    ) -> tuple[Array, Array]:
        up, down = (np.exp(-np.maximum(climb, 0) / self.height_scale_m) for climb in (rise, -rise))
        spread = self.diffusivity_m2_s / distance * up * down
        return (
            length * (np.maximum(wind, 0) * up + spread),
            length * (np.maximum(-wind, 0) * down + spread),
        )

    def _fastest_loss(self, to_east: Array, from_east: Array, to_north: Array, from_north: Array) -> Array:
        """Largest share that a cell gives away, per second, `[E]`."""
        out = to_east + np.roll(from_east, 1, axis=2)
        out[:, :-1] += to_north
        out[:, 1:] += from_north
        return (out / self.area_m2[:, None]).max(axis=(1, 2)) + self._decay_per_second

    @property
    def _decay_per_second(self) -> float:
        return self.decay_per_day / 24 / SECONDS_AN_HOUR

    def _run(self, c: Array, faces: list[Array], hours: float, steps: int) -> Array:
        to_east, from_east, to_north, from_north = faces
        seconds = hours * SECONDS_AN_HOUR / steps
        share = seconds / self.area_m2[:, None]
        source = 0.0 if self.source_per_hour is None else self.source_per_hour * hours / steps
        for _ in range(steps):
            east = to_east * c - from_east * np.roll(c, -1, axis=2)
            north = to_north * c[:, :-1] - from_north * c[:, 1:]
            out = east - np.roll(east, 1, axis=2)
            out[:, :-1] += north
            out[:, 1:] -= north
            c = c - share * out + source - self._decay_per_second * seconds * c
        return c


@dataclass(frozen=True, eq=False)
class WindEpisodes:
    """Smooth random winds, one independent draw an episode, turning slowly.

        psi(t) = cos(t / turn_hours) psi_0 + sin(t / turn_hours) psi_1,   u = -dpsi/dy,   v = dpsi/dx

    Both stream functions are sums of random plane waves, brought to 0 at the northern and southern
    boundary (and, on a regional grid, at the others), so that hardly anything converges or leaves.

    Args:
        first: u and v at t = 0, each `[E, H, W]`, m/s.
        second: u and v a quarter of a turn later.
        turn_hours: Time in which the winds turn by one radian into others, hours.
    """

    first: Winds
    second: Winds
    turn_hours: float

    def at(self, hours: float) -> Winds:
        """u and v at a time, each `[E, H, W]`, m/s."""
        angle = hours / self.turn_hours
        u, v = (
            np.cos(angle) * first + np.sin(angle) * second
            for first, second in zip(self.first, self.second, strict=True)
        )
        return u, v


def draw_winds(
    ground: ElevationMap, generators: list[np.random.Generator], *, speed_m_s: float, turn_hours: float
) -> WindEpisodes:
    """Draw one wind episode from each generator.

    Args:
        ground: The grid.
        generators: One an episode.
        speed_m_s: Root mean square of the wind speed of each field, m/s.
        turn_hours: See `WindEpisodes`.
    """
    pairs = [[_wind(ground, _stream_function(ground, each)) for _ in range(2)] for each in generators]
    fields = np.array(pairs)  # [E, 2, (u, v), H, W]
    fields *= speed_m_s / np.sqrt(np.square(fields).sum(axis=2).mean(axis=(2, 3)))[:, :, None, None, None]
    first, second = ((fields[:, k, 0], fields[:, k, 1]) for k in range(2))
    return WindEpisodes(first, second, turn_hours)


WAVES = 12
SHORTEST_WAVE, LONGEST_WAVE = 12.0, 48.0  # cells of latitude


def _stream_function(ground: ElevationMap, generator: np.random.Generator) -> Array:
    """At the corners of cells, `[H + 1, W + 1]`, in no particular unit."""
    rows, columns = ground.elevation_m.shape
    heading = generator.uniform(0, 2 * np.pi, WAVES)
    length = generator.uniform(SHORTEST_WAVE, LONGEST_WAVE, WAVES) * ground.lat_step
    phase = generator.uniform(0, 2 * np.pi, WAVES)
    across = columns * ground.lon_step / length * np.cos(heading)
    along = rows * ground.lat_step / length * np.sin(heading)
    if ground.periodic:
        across = np.rint(across)
    y, x = np.linspace(0, 1, rows + 1), np.linspace(0, 1, columns + 1)
    angle = 2 * np.pi * (along[:, None, None] * y[:, None] + across[:, None, None] * x) + phase[:, None, None]
    # Longer waves carry more, as in the atmosphere; the wind's own spectrum is then about flat.
    psi = (np.cos(angle) * length[:, None, None]).sum(axis=0) * _taper(y)[:, None]
    return psi if ground.periodic else psi * _taper(x)


def _taper(x: Array) -> Array:
    return 1 - (2 * x - 1) ** 4


def _wind(ground: ElevationMap, psi: Array) -> Winds:
    middle_lat, middle_lon = (psi[1:] + psi[:-1]) / 2, (psi[:, 1:] + psi[:, :-1]) / 2
    u = -np.diff(middle_lon, axis=0) / ground.lat_step
    v = np.diff(middle_lat, axis=1) / ground.lon_step / np.cos(np.deg2rad(ground.lat))[:, None]
    return u, v


@dataclass(frozen=True)
class TracerSettings:
    """How `write_tracer_dataset` draws and runs its episodes.

    Args:
        steps: Recorded times an episode; a shard holds one episode.
        step_hours: Time between two, hours; none: what carries the tracer about three cells.
        spin_up_steps: Steps simulated before the first that is recorded.
        speed_m_s: Root mean square wind speed, m/s.
        turn_steps: Steps in which the winds turn by one radian into others.
        height_scale_m: See `TracerSimulator`.
        diffusivity_cells: Diffusivity, squared cells of latitude a step.
        decay_steps: Steps in which the tracer falls to 1/e.
        sources: Number of places that emit, on low ground, the same in every episode.
    """

    steps: int = 4
    step_hours: float | None = None
    spin_up_steps: int = 2
    speed_m_s: float = 9.0
    turn_steps: float = 10.0
    height_scale_m: float = 1500.0
    diffusivity_cells: float = 0.1
    decay_steps: float = 20.0
    sources: int = 24

    def hours(self, ground: ElevationMap) -> float:
        """Hours a step on this grid: a whole number, as ClimaX wants."""
        if self.step_hours is not None:
            return self.step_hours
        cell_m = EARTH_RADIUS_M * np.deg2rad(ground.lat_step)
        return max(1.0, round(3 * cell_m / self.speed_m_s / SECONDS_AN_HOUR))


DEFAULT_SETTINGS = TracerSettings()


def tracer_simulator(
    ground: ElevationMap, *, seed: int, settings: TracerSettings = DEFAULT_SETTINGS
) -> TracerSimulator:
    """The simulator behind `write_tracer_dataset` with the same arguments."""
    hours = settings.hours(ground)
    cell_m = EARTH_RADIUS_M * np.deg2rad(ground.lat_step)
    return TracerSimulator(
        ground,
        height_scale_m=settings.height_scale_m,
        diffusivity_m2_s=settings.diffusivity_cells * cell_m**2 / (hours * SECONDS_AN_HOUR),
        decay_per_day=24 / (settings.decay_steps * hours),
        source_per_hour=_sources(ground, np.random.default_rng([seed]), settings.sources) / hours,
    )


def write_tracer_dataset(
    out: str | Path,
    ground: ElevationMap,
    *,
    episodes: Mapping[str, int],
    seed: int,
    settings: TracerSettings = DEFAULT_SETTINGS,
    progress: bool = False,
) -> TracerSimulator:
    """Simulate independent episodes and write them as ClimaX shards, one episode a shard.

    An episode has winds and a first tracer of its own. ClimaX pairs a time with a later one of the same
    shard, so no sample crosses from one episode into another. Variables: `TRACER_VARIABLES`, orography
    in metres, winds in m/s. Means, standard deviations and climatology are those of the training
    episodes.

    Args:
        out: Folder to write; what an earlier call wrote there is replaced.
        ground: Grid and elevation.
        episodes: Number of episodes for each of "train", "val" and "test", each at least 1.
        seed: Same seed, same data; an episode does not depend on how many there are.
        settings: How episodes are drawn and run.
        progress: Show a progress bar.

    Returns:
        The simulator, for `floor`.

    Raises:
        InputError: If a number of episodes is missing or `out` holds other data.
    """
    out = Path(out)
    _check_request(out, episodes, seed, settings)
    simulator = tracer_simulator(ground, seed=seed, settings=settings)
    _start_afresh(out, seed, settings)
    statistics = RunningStatistics()
    with tqdm(total=sum(episodes.values()), desc="simulating", unit="episode", disable=not progress) as bar:
        for part, partition in enumerate(PARTITIONS):
            for start in range(0, episodes[partition], CHUNK):
                numbers = range(start, min(start + CHUNK, episodes[partition]))
                generators = [np.random.default_rng([seed, part + 1, number]) for number in numbers]
                for number, shard in zip(numbers, _shards(simulator, generators, settings), strict=True):
                    if partition == "train":
                        statistics.update(shard)
                    save_npz(out / partition / f"episode_{number:05d}.npz", shard)
                bar.update(len(numbers))
    for partition in ("val", "test"):
        save_npz(out / partition / "climatology.npz", statistics.climatology())
    save_npz(out / "normalize_mean.npz", statistics.mean())
    save_npz(out / "normalize_std.npz", statistics.std())
    save_npy(out / "lat.npy", ground.lat)
    save_npy(out / "lon.npy", ground.lon)
    return simulator


@dataclass(frozen=True)
class Floor:
    """Errors that need no training, root mean square by cos-latitude, mean over samples, tracer units.

    Args:
        initial_wind: The simulator itself, given the first tracer and holding the first wind: what a
            perfect model of the transport reaches that sees what a forecast model sees.
        true_wind: The simulator given the recorded winds of every step in between, interpolated.
        persistence: The first tracer, unchanged.
    """

    initial_wind: float
    true_wind: float
    persistence: float


def floor(
    out: str | Path, simulator: TracerSimulator, *, hours: float, partition: str = "test", predict_range: int = 1
) -> Floor:
    """How well the tracer of a data set can be forecast.

    Args:
        out: Folder that `write_tracer_dataset` wrote.
        simulator: What it returned.
        hours: Hours a step.
        partition: Whose episodes.
        predict_range: Steps ahead.

    Raises:
        InputError: If there are no episodes there, or they are too short for the lead.
    """
    shards = sorted((Path(out) / partition).glob("episode_*.npz"))
    if not shards:
        raise InputError(f"{Path(out) / partition} holds no episodes: write_tracer_dataset makes them")
    errors: list[Array] = []
    for start in range(0, len(shards), CHUNK):
        loaded = [np.load(path) for path in shards[start : start + CHUNK]]
        tracer, u, v = (
            np.stack([shard[name][:, 0] for shard in loaded]).astype(np.float64) for name in ("tracer", *WIND_VARIABLES)
        )
        if tracer.shape[1] <= predict_range:
            raise InputError(f"{tracer.shape[1]} steps an episode are too few to forecast {predict_range} ahead")
        errors.append(_floor_errors(simulator, tracer, u, v, hours, predict_range))
    return Floor(*np.concatenate(errors, axis=1).mean(axis=1).tolist())


def _floor_errors(simulator: TracerSimulator, tracer: Array, u: Array, v: Array, hours: float, lead: int) -> Array:
    """Error of each sample with the first wind, with the true wind, and of persistence, `[3, samples]`."""
    times, grid = tracer.shape[1] - lead, tracer.shape[2:]

    def wind(known: bool) -> Callable[[float], Winds]:
        def at(step: float) -> Winds:
            before = int(step) if known else 0
            after, share = (before + 1, step - before) if known else (0, 0.0)
            fields = (
                (1 - share) * field[:, before : before + times] + share * field[:, after : after + times]
                for field in (u, v)
            )
            east, north = (field.reshape(-1, *grid) for field in fields)
            return east, north

        return at

    first = tracer[:, :times].reshape(-1, *grid)
    last = tracer[:, lead:].reshape(-1, *grid)
    forecasts = [_integrate(simulator, first, wind(known), 0, lead, hours) for known in (False, True)]
    weight = np.cos(np.deg2rad(simulator.ground.lat))[:, None]
    squares = np.square(np.array([*forecasts, first]) - last) * (weight / weight.mean())
    return np.sqrt(squares.mean(axis=(-2, -1)))


def _integrate(
    simulator: TracerSimulator,
    tracer: Array,
    wind: Callable[[float], Winds],
    start: float,
    steps: float,
    hours: float,
) -> Array:
    """Run `steps` steps of `hours` from step `start`, with the wind of the middle of each update."""
    for update in range(round(steps * WIND_UPDATES)):
        middle = start + (update + 0.5) / WIND_UPDATES
        tracer = simulator.advance(tracer, *wind(middle), hours / WIND_UPDATES)
    return tracer


def _shards(
    simulator: TracerSimulator, generators: list[np.random.Generator], settings: TracerSettings
) -> list[dict[str, NDArray[np.float32]]]:
    """Simulate one episode a generator: for each, its arrays `[steps, 1, H, W]`."""
    ground, hours = simulator.ground, settings.hours(simulator.ground)
    winds = draw_winds(ground, generators, speed_m_s=settings.speed_m_s, turn_hours=settings.turn_steps * hours)

    def wind(step: float) -> Winds:
        return winds.at(step * hours)

    tracer = np.array([_blobs(ground, generator) for generator in generators])
    tracer = _integrate(simulator, tracer, wind, -settings.spin_up_steps, settings.spin_up_steps, hours)
    recorded = []
    for step in range(settings.steps):
        recorded.append((*wind(step), tracer))
        if step + 1 < settings.steps:
            tracer = _integrate(simulator, tracer, wind, step, 1, hours)
    moving = np.array(recorded, dtype=np.float32)  # [steps, 3, E, H, W]

    shape = (settings.steps, 1, *ground.elevation_m.shape)
    fixed = [np.broadcast_to(field.astype(np.float32), shape) for field in _fixed(ground)]
    return [
        dict(zip(TRACER_VARIABLES, [*fixed, *moving[:, :, episode].swapaxes(0, 1)[:, :, None]], strict=True))
        for episode in range(len(generators))
    ]


def _fixed(ground: ElevationMap) -> tuple[Array, Array]:
    return ground.elevation_m, np.broadcast_to(ground.lat[:, None], ground.elevation_m.shape)


BLOBS = 16
SMALLEST_BLOB, LARGEST_BLOB = 1.5, 5.0  # cells


def _blobs(ground: ElevationMap, generator: np.random.Generator) -> Array:
    """A first tracer: round clouds anywhere, each 0.5 to 1.5 units at its centre."""
    rows, columns = ground.elevation_m.shape
    height = generator.uniform(0.5, 1.5, BLOBS)
    radius = generator.uniform(SMALLEST_BLOB, LARGEST_BLOB, BLOBS)
    at_row, at_column = generator.uniform(0, rows, BLOBS), generator.uniform(0, columns, BLOBS)
    return _gaussians(ground, at_row, at_column, radius, height)


def _sources(ground: ElevationMap, generator: np.random.Generator, count: int) -> Array:
    """Emission a step at `count` cells, most of them on low ground."""
    low = np.exp(-ground.elevation_m / 1000)
    chosen = generator.choice(low.size, size=count, p=(low / low.sum()).ravel())
    at_row, at_column = np.unravel_index(chosen, low.shape)
    return _gaussians(ground, at_row + 0.5, at_column + 0.5, np.full(count, 1.0), np.full(count, 0.2))


def _gaussians(
    ground: ElevationMap, at_row: NDArray[np.floating], at_column: NDArray[np.floating], radius: Array, height: Array
) -> Array:
    rows, columns = ground.elevation_m.shape
    down = np.arange(rows)[:, None] + 0.5 - at_row[:, None, None]
    across = np.arange(columns) + 0.5 - at_column[:, None, None]
    if ground.periodic:
        across = (across + columns / 2) % columns - columns / 2
    clouds = np.exp(-(down**2 + across**2) / (2 * radius[:, None, None] ** 2))
    return (height[:, None, None] * clouds).sum(axis=0)


def _check_request(out: Path, episodes: Mapping[str, int], seed: int, settings: TracerSettings) -> None:
    if set(episodes) != set(PARTITIONS) or min(episodes.values()) < 1:
        raise InputError(f"episodes is a number of at least 1 for each of {PARTITIONS}, not {dict(episodes)}")
    if seed < 0:
        raise InputError(f"a seed is 0 or more, not {seed}")
    if settings.steps < 2:
        raise InputError(f"an episode has at least 2 steps, not {settings.steps}")
    check_own(out, (RECIPE,), "what this simulator wrote")
    check_folder("the folder", out)


def _start_afresh(out: Path, seed: int, settings: TracerSettings) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / RECIPE).write_text(json.dumps({"simulated": "tracer", "seed": seed, **asdict(settings)}, indent=2))
    for partition in PARTITIONS:
        for shard in (out / partition).glob("*.npz"):
            shard.unlink()
