"""`climax-elevation forecast`: from a trained run and a source to a netCDF file of forecasts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from climax_elevation.checks import one_of
from climax_elevation.data.names import OROGRAPHY
from climax_elevation.errors import InputError
from climax_elevation.forecast.loaded import Array, LoadedRun, load_run
from climax_elevation.forecast.output import writing
from climax_elevation.forecast.rollout import check_others, check_times, not_forecast, roll_out
from climax_elevation.forecast.states import LAST, States, open_states, stamp

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """One field of a forecast, to be drawn.

    Attributes:
        variable: ClimaX's name.
        lat, lon: Degrees, of rows and columns or of each pixel.
        values: In the variable's unit, `[h, w]`.
        without: The same without the bias; None: there is none already.
        ground: Elevation, metres, `[h, w]`; None: unknown.
        when: From when, and for when, in words.
    """

    variable: str
    lat: Array
    lon: Array
    values: Array
    without: Array | None
    ground: Array | None
    when: str


@dataclass(frozen=True)
class Forecast:
    """What was forecast.

    Attributes:
        path: The file.
        run: By what.
        starts: Times that were forecast from, ISO 8601.
        lead_hours: Of each step.
        shown: The last forecast from the last start, of the variable that was asked for; None: of none.
    """

    path: Path
    run: LoadedRun
    starts: tuple[str, ...]
    lead_hours: tuple[float, ...]
    shown: Shown | None


def forecast(
    run: str | Path | LoadedRun,
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    checkpoint: str | Path | None = None,
    data: str | Path | None = None,
    climax: str | Path | None = None,
    start: Sequence[str] = (LAST,),
    steps: int = 1,
    others: str | None = None,
    bias_scale: float = 1.0,
    constants: str | Path | None = None,
    units: Mapping[str, str] | None = None,
    select: Mapping[str, str] | None = None,
    show: str | None = None,
) -> Forecast:
    """Forecast from the states of a source, and write CF netCDF.

    Args:
        run: Folder of a finished or running training, of either host; or from `load_run`.
        source: netCDF, Zarr or GRIB, as `prepare` takes it, one or several, on the run's grid.
        out: File to write, which does not exist.
        checkpoint, data, climax: As `load_run` takes them.
        start: Times to forecast from: "last" or "all" of the source; a year or ISO date, for all times in
            it; or two, for all from one to the other.
        steps: How often what is forecast is fed back.
        others: What a further step has of inputs that are not forecast: "keep", what the start has; or
            "source", what the source has at that time. Static fields are kept in any case.
        bias_scale: The bias times this; 0: attention as without it.
        constants: A further file on the same grid, with orography and land-sea mask. What neither has is
            taken from the run's data.
        units: Unit by variable, where the source names none or a wrong one.
        select: Value by coordinate, where the source has several runs or members.
        show: Variable of which the last forecast from the last start is returned, with and without the bias;
            "": the first that is forecast; None: none.

    Raises:
        InputError: For every mistake in run, source or options, in one sentence; nothing is written then.
    """
    out = Path(out)
    sources = [str(source)] if isinstance(source, str | Path) else [str(one) for one in source]
    if steps < 1:
        raise InputError(f"steps is 1 or more, not {steps}")
    if out.exists():
        raise InputError(f"{out} exists: name another file, or remove it")
    loaded = run if isinstance(run, LoadedRun) else load_run(run, checkpoint=checkpoint, data=data, climax=climax)
    if loaded.terrain is None and bias_scale != 1:
        raise InputError("the run has no terrain bias to scale: leave out bias_scale")
    variable = None if show is None else one_of("variable", show or loaded.out_variables[0], loaded.out_variables)
    _announce(loaded, bias_scale)
    check_others(loaded, steps, others)
    further = None if constants is None else str(constants)
    with open_states(loaded, sources, constants=further, units=units, select=select, time=start[0]) as states:
        starts = states.starts(start)
        if others == "source":
            check_times(states, starts, steps)
        stamps = [states.stamps[index] for index in starts]
        logger.info("forecasting from %s", _listed(stamps))
        asked = steps > 1 and bool(not_forecast(loaded))
        attributes = _attributes(loaded, ", ".join(sources), bias_scale, others if asked else None)
        with loaded.scaled(bias_scale), writing(out, states, starts, steps, attributes) as output:
            last = _write(states, starts, steps, others, output)
        shown = None if variable is None else _shown(states, starts[-1], steps, others, variable, last, bias_scale)
    hours = tuple(loaded.lead_hours * step for step in range(1, steps + 1))
    return Forecast(out, loaded, tuple(stamps), hours, shown)


def _write(states: States, starts: Sequence[int], steps: int, others: str | None, output: Any) -> Array:
    """All forecasts into the file; returns the last one."""
    run = states.run
    with tqdm(total=len(starts) * steps, desc="forecast", unit="field", disable=None) as bar:
        for first in range(0, len(starts), run.batch_size):
            chosen = starts[first : first + run.batch_size]
            for step, predicted in enumerate(roll_out(states, chosen, steps, others)):
                values = run.physical(predicted, run.out_variables)
                _check(values, run, states.stamps[chosen[0]], step)
                output.write(first, step, values)
                bar.update(len(chosen))
    return values[-1]


def _shown(
    states: States, start: int, steps: int, others: str | None, variable: str, last: Array, bias_scale: float
) -> Shown:
    run, (rows, columns) = states.run, states.run.pixels
    index = run.out_variables.index(variable)
    without = None
    if run.terrain is not None and bias_scale != 0:
        with run.scaled(0.0):
            *_, plain = roll_out(states, [start], steps, others)
        without = run.physical(plain, run.out_variables)[0, index]
    places = run.places
    return Shown(
        variable,
        run.lat[rows] if places is None else places[0][rows, columns],
        run.lon[columns] if places is None else places[1][rows, columns],
        last[index],
        without,
        states.read(OROGRAPHY.name, [start])[0, rows, columns] if OROGRAPHY.name in run.variables else None,
        f"from {states.stamps[start][:16]} for {stamp(states.after(start, steps))[:16]}",
    )


def _check(values: Array, run: LoadedRun, start: str, step: int) -> None:
    bad = [name for index, name in enumerate(run.out_variables) if not np.isfinite(values[:, index]).all()]
    if bad:
        raise InputError(
            f"step {step + 1} from {start} on forecasts numbers that are not finite ({', '.join(bad)}): take another "
            f"checkpoint than {run.checkpoint}, or fewer steps"
        )


def _announce(run: LoadedRun, bias_scale: float) -> None:
    logger.info("host: %s; checkpoint: %s", run.host, run.checkpoint)
    logger.info(
        "input: %s; on %d x %d pixels; lead time %g h; forecast: %s",
        ", ".join(run.variables),
        *run.shape,
        run.lead_hours,
        ", ".join(run.out_variables),
    )
    logger.info("bias: %s%s", run.bias, "" if bias_scale == 1 else f"; times {bias_scale:g}")


def _attributes(run: LoadedRun, source: str, bias_scale: float, others: str | None) -> dict[str, Any]:
    kept = {} if others is None else {"not_forecast": "kept" if others == "keep" else "from the source"}
    return {
        "title": "ClimaX forecasts with terrain-aware attention" if run.terrain is not None else "ClimaX forecasts",
        "source": f"{run.host}; checkpoint {run.checkpoint}",
        "initial_states": source,
        "terrain_bias": run.bias,
        "terrain_bias_scale": bias_scale if run.terrain is not None else 0.0,
        **kept,
    }


def _listed(stamps: Sequence[str]) -> str:
    return stamps[0] if len(stamps) == 1 else f"{len(stamps)} times, {stamps[0]} to {stamps[-1]}"
