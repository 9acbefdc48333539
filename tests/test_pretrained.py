"""Pretrained weights go where they belong by name: a model of some of the variables forecasts as the whole one did."""

import shutil

import pytest
import tiny_data
import torch
from test_launch import forecasting
from torch import nn
from torch.nn.functional import interpolate

from climax_elevation import InputError
from climax_elevation.cli import main
from climax_elevation.host import StandInClimaX
from climax_elevation.pretrained import CLIMAX_VARIABLES, DESCRIPTION, describe, load_pretrained, stating
from climax_elevation.train import train
from climax_elevation.upstream import find_climax, overlay
from climax_elevation.upstream.overlay import importable

SIZES = {"img_size": [8, 16], "patch_size": 2, "embed_dim": 16, "depth": 1, "decoder_depth": 1, "num_heads": 2}
OWN = ["2m_temperature", "10m_v_component_of_wind", "temperature_850"]


class Module(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


def model(variables, seed=0, **changes):
    """With weights that are all different, and of a size that shows."""
    torch.manual_seed(seed)
    module = Module(StandInClimaX(variables, **SIZES | changes))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


def saved(module, path, **further):
    torch.save({"state_dict": module.state_dict(), **further}, path)
    return str(path)


def predicted(module, x, variables):
    with torch.no_grad():
        return module.net(x, None, torch.full((len(x),), 0.06), variables, variables, None, None)[1]


@pytest.fixture
def climaxs(tmp_path):
    """A model of ClimaX's 48 variables, and its checkpoint, which says nothing."""
    module = model(CLIMAX_VARIABLES)
    return module, saved(module, tmp_path / "climax.ckpt")


def test_climaxs_variables_are_those_of_its_configurations(climax):
    from omegaconf import OmegaConf

    folder = next(parent for parent in (climax, *climax.parents) if (parent / "configs").is_dir())
    config = OmegaConf.load(folder / "configs" / "global_forecast_climax.yaml")
    assert tuple(config.model.net.init_args.default_vars) == CLIMAX_VARIABLES


@pytest.mark.parametrize("own_kind", [False, True])
@pytest.mark.parametrize("kind", [False, True])
def test_some_of_the_variables_forecast_as_all_did(tmp_path, kind, own_kind):
    whole = model(CLIMAX_VARIABLES, parallel_patch_embed=kind)
    module = model(OWN, seed=1, parallel_patch_embed=own_kind)
    x = torch.randn(2, len(OWN), 8, 16)
    assert not torch.allclose(predicted(module, x, OWN), predicted(whole, x, OWN), atol=0.1)
    load_pretrained(module, saved(whole, tmp_path / "whole.ckpt"))
    torch.testing.assert_close(predicted(module, x, OWN), predicted(whole, x, OWN), rtol=1e-5, atol=1e-5)


def test_what_was_done_is_said_and_new_variables_start_afresh(climaxs, caplog):
    whole, path = climaxs
    names = ["snow_depth", "2m_temperature"]
    module = model(names, seed=1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with caplog.at_level("INFO", "climax_elevation"):
        load_pretrained(module, path)
    assert "taken to have ClimaX's 48 variables" in caplog.text
    assert "weights by name: 2m_temperature\n" in caplog.text
    assert "which start afresh: snow_depth\n" in caplog.text
    assert "left out: land_sea_mask, orography, lattitude, 10m_u" in caplog.text
    missing = ", ".join(f"net.token_embeds.0.proj.{kind}" for kind in ("weight", "bias"))
    assert f"missing: {missing}; unexpected or of another shape: none" in caplog.text
    after, theirs = module.state_dict(), whole.state_dict()
    for kind in ("weight", "bias"):
        assert torch.equal(after[f"net.token_embeds.0.proj.{kind}"], before[f"net.token_embeds.0.proj.{kind}"])
        assert torch.equal(after[f"net.token_embeds.1.proj.{kind}"], theirs[f"net.token_embeds.3.proj.{kind}"])
        rows = after[f"net.head.2.{kind}"].unflatten(0, (2, 2, 2))
        assert torch.equal(rows[:, :, 0], before[f"net.head.2.{kind}"].unflatten(0, (2, 2, 2))[:, :, 0])
        assert torch.equal(rows[:, :, 1], theirs[f"net.head.2.{kind}"].unflatten(0, (2, 2, 48))[:, :, 3])
    assert torch.equal(after["net.var_embed"][0, 0], before["net.var_embed"][0, 0])
    assert torch.equal(after["net.var_embed"][0, 1], theirs["net.var_embed"][0, 3])


@pytest.mark.parametrize("img_size", [[8, 10], [12, 16], [4, 32]])
def test_positions_are_interpolated_whichever_axis_differs(climaxs, caplog, img_size):
    whole, path = climaxs
    module = model(OWN, seed=1, img_size=img_size)
    with caplog.at_level("INFO", "climax_elevation"):
        load_pretrained(module, path)
    rows, columns = img_size[0] // 2, img_size[1] // 2
    assert f"position embedding interpolated from 4 x 8 to {rows} x {columns} patches" in caplog.text
    field = whole.net.pos_embed.detach().reshape(1, 4, 8, 16).permute(0, 3, 1, 2)
    expected = interpolate(field, size=(rows, columns), mode="bicubic", align_corners=False)
    torch.testing.assert_close(module.net.pos_embed, expected.permute(0, 2, 3, 1).reshape(1, rows * columns, 16))


def test_a_checkpoint_that_does_not_say_is_refused(tmp_path):
    few = model(OWN)
    path, module = saved(few, tmp_path / "few.ckpt"), model(OWN[::-1], seed=1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(InputError, match="has weights of 3 variables and does not say which.*--pretrained-variables"):
        load_pretrained(module, path)
    with pytest.raises(InputError, match="has weights of 3 variables, and 2 are named"), stating(OWN[:2]):
        load_pretrained(module, path)
    with pytest.raises(InputError, match="has weights of 3 variables, and 3 are named"), stating([OWN[0]] * 3):
        load_pretrained(module, path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with stating(OWN):
        load_pretrained(module, path)
    x = torch.randn(1, 3, 8, 16)
    torch.testing.assert_close(predicted(module, x, OWN), predicted(few, x, OWN))
    checkpoint = {"state_dict": few.state_dict()}
    describe(checkpoint, few.net)
    torch.save(checkpoint, tmp_path / "says.ckpt")
    says = model(OWN[::-1], seed=2)
    load_pretrained(says, str(tmp_path / "says.ckpt"))
    torch.testing.assert_close(predicted(says, x, OWN), predicted(few, x, OWN))


def test_another_patch_size_or_depth_of_the_head_is_left_out(climaxs, caplog):
    whole, path = climaxs
    module = model(OWN, seed=1, patch_size=4, decoder_depth=2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with caplog.at_level("INFO", "climax_elevation"):
        load_pretrained(module, path)
    after = module.state_dict()
    assert torch.equal(after["net.token_embeds.0.proj.weight"], before["net.token_embeds.0.proj.weight"])
    for kind in ("weight", "bias"):
        assert torch.equal(after[f"net.head.4.{kind}"], before[f"net.head.4.{kind}"])
    assert torch.equal(after["net.var_embed"][0, 0], whole.state_dict()["net.var_embed"][0, 3])
    assert "net.head.2.weight, net.head.2.bias" in caplog.text.partition("another shape: ")[2]


# ---- both hosts ------------------------------------------------------------------------------------


def test_as_climaxs_own_loader_where_that_is_right(climax, climaxs, tmp_path):
    """The same variables, on a grid twice as wide as high."""
    pytest.importorskip("torchvision")
    _, path = climaxs
    loaded = []
    with overlay(find_climax(climax), patched=True) as folder, importable(folder):
        from climax.arch import ClimaX
        from climax.global_forecast.module import GlobalForecastModule

        for load in (GlobalForecastModule.load_pretrained_weights, load_pretrained):
            torch.manual_seed(3)
            module = GlobalForecastModule(ClimaX(list(CLIMAX_VARIABLES), **SIZES | {"img_size": [16, 32]}))
            load(module, path)
            loaded.append(module.state_dict())
    assert all(torch.equal(value, loaded[1][name]) for name, value in loaded[0].items())


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_data.write(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("host", ["stand-in", "global", "regional"])
def test_a_run_starts_from_climaxs_weights_by_name(shards, climaxs, tmp_path, request, caplog, host):
    if host != "stand-in":
        pytest.importorskip("torchvision")
    climax = request.getfixturevalue("no_climax" if host == "stand-in" else "climax")
    whole, _ = climaxs
    # more than tensors, as the published ones hold
    objects = {} if host == "stand-in" else {"hyper_parameters": {"root_dir": tmp_path}}
    path = saved(whole, tmp_path / "pretrained.ckpt", **objects)
    run = tmp_path / "run"
    net = "--model.net=climax.regional_forecast.arch.RegionalClimaX"
    arguments = [
        net if host == "regional" and given.startswith("--model.net=") else given for given in forecasting(shards, run)
    ]
    arguments += ["--data.region=Global"] if host == "regional" else []
    still = ["--model.lr=1e-12", "--model.weight_decay=0", "--model.net.init_args.depth=1", "--model.beta_1=0.5"]
    still += ["--model.net.init_args.decoder_depth=1", f"--model.pretrained_path={path}"]
    module = "regional_forecast" if host == "regional" else "global_forecast"
    with caplog.at_level("INFO", "climax_elevation"):
        train(module, climax, [*arguments, *still])
    assert f"weights by name: {', '.join(tiny_data.VARIABLES)}" in caplog.text
    checkpoint = torch.load(next(run.rglob("last.ckpt")), weights_only=False)
    state, theirs = checkpoint["state_dict"], whole.state_dict()
    for index, name in enumerate(tiny_data.VARIABLES):
        there = CLIMAX_VARIABLES.index(name)
        for kind in ("weight", "bias"):
            at, key = f"net.token_embeds.{there}.proj.{kind}", f"net.token_embeds.{index}.proj.{kind}"
            torch.testing.assert_close(state[key], theirs[at], rtol=1e-5, atol=1e-6)
    # and says what it is itself, wherever it goes
    assert checkpoint[DESCRIPTION]["default_vars"] == tiny_data.VARIABLES
    assert checkpoint[DESCRIPTION]["img_size"] == [8, 16]
    alone = shutil.copy(next(run.rglob("last.ckpt")), tmp_path / "alone.ckpt")
    other = model(tiny_data.VARIABLES[::-1], seed=4)
    load_pretrained(other, str(alone), trusted=True)
    position = tiny_data.VARIABLES.index("2m_temperature")
    ours = other.net.token_embeds[len(tiny_data.VARIABLES) - 1 - position].proj.weight
    assert torch.equal(ours, state[f"net.token_embeds.{position}.proj.weight"])


def test_the_configuration_beside_a_checkpoint_says_its_variables(tmp_path):
    few, folder = model(OWN), tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    path = saved(few, folder / "best.ckpt")
    said = f"model: {{net: {{init_args: {{default_vars: [{', '.join(OWN)}], img_size: [8, 16], patch_size: 2}}}}}}\n"
    (tmp_path / "version_0" / "config.yaml").write_text(said)
    module, x = model(OWN[::-1], seed=1), torch.randn(1, 3, 8, 16)
    load_pretrained(module, path)
    torch.testing.assert_close(predicted(module, x, OWN), predicted(few, x, OWN))


def test_the_command_line_names_them(shards, no_climax, tmp_path, capsys):
    path = saved(model(tiny_data.VARIABLES), tmp_path / "few.ckpt")
    arguments = [*forecasting(shards, tmp_path / "run"), f"--model.pretrained_path={path}"]
    arguments += ["--model.net.init_args.depth=1"]
    assert main(["train", "global_forecast", "--", *arguments]) == 2
    assert "does not say which" in capsys.readouterr().err
    names = ["--pretrained-variables", *tiny_data.VARIABLES]
    assert main(["train", "global_forecast", *names, "--", *arguments]) == 0
