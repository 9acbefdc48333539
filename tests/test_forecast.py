"""Real training of the stand-in on small data: what is logged, optimised, scheduled, resumed and loaded."""

import importlib
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from reference.write_reference import fill

from climax_elevation import InputError
from climax_elevation.host import StandInClimaX, metrics
from climax_elevation.host.module import GlobalForecastModule, postfix, warmup_cosine
from climax_elevation.host.shards import GlobalForecastDataModule
from climax_elevation.pretrained import load_pretrained, stating
from climax_elevation.upstream import find_climax, overlay
from climax_elevation.upstream.overlay import importable

SIZES: dict[str, Any] = {"img_size": [8, 16], "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SCHEDULE: dict[str, Any] = {"lr": 3e-3, "warmup_epochs": 2, "max_epochs": 40}


@pytest.fixture(autouse=True)
def _seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # seed_everything leaves its seed in the environment, where other tests would find it
    monkeypatch.setitem(os.environ, "PL_GLOBAL_SEED", "0")
    monkeypatch.setitem(os.environ, "PL_SEED_WORKERS", "0")


def _net(**changes: Any) -> StandInClimaX:
    return StandInClimaX(tiny_data.VARIABLES, **SIZES | changes)


def _terrain_net(root: Path) -> StandInClimaX:
    return _net(use_physics_mask=True, bias_args={"stats_dir": str(root), "static_terrain": True})


def _data(root: Path, **changes: Any) -> GlobalForecastDataModule:
    settings: dict[str, Any] = {"buffer_size": 5, "out_variables": tiny_data.TARGETS, "predict_range": 1}
    return GlobalForecastDataModule(str(root), tiny_data.VARIABLES, batch_size=4, **settings | changes)


def _trainer(folder: Path, epochs: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=CSVLogger(str(folder)),
        callbacks=[ModelCheckpoint(monitor="val/w_rmse", save_last=True), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def _untrained(net: StandInClimaX, **changes: Any) -> GlobalForecastModule:
    return GlobalForecastModule(net, **SCHEDULE | changes)


class _Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def test_training_with_terrain_lowers_the_loss_and_moves_alpha(tmp_path: Path) -> None:
    root = tiny_data.write(tmp_path / "data")
    seed_everything(1)
    losses = _Losses()
    module = _untrained(_terrain_net(root), lr=1e-2)
    trainer = _trainer(tmp_path, 10, losses)
    trainer.fit(module, datamodule=_data(root))
    logged = {*trainer.logged_metrics, *trainer.callback_metrics}
    # 15 pairs in batches of 4, 10 times
    assert len(losses.values) == 40
    assert np.mean(losses.values[-4:]) < 0.7 * np.mean(losses.values[:4])
    state = module.net.state_dict()
    assert state["blocks.0.attn.bias.elevation_alpha"].item() != 1.0
    assert state["blocks.0.attn.bias.wind_beta"].item() != pytest.approx(0.3, abs=1e-6)

    (tested,) = trainer.test(module, datamodule=_data(root), ckpt_path="best", verbose=False)
    expected = {"train/loss", "train/2m_temperature", "train/10m_u_component_of_wind"}
    for part, names in (("val", logged), ("test", tested)):
        expected_scores = {f"{part}/{score}" for score in ("w_mse", "w_rmse", "acc")}
        expected_scores |= {
            f"{part}/{score}_{name}_1_hours" for score in ("w_mse", "w_rmse", "acc") for name in tiny_data.TARGETS
        }
        assert expected_scores <= set(names)
    assert expected <= logged


def test_scores_are_the_metrics_of_the_predictions(tmp_path: Path) -> None:
    """Four test pairs in one batch: what Lightning logs is what the functions say, in kelvin."""
    root = tiny_data.write(tmp_path / "data", test=(5,))
    data, module = _data(root), _untrained(_net())
    (tested,) = _trainer(tmp_path, 1).test(module, datamodule=data, verbose=False)
    x, y, lead_times, variables, targets = next(iter(data.test_dataloader()))
    module.eval()
    with torch.no_grad():
        _, predictions = module.net(x, y, lead_times, variables, targets, None, None)
    with np.load(root / "normalize_std.npz") as std:
        scale = torch.tensor([float(std[name][0]) for name in targets])[:, None, None]
    error = metrics.lat_weighted_rmse(
        predictions * scale, y * scale, lambda field: field, targets, tiny_data.LAT, data.test_clim, "1_hours"
    )
    for name in ("w_rmse", "w_rmse_2m_temperature_1_hours"):
        # denormalised first, by a mean near 290 K in float32
        assert tested[f"test/{name}"] == pytest.approx(error[name].item(), rel=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, workers: int) -> None:
    """Bit for bit, with dropout, stochastic depth and shuffling."""
    root = tiny_data.write(tmp_path / "data")

    def run(folder: str, epochs: int, checkpoint: Path | None) -> tuple[GlobalForecastModule, list[float]]:
        seed_everything(5)
        module, losses = _untrained(_terrain_net(root)), _Losses()
        data = _data(root, num_workers=workers)
        if checkpoint is not None:
            torch.rand(7)  # whatever a new process did before
        _trainer(tmp_path / folder, epochs, losses).fit(module, datamodule=data, ckpt_path=checkpoint)
        return module, losses.values

    whole, whole_losses = run("whole", 4, None)
    _, first_losses = run("half", 2, None)
    (last,) = (tmp_path / "half").glob("**/last.ckpt")
    resumed, second_losses = run("resumed", 4, last)
    assert first_losses + second_losses == whole_losses
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)


def test_dropout_differs_between_steps_and_follows_the_seed(tmp_path: Path) -> None:
    root = tiny_data.write(tmp_path / "data", train=(5,))
    runs = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        net = _net()
        fill(net)
        module, losses = _untrained(net, lr=1e-30, warmup_start_lr=1e-30, eta_min=0.0), _Losses()
        # one batch of all pairs an epoch, and no learning: only dropout tells epochs apart
        _trainer(tmp_path, 3, losses).fit(module, datamodule=_data(root))
        runs.append([round(loss, 4) for loss in losses.values])
    assert runs[0] == runs[1]
    assert len({*runs[0], *runs[2]}) == 6


TWO_PROCESSES = """
import sys
from pathlib import Path

import torch
from pytorch_lightning import Trainer, seed_everything
from test_forecast import _data, _Losses, _terrain_net, _untrained

root, out = Path(sys.argv[1]), Path(sys.argv[2])
seed_everything(3)
module, losses = _untrained(_terrain_net(root)), _Losses()
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, callbacks=[losses], logger=False,
                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(module, datamodule=_data(root, num_workers=1))
scores = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
torch.save((losses.values, module.state_dict(), scores), out / f"{trainer.global_rank}.pt")
"""


def test_two_processes_train_one_model_on_all_the_data(tmp_path: Path) -> None:
    root = tiny_data.write(tmp_path / "data")
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "run.py"), str(root), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (first, first_state, first_scores), (second, second_state, second_scores) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    # 15 pairs: 7 for each of the two, in batches of 4, twice
    assert len(first) == len(second) == 4
    assert not set(first) & set(second)
    for (name, one), other in zip(first_state.items(), second_state.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)
    assert first_scores == second_scores


def test_a_data_module_is_needed(tmp_path: Path) -> None:
    loader = _data(tiny_data.write(tmp_path / "data")).train_dataloader()
    with pytest.raises(InputError, match="data module"):
        _trainer(tmp_path, 1).fit(_untrained(_net()), loader)


def test_embeddings_and_terrain_are_not_decayed(tmp_path: Path) -> None:
    module = _untrained(_terrain_net(tiny_data.write(tmp_path)), weight_decay=0.1)
    optimizer = module.configure_optimizers()["optimizer"]
    decayed, kept = ({id(parameter) for parameter in group["params"]} for group in optimizer.param_groups)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {names[key] for key in kept} == {
        "net.var_embed",
        "net.pos_embed",
        "net.blocks.0.attn.bias.elevation_alpha",
        "net.blocks.0.attn.bias.wind_beta",
    }
    assert decayed | kept == set(names)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}


