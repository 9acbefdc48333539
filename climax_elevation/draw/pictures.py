"""The pictures of `climax-elevation plot`: from the folder of a run, or of a comparison, to a figure."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from climax_elevation.diagnostics.monitor import FILE, Row, read_record
from climax_elevation.diagnostics.run import Run
from climax_elevation.diagnostics.view import Place, error_field, ground_field, transect, view_from
from climax_elevation.draw import plots
from climax_elevation.errors import InputError
from climax_elevation.files import reading_table

DIFFERENCES = "differences.csv"
COLUMNS = (
    *("variant", "counterpart", "part", "metric", "variable", "stratum", "seeds", "verdict"),
    *("difference", "low", "high", "time_low", "time_high"),
    *("percent", "percent_low", "percent_high", "percent_time_low", "percent_time_high"),
)
USUAL = {"part": "test", "metric": "rmse_standardised", "variable": "mean", "stratum": "all"}
"""What a forest is of, where it is not said and there are several."""


def errors(run: Run, other: Run | None, *, part: str, variable: str | None, names: tuple[str, str | None]) -> Figure:
    """Where a run errs, and where more or less than another.

    Args:
        run, other: Of the same data; None: no other.
        part: "val" or "test".
        variable: One that is forecast; None: the first.
        names: What the runs are called.

    Raises:
        InputError: If the runs' grids or forecasts differ, or there is no terrain to show.
    """
    error, variable = error_field(run, part, variable)
    beside = None
    if other is not None:
        theirs, _ = error_field(other, part, variable)
        same = theirs.values.shape == error.values.shape and np.allclose(theirs.lat, error.lat)
        if not (same and np.allclose(theirs.lon, error.lon)):
            raise InputError(f"{names[0]} and {names[1]} forecast other grids: compare runs of the same data")
        beside = (str(names[1]), theirs.values)
    return plots.error_figure(error, ground_field(run, part), variable, part, names[0], beside)


def parameters(source: str | Path) -> Figure:
    """The parameters of a run's biases over training.

    Args:
        source: bias.csv, or the folder of a run that has one at any depth.

    Raises:
        InputError: If there is none, or several.
    """
    rows = read_record(_one_file(Path(source), FILE))
    values, gradients = _trajectories(rows, ("value", "norm")), _trajectories(rows, ("gradient", "gradient_norm"))
    if not values:
        raise InputError(f"{source} holds no parameter yet: the bias has none, or the run has not made a step")
    return plots.parameter_figure(values, gradients)


def _trajectories(rows: Sequence[Row], quantities: tuple[str, str]) -> dict[str, plots.Series]:
    found: dict[str, dict[tuple[int, int | None], list[Row]]] = {}
    for row in rows:
        if row.parameter and row.quantity in quantities:
            name = f"norm of {row.parameter}" if row.quantity == quantities[1] else row.parameter
            found.setdefault(name, {}).setdefault((row.block, row.head), []).append(row)
    return {
        name: {
            key: plots.Trajectory([row.step for row in each], [row.value for row in each])
            for key, each in series.items()
        }
        for name, series in found.items()
    }


def forest(
    source: str | Path,
    *,
    part: str | None = None,
    variable: str | None = None,
    metric: str | None = None,
    stratum: str | None = None,
) -> Figure:
    """The differences of a comparison, with their intervals: of errors in per cent, of other scores as they are.

    A comparison with arms, such as heights given and withheld, has a panel for each.

    Args:
        source: differences.csv, or the folder of `climax-elevation compare` that has it.
        part, variable, metric, stratum: Which; None: that of `USUAL`, or else the only one that there is.

    Raises:
        InputError: If there is no such file or it is another, or what to draw is not clear.
    """
    file = _one_file(Path(source), DIFFERENCES)
    with reading_table(file), file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    missing = [name for name in COLUMNS if rows and name not in rows[0]]
    if missing or not rows:
        raise InputError(f"{file} is no result of compare: it lacks {', '.join(missing) or 'rows'}")
    chosen = {"part": part, "variable": variable, "metric": metric, "stratum": stratum}
    for name in USUAL:
        there = sorted({row[name] for row in rows})
        chosen[name] = _choice(file, name, chosen[name], there)
        rows = [row for row in rows if row[name] == chosen[name]]
    relative = all(row["percent"] for row in rows)
    unit = "% of the counterpart's; below 0: smaller error" if relative else "dimensionless; above 0: better"
    of = f"variable: {chosen['variable']}, part: {chosen['part']}, stratum: {chosen['stratum']}"
    with reading_table(file):
        panels: dict[str, list[plots.Difference]] = {}
        for row in rows:
            found = _difference(row, "percent" if relative else "difference")
            panels.setdefault(row.get("arm", "").replace("_", " "), []).append(found)
    return plots.forest_figure(panels, of, f"difference in {chosen['metric']} ({unit})")


def _choice(file: Path, name: str, wanted: str | None, there: list[str]) -> str:
    if wanted is None:
        wanted = USUAL[name] if USUAL[name] in there else there[0] if len(there) == 1 else None
    if wanted is None:
        raise InputError(f"{file} has several values of {name}: choose with --{name} one of {', '.join(there)}")
    if wanted not in there:
        raise InputError(f"{file} has no {name} {wanted!r}; it has {', '.join(there)}")
    return wanted


def _difference(row: dict[str, str], value: str) -> plots.Difference:
    before = "percent_" if value == "percent" else ""
    ends = {name: float(row[before + name] or "nan") for name in ("low", "high", "time_low", "time_high")}
    return plots.Difference(
        row["variant"],
        row["counterpart"],
        float(row[value] or "nan"),
        int(row["seeds"]),
        (ends["low"], ends["high"]),
        (ends["time_low"], ends["time_high"]),
        row["verdict"],
    )


def _one_file(source: Path, name: str) -> Path:
    if source.is_file():
        return source
    if (source / name).is_file():
        return source / name
    found = sorted(source.rglob(name)) if source.is_dir() else []
    if len(found) != 1:
        there = f"has {len(found)} of them: name one" if found else "does not exist or has none"
        raise InputError(f"{name} is drawn, and {source} {there}")
    return found[0]


def bias(run: Run, place: Place | None, *, part: str, sample: int, block: int | None, head: int | None) -> Figure:
    """The bias seen from a place; the arguments are those of `view_from`."""
    return plots.bias_figure(view_from(run, place, part=part, sample=sample, block=block, head=head))


def attention(run: Run, place: Place | None, *, part: str, sample: int, block: int | None, head: int | None) -> Figure:
    """The attention of a place without and with the bias; the arguments are those of `view_from`."""
    return plots.attention_figure(view_from(run, place, part=part, sample=sample, block=block, head=head))


def across(
    run: Run, start: Place, end: Place, *, part: str, sample: int, block: int | None, head: int | None
) -> Figure:
    """Terrain, bias and attention from one place to another; the other arguments are those of `view_from`."""
    view = view_from(run, start, part=part, sample=sample, block=block, head=head)
    return plots.transect_figure(view, transect(view, start, end))
