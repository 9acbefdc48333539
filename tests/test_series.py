"""The patches as a maintainer would take them: one by one, with ClimaX running after each, and by itself."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny_data
import torch
from test_patching import git
from test_upstream_yaml import FILES, climate_bench
from tiny_data import TARGETS, VARIABLES

from climax_elevation.upstream.patching import apply, revert
from climax_elevation.upstream.series import SERIES, read_patches

pytestmark = pytest.mark.slow  # each patch by git, ClimaX beside it

PATCHES = read_patches()
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("CLIMAX_SRC", "NODES")}
OTHERS = list(filter(None, [os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="module")
def clean(climax, tmp_path_factory):
    """A clean checkout of ClimaX, in a repository of its own."""
    if not (climax / "pyproject.toml").is_file():
        pytest.skip("this ClimaX is an installation, without what is around the package")
    folder = tmp_path_factory.mktemp("clean") / "ClimaX"
    shutil.copytree(climax, folder, ignore=shutil.ignore_patterns(".git", "__pycache__", "assets", "snakemake_configs"))
    revert(folder)
    git(folder, "init", "-q")
    commit(folder)
    return folder


@pytest.fixture
def checkout(clean, tmp_path):
    return Path(shutil.copytree(clean, tmp_path / "ClimaX"))


def commit(folder):
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "ClimaX")


def tree(folder):
    """What is in the working tree, by git's name for it."""
    git(folder, "add", "-A")
    return git(folder, "write-tree")


def take(folder, patches):
    """`git am` of each, as a maintainer does, and the tree after each."""
    trees = []
    for patch in patches:
        mail = folder.parent / "mail"
        mail.write_bytes(patch.content)
        git(folder, "am", "-q", str(mail))
        trees.append(git(folder, "rev-parse", "HEAD^{tree}"))
    return trees


@pytest.mark.parametrize("order", [("today",), ("terrain",), ("today", "terrain"), ("terrain", "today")])
def test_git_takes_what_patch_apply_applies(checkout, order):
    other = Path(shutil.copytree(checkout, checkout.parent / "other"))
    before = tree(other)
    for series in order:
        take(checkout, [patch for patch in PATCHES if patch.series == series])
        assert "patched" in apply(other, series)
    assert tree(other) == tree(checkout)
    for series in order:  # the first first: what comes off need not be what was last put on
        revert(other, series)
    assert tree(other) == before


def looked_at(names, folders, *options):
    """What each_stage.py says of each folder, by name."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("each_stage.py")), *options, *map(str, folders)],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))


def test_after_each_patch_climax_imports_and_its_tests_and_numbers_hold(checkout):
    """From unmodified ClimaX, which today does not import, to the last patch, with the plugin and without."""
    names = ["unmodified", *(patch.name for patch in PATCHES)]
    folders = [Path(shutil.copytree(checkout, checkout.parent / "0"))]
    for number, patch in enumerate(PATCHES, 1):
        take(checkout, [patch])
        folders.append(Path(shutil.copytree(checkout, checkout.parent / str(number))))
    on_top = sum(patch.series == "today" for patch in PATCHES) + 1
    bare = looked_at([*names[:on_top], "all"], [*folders[:on_top], folders[-1]], "--without-plugin")
    aware = looked_at(names[on_top:], folders[on_top:])

    before = bare.pop("unmodified")
    assert "climax.global_forecast.train" in before["missing"]
    if version("timm").startswith("0.6."):  # the last that has the names of its time
        assert before["status"] == pytest.ExitCode.TESTS_FAILED
    else:
        assert "climax.arch" in before["missing"]
        assert before["status"] == pytest.ExitCode.INTERRUPTED, "its tests cannot be collected"
    for number, (name, after) in enumerate((bare | aware).items(), 1):
        assert "climax.arch" not in after["missing"], name
        assert number < 2 or not after["missing"], f"{name}: {after['missing']}"
        if number >= 4:  # until then a model cannot be built
            assert after["off"] < 1e-6, name
        if number >= 5:  # whose subject is upstream's test
            assert after["status"] == 0, f"{name}: {after['ends']}"
    for stage, end in ((bare["all"], "SKIPPED"), (aware[names[-1]], "PASSED")):
        assert sum("test_flag_off" in line for line in stage["ends"]) == 3
        assert any("test_terrain.py" in line and line.startswith(end) for line in stage["ends"])
    assert sum("test_flag_on" in line for line in aware[names[-1]]["ends"]) == 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    climate_bench(
        folder / "bench", ("CO2", "SO2", "CH4", "BC"), {"train_val": ("ssp126", "ssp370"), "test": ("ssp245",)}
    )
    tiny_data.write(folder / "shards")
    return folder


@pytest.fixture(scope="module")
def today(clean, tmp_path_factory):
    folder = Path(shutil.copytree(clean, tmp_path_factory.mktemp("today") / "ClimaX"))
    apply(folder, "today")
    return folder


@pytest.fixture(scope="module")
def without_plugin(tmp_path_factory):
    """A folder that makes importing the plugin fail, as where it is not installed."""
    folder = tmp_path_factory.mktemp("hiding")
    (folder / "climax_elevation.py").write_text("raise ModuleNotFoundError('climax_elevation is not installed')\n")
    return folder


def overrides(module, root, out):
    """What a user of upstream's YAML writes on the command line: paths, device, sizes, and fewer variables."""
    trainer = ["accelerator=cpu", "devices=1", "precision=32", f"default_root_dir={out}", "max_epochs=1"]
    net, data = ["embed_dim=16", "depth=2", "num_heads=2"], ["batch_size=2"]
    model = []
    if module == "climate_projection":
        net += ["img_size=[16, 32]", "time_history=3"]
        model = ["pretrained_path="]
        data += [f"root_dir={root}", "list_train_simu=[ssp126, ssp370]", "history=3"]
    else:
        net += [f"default_vars={VARIABLES}", "img_size=[8, 16]"]
    if module == "pretrain":
        sources = {"root_dirs": root, "in_variables": VARIABLES, "max_predict_ranges": 3, "buffer_sizes": 5}
        data += [f"dict_{key}={{mpi-esm: {value}}}" for key, value in sources.items()]
    elif module != "climate_projection":
        data += [f"root_dir={root}", f"variables={VARIABLES}", f"out_variables={TARGETS}", "predict_range=2"]
    if module == "regional_forecast":
        data.append("region=Global")
    return [
        *(f"--trainer.{option}" for option in trainer),
        *(f"--model.net.init_args.{option}" for option in net),
        *(f"--model.{option}" for option in model),
        *(f"--data.{option}" for option in data),
    ]


