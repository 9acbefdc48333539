"""The command line: `climax-elevation COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from climax_elevation.errors import InputError
from climax_elevation.train import MODULES, READERS
from climax_elevation.upstream.patching import CHOICES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from climax_elevation.diagnostics import Run

RUN_OPTIONS = ("part", "checkpoint", "data", "climax")
DEMO_TASKS = {"gaps": "demo", "transport": "transport"}  # and the modules of testbed that show them
INTERRUPTED = 130  # what a shell returns for a program that was stopped by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 only on success, and a user's mistake is one sentence on standard error.

    Args:
        arguments: In the place of `sys.argv[1:]`.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("climax_elevation").setLevel(logging.INFO)
    ours, theirs = _split(list(sys.argv[1:] if arguments is None else arguments))
    parser = _parser()
    options = parser.parse_args(ours)
    if theirs and options.command != "train":
        parser.error(f"only train takes arguments after '--', not {options.command}")
    try:
        return options.run(options, theirs) or 0
    except InputError as error:
        if not error.said:
            print(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and the training script's after the first '--'."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


class _Parser(argparse.ArgumentParser):
    """Ends with one sentence, without the usage of all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _path(written: str) -> Path:
    if not written:
        raise argparse.ArgumentTypeError("a path is expected, and not ''")
    return Path(written)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="climax-elevation", description="Terrain-aware attention for the ClimaX weather transformer.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="see terrain-aware attention work in three minutes, without ClimaX, data or network",
        description="Trains the stand-in host over real terrain, without and with a terrain bias, and draws what came "
        "out. The task gaps infers hidden values of a simulated field whose covariance, and so the least possible "
        "error, is known; transport forecasts a simulated tracer.",
    )
    demo.add_argument("--task", choices=DEMO_TASKS, default="gaps", help="what is learned (default: gaps)")
    demo.add_argument("--region", default="asia", metavar="NAME", help="where (default: asia); a wrong name lists all")
    demo.add_argument(
        "--bias",
        metavar="NAME",
        help="which bias, or a sum: ridge+advection (default: structure; of transport: physics)",
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of data, weights and order (default: 0)")
    demo.add_argument("--out", type=_path, default=Path("demo"), metavar="OUT", help="folder (default: demo)")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="run ClimaX's own training script with terrain-aware attention",
        usage="climax-elevation train MODULE [--climax PATH] [--reader NAME] [--plan] "
        "[--pretrained-variables NAME ...] -- UPSTREAM ARGUMENTS",
        description="Runs ClimaX's training script in a patched temporary copy; where there is no ClimaX, "
        "global_forecast runs on the stand-in host. What follows '--' goes to the script: --config FILE, and "
        "overrides such as --model.net.init_args.use_physics_mask=true.",
    )
    train.add_argument("module", choices=MODULES, metavar="MODULE", help=", ".join(MODULES))
    train.add_argument("--climax", type=_path, metavar="PATH", help="a checkout of microsoft/ClimaX, or its folder")
    train.add_argument(
        "--pretrained-variables",
        nargs="+",
        metavar="NAME",
        help="of the checkpoint of --model.pretrained_path, in its order (default: as it or its config.yaml says, or "
        "ClimaX's 48)",
    )
    train.add_argument(
        "--reader",
        choices=READERS,
        default="climax",
        help="who reads the shards of global and regional forecasting: ClimaX's own reader (the default), which gives "
        "whole shards to processes, or the plugin's, which reads every sample once an epoch, whatever the number of "
        "processes and shards",
    )
    train.add_argument("--plan", action="store_true", help="print what the run would be, and do not start it")
    train.set_defaults(run=_train)

    patch = commands.add_parser("patch", help="apply, check or revert the patches of a ClimaX checkout")
    patch.add_argument("action", choices=["apply", "check", "revert"])
    patch.add_argument("path", type=_path, metavar="PATH", help="a checkout of microsoft/ClimaX at 6d5d354")
    patch.add_argument(
        "--series",
        choices=CHOICES,
        default="all",
        help="today: ClimaX on today's versions; terrain: the flag, on top or by itself (default: all)",
    )
    patch.set_defaults(run=_patch)

    prepare = commands.add_parser(
        "prepare",
        help="turn reanalysis files into ClimaX's training format",
        description="Writes ClimaX's training format from reanalysis files. Where SOURCE is prepared already, in that "
        "format, cuts its shards anew into OUT, for other --processes, --shard-steps or --predict-range.",
    )
    prepare.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="netCDF, GRIB or Zarr: files, a folder, a pattern or a URL; or a folder that is prepared already",
    )
    prepare.add_argument("out", type=_path, metavar="OUT", help="folder to write: new, or begun by the same command")
    prepare.add_argument("--val-from", metavar="DATE", help="first year or date of validation (default: 80 %% of time)")
    prepare.add_argument("--test-from", metavar="DATE", help="first year or date of test (default: 90 %% of time)")
    prepare.add_argument("--patch-size", type=int, metavar="N", help="crop to a multiple of N (default: 2)")
    prepare.add_argument(
        "--predict-range",
        type=int,
        metavar="N",
        help="steps from input to target, of which shards lose no pair (default: 1, or what SOURCE was prepared for)",
    )
    prepare.add_argument(
        "--shard-steps",
        type=int,
        metavar="N",
        help="longest shard (default: that gives up to 800 shards a part, of 20 times --predict-range pairs or more)",
    )
    prepare.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="make a multiple of N shards of each part, for ClimaX's own readers (default: 1)",
    )
    prepare.add_argument("--variables", nargs="+", metavar="NAME", help="what to take (default: all ClimaX knows)")
    prepare.add_argument("--levels", nargs="+", type=int, metavar="HPA", help="pressure levels (default: ClimaX's)")
    _add_source_options(prepare)
    prepare.add_argument("--regrid", metavar="DEGREES", help="to ClimaX's grid of 5.625, 2.8125 or 1.40625 degrees")
    prepare.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth time step (default: 1)")
    prepare.add_argument("--winds", choices=["grid", "earth"], help="along what winds go, where the source is silent")
    prepare.add_argument("--orography", metavar="NAME", help="the source's name of the orography")
    prepare.add_argument(
        "--sea-level-where-missing", action="store_true", help="make the orography 0 m where it is missing"
    )
    prepare.set_defaults(run=_prepare)

    forecast = commands.add_parser(
        "forecast",
        help="from a trained run and a file of states to a netCDF file of forecasts",
        description="Forecasts from states in SOURCE with a finished or running training, of either host. Statistics, "
        "variables, grid and lead time are the run's.",
    )
    forecast.add_argument("folder", type=_path, metavar="RUN", help="folder of a run of train or compare")
    forecast.add_argument("source", nargs="+", metavar="SOURCE", help="netCDF, GRIB or Zarr, as prepare takes it")
    forecast.add_argument("out", type=_path, metavar="OUT.nc", help="file to write")
    forecast.add_argument(
        "--start",
        nargs="+",
        default=["last"],
        metavar="DATE",
        help="forecast from all times in this year or date, or from one to another; last, or all, of the source "
        "(default: last)",
    )
    forecast.add_argument("--steps", type=int, default=1, metavar="N", help="forecasts fed back (default: 1)")
    forecast.add_argument(
        "--others",
        choices=["keep", "source"],
        help="inputs of further steps that are not forecast: as at the start, or read from SOURCE at each time",
    )
    forecast.add_argument(
        "--bias-scale", type=float, default=1.0, metavar="X", help="the bias times this; 0: without it (default: 1)"
    )
    forecast.add_argument(
        "--picture", type=_path, metavar="PATH", help="draw the last forecast and what the bias changed, as PNG and PDF"
    )
    forecast.add_argument("--variable", metavar="NAME", help="of the picture (default: the first that is forecast)")
    _add_source_options(forecast)
    _add_opening_options(forecast, "folder of statistics and coordinates")
    forecast.set_defaults(run=_forecast)

    compare = commands.add_parser(
        "compare",
        help="train biases beside none, with several seeds, and say what differs",
        description="Trains every variant of CONFIG with every seed, everything else equal, on ClimaX's architecture "
        "where ClimaX is found, else on the stand-in host; writes results.csv, differences.csv and report.md, and "
        "prints the report. The same command goes on where it was stopped; seeds and variants may be added.",
    )
    compare.add_argument(
        "config", type=_path, metavar="CONFIG", help="a YAML file, such as configs/compare/tracer.yaml"
    )
    compare.add_argument("--out", type=_path, metavar="DIR", help="run directory (default: the file's)")
    compare.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a GPU, or one on the CPU)")
    compare.add_argument("--seeds", nargs="+", type=int, metavar="N", help="in the place of the file's")
    compare.add_argument("--variants", nargs="+", metavar="NAME", help="only these, and the baseline")
    compare.set_defaults(run=_compare)

    plot = commands.add_parser("plot", help="draw a run or a comparison, as PNG and PDF")
    _add_kinds(plot.add_subparsers(dest="kind", required=True, metavar="KIND"))

    doctor = commands.add_parser(
        "doctor",
        help="print versions, what is installed, and what is wrong; or whether a run's bias is alive",
        description="Without RUN: versions, what is installed, and what is wrong. With RUN: whether the bias that was "
        "trained there is alive, and how the error changes with elevation zeroed or permuted, wind reversed, and the "
        "bias times 0, 0.5 and 2.",
    )
    doctor.add_argument("folder", nargs="?", type=_path, metavar="RUN", help="folder of a run of train or compare")
    _add_run_options(doctor)
    doctor.set_defaults(run=_doctor)
    return parser


