"""Every configuration in configs/ trains: overlays on top of a run, and the document's run cut down to size."""

from pathlib import Path

import pytest
import tiny_data
import yaml
from test_launch import NAMES, TARGETS, check_run, forecasting

from climax_elevation import available_biases
from climax_elevation.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
OVERLAYS = sorted(path.stem for path in (CONFIGS / "bias").glob("*.yaml"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_data.write(tmp_path_factory.mktemp("shards"))


def read(path):
    return yaml.safe_load(path.read_text())


def test_every_bias_has_a_configuration():
    named = [read(CONFIGS / "bias" / f"{name}.yaml")["model"]["net"]["init_args"]["bias_type"] for name in OVERLAYS]
    assert {part for name in named for part in name.split("+")} == set(available_biases())


@pytest.mark.parametrize("host", ["stand-in", "ClimaX"])
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_trains_on_top_of_a_run(request, shards, tmp_path, caplog, name, host):
    climax = request.getfixturevalue("climax") if host == "ClimaX" else request.getfixturevalue("no_climax")
    if climax:
        pytest.importorskip("torchvision")
    file = CONFIGS / "bias" / f"{name}.yaml"
    with caplog.at_level("INFO", "climax_elevation"):
        train("global_forecast", climax, [*forecasting(shards, tmp_path), "--config", str(file)])
    check_run(tmp_path)
    assert f"terrain: bias {read(file)['model']['net']['init_args']['bias_type']} in blocks 0 of 2" in caplog.text


def test_the_documents_run_has_the_documents_numbers():
    run = read(CONFIGS / "config_elevation_corrected.yaml")
    net = run["model"]["net"]["init_args"]
    assert (net["use_physics_mask"], net["parallel_patch_embed"]) == (True, False)
    assert (run["trainer"]["devices"], run["trainer"]["num_nodes"]) == (8, 50)
    assert (run["trainer"]["max_steps"], run["data"]["batch_size"]) == (20000, 2)
    assert float(run["model"]["lr"]) == 1e-4
    assert net["img_size"] == [128, 256]
    assert (net["patch_size"], net["embed_dim"], net["depth"], net["num_heads"]) == (2, 768, 6, 8)


@pytest.mark.parametrize("host", ["stand-in", "ClimaX"])
def test_the_documents_run_trains_when_cut_down(request, shards, tmp_path, host):
    climax = request.getfixturevalue("climax") if host == "ClimaX" else request.getfixturevalue("no_climax")
    if climax:
        pytest.importorskip("torchvision")
    smaller = {
        "trainer": ["accelerator=cpu", "devices=1", "num_nodes=1", "strategy=auto", "precision=32", "max_epochs=1"],
        "model": ["warmup_epochs=1", "max_epochs=100"],
        "model.net.init_args": [f"default_vars={NAMES}", "img_size=[8, 16]", "embed_dim=16", "depth=2", "num_heads=2"],
        "data": [f"root_dir={shards}", f"variables={NAMES}", f"out_variables={TARGETS}", "predict_range=2"],
    }
    overrides = [f"--{place}.{setting}" for place, settings in smaller.items() for setting in settings]
    overrides += ["--data.num_workers=0", "--data.buffer_size=5", f"--trainer.default_root_dir={tmp_path}"]
    overrides += ["--trainer.logger.init_args.name=log", "--trainer.logger.init_args.version=0"]
    train("global_forecast", climax, ["--config", str(CONFIGS / "config_elevation_corrected.yaml"), *overrides])
    check_run(tmp_path)
