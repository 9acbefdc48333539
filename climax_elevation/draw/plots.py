"""How things are drawn: maps, transects, trajectories and forests, for print and for the colour-blind."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from climax_elevation.data.names import VARIABLES
from climax_elevation.diagnostics.view import Array, Field, Transect, View, latitude_words, longitude_words

logger = logging.getLogger(__name__)

Limits = tuple[float | None, float | None]

# Okabe and Ito's colours, told apart by the colour-blind
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    *("#000000", "#e69f00", "#56b4e9", "#009e73"),
    *("#f0e442", "#0072b2", "#d55e00", "#cc79a7"),
)
LINES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
STYLES = ("-", "--", "-.", ":")
POINTS = 11  # of the smallest text, in a figure of the size that it is made for
WIDTH_INCHES = 7.2
WIDE = 1.3  # of a map's width to its height: its colour bar stands beside it, and maps below each other
FONTS: dict[Any, Any] = {
    "font.size": POINTS,
    "axes.titlesize": POINTS + 1,
    "axes.labelsize": POINTS,
    "xtick.labelsize": POINTS,
    "ytick.labelsize": POINTS,
    "legend.fontsize": POINTS,
    "figure.titlesize": POINTS + 2,
    "pdf.fonttype": 42,  # text that can be searched and edited
}
CONTOURS_M = (100, 250, 500, 1000, 2000)  # distances between contours, of which one is chosen
MOST_CONTOURS = 4
MOST_OF_ERRORS = 99  # per cent of the pixels: a few worst ones would take all the colours
ONE_SIDED = 0.02  # of the larger side: what is smaller on the other side needs no colours
BIAS_LABEL = "added to logits\n(dimensionless); below 0:\nattends less, above 0: more"
UNITS = {"k": "K", "ms-1": "m/s", "pa": "Pa", "jm-2": "J/m²", "m": "m", "m2s-2": "m²/s²", "%": "%", "kgkg-1": "kg/kg"}
Panel = tuple[str, Array, str, str | Colormap, Limits]
"""Title, values, the colour bar's label, and draw_map's colours and limits."""
PARAMETERS = {
    "elevation_alpha": "alpha (logits per height scale)",
    "wind_beta": "beta (share of the bias)",
    "elevation_strength": "strength (per height scale)",
    "adaptive_scale": "scale (dimensionless)",
    "log_kappa": "log kappa (dimensionless)",
    "fraction": "fraction (of the lead time)",
    "log_length": "log length (patches)",
    "log_height": "log height (m)",
    "log_land": "log share of land",
}


@contextmanager
def readable_fonts() -> Iterator[None]:
    """Draw with `FONTS`; the user's own settings are as they were afterwards."""
    with matplotlib.rc_context(FONTS):
        yield


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """A figure by hand, not through pyplot: a user's own figures and backend stay as they are."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> tuple[Path, Path]:
    """Write a figure as PNG and as PDF; returns where.

    Args:
        figure: What to write.
        path: Without suffix; its folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = (path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.pdf"))
    with readable_fonts():
        for file in files:
            figure.savefig(file, dpi=200)
    return files


# ---- maps ----------------------------------------------------------------------------------------


def draw_map(
    axes: Axes,
    field: Field,
    title: str,
    label: str,
    colours: str | Colormap,
    limits: Limits = (None, None),
    ground: Field | None = None,
) -> None:
    """A map with a colour bar.

    Args:
        axes: Where.
        field: What.
        title: Above the map.
        label: Of the colour bar, with the unit.
        colours: A colour map.
        limits: Values at its ends; None: those of the field.
        ground: Elevation in metres, to be shown as contours.
    """
    low, high = limits
    # in a PDF a picture, lest every cell become a polygon
    image = axes.pcolormesh(
        field.unwrapped, field.lat, field.values, cmap=colours, vmin=low, vmax=high, shading="nearest", rasterized=True
    )
    axes.set_aspect("equal")
    axes.set_title(title)
    axes.set_xlabel("longitude")
    axes.set_ylabel("latitude")
    wide = np.ptp(field.unwrapped) > WIDE * np.ptp(field.lat)
    axes.xaxis.set_major_locator(MaxNLocator(5 if wide else 3, steps=[1, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(lambda lon, _: longitude_words(lon))
    axes.yaxis.set_major_formatter(lambda lat, _: latitude_words(lat))
    beyond = high is not None and field.values.max() > high
    extend = "max" if beyond else "neither"
    if wide:
        # as high as the map, however much room there is
        bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.03, 0.0, 0.03, 1.0)), extend=extend)
    else:
        bar = axes.figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.9, extend=extend)
    bar.set_label(label)
    scale = bar.ax.yaxis if wide else bar.ax.xaxis
    scale.set_major_locator(MaxNLocator(4))
    # each number whole: what matplotlib takes out of all of them lies on the label
    scale.set_major_formatter(lambda value, _: f"{value:.6g}".replace("-", "\N{MINUS SIGN}"))
    limits_drawn = (axes.get_xlim(), axes.get_ylim())
    if ground is not None and len(levels := contour_levels_m(ground.values)):
        for colour, width in (("white", 2.0), (BLACK, 0.8)):  # seen on dark and on bright colours
            axes.contour(ground.unwrapped, ground.lat, ground.values, levels, colors=colour, linewidths=width)
    _coastlines(axes, field)
    axes.set_xlim(limits_drawn[0])
    axes.set_ylim(limits_drawn[1])


