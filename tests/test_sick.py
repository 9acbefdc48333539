"""A run whose numbers are not finite ends with a sentence, and keeps its last good checkpoint; both hosts."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_data
import torch
from test_launch import ON, forecasting, launched

from climax_elevation import watch
from climax_elevation.checkpoints import not_finite, read_checkpoint
from climax_elevation.errors import InputError, SickRun
from climax_elevation.health import StopNotFinite
from climax_elevation.host.module import GlobalForecastModule
from climax_elevation.train import train
from climax_elevation.upstream.settings import check_settings


def spoil(path, variable, value, step=2):
    """One pixel of a shard."""
    arrays = dict(np.load(path))
    arrays[variable] = arrays[variable].copy()
    arrays[variable][step, 0, 2, 5] = value
    np.savez(path, **arrays)


def run(host, root, out, *more, epochs=1):
    train("global_forecast", host, [*forecasting(root, out, epochs=epochs), *more])


@pytest.mark.parametrize(
    ("shard", "variable", "value", "on"),
    [
        ("train/1", "2m_temperature", np.nan, False),
        ("train/2", "10m_v_component_of_wind", np.inf, False),
        ("train/2", "10m_u_component_of_wind", np.nan, True),
        ("train/1", "orography", np.nan, True),
        ("val/0", "2m_temperature", -np.inf, False),
        ("test/0", "2m_temperature", np.nan, False),
    ],
)
def test_a_value_in_one_shard(host, tmp_path, shard, variable, value, on):
    root = tiny_data.write(tmp_path / "shards")
    spoil(root / f"{shard}.npz", variable, value)
    with pytest.raises(SickRun) as error:
        run(host, root, tmp_path / "out", *([ON] if on else []))
    sentence = str(error.value)
    assert f"{variable!r} of {root} has values that are not finite" in sentence
    assert f"{root / shard}.npz has the first, {variable!r} at time step 2" in sentence
    assert "step " in sentence
    assert "allow_nan: true" in sentence
    assert "\n" not in sentence
    if shard.startswith("test"):  # trained, and its checkpoints are good
        last = next((tmp_path / "out").rglob("last.ckpt"))
        assert str(last.parent) in sentence
        assert not_finite(read_checkpoint(last)["state_dict"].items()) is None


def test_a_run_that_explodes_keeps_its_last_good_checkpoint(host, tmp_path):
    """A learning rate that is finite, and in its second step too large for any weight."""
    root, out = tiny_data.write(tmp_path / "shards"), tmp_path / "out"
    keep = ["pytorch_lightning.callbacks.ModelCheckpoint", *("--trainer.callbacks.every_n_train_steps=1",)]
    more = ["--model.lr=1e30", "--model.warmup_epochs=3", f"--trainer.callbacks+={keep[0]}", keep[1]]
    with pytest.raises(SickRun, match=r"(loss is|weights have).* step \d+.*lower model.lr") as error:
        run(host, root, out, *more, epochs=3)
    kept = list(out.rglob("*.ckpt"))
    assert any(f"the last checkpoint is {path}" in str(error.value) for path in kept)
    for path in kept:
        assert not_finite(read_checkpoint(path)["state_dict"].items()) is None, path


def test_it_goes_on_where_that_is_wanted(host, tmp_path):
    root, out = tiny_data.write(tmp_path / "shards"), tmp_path / "out"
    spoil(root / "train/1.npz", "2m_temperature", np.nan)
    run(host, root, out, "--allow_nan=true")
    last = next(out.rglob("last.ckpt"))
    assert not_finite(read_checkpoint(last)["state_dict"].items()) is not None
    assert "allow_nan: true" in next(out.rglob("config.yaml")).read_text()


@pytest.mark.parametrize("name", ["normalize_mean.npz", "normalize_std.npz"])
@pytest.mark.parametrize("value", [0.0, -2.0, np.nan, np.inf])
def test_statistics(host, tmp_path, name, value):
    root = tiny_data.write(tmp_path / "shards")
    found = dict(np.load(root / name))
    found["2m_temperature"] = np.full_like(found["2m_temperature"], value)
    np.savez(root / name, **found)
    if "mean" in name and math.isfinite(value):
        return  # a temperature in degrees Celsius may have such a mean
    with pytest.raises(InputError, match="2m_temperature") as error:
        run(host, root, tmp_path / "out")
    assert not isinstance(error.value, SickRun)
    assert not list((tmp_path / "out").rglob("*.ckpt"))


@pytest.mark.parametrize("part", ["val", "test"])
def test_climatologies(host, tmp_path, part):
    root = tiny_data.write(tmp_path / "shards")
    path = root / part / "climatology.npz"
    found = dict(np.load(path))
    found["2m_temperature"][0, 2, 5] = np.nan
    np.savez(path, **found)
    with pytest.raises(InputError, match=f"{part}/climatology.npz has values .* not finite"):
        run(host, root, tmp_path / "out")


REFUSED = [
    ("lr", [0.0, -1.0, math.inf, math.nan]),
    ("weight_decay", [-1.0, math.inf, math.nan]),
    ("warmup_start_lr", [-1.0, math.inf, math.nan]),
    ("eta_min", [-1.0, math.inf, math.nan]),
    ("drop_path", [-0.1, 1.0, math.nan]),
    ("drop_rate", [-0.1, 1.5, math.inf]),
]


REST = {"trainer": {"max_epochs": 1}, "data": {}}


def with_net(model):
    """The part `model` of a configuration, whose network, if it has one, is ClimaX."""
    return {**model, "net": {"class_path": "climax.arch.ClimaX", **model["net"]}} if "net" in model else model


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED for value in values])
def test_settings_are_refused(name, value):
    model = {name: value} if not name.startswith("drop") else {"net": {"init_args": {name: value}}}
    with pytest.raises(InputError, match=f"{name} is .* not {value}"):
        check_settings(REST | {"model": with_net(model)})
    if not name.startswith("drop"):
        with pytest.raises(InputError, match=f"model.{name} is"):
            GlobalForecastModule(torch.nn.Linear(1, 1), **{name: value})


def test_settings_that_are_usual_are_not():
    usual = {"lr": 5e-4, "weight_decay": 0.0, "eta_min": 0, "net": {"init_args": {"drop_path": 0.1}}}
    check_settings(REST | {"model": with_net(usual)})
    check_settings(REST | {"model": {"net": None}})
    check_settings(REST | {"model": {"net": "climax.arch.ClimaX"}})


@pytest.mark.parametrize(
    "setting", ["model.lr=.inf", "model.weight_decay=-1", "model.eta_min=.nan", "model.net.init_args.drop_path=-0.1"]
)
def test_settings_are_refused_before_anything_begins(host, tmp_path, setting):
    root = tiny_data.write(tmp_path / "shards")
    name = setting.partition("=")[0]
    with pytest.raises(InputError, match=f"{name} is"):
        run(host, root, tmp_path / "out", f"--{setting}")
    assert not (tmp_path / "out").exists()


def test_pretrained_weights(host, tmp_path):
    root, out = tiny_data.write(tmp_path / "shards"), tmp_path / "out"
    run(host, root, out)
    whole = next(out.rglob("last.ckpt"))
    saved = torch.load(whole, weights_only=True)
    saved["state_dict"]["net.norm.bias"][3] = math.nan
    torch.save(saved, tmp_path / "nan.ckpt")
    (tmp_path / "short.ckpt").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("weights\n")
    torch.save([1], tmp_path / "list.ckpt")
    for name, sentence in (
        ("nan", "has weights that are not finite, the first of them net.norm.bias"),
        ("short", "is cut short, after"),
        ("empty", "is empty"),
        ("text", "is no checkpoint"),
        ("list", "is not a Lightning checkpoint"),
        ("absent", "does not exist"),
    ):
        path = tmp_path / f"{name}.ckpt"
        for given in (f"--model.pretrained_path={path}", f"--ckpt_path={path}"):
            with pytest.raises(InputError, match=sentence) as error:
                run(host, root, tmp_path / "again", given, epochs=2)
            assert f"{name}.ckpt" in str(error.value)
            assert "\n" not in str(error.value)


def test_nothing_waits_for_a_device(monkeypatch):
    """What is judged is sent, and not looked at, until it has arrived."""
    sent, arrived = [], []
    monkeypatch.setattr(watch, "_on_host", lambda numbers: False)
    monkeypatch.setattr(
        watch, "_sent", lambda numbers: (sent.append(numbers) or numbers.clone(), lambda: bool(arrived))
    )
    looked = lambda *_: pytest.fail("a number was looked at")  # noqa: E731
    trainer = SimpleNamespace(
        global_step=5, current_epoch=1, fit_loop=SimpleNamespace(batch_idx=2), checkpoint_callbacks=[]
    )
    trainer.datamodule, trainer.lightning_module = None, torch.nn.Linear(1, 1)
    callback = StopNotFinite()
    callback.setup(trainer, trainer.lightning_module, "fit")
    x, y = torch.ones(2, 4, 8, 16), torch.ones(2, 2, 8, 16)
    y[1, 1, 3, 4] = math.inf
    with monkeypatch.context() as looking:
        for name in ("item", "tolist", "__bool__", "__float__", "numpy", "cpu"):
            looking.setattr(torch.Tensor, name, looked)
        batch = (x, y, torch.ones(2), tiny_data.VARIABLES, tiny_data.TARGETS)
        callback.on_train_batch_start(trainer, trainer.lightning_module, batch, 2)
        callback.on_before_backward(trainer, trainer.lightning_module, torch.tensor(math.inf))
    assert [len(numbers) for numbers in sent] == [6, 1]
    arrived.append(True)
    with pytest.raises(SickRun, match=r"'10m_u_component_of_wind' of the data has .* in step 5 \(epoch 1, batch 2\)"):
        callback.on_train_batch_start(trainer, trainer.lightning_module, (x, x, None, [*"abcd"], [*"abcd"]), 3)


def test_no_checkpoint_is_written_before_all_has_been_judged(no_climax, tmp_path, monkeypatch):
    """As on a device where nothing arrives unless it is waited for."""
    monkeypatch.setattr(watch, "_on_host", lambda numbers: False)
    monkeypatch.setattr(watch, "_sent", lambda numbers: (numbers.clone(), lambda: False))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    root, out = tiny_data.write(tmp_path / "shards"), tmp_path / "out"
    spoil(root / "train/1.npz", "2m_temperature", np.nan)
    keep = "pytorch_lightning.callbacks.ModelCheckpoint"
    with pytest.raises(SickRun, match="'2m_temperature' of"):
        run(None, root, out, f"--trainer.callbacks+={keep}", "--trainer.callbacks.every_n_train_steps=1")
    for path in out.rglob("*.ckpt"):
        assert not_finite(read_checkpoint(path)["state_dict"].items()) is None, path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_damaged_is_a_sentence_from_a_worker_too(no_climax, tmp_path, workers):
    root = tiny_data.write(tmp_path / "shards")
    path = root / "train" / "1.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"^[^\n]*1.npz is damaged \(Bad CRC-32[^\n]*$"):
        run(None, root, tmp_path / "out", f"--data.num_workers={workers}")


def test_the_command_line_ends_with_status_1(no_climax, tmp_path):
    root = tiny_data.write(tmp_path / "shards")
    spoil(root / "train/1.npz", "2m_temperature", np.nan)
    done = launched("global_forecast", "--", *forecasting(root, tmp_path / "out"), "--data.num_workers=1")
    assert done.returncode == 1
    assert done.stderr.count("error: '2m_temperature' of") == 1
    assert "Traceback" not in done.stderr