def _add_kinds(kinds: Any) -> None:
    """One parser for each kind of picture."""
    helps = {
        "bias": "the bias seen from a place, on maps of the terrain",
        "attention": "a place's attention without and with the bias",
        "transect": "terrain, bias and attention along the line between two places",
        "errors": "where a run errs, over the terrain; with --against, where more or less than another run",
        "parameters": "alpha, beta and their gradients over training, as BiasMonitor recorded them",
        "forest": "the differences that compare found, with their intervals",
    }
    parsers = {name: kinds.add_parser(name, help=text, description=text) for name, text in helps.items()}
    for name, parser in parsers.items():
        what = "of a comparison, or its differences.csv" if name == "forest" else "of a run of train or compare"
        parser.add_argument("folder", type=_path, metavar="RUN", help=f"folder {what}")
        parser.add_argument("--out", type=_path, metavar="PATH", help=f"without suffix (default: {name})")
        parser.set_defaults(run=_plot)
    for name in ("bias", "attention", "transect"):
        parser = parsers[name]
        where = "of the place, degrees" + ("" if name == "transect" else " (default: the steepest rise)")
        for axis in ("lat", "lon"):
            parser.add_argument(f"--{axis}", type=float, required=name == "transect", metavar="DEGREES", help=where)
        parser.add_argument("--sample", type=int, default=0, metavar="N", help="number of the forecast (default: 0)")
        parser.add_argument("--block", type=int, metavar="N", help="which block (default: the first with a bias)")
        parser.add_argument("--head", type=int, metavar="N", help="which head (default: the mean of all)")
    for axis in ("lat", "lon"):
        parsers["transect"].add_argument(f"--to-{axis}", type=float, required=True, metavar="DEGREES", help="its end")
    parsers["errors"].add_argument(
        "--against", type=_path, metavar="RUN", help="folder of another run of the same data"
    )
    for name in ("bias", "attention", "transect", "errors"):
        _add_run_options(parsers[name])
    for name in ("errors", "forest"):
        parsers[name].add_argument("--variable", metavar="NAME", help="which variable")
    for option in ("part", "metric", "stratum"):
        parsers["forest"].add_argument(f"--{option}", metavar="NAME", help=f"which {option}")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", metavar="PART", help="of the data: val or test (default: val)")
    _add_opening_options(parser, "folder of shards")


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--units", nargs="+", metavar="NAME=UNIT", help="units that the source lacks or has wrong")
    parser.add_argument("--constants", metavar="FILE", help="a further file with orography and land-sea mask")
    parser.add_argument("--select", nargs="+", metavar="NAME=VALUE", help="of runs or members: step=6 number=0")