def contour_levels_m(elevation_m: Array) -> list[int]:
    """A few round elevations that are reached, metres; none on level ground."""
    low, high = float(np.min(elevation_m)), float(np.max(elevation_m))
    for step in CONTOURS_M:
        levels = [level for level in range(step, int(high) + 1, step) if low < level < high]
        if len(levels) <= MOST_CONTOURS:
            return levels
    return levels


def _coastlines(axes: Axes, field: Field) -> None:
    """Coastlines, where cartopy and its data are there."""
    try:
        from cartopy.feature import NaturalEarthFeature
    except ImportError:
        return
    lon, lat = field.unwrapped, field.lat
    scale = "110m" if np.ptp(lon) > 90 else "50m"
    try:
        for turn in (-360, 0, 360):
            box = (float(lon.min()) - turn, float(lon.max()) - turn, float(lat.min()), float(lat.max()))
            for shape in NaturalEarthFeature("physical", "coastline", scale).intersecting_geometries(box):
                for line in getattr(shape, "geoms", [shape]):
                    x, y = np.asarray(line.coords)[:, :2].T
                    axes.plot(x + turn, y, color=BLACK, lw=0.6)
    except Exception as error:  # its data come from the web at first use, and that may fail in any way
        logger.info("no coastlines: cartopy cannot read its data (%s)", error)


