"""The demonstration `transport`: a forecast of a simulated tracer over real terrain, without and with a bias."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from climax_elevation.bias import ElevationBias
from climax_elevation.diagnostics.view import Field, steepest_rise
from climax_elevation.errors import InputError
from climax_elevation.files import check_folder
from climax_elevation.host import StandInClimaX
from climax_elevation.host.shards import GlobalForecastDataModule
from climax_elevation.testbed.altitude import ElevationMap, region_elevation
from climax_elevation.testbed.demo import check_extra, check_seed
from climax_elevation.testbed.fit import (
    DataSettings,
    ModelSettings,
    TrainingSettings,
    build_network,
    fit,
    one_thread,
    quiet,
)
from climax_elevation.testbed.tracer import TRACER_VARIABLES, Floor, TracerSettings, floor, write_tracer_dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIABLES = [name for name in TRACER_VARIABLES if name != "lattitude"]
SETTINGS = TracerSettings(steps=3)
MODEL = ModelSettings()
BATCH = TrainingSettings.batch_size
VALIDATIONS = 10
PICTURE = "demo.png"


@dataclass(frozen=True)
class Run:
    """One training of the stand-in host.

    Attributes:
        error: Of the tracer over the test episodes, root mean square weighted by latitude, tracer units.
        curve: Training steps, and the error over the validation episodes there.
        seconds_a_step: Median over training, reading of data excluded.
        scalars: Each scalar parameter of the bias, before and after training.
    """

    error: float
    curve: list[tuple[int, float]]
    seconds_a_step: float
    scalars: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class TransportReport:
    """What `transport` found; `str()` of it is a table to print."""

    region: str
    bias: str
    seed: int
    ground: ElevationMap
    hours: int
    steps: int
    without: Run
    with_bias: Run
    floor: Floor
    picture: Path

    def __str__(self) -> str:
        rows, columns = self.ground.elevation_m.shape
        change = 100 * (self.with_bias.error / self.without.error - 1)
        lines = [
            "The tracer and its winds are simulated; the terrain is real. The network is a small stand-in, not ClimaX.",
            f"{self.region}: {rows} x {columns} cells of {self.ground.lat_step:g} degrees, "
            f"0 to {self.ground.elevation_m.max():.0f} m; forecast {self.hours} h ahead; "
            f"{self.steps} training steps each, seed {self.seed}",
            "",
            f"{'':28}{'test error':>12}{'of persistence':>17}{'s a step':>11}",
            self._line("persistence", self.floor.persistence),
            self._line("without bias", self.without.error, self.without.seconds_a_step),
            self._line(f"with bias {self.bias}", self.with_bias.error, self.with_bias.seconds_a_step),
            self._line("floor: simulator, first wind", self.floor.initial_wind),
            self._line("floor: simulator, true wind", self.floor.true_wind),
            "",
            *(
                f"{name}: {start:.3f} before training, {end:.3f} after"
                for name, (start, end) in self.with_bias.scalars.items()
            ),
            f"With the bias the error is {abs(change):.1f}% {'lower' if change < 0 else 'higher'}. "
            "This is one seed: compare over several before believing a few per cent.",
            f"Picture: {self.picture}",
        ]
        return "\n".join(lines)

    def _line(self, name: str, error: float, seconds: float | None = None) -> str:
        speed = "" if seconds is None else f"{seconds:.3f}"
        return f"{name:28}{error:12.4f}{error / self.floor.persistence:17.0%}{speed:>11}"


def transport(
    out: str | Path,
    *,
    region: str = "asia",
    bias: str = "physics",
    seed: int = 0,
    bias_args: dict[str, Any] | None = None,
    steps: int = 800,
    episodes: int = 600,
) -> TransportReport:
    """Train the stand-in host on a simulated tracer over real terrain, without and with a terrain bias.

    Both trainings start from the same host weights and see the same data in the same order. Everything
    is simulated and trained in about two minutes on two cores, without a network.

    Args:
        out: Folder for the data set and the picture; what an earlier demo wrote there is replaced.
        region: One of `climax_elevation.testbed.altitude.REGIONS`.
        bias: One of `climax_elevation.available_biases()`, or several with "+" between.
        seed: Of data, weights and order.
        bias_args: As `climax_elevation.attach` takes them; none: all blocks, and the bias's own defaults.
        steps: Training steps of each of the two, at least 10.
        episodes: Training episodes; an eighth as many for each of validation and test.

    Returns:
        The report; print it.

    Raises:
        InputError: If a name is unknown, a number too small, a package of the extra "demo" not
            installed, or `out` holds other data. Nothing is written then.
    """
    out = Path(out)
    check_folder("the folder", out)
    check_extra()
    if steps < VALIDATIONS or episodes < BATCH:
        raise InputError(f"the demo needs {VALIDATIONS} steps and {BATCH} episodes or more, not {steps} and {episodes}")
    check_seed(seed)
    ground = region_elevation(region)
    # first of all: what is wrong with the bias shows here, before anything is written
    biased = _network(ground, seed, bias, {"blocks": "all", "static_terrain": True, **(bias_args or {})})
    held_out = max(1, episodes // 8)
    numbers = {"train": episodes, "val": held_out, "test": held_out}
    simulator = write_tracer_dataset(out, ground, episodes=numbers, seed=seed, settings=SETTINGS, progress=True)
    hours = int(SETTINGS.hours(ground))
    floors = {part: floor(out, simulator, hours=hours, partition=part) for part in ("val", "test")}
    with one_thread():
        without = _train(_network(ground, seed), out, hours, seed, steps, "without bias")
        with_bias = _train(biased, out, hours, seed, steps, f"with bias {bias}")
    report = TransportReport(
        region, bias, seed, ground, hours, steps, without, with_bias, floors["test"], out / PICTURE
    )
    _draw(report, floors["val"], *_bias_of_one_patch(biased, _data(out, hours).module(BATCH)))
    return report


def _network(
    ground: ElevationMap, seed: int, bias: str | None = None, bias_args: dict[str, Any] | None = None
) -> StandInClimaX:
    net = build_network(
        MODEL, VARIABLES, ground.elevation_m.shape, seed=seed, bias_type=bias, bias_args=bias_args, host=StandInClimaX
    )
    return cast(StandInClimaX, net)


def _data(out: Path, hours: int) -> DataSettings:
    return DataSettings(str(out), tuple(VARIABLES), ("tracer",), hrs_each_step=hours)


def _train(net: StandInClimaX, out: Path, hours: int, seed: int, steps: int, name: str) -> Run:
    training = TrainingSettings(steps=steps, validations=VALIDATIONS)
    with tqdm(total=steps, desc=f"training {name}", unit="step") as bar, logging_redirect_tqdm():

        def on_step(error: float | None) -> None:
            if error is not None:
                bar.set_postfix_str(f"error {error:.4f}", refresh=False)
            bar.update()

        fitted = fit(net, _data(out, hours), training, seed=seed, on_step=on_step)
    with quiet():
        scores = fitted.trainer.test(fitted.module, datamodule=fitted.data, verbose=False)
    return Run(scores[0]["test/w_rmse"], fitted.curve, fitted.seconds_a_step, fitted.scalars)


def _bias_of_one_patch(
    net: StandInClimaX, data: GlobalForecastDataModule
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Bias of the patch with the steepest rise to a neighbour, `[h, w]`, mean over heads; its row and column."""
    x, _, lead_times, variables, _ = next(iter(data.test_dataloader()))
    bias = next(part for part in net.modules() if isinstance(part, ElevationBias))
    with torch.no_grad():
        terrain = net.terrain(x, lead_times, variables)
        values = bias(*bias.inputs(terrain))[0].mean(dim=0)
    chosen = steepest_rise(terrain)
    return values[chosen].reshape(net.grid).float().numpy(), divmod(chosen, net.grid[1])


