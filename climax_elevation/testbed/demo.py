"""Terrain-aware attention at work in three minutes: values at hidden places, where the right answer is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from climax_elevation.bias import StructureBias, build_bias
from climax_elevation.diagnostics.view import Field
from climax_elevation.errors import InputError
from climax_elevation.files import check_folder, check_own
from climax_elevation.host import StandInClimaX
from climax_elevation.options import WIND_FIELDS, AttachOptions
from climax_elevation.terrain.sphere import EARTH_RADIUS_M
from climax_elevation.testbed.altitude import ElevationMap, region_elevation
from climax_elevation.testbed.fit import (
    WARM_UP_SHARE,
    ModelSettings,
    bias_scalars,
    build_network,
    denormals_as_zero,
    one_thread,
)
from climax_elevation.testbed.gaussian_field import GaussianField, Mask, visible_cells
from climax_elevation.training import bias_parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]

GRID = (16, 16)
CHANNELS = ["value", "visible"]
WINDS = list(AttachOptions.wind_variables)
MODEL = ModelSettings(patch_size=1, embed_dim=64, depth=2, decoder_depth=1, num_heads=4)
LENGTH_CELLS = 3.0  # L in the side of a square as large as the mean cell
HEIGHT_M = 500.0
SHARE_VISIBLE = 0.2
BATCH = 16
LEARNING_RATE = 6e-3
WEIGHT_DECAY = 1e-5
CLIP = 1.0  # norm of the gradient
VALIDATIONS = 10
HELD_OUT = {"val": 10, "test": 5}  # one field for so many of training
LEAST_FIELDS = max(HELD_OUT.values())
PICTURE = "demo.png"


@dataclass(frozen=True)
class Fields:
    """Simulated fields, and which of their cells are visible.

    Attributes:
        values, visible: `[fields, cells]`.
    """

    values: Tensor
    visible: Tensor

    def error(self, inferred: Tensor) -> float:
        """Root mean square over what is hidden."""
        return float((inferred - self.values)[~self.visible].square().mean().sqrt())


@dataclass(frozen=True)
class Run:
    """One training of the stand-in host.

    Attributes:
        error: Over what is hidden of the test fields.
        curve: Training steps, and the error over the validation fields there.
        scalars: Each scalar parameter of the bias, before and after training.
        lengths_m: Of `structure` in each block, L, and V where height counts, of its heads before and after training,
            metres, `[2 or 1, heads, 2]`.
        example: What it makes of the first test field, `[cells]`.
    """

    error: float
    curve: list[tuple[int, float]]
    scalars: dict[str, tuple[float, float]]
    lengths_m: dict[str, Array]
    example: Array


@dataclass(frozen=True)
class DemoReport:
    """What `demo` found; `str()` of it is a table to print.

    Attributes:
        runs: "without bias", "with BIAS" and "with BIAS, ground mirrored", in this order.
        floor, climatology: Errors of kriging with the true covariance, and of the mean, over the test fields.
        floor_over_training: The floor of the validation fields.
        truth, visible: The first test field, `[cells]`, and where it can be seen.
    """

    region: str
    bias: str
    seed: int
    steps: int
    field: GaussianField
    runs: dict[str, Run]
    floor: float
    climatology: float
    floor_over_training: float
    truth: Array
    visible: Mask
    picture: Path

    def __str__(self) -> str:
        ground = self.field.ground
        rows, columns = ground.elevation_m.shape
        without, biased, mirrored = (run.error for run in self.runs.values())
        lines = [
            "The field is simulated; the terrain is real. The network is a small stand-in, not ClimaX.",
            f"{self.region}: {rows} x {columns} patches of {ground.lat_step:g} x {ground.lon_step:g} degrees, 0 to "
            f"{ground.elevation_m.max():.0f} m; {self.visible.sum()} of {self.visible.size} visible, heights not among "
            f"the inputs; {self.steps} training steps each, seed {self.seed}",
            "",
            f"{'':44}{'test error':>12}",
            self._line("climatology", self.climatology),
            *(self._line(name, run.error) for name, run in self.runs.items()),
            self._line("floor: kriging with the true covariance", self.floor),
            "",
            *self._parameters(),
            f"With the bias the error is {_change(biased, without)} than without, and with the ground mirrored "
            f"{_change(mirrored, without)}. This is one seed and one simulation.",
            f"Picture: {self.picture}",
        ]
        return "\n".join(lines)

    def _line(self, name: str, error: float) -> str:
        return f"{name:44}{error:12.4f}"

    def _parameters(self) -> list[str]:
        """How far the biases' parameters came, over the ground as it is."""
        run = list(self.runs.values())[1]
        lines = [f"{name}: {start:.3f} before training, {end:.3f} after" for name, (start, end) in run.scalars.items()]
        lines += _moved("L", "km", self.field.length_m / 1e3, {p: rows[0] / 1e3 for p, rows in run.lengths_m.items()})
        heights = {place: rows[1] for place, rows in run.lengths_m.items() if len(rows) > 1}
        return lines + _moved("V", "m", self.field.height_m, heights)