def bias_colours(values: Array) -> tuple[Colormap, Limits]:
    """Orange below 0, purple above, white at 0; only the side that there is, if there is one."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    limit = max(-low, high) or 1.0
    diverging = matplotlib.colormaps["PuOr"]
    if min(-low, high) > ONE_SIDED * limit or low == high:
        return diverging, (-limit, limit)
    half, limits = ((0.0, 0.5), (-limit, 0.0)) if -low > high else ((0.5, 1.0), (0.0, limit))
    return LinearSegmentedColormap.from_list("half", diverging(np.linspace(*half, 256))), limits


def maps(fields: Sequence[Field]) -> tuple[Figure, list[Axes]]:
    """A figure with room for maps of one region: below each other if it is wide, else side by side."""
    first = fields[0]
    width, height = float(np.ptp(first.unwrapped)), float(np.ptp(first.lat))
    if width > WIDE * height:
        each = min(4.0, 5.0 * height / width + 0.9)
        figure = new_figure(WIDTH_INCHES, len(fields) * each)
        return figure, list(figure.subplots(len(fields), 1, squeeze=False)[:, 0])
    each = 3.4
    figure = new_figure(len(fields) * each, min(9.0, 2.6 * height / width + 2.0))
    return figure, list(figure.subplots(1, len(fields), squeeze=False)[0])


def mark(axes: Axes, lat: float, lon: float) -> None:
    """A cross at a place."""
    left, right = axes.get_xlim()
    turn = 360 * np.round(((left + right) / 2 - lon) / 360)
    axes.plot(lon + turn, lat, "x", color=VERMILION, markersize=11, markeredgewidth=3)


def bias_figure(view: View) -> Figure:
    """The terrain, and the bias seen from a place: as it reads the others, and as they read it."""
    panels: list[Panel] = [
        ("Terrain", view.elevation_m, "elevation (m)", "cividis", (None, None)),
        ("Bias with which the cross\nreads each patch", view.reads, BIAS_LABEL, *bias_colours(view.reads)),
        ("Bias with which each\npatch reads the cross", view.is_read, BIAS_LABEL, *bias_colours(view.is_read)),
    ]
    return _view_figure(view, panels, "Bias")


def attention_figure(view: View) -> Figure:
    """A place's attention without and with the bias, and the difference."""
    before, after = 100 * view.without, 100 * view.with_bias
    change = after - before
    most = max(float(before.max()), float(after.max()))
    label = "share of the cross's\nattention (%)"
    panels: list[Panel] = [
        ("Attention of the cross\nwithout the bias", before, label, "viridis", (0.0, most)),
        ("Attention of the cross\nwith the bias", after, label, "viridis", (0.0, most)),
        ("What the bias changes", change, "change of the share\n(percentage points)", *bias_colours(change)),
    ]
    return _view_figure(view, panels, "Attention")


def _view_figure(view: View, panels: Sequence[Panel], what: str) -> Figure:
    with readable_fonts():
        figure, axes = maps([view.field(values) for _, values, *_ in panels])
        for each, (title, values, label, colours, limits) in zip(axes, panels, strict=True):
            lines = None if values is view.elevation_m else view.ground
            draw_map(each, view.field(values), title, label, colours, limits, lines)
            mark(each, view.lat[view.place], view.lon[view.place])
        figure.suptitle(f"{what}, {view.of}{_contour_words(view.elevation_m)}")
    return figure


def _contour_words(elevation_m: Array) -> str:
    levels = contour_levels_m(elevation_m)
    return f"\n(lines: {', '.join(map(str, levels))} m)" if levels else ""


def transect_figure(view: View, line: Transect) -> Figure:
    """Terrain, bias and attention along a line that begins where the view is from."""

    def along(values: Array) -> Array:
        return values[line.rows, line.columns]

    with readable_fonts():
        figure = new_figure(WIDTH_INCHES, 7.5)
        terrain, bias, attention = figure.subplots(3, 1, sharex=True)
        ground = along(view.elevation_m)
        terrain.fill_between(line.distance_km, min(0.0, float(ground.min())), ground, color="0.75", lw=0)
        terrain.plot(line.distance_km, ground, color=BLACK, lw=1.5)
        terrain.set_ylabel("elevation,\npatch mean (m)")
        terrain.set_title(f"From {line.ends[0]} to {line.ends[1]}\n{view.of}")
        bias.plot(line.distance_km, along(view.reads), "o-", color=BLUE, label="start reads the place")
        bias.plot(line.distance_km, along(view.is_read), "s--", color=VERMILION, label="place reads the start")
        bias.axhline(0, color="0.5", lw=0.8)
        bias.set_ylabel("bias (dimensionless);\nbelow 0: attends less")
        attention.plot(line.distance_km, 100 * along(view.without), "s--", color="0.45", label="without the bias")
        attention.plot(line.distance_km, 100 * along(view.with_bias), "o-", color=BLUE, label="with the bias")
        attention.set_ylim(bottom=0)
        attention.set_ylabel("share of the start's\nattention (%)")
        attention.set_xlabel("distance from the start (km)")
        for axes in (bias, attention):
            axes.legend()
        for axes in (terrain, bias, attention):
            axes.grid(alpha=0.3)
            for marker in axes.get_lines():
                marker.set_markersize(5)
    return figure


