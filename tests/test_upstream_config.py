"""Configurations of Lightning 1.8: what had no effect goes, what had one is refused with what to write."""

import logging

import pytest
from omegaconf import OmegaConf
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser

from climax_elevation.errors import InputError
from climax_elevation.upstream.config import CALLBACK, RETIRED, STAND_IN_CLASS, modernize

ADDED = f"--trainer.callbacks+={CALLBACK}"


def write(path, text):
    path.write_text(text)
    return path


def configuration(arguments):
    """The YAML file that the arguments name."""
    return OmegaConf.to_container(OmegaConf.load(arguments[arguments.index("--config") + 1]), resolve=False)


@pytest.mark.parametrize(
    "name", ["global_forecast_climax", "regional_forecast_climax", "climate_projection", "pretrain_climax"]
)
def test_upstreams_own_files(climax, tmp_path, name):
    file = climax / "configs" / f"{name}.yaml"
    if not file.is_file():
        pytest.skip("this ClimaX is an installation, without upstream's configs")
    text = file.read_text()
    done = modernize(["--config", str(file)], tmp_path)
    before, after = OmegaConf.to_container(OmegaConf.load(file)), configuration(done.arguments)
    for key in ("gpus", "resume_from_checkpoint"):
        assert before["trainer"].pop(key, "absent") is None
    # the rest says what it said: interpolations as they are written, 5e-4 a number
    assert after == OmegaConf.to_container(OmegaConf.create(before), resolve=False) | {"trainer": after["trainer"]}
    assert after["trainer"].keys() == before["trainer"].keys()
    assert after["trainer"]["default_root_dir"].startswith("${oc.env:")
    assert after["trainer"]["logger"]["init_args"]["save_dir"] == "${trainer.default_root_dir}/logs"
    assert after["model"]["lr"] == 5e-4
    assert file.read_text() == text
    assert done.resume is None
    assert done.arguments[-1] == ADDED


def test_a_file_without_retired_keys_is_passed_as_it_is(tmp_path):
    file = write(tmp_path / "new.yaml", "trainer: {max_epochs: 3}\nmodel: {lr: 5e-4}\n")
    assert modernize(["-c", str(file), "--model.lr=1"], tmp_path).arguments == ["-c", str(file), "--model.lr=1", ADDED]
    assert modernize([f"--config={file}"], tmp_path).arguments == [f"--config={file}", ADDED]


@pytest.mark.parametrize("key", RETIRED)
def test_retired_keys_are_retired(key):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(Trainer, "trainer")
    assert f"trainer.{key}" not in parser.get_defaults()


@pytest.mark.parametrize(
    ("key", "value"), [(key, None) for key in RETIRED] + [(k, v.idle[0]) for k, v in RETIRED.items() if v.idle]
)
@pytest.mark.parametrize("way", ["yaml", "=", " "])
def test_a_value_without_effect_is_dropped_and_told(tmp_path, caplog, key, value, way):
    written = OmegaConf.to_yaml({"trainer": {key: value, "max_epochs": 2}})
    plain = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    arguments = {
        "yaml": ["--config", str(write(tmp_path / "old.yaml", written))],
        "=": [f"--trainer.{key}={plain}", "--model.lr=1"],
        " ": [f"--trainer.{key}", plain, "--model.lr=1"],
    }[way]
    with caplog.at_level(logging.INFO):
        done = modernize(arguments, tmp_path)
    if way == "yaml":
        assert configuration(done.arguments) == {"trainer": {"max_epochs": 2}}
    else:
        assert done.arguments == ["--model.lr=1", ADDED]
    assert key in caplog.text
    assert "left out" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("gpus", "2", r"trainer\.accelerator: gpu and trainer\.devices: 2"),
        ("gpus", "-1", r"trainer\.devices: -1"),
        ("gpus", "0", r"trainer\.accelerator: cpu"),
        ("gpus", "[0, 1]", r"trainer\.devices: \[0, 1\]"),
        ("num_processes", "2", r"trainer\.accelerator: cpu and trainer\.devices: 2"),
        ("replace_sampler_ddp", "false", r"trainer\.use_distributed_sampler: false"),
        ("track_grad_norm", "2", "callback"),
        ("auto_lr_find", "true", r"model\.lr"),
        ("weights_save_path", "/x", "dirpath: /x"),
        ("ipus", "${oc.env:N,2}", "IPUs"),
    ],
)
@pytest.mark.parametrize("way", ["yaml", "=", " "])
def test_a_value_with_effect_is_refused_with_what_to_write(tmp_path, key, value, instead, way):
    arguments = {
        "yaml": [
            "--config",
            str(write(tmp_path / "old.yaml", f"trainer: {{{key}: '{value}'}}".replace("'[", "[").replace("]'", "]"))),
        ],
        "=": [f"--trainer.{key}={value}"],
        " ": [f"--trainer.{key}", value],
    }[way]
    with pytest.raises(InputError, match=instead) as error:
        modernize(arguments, tmp_path)
    assert key in str(error.value)
    if way == "yaml":
        assert "old.yaml" in str(error.value)


