"""Every plausible mistake in a file or on a command line is one sentence: those of mistakes.txt, and generated ones."""

import copy
import os
import shlex
import shutil
from pathlib import Path

import pytest
import tiny_data
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from climax_elevation.cli import main

TABLE = Path(__file__).with_name("mistakes.txt")
NAMES, TARGETS = tiny_data.VARIABLES, tiny_data.TARGETS
RUN = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "limit_train_batches": 1,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": "out",
        "logger": {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "out"}},
        "callbacks": [{"class_path": "pytorch_lightning.callbacks.ModelCheckpoint"}],
    },
    "model": {
        "lr": 1e-2,
        "warmup_epochs": 1,
        "max_epochs": 100,
        "net": {
            "class_path": "climax.arch.ClimaX",
            "init_args": {
                "default_vars": NAMES,
                "img_size": [8, 16],
                "embed_dim": 16,
                "depth": 2,
                "num_heads": 2,
                "use_physics_mask": True,
                "bias_args": {"blocks": [0]},
            },
        },
    },
    "data": {
        "root_dir": "{shards}",
        "variables": NAMES,
        "out_variables": TARGETS,
        "predict_range": 2,
        "buffer_size": 5,
        "batch_size": 2,
        "num_workers": 0,
    },
}
COMPARISON = {
    "data": {"root_dir": "{shards}", "variables": NAMES, "out_variables": TARGETS[:1]},
    "variants": {"none": None, "physics": {"bias_type": "physics", "bias_args": {"blocks": "all"}}},
    "seeds": [0],
    "host": "stand-in",
    "accelerator": "cpu",
    "model": {"patch_size": 4, "embed_dim": 16, "depth": 1, "decoder_depth": 1, "num_heads": 2},
    "training": {"steps": 2, "batch_size": 2, "validations": 1},
}