def _add_opening_options(parser: argparse.ArgumentParser, data: str) -> None:
    parser.add_argument("--checkpoint", type=_path, metavar="FILE", help="which (default: the only one, or last.ckpt)")
    parser.add_argument("--data", type=_path, metavar="ROOT", help=f"{data} (default: the run's)")
    parser.add_argument("--climax", type=_path, metavar="PATH", help="a checkout of ClimaX, for a run of ClimaX itself")


def _demo(options: argparse.Namespace, _: list[str]) -> None:
    name = DEMO_TASKS[options.task]
    show = getattr(importlib.import_module(f"climax_elevation.testbed.{name}"), name)
    bias = {} if options.bias is None else {"bias": options.bias}
    print(show(options.out, region=options.region, seed=options.seed, **bias))


def _train(options: argparse.Namespace, arguments: list[str]) -> None:
    # before torch is there: its store of processes warns with stack traces where one of them has ended
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from climax_elevation.train import train

    train(
        options.module,
        options.climax,
        arguments,
        pretrained_variables=options.pretrained_variables,
        plan=options.plan,
        reader=options.reader,
    )


def _patch(options: argparse.Namespace, _: list[str]) -> int:
    from climax_elevation.upstream import patching

    if options.action == "check":
        found = patching.check(options.path, options.series)
        print(found.sentence)
        return int(found.state in (patching.State.HALF, patching.State.MODIFIED))
    print(getattr(patching, options.action)(options.path, options.series))
    return 0