def _moved(name: str, unit: str, truth: float, found: Mapping[str, Array]) -> list[str]:
    """Of each block the heads' values before and after training, `[heads, 2]`, and how near they came."""
    if not found:
        return []
    lines = [f"{name} of the heads, in truth {truth:.0f} {unit}:"]
    for place, heads in found.items():
        lines.append(f"  {place}: " + ", ".join(f"{start:.0f} → {end:.0f}" for start, end in heads))
    before, after = np.exp(np.median(np.abs(np.log(np.concatenate(list(found.values())) / truth)), axis=0))
    return [*lines, f"  half of them are off by less than a factor of {after:.2f}, at first of {before:.2f}"]


def demo(
    out: str | Path,
    *,
    region: str = "asia",
    bias: str = "structure",
    seed: int = 0,
    bias_args: dict[str, Any] | None = None,
    steps: int = 400,
    fields: int = 600,
) -> DemoReport:
    """Train the stand-in host to infer hidden values, without a bias, with one, and with one over mirrored ground.

    A fifth of the patches of each field is visible, others at every step. The networks are told the values there and
    which they are, and no heights. They start from the same host weights and see the same data in the same order.
    Everything is simulated and trained in less than three minutes on two cores, without a network.

    Args:
        out: Folder for the picture.
        region: One of `climax_elevation.testbed.altitude.REGIONS`.
        bias: One of `climax_elevation.available_biases()`, or several with "+" between; those that read wind see calm.
        seed: Of data, weights and order.
        bias_args: As `climax_elevation.attach` takes them; none: all blocks, and the bias's own defaults.
        steps: Training steps of each of the three, at least 10.
        fields: Training fields, at least 10.

    Returns:
        The report; print it.

    Raises:
        InputError: If a name is unknown, a number too small, or a package of the extra "demo" not installed. Nothing is
            written then.
    """
    out = Path(out)
    check_folder("the folder", out)
    check_own(out, (PICTURE,), "a demo's picture")
    check_extra()
    if steps < VALIDATIONS or fields < LEAST_FIELDS:
        raise InputError(
            f"the demo needs {VALIDATIONS} steps and {LEAST_FIELDS} fields or more, not {steps} and {fields}"
        )
    check_seed(seed)
    ground = region_elevation(region, GRID)
    arguments = {"blocks": "all", **(bias_args or {})}
    names = {"without bias": None, f"with {bias}": {}, f"with {bias}, ground mirrored": {"control": "mirrored"}}
    channels = CHANNELS + (WINDS if _reads_wind(bias, arguments) else [])
    networks = {
        name: _network(ground, channels, seed, bias if control is not None else None, {**arguments, **(control or {})})
        for name, control in names.items()
    }
    field = GaussianField(ground, LENGTH_CELLS * _cell_m(ground), HEIGHT_M)
    data = _simulated(field, fields, seed)
    test, validation = data["test"], data["val"]
    out.mkdir(parents=True, exist_ok=True)
    with one_thread(), denormals_as_zero():
        runs = {name: _train(net, channels, data, seed, steps, name) for name, net in networks.items()}
    report = DemoReport(
        region,
        bias,
        seed,
        steps,
        field,
        runs,
        floor=_floor(field, test),
        climatology=test.error(torch.zeros_like(test.values)),
        floor_over_training=_floor(field, validation),
        truth=test.values[0].double().numpy(),
        visible=test.visible[0].numpy(),
        picture=out / PICTURE,
    )
    _draw(report)
    return report