def cases():
    """Number of the line, kind, status, input, and the words that the sentence has to have."""
    kind = None
    for number, line in enumerate(TABLE.read_text().splitlines(), 1):
        if line.startswith("["):
            kind = line.strip("[]")
        elif line and not line.startswith("#"):
            status, written, words = line.split(" | ")
            yield pytest.param(kind, status, written, words.split("; "), id=f"{number} {kind}: {written}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, a run, a folder and a file of other things, and a patched ClimaX where there is one to patch."""
    root = tmp_path_factory.mktemp("world")
    tiny_data.write(root / "shards")
    (root / "other").mkdir()
    (root / "other" / "thesis.txt").write_text("other data")
    (root / "empty").mkdir()
    (root / "file").write_text("a file")
    (root / "text.csv").write_text("a,b\n1,2\n")
    header = "step,block,parameter,head,quantity,value\n"
    (root / "bias.csv").write_text(f"{header}0,0,elevation_alpha,,value,much\n")
    (root / "comparison.yaml").write_text(filled(yaml.safe_dump(COMPARISON), root))
    checkout = os.environ.get("CLIMAX_SRC")
    if checkout:
        ignored = shutil.ignore_patterns(".git", "__pycache__")
        shutil.copytree(checkout, root / "ClimaX", ignore=ignored)
        assert main(["patch", "apply", str(root / "ClimaX")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CLIMAX_SRC", raising=False)
        patch.chdir(root)
        (root / "run.yaml").write_text(filled(yaml.safe_dump(RUN | {"seed_everything": 1}), root))
        assert main(["train", "global_forecast", "--", "--config", "run.yaml"]) == 0
    (root / "out").rename(root / "run")
    return root


def filled(text, world):
    """With the names of the world's places."""
    for name in ("shards", "other", "empty", "file", "run"):
        text = text.replace(f"{{{name}}}", str(world / name))
    return text.replace("{world}", str(world))


def changed(configuration, written, world):
    """A configuration with one key changed, as `key.of.it: value` says, as YAML."""
    key, _, value = written.partition(":")
    found = node = copy.deepcopy(configuration)
    *parts, last = key.split(".")
    for part in parts:
        node = node.setdefault(part, {})
    node[last] = yaml.safe_load(filled(value, world))
    return filled(yaml.safe_dump(found), world)


def command(kind, written, world, folder):
    """Arguments for a line of the table, and the file that they name."""
    train = ["train", "global_forecast"]
    if "ClimaX" in kind:
        train += ["--climax", str(world / "ClimaX")]
    if kind == "command":
        return shlex.split(filled(written, world))
    if kind == "file":
        (folder / "mistake.yaml").write_bytes(written.encode().decode("unicode_escape").encode("latin-1"))
        return [*train, "--", "--config", "mistake.yaml"]
    if kind == "compare":
        (folder / "mistake.yaml").write_text(changed(COMPARISON, written, world))
        return ["compare", "mistake.yaml"]
    if kind.startswith("yaml"):
        (folder / "mistake.yaml").write_text(changed(RUN, written, world))
        return [*train, "--", "--config", "mistake.yaml"]
    (folder / "run.yaml").write_text(filled(yaml.safe_dump(RUN), world))
    return [*train, "--", "--config", "run.yaml", *shlex.split(filled(written, world))]


def state(*folders):
    """All that lies there, and when files were written."""
    paths = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in paths}


def outcome(arguments):
    try:
        return main(arguments)
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "status", "written", "words"), cases())
def test_a_mistake_is_one_sentence(world, tmp_path, monkeypatch, capsys, kind, status, written, words):
    if "ClimaX" in kind and not (world / "ClimaX").is_dir():
        pytest.skip("needs microsoft/ClimaX: set CLIMAX_SRC to a checkout")
    for name in ("CLIMAX_SRC", "NOT_SET", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    arguments = command(kind, written, world, tmp_path)
    before = state(world, tmp_path)
    assert outcome(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    *_, sentence = said.splitlines()
    assert sentence.startswith("error: ")
    assert said.count("error: ") == 1
    assert [word for word in words if word not in sentence] == []
    if status == "2":
        assert state(world, tmp_path) == before
    else:  # a run that had begun, in its own folder
        assert status == "2, begun"
        assert {path for path in state(world) if path not in before} == set()


def test_there_are_enough():
    kinds = [case.values[0] for case in cases()]
    assert len(kinds) >= 300
    assert all(kinds.count(kind) >= 5 for kind in set(kinds))
    assert len({case.id.partition(" ")[2] for case in cases()}) == len(kinds)


# ---- generated ------------------------------------------------------------------------------------

WORDS = st.text("abcdefgh", min_size=1, max_size=8)
OTHERS = st.one_of(WORDS, st.lists(WORDS, max_size=2), st.dictionaries(WORDS, WORDS, max_size=2), st.none())
NO_COUNT = st.one_of(OTHERS, st.integers(max_value=0), st.floats(0.1, 0.9), st.booleans())
NO_SHARE = st.one_of(OTHERS, st.floats(max_value=-1e-9), st.floats(min_value=1), st.just(float("nan")), st.booleans())
NO_POSITIVE = st.one_of(OTHERS, st.floats(max_value=0), st.sampled_from([float("nan"), float("inf")]))
NO_FLAG = st.one_of(OTHERS.filter(lambda value: value is None or value), st.integers(2), st.floats(0.1, 0.9))
NO_NAMES = st.one_of(
    WORDS, st.just([]), st.just(["orography", "orography"]), st.integers(), st.lists(st.integers(), min_size=1)
)
NO_BLOCKS = st.one_of(
    WORDS, st.integers(), st.floats(0, 9), st.none(), st.lists(st.integers(2), max_size=2), st.just([0, 0])
)
WRONG = {
    "model.net.init_args": {
        **dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads"), NO_COUNT),
        **dict.fromkeys(("drop_rate", "drop_path"), NO_SHARE),
        **dict.fromkeys(("parallel_patch_embed", "use_physics_mask"), NO_FLAG),
        "mlp_ratio": NO_POSITIVE,
        "default_vars": NO_NAMES,
    },
    "model.net.init_args.bias_args": {
        **dict.fromkeys(("static_terrain", "terrain_is_flat", "wind"), NO_FLAG),
        "blocks": NO_BLOCKS,
        "height_scale_m": NO_POSITIVE,
        "direction": OTHERS,
        "patch_order": OTHERS,
        "control": OTHERS,
        "wind_variables": NO_NAMES,
    },
    "model": {**dict.fromkeys(("beta_1", "beta_2"), NO_SHARE), "lr": NO_POSITIVE},
    "data": {
        **dict.fromkeys(("batch_size", "predict_range", "hrs_each_step", "buffer_size"), NO_COUNT),
        "variables": NO_NAMES,
        "pin_memory": NO_FLAG,
    },
    "trainer": {"accumulate_grad_batches": NO_COUNT},
}
PLACES = [(f"{part}.{name}", values) for part, keys in WRONG.items() for name, values in keys.items()]
GENERATED = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    monkeypatch.delenv("CLIMAX_SRC", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@settings(GENERATED, max_examples=50)
@given(case=st.sampled_from(PLACES).flatmap(lambda place: st.tuples(st.just(place[0]), place[1])))
def test_what_a_setting_cannot_be_is_named(world, quiet, capsys, case):
    key, value = case
    (quiet / "mistake.yaml").write_text(changed(RUN, f"{key}: {yaml.safe_dump(value, default_flow_style=True)}", world))
    before = state(quiet)
    assert outcome(["train", "global_forecast", "--", "--config", "mistake.yaml"]) == 2
    *_, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert key.rpartition(".")[2] in sentence
    assert state(quiet) == before


TOKENS = [
    *("plot", "doctor", "patch", "bias", "attention", "transect", "errors", "parameters", "forest", "check", "revert"),
    *("{run}", "{shards}", "{file}", "{other}", "{world}", "absent", "", ".", "-1", "0", "3", "inf", "nan", "x", "--"),
    *("--lat", "--lon", "--to-lat", "--to-lon", "--part", "val", "bogus", "--head", "--block", "--sample", "--data"),
    *("--checkpoint", "--climax", "--against", "--variable", "--metric", "--series", "today", "--out"),
]


@pytest.mark.filterwarnings("ignore")
@settings(GENERATED, max_examples=100)
@given(
    command=st.sampled_from(["plot bias", "plot transect", "plot errors", "plot forest", "doctor", "patch", ""]),
    rest=st.lists(st.sampled_from(TOKENS), max_size=7),
)
def test_any_command_line_is_done_or_answered(world, quiet, capsys, command, rest):
    before = state(world)
    status = outcome([*command.split(), *(filled(token, world) for token in rest)])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert status in (0, 1, 2)  # 1: a doctor's or a check's finding
    if status == 2:
        assert said.splitlines()[-1].startswith("error: ")
    if "--out" not in rest:
        assert state(world) == before