def _rates(make: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(()))]}], lr=0.4)
    schedule = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_schedule_by_hand() -> None:
    # from 0.1 to 0.4 in 4 steps, held once; then 0.2 + 0.2 * (1 + cos(pi k / 4)) / 2, and up again after step 8
    half = math.sqrt(0.5)
    expected = [0.1, 0.2, 0.3, 0.4, 0.4, 0.3 + 0.1 * half, 0.3, 0.3 - 0.1 * half, 0.2, 0.3 - 0.1 * half]
    assert _rates(lambda optimizer: warmup_cosine(optimizer, 4, 8, 0.1, 0.2), 10) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "arguments", [(4, 8, 0.1, 0.2), (0, 30, 1e-8, 1e-8), (1, 20, 0.0, 0.0), (100, 1000, 1e-8, 1e-6)]
)
def test_schedule_equals_upstreams(climax: Path, arguments: tuple[int, int, float, float]) -> None:
    with overlay(find_climax(climax), patched=False) as folder, importable(folder):
        upstream = importlib.import_module("climax.utils.lr_scheduler").LinearWarmupCosineAnnealingLR
    steps = 2 * arguments[1]
    theirs = _rates(lambda optimizer: upstream(optimizer, *arguments), steps)
    # theirs multiplies a factor a step, and its rounding grows
    assert _rates(lambda optimizer: warmup_cosine(optimizer, *arguments), steps) == pytest.approx(
        theirs, rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr is above 0"),
        ({"warmup_epochs": 40}, "from 0 to model.max_epochs"),
        ({"warmup_epochs": -1}, "-1"),
    ],
)
def test_wrong_settings_are_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _untrained(_net(), **changes)