def _prepare(options: argparse.Namespace, _: list[str]) -> None:
    from climax_elevation.data.prepare import prepare

    given = {name: value for name, value in vars(options).items() if name not in ("command", "run", "units", "select")}
    units, select = _units_and_select(options)
    prepared = prepare(**given, units=units, select=select)
    height, width = prepared.shape
    print(
        f"{prepared.out}: {height} x {width} pixels, {', '.join(prepared.variables)}; "
        + ", ".join(
            f"{part} {steps} steps in {_shards(prepared.shards[part])}" for part, steps in prepared.steps.items()
        )
    )
    if prepared.commands:
        print("\n".join(["to train a small model, without the terrain bias and with it:", *prepared.commands]))


def _shards(count: int) -> str:
    return f"{count} shard{'s' if count != 1 else ''}"


def _compare(options: argparse.Namespace, _: list[str]) -> None:
    from climax_elevation.compare import compare

    done = compare(options.config, out=options.out, jobs=options.jobs, seeds=options.seeds, variants=options.variants)
    print(done.report)
    print(f"{done.out}: results.csv, differences.csv, report.md")


def _forecast(options: argparse.Namespace, _: list[str]) -> None:
    if options.variable is not None and options.picture is None:
        raise InputError("--variable says what --picture draws: give both")
    plots = None if options.picture is None else _plots()
    if options.picture is not None:
        _check_picture("--picture", options.picture, "forecast")
    from climax_elevation.forecast import forecast

    units, select = _units_and_select(options)
    done = forecast(
        options.folder,
        options.source,
        options.out,
        checkpoint=options.checkpoint,
        data=options.data,
        climax=options.climax,
        start=options.start,
        steps=options.steps,
        others=options.others,
        bias_scale=options.bias_scale,
        constants=options.constants,
        units=units,
        select=select,
        show=None if plots is None else options.variable or "",
    )
    print(done.path)
    if plots is not None:
        from climax_elevation.forecast.picture import picture

        for file in plots.save(picture(done), _without_suffix(options.picture)):
            print(file)