def test_a_retired_key_without_value(tmp_path):
    with pytest.raises(InputError, match="leave it out"):
        modernize(["--trainer.gpus", "--model.lr=1"], tmp_path)


def test_the_last_checkpoint_named_is_resumed_from(tmp_path):
    file = write(
        tmp_path / "old.yaml", "trainer: {default_root_dir: /a, resume_from_checkpoint: '${.default_root_dir}/x'}"
    )
    config = ["--config", str(file)]
    assert modernize(config, tmp_path).resume == "${.default_root_dir}/x"
    assert modernize([*config, "--trainer.resume_from_checkpoint", "y.ckpt"], tmp_path).resume == "y.ckpt"
    assert modernize([*config, "--trainer.resume_from_checkpoint=null"], tmp_path).resume is None
    assert configuration(modernize(config, tmp_path).arguments) == {"trainer": {"default_root_dir": "/a"}}


def test_several_files_do_not_overwrite_each_other(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first = write(tmp_path / "a" / "same.yaml", "trainer: {gpus: null, max_epochs: 1}")
    second = write(tmp_path / "b" / "same.yaml", "trainer: {gpus: null, max_epochs: 2}")
    done = modernize(["--config", str(first), "--config", str(second)], tmp_path)
    assert [OmegaConf.load(done.arguments[i]).trainer.max_epochs for i in (1, 3)] == [1, 2]


def test_a_part_in_a_file_of_its_own_is_still_found(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write(source / "data.yaml", "root_dir: /d")
    file = write(source / "all.yaml", "trainer: {gpus: null}\ndata: data.yaml\n")
    assert configuration(modernize(["--config", str(file)], tmp_path).arguments)["data"] == str(source / "data.yaml")


def test_the_callback_is_added_once(tmp_path):
    named = write(tmp_path / "named.yaml", f"trainer: {{callbacks: [{{class_path: {CALLBACK}}}]}}")
    comment = write(tmp_path / "comment.yaml", f"trainer: {{max_epochs: 1}}  # no {CALLBACK}")
    assert modernize(["--config", str(named)], tmp_path).arguments == ["--config", str(named)]
    assert modernize([ADDED], tmp_path).arguments == [ADDED]
    assert modernize(["--config", str(comment)], tmp_path).arguments == ["--config", str(comment), ADDED]


def test_the_stand_in_takes_climax_place_where_asked(tmp_path, caplog):
    file = write(tmp_path / "net.yaml", "model: {lr: 1, net: {class_path: climax.arch.ClimaX, init_args: {depth: 2}}}")
    arguments = [
        "--config",
        str(file),
        "--model.net=climax.arch.ClimaX",
        "--model.net.class_path",
        "climax.arch.ClimaX",
    ]
    assert modernize(arguments, tmp_path).arguments[:-1] == arguments
    with caplog.at_level(logging.INFO):
        done = modernize(arguments, tmp_path, stand_in=True)
    assert configuration(done.arguments)["model"] == {
        "lr": 1,
        "net": {"class_path": STAND_IN_CLASS, "init_args": {"depth": 2}},
    }
    assert done.arguments[2:5] == [f"--model.net={STAND_IN_CLASS}", "--model.net.class_path", STAND_IN_CLASS]
    assert caplog.text.count("stand-in host") == 3


@pytest.mark.parametrize(
    ("text", "sentence"), [(None, "does not exist"), ("a: [", "is not YAML"), ("- a\n- b\n", "holds no configuration")]
)
def test_files_that_are_no_configuration(tmp_path, text, sentence):
    file = tmp_path / "bad.yaml"
    if text is not None:
        write(file, text)
    with pytest.raises(InputError, match=sentence):
        modernize(["--config", str(file)], tmp_path)


def test_everything_else_is_passed_on_as_written(tmp_path):
    arguments = [
        "--print_config",
        "--trainer.callbacks+=A",
        "--trainer.max_epochs",
        "2",
        "--data.x=a=b",
        "--seed_everything",
        "-1",
        "word",
    ]
    assert modernize(arguments, tmp_path).arguments == [*arguments, ADDED]