def error_figure(
    error: Field, ground: Field, variable: str, part: str, name: str, other: tuple[str, Array] | None
) -> Figure:
    """Where the forecast errs, and where it errs more or less than another.

    Args:
        error: Root mean square error at each pixel, in the variable's unit.
        ground: Elevation, metres.
        variable: ClimaX's name.
        part: Of the data.
        name: What the run is called.
        other: What another run is called, and its error on the same grid; None: there is none.
    """
    unit = variable_unit(variable)
    with readable_fonts():
        figure, axes = maps([error] * (1 if other is None else 2))
        most = float(np.percentile(error.values, MOST_OF_ERRORS)) or None
        draw_map(axes[0], error, name, f"RMSE ({unit})", "cividis", (0.0, most), ground)
        if other is not None:
            change = error.values - other[1]
            label = f"change of RMSE ({unit});\nbelow 0: smaller error"
            title = f"{name} minus {other[0]}"
            draw_map(axes[1], Field(error.lat, error.lon, change), title, label, *bias_colours(change), ground)
        figure.suptitle(f"Error of {variable}, {part}{_contour_words(ground.values)}")
    return figure


def forecast_figure(
    forecast: Field, change: Array | None, ground: Field | None, variable: str, when: str, unit: str
) -> Figure:
    """A forecast, and what the bias changed in it.

    Args:
        forecast: In the variable's unit.
        change: With the bias less without it, on the same grid; None: there is none.
        ground: Elevation, metres; None: unknown.
        variable: ClimaX's name.
        when: From when and for when, in words.
        unit: The variable's.
    """
    with readable_fonts():
        figure, axes = maps([forecast] * (1 if change is None else 2))
        label = f"{variable}\n({unit})"
        draw_map(axes[0], forecast, "Forecast", label, "viridis", ground=ground)
        if change is not None:
            field = Field(forecast.lat, forecast.lon, change)
            label = f"with the bias less\nwithout it ({unit})"
            draw_map(axes[1], field, "What the bias changed", label, *bias_colours(change), ground)
        contours = "" if ground is None else _contour_words(ground.values)
        figure.suptitle(f"{when}{contours}")
    return figure


def variable_unit(name: str) -> str:
    """The unit of one of ClimaX's variables."""
    for variable in VARIABLES:
        known = variable.name == name or (variable.on_levels and name.rpartition("_")[0] == variable.name)
        if known:
            return UNITS.get(next(iter(variable.units)), "dimensionless")
    return f"{name} units"


# ---- curves ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trajectory:
    """A number over training.

    Attributes:
        steps: Optimiser steps, `[N]`.
        values: `[N]`.
    """

    steps: Sequence[int]
    values: Sequence[float]


Series = Mapping[tuple[int, int | None], Trajectory]
"""By block, and head where each head has its own."""


def parameter_figure(values: Mapping[str, Series], gradients: Mapping[str, Series]) -> Figure:
    """Every parameter over training, and the gradient that moved it, by block and head.

    Args:
        values, gradients: By the parameter's name.
    """
    with readable_fonts():
        figure = new_figure(max(WIDTH_INCHES, 3.6 * len(values)), 6.0)
        grid = figure.subplots(2, len(values), sharex=True, squeeze=False)
        for column, (name, series) in enumerate(values.items()):
            label = PARAMETERS.get(name.rpartition(".")[2], f"{name}\n(dimensionless)")
            _series(grid[0, column], series, label)
            gradient = f"gradient of the loss\nby {label.partition(' (')[0].partition(chr(10))[0]}"
            _series(grid[1, column], gradients.get(name, {}), gradient)
            grid[1, column].axhline(0, color="0.5", lw=0.8)
            grid[1, column].set_xlabel("training step")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return figure