def _pairs(option: str, form: str, example: str, given: list[str] | None) -> dict[str, str]:
    pairs = dict(pair.partition("=")[::2] for pair in given or [])
    for name, value in pairs.items():
        if not value:
            raise InputError(f"--{option} takes {form}, such as {example}, not {name!r}")
    return pairs


def _units_and_select(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    return (
        _pairs("units", "NAME=UNIT", "orography=m", options.units),
        _pairs("select", "NAME=VALUE", "step=6", options.select),
    )


def _plot(options: argparse.Namespace, _: list[str]) -> None:
    plots = _plots()
    out = options.out or Path(options.kind)
    _check_picture("--out", out, options.kind)
    for file in plots.save(_figure(options), _without_suffix(out)):
        print(file)


def _check_picture(option: str, path: Path, name: str) -> None:
    from climax_elevation.files import check_folder

    if path.is_dir() and path != Path(name):
        raise InputError(f"{option} is a file's name without suffix, and {path} is a folder: write {path / name}")
    check_folder(f"the folder of {option}", path.parent)


def _plots() -> ModuleType:
    try:
        return importlib.import_module("climax_elevation.draw.plots")
    except ImportError as error:
        raise InputError(
            "pictures are drawn with matplotlib, which is not installed: pip install 'climax-elevation[plot]'"
        ) from error


def _without_suffix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".png", ".pdf") else path


def _figure(options: argparse.Namespace) -> Figure:
    from climax_elevation.draw import pictures

    if options.kind == "parameters":
        return pictures.parameters(options.folder)
    if options.kind == "forest":
        chosen = {name: getattr(options, name) for name in pictures.USUAL}
        return pictures.forest(options.folder, **chosen)
    with _opened(options, options.folder) as run:
        if options.kind == "errors":
            names = (options.folder.name, None if options.against is None else options.against.name)
            with nullcontext() if options.against is None else _opened(options, options.against) as other:
                return pictures.errors(run, other, part=_part(options), variable=options.variable, names=names)
        seen = {name: getattr(options, name) for name in ("sample", "block", "head")} | {"part": _part(options)}
        place = (options.lat, options.lon)
        if options.kind == "transect":
            return pictures.across(run, place, (options.to_lat, options.to_lon), **seen)
        if place.count(None) == 1:
            raise InputError("a place has a latitude and a longitude: give both --lat and --lon")
        draw = {"bias": pictures.bias, "attention": pictures.attention}[options.kind]
        return draw(run, None if None in place else place, **seen)


def _part(options: argparse.Namespace) -> str:
    return "val" if options.part is None else options.part


def _opened(options: argparse.Namespace, folder: Path) -> AbstractContextManager[Run]:
    from climax_elevation.diagnostics import open_run

    # a checkpoint is of one run
    checkpoint = options.checkpoint if folder == options.folder else None
    return open_run(folder, checkpoint=checkpoint, root_dir=options.data, climax=options.climax)


def _doctor(options: argparse.Namespace, _: list[str]) -> int:
    given = [name for name in RUN_OPTIONS if options.folder is None and getattr(options, name) is not None]
    if given:
        raise InputError(f"--{given[0]} is about a run: give RUN too, the folder of one of train or compare")
    if options.folder is not None:
        from climax_elevation.diagnostics import examine

        with _opened(options, options.folder) as run:
            print(examine(run, _part(options)))
        return 0
    from climax_elevation.doctor import doctor, render, status

    findings = doctor()
    print(render(findings))
    return status(findings)