def check_extra() -> None:
    """Raise InputError unless there is something to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the demo draws with matplotlib, which is not installed: pip install 'climax-elevation[demo]'"
        ) from error


def check_seed(seed: int) -> None:
    """Raise InputError unless random numbers can be drawn by it."""
    if not 0 <= seed < 2**32:
        raise InputError(f"a seed is a whole number from 0 to 4294967295, not {seed}")


def _reads_wind(bias: str, arguments: Mapping[str, Any]) -> bool:
    own = {name: value for name, value in arguments.items() if name not in AttachOptions.names()}
    return bool(build_bias(bias, num_heads=MODEL.num_heads, grid=GRID, **own).needs & WIND_FIELDS)


def _network(
    ground: ElevationMap, channels: list[str], seed: int, bias: str | None, arguments: dict[str, Any]
) -> StandInClimaX:
    """A fresh network, whose bias reads the ground from a file, since no channel tells it."""
    with TemporaryDirectory() as folder:
        if bias is not None:
            file = Path(folder) / "elevation.npz"
            np.savez(file, orography=ground.elevation_m, lat=ground.lat, lon=ground.lon)
            arguments = {"elevation_file": str(file), **arguments}
        net = build_network(
            MODEL,
            channels,
            ground.elevation_m.shape,
            seed=seed,
            bias_type=bias,
            bias_args=arguments,
            host=StandInClimaX,
        )
        if bias is not None:
            terrain = cast(StandInClimaX, net).terrain
            terrain.set_statistics(dict.fromkeys(WINDS, 0.0), dict.fromkeys(WINDS, 1.0), "the demo")
            terrain.set_grid(ground.lat, ground.lon, "the demo")
    return cast(StandInClimaX, net)


def _cell_m(ground: ElevationMap) -> float:
    """Side of a square as large as the mean cell, metres."""
    north, south = (np.deg2rad(ground.lat[end] + side * ground.lat_step / 2) for end, side in ((-1, 1), (0, -1)))
    width = np.deg2rad(ground.lon.size * ground.lon_step)
    return float(EARTH_RADIUS_M * np.sqrt(width * (np.sin(north) - np.sin(south)) / ground.elevation_m.size))


def _simulated(field: GaussianField, fields: int, seed: int) -> dict[str, Fields]:
    rng = np.random.default_rng(seed)
    data = {}
    for part, fewer in {"train": 1, **HELD_OUT}.items():
        count = fields // fewer
        values = field.simulate(count, rng)
        visible = visible_cells(count, values.shape[1], SHARE_VISIBLE, rng)
        data[part] = Fields(torch.from_numpy(values).float(), torch.from_numpy(visible))
    return data


def _floor(field: GaussianField, fields: Fields) -> float:
    inferred = field.infer(fields.values.double().numpy(), fields.visible.numpy())
    return fields.error(torch.from_numpy(inferred).float())


def _infer(net: StandInClimaX, channels: list[str], fields: Fields) -> Tensor:
    """What the network makes of what is visible, `[fields, cells]`."""
    shown = fields.visible.float()
    calm = [torch.zeros_like(shown)] * (len(channels) - len(CHANNELS))
    x = torch.stack([fields.values * shown, shown, *calm], dim=1).unflatten(2, GRID)
    now = torch.zeros(len(x))
    return net(x, None, now, channels, CHANNELS[:1], None, None)[1].flatten(1)


def _train(net: StandInClimaX, channels: list[str], data: dict[str, Fields], seed: int, steps: int, name: str) -> Run:
    """Least squares over what is hidden; other patches are visible at every step."""
    _score(net, channels, Fields(data["val"].values[:1], data["val"].visible[:1]))  # biases now know their grid
    start, lengths = bias_scalars(net), _lengths(net)
    of_bias = list(bias_parameters(net).values())
    ids = {id(parameter) for parameter in of_bias}
    host = [parameter for parameter in net.parameters() if id(parameter) not in ids]
    groups = [{"params": host, "weight_decay": WEIGHT_DECAY}, {"params": of_bias, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    train, rng, curve = data["train"], np.random.default_rng([seed, 1]), []
    for step in tqdm(range(1, steps + 1), desc=f"training {name}", unit="step"):
        values = train.values[rng.integers(len(train.values), size=BATCH)]
        batch = Fields(values, torch.from_numpy(visible_cells(BATCH, values.shape[1], SHARE_VISIBLE, rng)))
        loss = (_infer(net, channels, batch) - values)[~batch.visible].square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if step % (steps // VALIDATIONS) == 0:
            curve.append((step, _score(net, channels, data["val"])[0]))
    error, inferred = _score(net, channels, data["test"])
    scalars = {key: (start[key], end) for key, end in bias_scalars(net).items()}
    moved = {place: np.stack([lengths[place], end], axis=2) for place, end in _lengths(net).items()}
    return Run(error, curve, scalars, moved, inferred[0].double().numpy())


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: rising over the first tenth, then falling as a cosine."""
    return min((step + 1) / max(1, steps // WARM_UP_SHARE), (1 + math.cos(math.pi * step / steps)) / 2)


def _score(net: StandInClimaX, channels: list[str], fields: Fields) -> tuple[float, Tensor]:
    with torch.no_grad():
        inferred = _infer(net.eval(), channels, fields)
    net.train()
    return fields.error(inferred), inferred


def _lengths(net: StandInClimaX) -> dict[str, Array]:
    """L and V of each `structure` in the network, metres, `[2 or 1, heads]`, by its block."""
    found = {}
    for place, bias in net.named_modules():
        if isinstance(bias, StructureBias):
            lengths = [bias.lengths_m, *([bias.heights_m] if bias.vertical else [])]
            found[place.replace(".attn.bias", "")] = torch.stack(lengths).double().numpy()
    return found


def _change(error: float, reference: float) -> str:
    percent = 100 * (error / reference - 1)
    return f"{abs(percent):.1f}% {'lower' if percent < 0 else 'higher'}"


# ---- the picture ---------------------------------------------------------------------------------


def _draw(report: DemoReport) -> None:
    from climax_elevation.draw.plots import new_figure, readable_fonts

    with readable_fonts():
        figure = new_figure(15, 7)
        first, second, third = report.runs
        panels = figure.subplot_mosaic([["truth", "visible", "errors"], [first, second, third]])
        seen = np.where(report.visible, report.truth, np.nan)
        maps = {"truth": ("Truth", report.truth), "visible": ("What is visible: a fifth of the patches", seen)}
        for name, run in report.runs.items():
            hidden = float(np.sqrt(np.square(run.example - report.truth)[~report.visible].mean()))
            maps[name] = (
                f"Inferred {name}\n(error where hidden {hidden:.2f})",
                np.where(report.visible, report.truth, run.example),
            )
        limit = float(np.abs(report.truth).max())
        for name, (title, values) in maps.items():
            _map(panels[name], report.field.ground, values, title, limit)
        _curves(panels["errors"], report)
        figure.suptitle(f"A simulated field over real terrain (lines: elevation): {report.region}", fontsize=16)
        figure.savefig(report.picture, dpi=100)


def _map(axes: Axes, ground: ElevationMap, values: Array, title: str, limit: float) -> None:
    from climax_elevation.draw.plots import draw_map

    shape = ground.elevation_m.shape
    elevation = Field(ground.lat, ground.lon, ground.elevation_m)
    shown = Field(ground.lat, ground.lon, values.reshape(shape))
    draw_map(axes, shown, title, "standard deviations", "RdBu_r", (-limit, limit), elevation)


def _curves(axes: Axes, report: DemoReport) -> None:
    styles = (("o-", "#0072b2"), ("s--", "#d55e00"), ("^:", "#cc79a7"))
    for (name, run), (style, colour) in zip(report.runs.items(), styles, strict=True):
        steps, errors = np.array(run.curve).T
        axes.plot(steps, errors, style, color=colour, lw=2, label=name)
    axes.axhline(1.0, color="0.3", ls=":", lw=2, label="climatology")
    axes.axhline(report.floor_over_training, color="#009e73", ls="-.", lw=2, label="floor: true covariance")
    axes.set_ylim(0, 1.7 * max(1.0, axes.get_ylim()[1]))
    axes.set_title("Error over training, validation fields", fontsize=14)
    axes.set_xlabel("training step", fontsize=12)
    axes.set_ylabel("root mean square error\n(standard deviations)", fontsize=12)
    axes.legend(fontsize=10, loc="upper right")
    axes.grid(alpha=0.3)