def _draw(report: TransportReport, floor: Floor, bias: NDArray[np.float32], patch: tuple[int, int]) -> None:
    from climax_elevation.draw.plots import new_figure, readable_fonts

    with readable_fonts():
        figure = new_figure(12, 9)
        panels = figure.subplot_mosaic([["terrain", "bias"], ["errors", "errors"]])
        _maps(panels["terrain"], panels["bias"], report.ground, bias, patch)
        _curves(panels["errors"], report, floor)
        figure.suptitle(f"Simulated tracer over real terrain: {report.region}, {report.hours} h ahead", fontsize=16)
        figure.savefig(report.picture, dpi=120)


def _maps(
    terrain: Axes, learned: Axes, ground: ElevationMap, bias: NDArray[np.float32], patch: tuple[int, int]
) -> None:
    from climax_elevation.draw.plots import BIAS_LABEL, bias_colours, draw_map, mark

    lat, lon = (axis.reshape(n, -1).mean(axis=1) for axis, n in zip((ground.lat, ground.lon), bias.shape, strict=True))
    field = Field(ground.lat, ground.lon, ground.elevation_m)
    draw_map(terrain, field, "Terrain", "elevation (m)", "cividis")
    title = "Learned bias of the patch at the cross, for reading\nfrom each other; mean of heads (lines: elevation)"
    draw_map(learned, Field(lat, lon, bias), title, BIAS_LABEL, *bias_colours(bias), field)
    for axes in (terrain, learned):
        mark(axes, lat[patch[0]], lon[patch[1]])


def _curves(axes: Axes, report: TransportReport, floor: Floor) -> None:
    for run, style, colour, label in (
        (report.without, "o-", "#0072b2", "without bias"),
        (report.with_bias, "s--", "#d55e00", f"with bias {report.bias}"),
    ):
        steps, errors = np.array(run.curve).T
        axes.plot(steps, errors, style, color=colour, lw=2, label=label)
    axes.axhline(floor.persistence, color="0.3", ls=":", lw=2, label="persistence")
    axes.axhline(floor.initial_wind, color="#009e73", ls="-.", lw=2, label="floor: simulator, first wind")
    axes.set_ylim(0, 1.3 * max(axes.get_ylim()[1], floor.persistence))
    axes.set_title("Error over training, validation episodes", fontsize=14)
    axes.set_xlabel("training step", fontsize=12)
    axes.set_ylabel("root mean square error (tracer units)", fontsize=12)
    axes.legend(fontsize=12, ncols=2, loc="upper right")
    axes.grid(alpha=0.3)
