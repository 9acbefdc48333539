"""`climax-elevation prepare`: reanalysis files to ClimaX's training format.

Work goes shard by shard, with one shard in memory, and every file appears whole or not at all.
OUT/prepare.json records the source, the options and whether all is done, so that the same command
goes on where it stopped, and changes nothing once it is done.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from tqdm import tqdm

from climax_elevation.data import configuration
from climax_elevation.data.field import BadDataError, Field
from climax_elevation.data.fields import Fields, find_fields
from climax_elevation.data.format import PARTITIONS, RunningStatistics, check_space
from climax_elevation.data.grib import is_grib_error
from climax_elevation.data.grid import Grid, is_global, read_grid, same_places
from climax_elevation.data.names import OROGRAPHY
from climax_elevation.data.record import COMPLETE, RECORD, RECUT, Prepared, read_record
from climax_elevation.data.recut import is_prepared, recut
from climax_elevation.data.source import fingerprint, open_source
from climax_elevation.data.times import Shard, TimeAxis, plan_shards, read_times, split
from climax_elevation.errors import InputError
from climax_elevation.files import FULL, alone, load_npz, save_npy, save_npz

logger = logging.getLogger(__name__)

_FORMAT, _FORMATS = 2, (1, 2)
"""Of the record: the first had shards that repeat nothing; one that was begun goes on as it was begun."""


@dataclass(frozen=True)
class _Plan:
    out: Path
    axis: TimeAxis
    grid: Grid
    fields: Fields
    parts: Mapping[str, range]
    shards: Sequence[Shard]
    identity: Mapping[str, Any]

    @property
    def step_bytes(self) -> int:
        return _step_bytes(self.fields, self.grid)


def prepare(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    variables: Sequence[str] | None = None,
    levels: Sequence[int] | None = None,
    units: Mapping[str, str] | None = None,
    constants: str | Path | None = None,
    val_from: str | None = None,
    test_from: str | None = None,
    predict_range: int | None = None,
    patch_size: int | None = None,
    shard_steps: int | None = None,
    processes: int = 1,
    regrid: str | None = None,
    select: Mapping[str, str] | None = None,
    every: int = 1,
    winds: str | None = None,
    orography: str | None = None,
    sea_level_where_missing: bool = False,
) -> Prepared:
    """Write ClimaX's training format from reanalysis files.

    Names are ClimaX's, units are K, m s-1, Pa, m2 s-2, %, kg kg-1, m, J m-2, orography is in metres
    (geopotential / 9.80665), latitude rises with the row and longitude with the column, and values are
    float32. Constants are repeated over the steps of each shard, as ClimaX's reader wants them, and
    `lattitude` (ClimaX's spelling), in degrees, is always among them. `config.yaml` trains a small model on it.

    Args:
        source: A netCDF or GRIB file, a zip archive of such, a Zarr folder, a folder of these, a pattern such as
            `era5_*.nc`, the URL of a Zarr store that fsspec opens, or several of these. Or a folder that is prepared
            already, whose shards are cut anew: see `recut`; of the options it takes shard_steps, processes and
            predict_range.
        out: Folder to write. New, empty, or one that the same command began.
        variables: What to take, by ClimaX's or the source's names. None: all that ClimaX knows; the
            others are left out and named. A name that ClimaX does not know is taken as it is; one that is not on
            pressure levels gets a name that says so, such as `T_lev3` or `t_level50m`.
        levels: Pressure levels in hPa. None: those of ClimaX's (50, 250, 500, 600, 700, 850, 925)
            that the source has.
        units: Unit by variable, e.g. `{"orography": "m"}`, where the source names none or a wrong one.
        constants: A further file, on the same grid, with orography and land-sea mask.
        val_from: First year ("2000") or ISO date of validation.
        test_from: First year or ISO date of test. Without both, the first 80 % of the time is for
            training, the next 10 % for validation, the last for test.
        predict_range: Steps between input and target. Each shard begins with so many steps that the one before it
            ends with, so that no boundary takes a pair. None: 1.
        patch_size: Height and width are cropped to a multiple of it, last rows and columns first. None: 2.
        shard_steps: Longest shard, in steps; shards of a stretch without gaps differ by one step at most. None: by the
            amount of data, as `climax_elevation.data.times.cut` says.
        processes: Of training. Each partition gets a multiple of so many shards, since ClimaX's readers give whole
            ones to processes and leave the rest out.
        regrid: "5.625", "2.8125" or "1.40625": regrid conservatively to ClimaX's global grid.
        select: Value by coordinate, of forecast runs, members and the like: `{"step": "6"}`, `{"number": "0"}`.
        every: Every how many-th step is taken.
        winds: "grid" or "earth": along what winds go, where the source does not say; written are winds towards east
            and north.
        orography: The source's name of the orography, where it is none that is known.
        sea_level_where_missing: Make the orography 0 m where it is missing.

    Returns:
        What was written.

    Raises:
        InputError: For every mistake in source, options or folder, and for a full disk, in one sentence.
            What the source's metadata shows is found before anything is changed; when missing or
            impossible values turn up later, the shards of this source are removed again.

    Source: the format is that of ClimaX's nc2np_equally_era5.py. Departures: the climatology of `val` and
    `test` is the time mean of *training*, constants included (there: of each partition itself, without
    constants), mean and standard deviation are exact over all training steps (there: from yearly ones),
    leap days are kept, and a standard deviation of zero is written as 1, so that normalising a flat
    field gives zeros.
    """
    sizes = {"predict_range": predict_range, "patch_size": patch_size, "shard_steps": shard_steps, "every": every}
    sizes |= {"processes": processes}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    sources = [str(source)] if isinstance(source, str | Path) else [str(one) for one in source]
    if any(is_prepared(Path(one)) for one in sources):
        others: dict[str, Any] = {"variables": variables, "levels": levels, "units": units, "constants": constants}
        others |= {"val_from": val_from, "test_from": test_from, "patch_size": patch_size, "regrid": regrid}
        others |= {"select": select, "winds": winds, "orography": orography, "every": None if every == 1 else every}
        others |= {"sea_level_where_missing": sea_level_where_missing}
        without_effect = [name for name, value in others.items() if value]
        if without_effect or len(sources) > 1:
            what = f"the option {without_effect[0]} has no effect there" if without_effect else "name it alone"
            raise InputError(f"{sources[0]} is prepared already, and its shards are only cut anew: {what}")
        return recut(sources[0], out, processes=processes, shard_steps=shard_steps, predict_range=predict_range)
    predict_range, patch_size = predict_range or 1, patch_size or 2
    options = {
        "variables": None if variables is None else list(variables),
        "levels": None if levels is None else list(levels),
        "units": dict(units or {}),
        "val_from": val_from,
        "test_from": test_from,
        "predict_range": predict_range,
        "patch_size": patch_size,
        "shard_steps": shard_steps,
        "regrid": regrid,
    }
    further_options: dict[str, Any] = {
        "select": dict(select or {}),
        "every": every if every > 1 else None,
        "processes": processes if processes > 1 else None,
        "winds": winds,
        "orography": orography,
        "sea_level_where_missing": sea_level_where_missing,
    }
    # recorded where they are given, so that what was begun without them goes on
    options |= {name: value for name, value in further_options.items() if value}
    out = Path(out).resolve()
    with ExitStack() as stack:
        dataset = stack.enter_context(
            open_source(
                sources,
                variables=variables,
                select=select,
                units=units,
                winds=winds,
                orography=orography,
                check_ground=constants is None,
            )
        )
        further = (
            None
            if constants is None
            else stack.enter_context(open_source(str(constants), units=units, orography=orography))
        )
        identity = {
            "format": _FORMAT,
            "source": fingerprint(sources, dataset),
            "constants": None if further is None else fingerprint(str(constants), further),
            "options": options,
        }
        begun = _check_folder(out, identity)
        if "time" not in dataset.coords:
            has = ", ".join(map(str, dataset.coords)) or "none"
            raise InputError(f"the source has no time coordinate of dates (CF units, or WRF's Times): it has {has}")
        dataset = dataset.isel(time=slice(None, None, every))
        axis = read_times(dataset["time"])
        parts = split(axis, val_from, test_from)
        grid = read_grid(dataset, patch_size=patch_size, regrid=regrid)
        further = None if further is None else _same_grid(further, dataset)
        fields = find_fields(
            dataset,
            further,
            grid,
            variables=variables,
            levels=levels,
            units=units or {},
            orography=orography,
            sea_level_where_missing=sea_level_where_missing,
        )
        shards = _recorded(begun, axis) or plan_shards(
            axis,
            parts,
            shard_steps=shard_steps,
            processes=processes,
            predict_range=predict_range,
            step_bytes=_step_bytes(fields, grid),
        )
        plan = _Plan(out, axis, grid, fields, parts, shards, identity)
        _announce(plan)
        return _carry_out(plan)


def _step_bytes(fields: Fields, grid: Grid) -> int:
    return 4 * len(fields.names) * grid.shape[0] * grid.shape[1]


def _same_grid(constants: xr.Dataset, dataset: xr.Dataset) -> xr.Dataset:
    """`constants` with its rows and columns in the order of `dataset`."""
    for name in ("lat", "lon"):
        if name not in constants.coords or constants[name].shape != dataset[name].shape:
            raise InputError(f"the file of constants is on another grid than the source: compare their {name}")
        here, there = constants[name], dataset[name].to_numpy()
        if here.ndim == 1 and not same_places(here.to_numpy(), there).all():
            constants = constants.isel({here.dims[0]: slice(None, None, -1)})
        if not same_places(constants[name].to_numpy(), there).all():
            raise InputError(f"the file of constants is on another grid than the source: their {name} differ")
    return constants


def _check_folder(out: Path, identity: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The record of an earlier run of the same command, or None where there is nothing."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise InputError(f"{out} must be a folder, it is a file: choose another")
    record = out / RECORD
    if not record.is_file():
        others = sorted(path.name for path in out.iterdir() if path not in _partials(out))
        if others:
            raise InputError(f"{out} holds other data ({others[0]}): choose a new or empty folder")
        return None
    if RECUT in (read_record(out) or {}):
        raise InputError(
            f"{out} holds shards that were cut anew from prepared ones: choose another folder, or remove it"
        )
    try:
        begun = json.loads(record.read_text())
        recorded = {key: begun[key] for key in ("format", "source", "constants", "options")}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{record} is not a record of this command: choose a new or empty folder") from None
    if recorded["format"] in _FORMATS:
        recorded["format"] = identity["format"]
    if recorded != identity:
        raise InputError(f"{out} was made from {_difference(recorded, identity)}: choose another folder, or remove it")
    return dict(begun)


def _difference(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    for key, what in (("source", "another source"), ("constants", "other constants"), ("format", "another version")):
        if recorded[key] != identity[key]:
            return what
    names = [name for name, value in identity["options"].items() if recorded["options"].get(name) != value]
    told = (f"{name} {recorded['options'].get(name)!r}, not {identity['options'][name]!r}" for name in names)
    return f"the same source with other options ({'; '.join(told)})"


def _recorded(begun: Mapping[str, Any] | None, axis: TimeAxis) -> list[Shard]:
    """The shards that an earlier run of the same command planned, perhaps by another rule; [] where there are none."""
    steps = {stamp: index for index, stamp in enumerate(axis.stamps)}
    try:
        return [
            Shard(shard["file"], steps[shard["first"]], steps[shard["last"]] + 1, shard.get("repeats"))
            for shard in (begun or {}).get("shards", [])
        ]
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{RECORD} of OUT names shards that are not of this source: choose a new or empty folder"
        ) from None


def _announce(plan: _Plan) -> None:
    steps = ", ".join(f"{name} {count}" for name, count in _steps(plan.shards).items())
    logger.info("variables: %s", ", ".join(plan.fields.names))
    if plan.axis.gaps:
        _tell_gaps(plan)
    logger.info("time steps: %s; one step is %g h", steps, plan.axis.hours_per_step)
    logger.info("shards: %s", ", ".join(f"{name} {count}" for name, count in _counts(plan.shards).items()))
    logger.info(
        "in ClimaX's configuration: img_size [%d, %d], hrs_each_step %d",
        *plan.grid.shape,
        max(1, round(plan.axis.hours_per_step)),
    )
    if is_global(plan.grid):
        logger.info(
            "for regional forecasting, mind that ClimaX's get_region_info selects mirrored latitudes: "
            "'NorthAmerica' is rows at 65 to 15 degrees south, whatever the order in lat.npy"
        )


def _steps(shards: Sequence[Shard]) -> dict[str, int]:
    """Of each partition."""
    return {part: sum(shard.own for shard in shards if shard.file.startswith(f"{part}/")) for part in PARTITIONS}


def _counts(shards: Sequence[Shard]) -> dict[str, int]:
    """Shards of each partition."""
    return {part: sum(shard.file.startswith(f"{part}/") for shard in shards) for part in PARTITIONS}


def _tell_gaps(plan: _Plan) -> None:
    gaps, left_out = plan.axis.gaps, sum(map(len, plan.parts.values())) - sum(_steps(plan.shards).values())
    logger.info(
        "%d gaps in time, the first after %s: shards are cut there, and no pair goes across; of %d steps, %d are left "
        "out, which have none %d steps later before a gap",
        len(gaps),
        plan.axis.stamps[gaps[0] - 1],
        len(plan.axis.stamps),
        left_out,
        plan.identity["options"]["predict_range"],
    )


def _carry_out(plan: _Plan) -> Prepared:
    if _is_complete(plan):
        logger.info("%s is complete: nothing to do, nothing changed", plan.out)
        return _result(plan, written=0, changed=False)
    missing_steps = sum(shard.stop - shard.start for shard in _missing(plan))
    check_space(plan.out, missing_steps * plan.step_bytes)
    try:
        with alone(plan.out, f"another run is writing to {plan.out}: wait until it has ended"):
            # Once more: another run may have come between the first look and the lock.
            begun = _check_folder(plan.out, plan.identity)
            missing = _missing(plan)
            if begun is not None:
                present = len(plan.shards) - len(missing)
                logger.info("going on in %s: %d of %d shards are there", plan.out, present, len(plan.shards))
            _write(plan, missing)
    except BadDataError:
        _discard(plan)
        raise
    except OSError as error:
        if error.errno in FULL:
            raise InputError(
                f"no space left on the disk of {plan.out}: free some and repeat the command, finished shards are kept"
            ) from error
        raise InputError(f"cannot write to {plan.out}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        logger.info("interrupted: repeat the command to go on, finished shards are kept")
        raise
    return _result(plan, written=len(missing), changed=True)


def _missing(plan: _Plan) -> list[Shard]:
    return [shard for shard in plan.shards if not (plan.out / shard.file).is_file()]


def _is_complete(plan: _Plan) -> bool:
    begun = _check_folder(plan.out, plan.identity)
    files = [plan.out / name for name in _summary_files(plan.grid)]
    return begun is not None and begun.get("state") == COMPLETE and not _missing(plan) and all(map(Path.is_file, files))


def _write(plan: _Plan, missing: Sequence[Shard]) -> None:
    for leftover in _partials(plan.out):
        leftover.unlink()
    _record(plan, "begun")
    statistics = RunningStatistics()
    fields = len(plan.fields.changing)
    with tqdm(total=fields * len(plan.shards), desc="prepare", unit="field", disable=None) as bar:
        for shard in plan.shards:
            _write_shard(plan, shard, shard in missing, statistics, bar)
    _write_summary(plan, statistics)
    _record(plan, COMPLETE)


def _write_shard(
    plan: _Plan, shard: Shard, is_missing: bool, statistics: RunningStatistics, bar: "tqdm[NoReturn]"
) -> None:
    path, training = plan.out / shard.file, shard.file.startswith("train/")
    if is_missing:
        arrays = _read_shard(plan, shard, bar)
        save_npz(path, arrays)
    else:
        arrays = _load_shard(path) if training else {}
        bar.update(len(plan.fields.changing))
    if training:
        statistics.update({name: values[shard.repeats or 0 :] for name, values in arrays.items()})


def _read_shard(plan: _Plan, shard: Shard, bar: "tqdm[NoReturn]") -> dict[str, NDArray[np.float32]]:
    stamps = plan.axis.stamps[shard.start : shard.stop]
    arrays = {}
    for field in plan.fields.changing:
        values = _read_field(field, plan.grid, shard)
        field.check(values, stamps)
        arrays[field.name] = values[:, None]
        bar.update()
    for name, constant in plan.fields.constant.items():
        arrays[name] = np.repeat(constant[None, None], len(stamps), axis=0)
    return arrays


def _read_field(field: Field, grid: Grid, shard: Shard) -> NDArray[np.float32]:
    try:
        return field.read(grid, shard.start, shard.stop)
    except Exception as error:
        # RuntimeError: netCDF4's word for a damaged file
        if not (isinstance(error, OSError | RuntimeError) or is_grib_error(error)):
            raise
        raise InputError(
            f"cannot read {field.called!r} from the source ({error}): finished shards are kept, repeat the command "
            "once it can be read"
        ) from error


def _load_shard(path: Path) -> dict[str, NDArray[np.float32]]:
    return load_npz(path, "remove it and repeat the command")


def _write_summary(plan: _Plan, statistics: RunningStatistics) -> None:
    mean, std = statistics.mean(), statistics.std()
    for name, value in std.items():
        # Less than float32 resolves is rounding, not variation.
        if value[0] <= np.finfo(np.float32).eps * abs(mean[name][0]):
            std[name] = np.ones(1)
            logger.info("%s is the same everywhere: its standard deviation is written as 1", name)
    climatology = {name: value.astype(np.float32) for name, value in statistics.climatology().items()}
    save_npz(plan.out / "normalize_mean.npz", mean)
    save_npz(plan.out / "normalize_std.npz", std)
    for partition in ("val", "test"):
        save_npz(plan.out / partition / "climatology.npz", climatology)
    save_npy(plan.out / "lat.npy", plan.grid.lat)
    save_npy(plan.out / "lon.npy", plan.grid.lon)
    if plan.grid.lon2d is not None:
        save_npy(plan.out / "lat2d.npy", plan.grid.lat2d)
        save_npy(plan.out / "lon2d.npy", plan.grid.lon2d)
    configuration.write_configuration(_configured(plan))


def _configured(plan: _Plan) -> configuration.Shards:
    options, orography = plan.identity["options"], plan.fields.constant[OROGRAPHY.name]
    training = [shard for shard in plan.shards if shard.file.startswith("train/")]
    return configuration.Shards(
        out=plan.out,
        changing=[field.name for field in plan.fields.changing],
        constant=list(plan.fields.constant),
        shape=plan.grid.shape,
        patch_size=options["patch_size"],
        predict_range=options["predict_range"],
        hours_per_step=plan.axis.hours_per_step,
        pairs=sum(shard.own - (options["predict_range"] if shard.repeats is None else 0) for shard in training),
        step_bytes=plan.step_bytes,
        ground_m=(float(orography.min()), float(orography.max())),
    )


def _summary_files(grid: Grid) -> list[str]:
    two_dimensional = [] if grid.lon2d is None else ["lat2d.npy", "lon2d.npy"]
    climatologies = ["val/climatology.npz", "test/climatology.npz"]
    arrays = ["normalize_mean.npz", "normalize_std.npz", *climatologies, "lat.npy", "lon.npy", *two_dimensional]
    return [*arrays, configuration.FILE]


def _record(plan: _Plan, state: str) -> None:
    shards = [
        {
            "file": shard.file,
            "first": plan.axis.stamps[shard.start],
            "last": plan.axis.stamps[shard.stop - 1],
            "repeats": shard.repeats,
        }
        for shard in plan.shards
    ]
    content = {
        **plan.identity,
        "state": state,
        "variables": list(plan.fields.names),
        "img_size": list(plan.grid.shape),
        "hours_per_step": plan.axis.hours_per_step,
        "shards": shards,
    }
    partial = plan.out / f".{RECORD}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, plan.out / RECORD)


def _partials(out: Path) -> list[Path]:
    """What a killed run may have left: see `format`, files are written one folder up."""
    inside = [*(path for part in PARTITIONS for path in out.glob(f".{part}-*.partial")), out / f".{RECORD}.partial"]
    names = ("lat.npy", "lon.npy", "lat2d.npy", "lon2d.npy", "normalize_mean.npz", "normalize_std.npz", "config.yaml")
    beside = [out.parent / f".{out.name}-{name}.partial" for name in names]
    return [path for path in (*inside, *beside) if path.is_file()]


def _discard(plan: _Plan) -> None:
    """Remove what this source left, and nothing else."""
    for name in (*(shard.file for shard in plan.shards), *_summary_files(plan.grid), RECORD):
        (plan.out / name).unlink(missing_ok=True)
    for folder in (*(plan.out / partition for partition in PARTITIONS), plan.out):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _result(plan: _Plan, *, written: int, changed: bool) -> Prepared:
    return Prepared(
        out=plan.out,
        variables=plan.fields.names,
        shape=plan.grid.shape,
        steps=_steps(plan.shards),
        shards=_counts(plan.shards),
        predict_range=plan.identity["options"]["predict_range"],
        hours_per_step=plan.axis.hours_per_step,
        shards_written=written,
        changed=changed,
        commands=configuration.commands(plan.out),
    )