def script(folder, module, out, data, *extra, path=()):
    """Upstream's own command, from its own YAML, with a user's overrides."""
    root = data / ("bench" if module == "climate_projection" else "shards")
    given = overrides(module, root, out)
    configs = ["--config", f"configs/{FILES[module]}.yaml"]
    return subprocess.run(
        [sys.executable, f"src/climax/{module}/train.py", *configs, *given, "--trainer.limit_train_batches=2", *extra],
        cwd=folder,
        # upstream's pretraining asks for the number of nodes, and its YAML for a place to write to
        env=ENVIRONMENT
        | {"OMP_NUM_THREADS": "1", "NODES": "1", "OUTPUT_DIR": str(out), "AMLT_OUTPUT_DIR": str(out)}
        | {"PYTHONPATH": os.pathsep.join(map(str, [*path, folder / "src", *OTHERS]))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_before_no_script_starts(clean, data, tmp_path, without_plugin):
    done = script(clean, "global_forecast", tmp_path, data, path=[without_plugin])
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("module", FILES)
def test_each_script_trains_from_its_own_yaml_without_the_plugin(today, data, tmp_path, without_plugin, module):
    for needed in ("torchvision", "tensorboard", "rich", *(["dask"] if module == "climate_projection" else [])):
        pytest.importorskip(needed)
    done = script(today, module, tmp_path, data, path=[without_plugin])
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=False)
    assert checkpoint["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    if module == "pretrain":  # the quickest
        last = next(tmp_path.rglob("last.ckpt"))
        done = script(
            today, module, tmp_path, data, "--trainer.max_epochs=2", f"--ckpt_path={last}", path=[without_plugin]
        )
        assert done.returncode == 0, done.stderr
        steps = {torch.load(file, weights_only=False)["global_step"] for file in tmp_path.rglob("last*.ckpt")}
        assert max(steps) == 4


def test_the_flag_trains_from_the_series_own_yaml(clean, data, tmp_path):
    """Without the launcher: the callback is named in configs/terrain.yaml."""
    for needed in ("torchvision", "tensorboard", "rich"):
        pytest.importorskip(needed)
    folder = Path(shutil.copytree(clean, tmp_path / "ClimaX"))
    apply(folder)
    done = script(folder, "global_forecast", tmp_path, data, "--config", "configs/terrain.yaml", "--model.lr=1")
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=False)
    state = checkpoint["state_dict"]
    assert checkpoint["global_step"] == 2
    assert state["net.terrain.elevation_std"].item() > 100  # metres
    assert state["net.blocks.0.attn.bias.elevation_alpha"].item() != 1


def test_checkpoints_with_more_than_weights_load(today, tmp_path):
    """As the pretrained ones are, which hold their run's hyperparameters."""
    program = """
import pathlib, sys, torch
from climax.arch import ClimaX
from climax.climate_projection.arch import ClimaXClimateBench
from climax.climate_projection.module import ClimateProjectionModule
from climax.global_forecast.module import GlobalForecastModule
from climax.regional_forecast.arch import RegionalClimaX
from climax.regional_forecast.module import RegionalForecastModule
sizes = dict(img_size=[8, 16], embed_dim=16, depth=1, num_heads=2)
for module, net in (
    (GlobalForecastModule, ClimaX(["a"], **sizes)),
    (RegionalForecastModule, RegionalClimaX(["a"], **sizes)),
    (ClimateProjectionModule, ClimaXClimateBench(["a"], "tas", **sizes)),
):
    saved = {f"net.{name}": value + 1 for name, value in net.state_dict().items()}
    torch.save({"state_dict": saved, "hyper_parameters": {"root_dir": pathlib.PurePosixPath("/d")}}, sys.argv[1])
    loaded = module(net, pretrained_path=sys.argv[1]).state_dict()
    assert torch.equal(loaded["net.blocks.0.attn.qkv.weight"], saved["net.blocks.0.attn.qkv.weight"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "old.ckpt")],
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(map(str, [today / "src", *OTHERS]))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_counts_files_and_lines_as_they_are():
    described = (Path(__file__).parents[1] / "patches" / "README.md").read_text()
    for patch in PATCHES:
        lines = [line for line in patch.content.decode().partition("\ndiff --git ")[2].splitlines() if line]
        added = sum(line[0] == "+" and not line.startswith("+++ ") for line in lines)
        removed = sum(line[0] == "-" and not line.startswith("--- ") for line in lines)
        name = Path(patch.name).stem
        assert f"| `{name}` | {len(patch.files)} | +{added} -{removed} |" in described


def test_a_series_has_each_name_once_in_order():
    for series in SERIES:
        numbers = [int(patch.name.split("/")[1][:4]) for patch in PATCHES if patch.series == series]
        assert numbers == list(range(1, len(numbers) + 1))