def test_pretrained_weights_are_loaded_where_they_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From a run without terrain, fewer blocks and older names, into a model with terrain."""
    root = tiny_data.write(tmp_path / "data")
    saved = _untrained(_net(depth=1)).state_dict()
    weights = {key.replace("var_", "channel_"): value for key, value in saved.items()}
    weights |= {"net.head.4.bias": torch.zeros(3), "net.gone": torch.zeros(1)}
    torch.save({"state_dict": weights}, tmp_path / "old.ckpt")
    with caplog.at_level(logging.INFO), stating(tiny_data.VARIABLES):
        module = _untrained(_terrain_net(root), pretrained_path=str(tmp_path / "old.ckpt"))
    loaded = module.state_dict()
    same = {key for key in saved if torch.equal(saved[key], loaded[key])}
    assert {"net.var_embed", "net.var_query", "net.blocks.0.attn.qkv.weight", "net.head.4.weight"} <= same
    assert loaded["net.blocks.0.attn.bias.elevation_alpha"] == 1.0
    message = caplog.text
    missing, unexpected = message[message.index("missing") :].split("unexpected")
    for name in ("net.blocks.0.attn.bias.elevation_alpha", "net.blocks.1.norm1.weight", "net.head.4.bias"):
        assert name in missing
    assert "net.gone" in unexpected
    assert "net.head.4.bias" in unexpected


def test_lightnings_own_checkpoints_are_pretrained_weights(tmp_path: Path) -> None:
    root = tiny_data.write(tmp_path / "data", train=(5,))
    trained = _untrained(_net())
    _trainer(tmp_path, 1).fit(trained, datamodule=_data(root))
    (last,) = tmp_path.glob("**/last.ckpt")
    with stating(tiny_data.VARIABLES):  # without TerrainCallback a checkpoint does not say
        fresh = _untrained(_net(), pretrained_path=str(last))
    for name, value in trained.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_useless_pretrained_files_are_said(tmp_path: Path) -> None:
    torch.save({"state_dict": {"other": torch.zeros(1)}}, tmp_path / "other.ckpt")
    torch.save({"weights": {}}, tmp_path / "none.ckpt")
    torch.save({"state_dict": {}, "path": tmp_path}, tmp_path / "object.ckpt")
    (tmp_path / "text.ckpt").write_text("weights")
    messages = {
        "other": "no weight",
        "none": "no state_dict",
        "absent": "does not exist",
        "object": "tensors alone",
        "text": "is no checkpoint, by its first bytes",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            load_pretrained(_untrained(_net()), str(tmp_path / f"{name}.ckpt"))


def test_pretrained_terrain_of_other_units_is_refused(tmp_path: Path) -> None:
    root = tiny_data.write(tmp_path / "data")
    saved = _untrained(_terrain_net(root)).state_dict()
    saved["net.terrain.elevation_std"] = torch.tensor(1.0)
    torch.save({"state_dict": saved}, tmp_path / "other.ckpt")
    disagreeing = pytest.raises(InputError, match=r"terrain.elevation_std from stats_dir .* disagree")
    with disagreeing, stating(tiny_data.VARIABLES):
        _untrained(_terrain_net(root), pretrained_path=str(tmp_path / "other.ckpt"))


def test_the_command_line_can_name_the_network() -> None:
    parser = ArgumentParser(parser_mode="omegaconf", exit_on_error=False)
    parser.add_class_arguments(GlobalForecastModule, "model")
    flags = ["--model.net=climax_elevation.host.StandInClimaX", "--model.net.default_vars=[a, b]"]
    flags += [f"--model.net.{name}={value}" for name, value in SIZES.items()]
    flags += ["--model.net.use_physics_mask=true", "--model.net.bias_args={elevation_variable: a, wind: false}"]
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name before 4.49
    module = instantiate(parser.parse_args(flags)).model
    assert module.net.terrain.elevation_variable == "a"
    assert module.net.img_size == SIZES["img_size"]


@pytest.mark.parametrize(
    ("hours", "name"), [(6, "6_hours"), (24, "1_days"), (72, "3_days"), (36, "36_hours"), (730, "730_hours")]
)
def test_names_of_metrics_say_the_lead_time(hours: int, name: str) -> None:
    assert postfix(hours) == name


def test_a_logged_name_says_the_lead_time_of_its_data(tmp_path: Path) -> None:
    root = tiny_data.write(tmp_path / "data")
    module = _untrained(_net())
    (tested,) = _trainer(tmp_path, 1).test(module, datamodule=_data(root, hrs_each_step=6), verbose=False)
    assert "test/w_rmse_2m_temperature_6_hours" in tested