def _series(axes: Axes, series: Series, label: str) -> None:
    """Blocks by colour, heads by the line's style."""
    blocks = sorted({block for block, _ in series})
    for (block, head), each in series.items():
        style = STYLES[(head or 0) % len(STYLES)]
        named = f"block {block}" if head is None else f"block {block}, head {head}"
        colour = LINES[blocks.index(block) % len(LINES)]
        axes.plot(each.steps, each.values, style, color=colour, lw=1.8, label=named)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.ticklabel_format(axis="y", scilimits=(-2, 4))
    axes.grid(alpha=0.3)


@dataclass(frozen=True)
class Difference:
    """A paired comparison, as `climax-elevation compare` has it.

    Attributes:
        variant, counterpart: What is compared with what.
        value: Of the difference.
        seeds: How many pairs.
        interval: Over seeds; NaN where there is none.
        time_interval: Over time; likewise.
        verdict: "better", "worse", or that it is neither.
    """

    variant: str
    counterpart: str
    value: float
    seeds: int
    interval: tuple[float, float]
    time_interval: tuple[float, float]
    verdict: str


LONGEST_NAME = 30  # characters a line
PANEL_INCHES = 4.0  # of a further panel
TICKS = 5  # at most, or the labels of a narrow panel touch each other
VERDICTS = {"better": BLUE, "worse": VERMILION}


def forest_figure(panels: Mapping[str, Sequence[Difference]], of: str, label: str) -> Figure:
    """Differences with their intervals, the lowest of the first panel above; filled where the verdict is clear.

    Args:
        panels: At least one difference each, by what is written over the panel; of the same pairs.
        of: What is compared, in words.
        label: Of the axis, with the unit.
    """
    everything = [each for differences in panels.values() for each in differences]
    first: dict[tuple[str, str], float] = {}
    for each in everything:
        first.setdefault((each.variant, each.counterpart), each.value)
    ordered = sorted(first, key=lambda pair: first[pair], reverse=True)
    with readable_fonts():
        figure = new_figure(WIDTH_INCHES + PANEL_INCHES * (len(panels) - 1), 2.2 + 0.42 * len(ordered))
        columns = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (title, differences) in zip(columns, panels.items(), strict=True):
            axes.set_title(title, fontsize=POINTS)
            own = {(each.variant, each.counterpart): each for each in differences}
            for row, pair in enumerate(ordered):
                if pair in own:
                    _draw_difference(axes, row, own[pair])
            axes.axvline(0, color=BLACK, lw=1)
            axes.grid(axis="x", alpha=0.3)
        names = [textwrap.fill(f"{variant} vs {counterpart}", LONGEST_NAME) for variant, counterpart in ordered]
        columns[0].set_yticks(range(len(ordered)), names)
        columns[0].set_ylim(-0.7, len(ordered) - 0.3)
        columns[0].xaxis.set_major_locator(MaxNLocator(TICKS))
        figure.supxlabel(label, fontsize=POINTS)
        seeds = sorted({each.seeds for each in everything})
        counted = " to ".join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1])))
        figure.suptitle(
            f"{of}\nthick: interval over seeds ({counted}), thin with ends: over time;\nfilled: clear after correction"
        )
    return figure


def _draw_difference(axes: Axes, row: int, each: Difference) -> None:
    colour = VERDICTS.get(each.verdict, "0.45")
    axes.plot(each.time_interval, [row, row], "|-", color=colour, lw=1, ms=14, mew=1.5, label="over time")
    # butt: round or projecting ends would make the interval longer
    axes.plot(each.interval, [row, row], "-", color=colour, lw=3.5, solid_capstyle="butt", label="over seeds")
    face = colour if each.verdict in VERDICTS else "white"
    axes.plot(each.value, row, "o", color=colour, ms=9, mfc=face, mew=2, label=each.verdict)
