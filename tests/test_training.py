"""TerrainCallback: units from a data module, scalars that are not decayed, and what a run says of them."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_data
import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from torch import nn

from climax_elevation import InputError
from climax_elevation.host import StandInClimaX
from climax_elevation.host.module import GlobalForecastModule
from climax_elevation.host.shards import GlobalForecastDataModule, Normalize
from climax_elevation.training import OwnRate, TerrainCallback, exempt_from_decay


def net(**flags):
    torch.manual_seed(0)
    return StandInClimaX(
        tiny_data.VARIABLES, img_size=[8, 16], patch_size=4, embed_dim=16, depth=2, num_heads=2, **flags
    )


def data(root):
    return GlobalForecastDataModule(
        str(root), tiny_data.VARIABLES, buffer_size=5, out_variables=tiny_data.TARGETS, predict_range=1, batch_size=4
    )


def trainer(folder, *callbacks, **options):
    defaults = {"max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, callbacks=list(callbacks), **defaults | options
    )


class Decays(GlobalForecastModule):
    """Upstream's grouping, which decays everything but the embeddings."""

    def configure_optimizers(self):
        names = dict(self.named_parameters())
        spared = [p for name, p in names.items() if "embed" in name]
        decayed = [p for name, p in names.items() if "embed" not in name]
        groups = [{"params": decayed, "weight_decay": 0.5}, {"params": spared, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def test_units_and_grid_come_from_the_data_module(tmp_path, caplog):
    module = GlobalForecastModule(net(use_physics_mask=True), lr=1e-2, warmup_epochs=1, max_epochs=9)
    source = data(tiny_data.write(tmp_path / "data"))
    with caplog.at_level(logging.INFO, "climax_elevation"):
        trainer(tmp_path, TerrainCallback()).fit(module, datamodule=source)
    reader = module.net.terrain
    index = tiny_data.VARIABLES.index("orography")
    assert reader.elevation_mean.item() == pytest.approx(source.transforms.mean[index])
    assert reader.wind_std.tolist() == pytest.approx(source.transforms.std[2:])
    assert reader.lat[0].item() == pytest.approx(tiny_data.LAT[:4].mean())
    assert set(reader.sources.values()) == {"the data module GlobalForecastDataModule"}
    alpha = module.net.blocks[0].attn.bias.elevation_alpha
    assert alpha.item() != 1.0
    assert f"net.blocks.0.attn.bias.elevation_alpha moved from 1 to {alpha.item():.6g}" in caplog.text
    assert "terrain: elevation" in caplog.text


def test_without_it_the_run_stops_and_says_what_to_do(tmp_path):
    module = GlobalForecastModule(net(use_physics_mask=True), warmup_epochs=1, max_epochs=9)
    with pytest.raises(InputError, match="TerrainCallback"):
        trainer(tmp_path).fit(module, datamodule=data(tiny_data.write(tmp_path / "data")))


def test_with_the_flag_off_it_does_nothing(tmp_path):
    source = data(tiny_data.write(tmp_path / "data"))
    states = []
    for callbacks in ([], [TerrainCallback()]):
        torch.manual_seed(1)
        module = Decays(net(), warmup_epochs=1, max_epochs=9)
        run = trainer(tmp_path, *callbacks)
        run.fit(module, datamodule=data(source.root))
        states.append((module.state_dict(), [len(group["params"]) for group in run.optimizers[0].param_groups]))
    assert states[0][1] == states[1][1]
    assert all(torch.equal(value, states[1][0][key]) for key, value in states[0][0].items())


def test_scalars_are_spared_from_decay_and_keep_their_schedule(tmp_path):
    module = Decays(net(use_physics_mask=True), warmup_epochs=1, max_epochs=9)
    run = trainer(tmp_path, TerrainCallback())
    run.fit(module, datamodule=data(tiny_data.write(tmp_path / "data")))
    bias = module.net.blocks[0].attn.bias
    decayed, spared = run.optimizers[0].param_groups
    assert {id(p) for p in bias.parameters()} <= {id(p) for p in spared["params"]}
    assert not {id(p) for p in bias.parameters()} & {id(p) for p in decayed["params"]}
    assert decayed["lr"] == spared["lr"] < 1e-3
    everything = [id(p) for group in run.optimizers[0].param_groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in module.parameters())


def test_a_run_that_decays_resumes_where_it_stopped(tmp_path):
    """The moved parameters have to be moved again before the optimiser's state is restored."""
    source = tiny_data.write(tmp_path / "data")

    def fit(epochs, checkpoint=None):
        torch.manual_seed(1)
        module = Decays(net(use_physics_mask=True), warmup_epochs=1, max_epochs=9)
        run = trainer(tmp_path, TerrainCallback(), max_epochs=epochs)
        run.fit(module, datamodule=data(source), ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, run

    fit(1)
    module, run = fit(2, tmp_path / "1.ckpt")
    steps = [run.optimizers[0].state[p]["step"].item() for p in module.net.blocks[0].attn.bias.parameters()]
    assert steps == [run.global_step] * 2


def test_an_optimizer_without_a_group_for_them_is_refused():
    alpha, other = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([alpha, other], weight_decay=0.1)
    with pytest.raises(InputError, match="no parameter group with weight_decay 0"):
        exempt_from_decay(optimizer, [alpha])
    exempt_from_decay(torch.optim.AdamW([alpha, other], weight_decay=0.0), [alpha])


def quadratic(optimizer_class, factor=None, **options):
    """Three parameters pulled towards 2 for five steps of a falling rate; the second at a rate of its own."""
    torch.manual_seed(0)
    weight, alpha, beta = (nn.Parameter(torch.randn(shape)) for shape in ((3,), (), (2,)))
    if factor is None:
        groups = [{"params": [weight]}, {"params": [alpha], "lr": 7 * 0.01}, {"params": [beta], "lr": 7 * 0.01}]
        optimizer = optimizer_class(groups, lr=0.01, **options)
    else:
        optimizer = optimizer_class([{"params": [weight, alpha]}, {"params": [beta]}], lr=0.01, **options)
        OwnRate(optimizer, [alpha, beta], factor)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(5):
        optimizer.zero_grad()
        sum((parameter - 2).square().sum() for parameter in (weight, alpha, beta)).backward()
        optimizer.step()
        schedule.step()
    return [weight, alpha, beta], optimizer


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.AdamW, {"weight_decay": 0.0}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_a_factor_is_a_group_with_its_own_learning_rate(optimizer_class, options):
    by_hand, _ = quadratic(optimizer_class, **options)
    ours, optimizer = quadratic(optimizer_class, factor=7, **options)
    same_rate, _ = quadratic(optimizer_class, factor=1, **options)
    assert all(torch.equal(a, b) for a, b in zip(by_hand, ours, strict=True))
    assert torch.equal(ours[0], same_rate[0])
    assert not torch.equal(ours[1], same_rate[1])
    # a group whose parameters are all biases is there again, and so is every rate
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.01 / 6)] * 2


def test_one_step_of_plain_descent_by_hand():
    """alpha - 0.1 * 5 * 2 (alpha - 3), at alpha = 1: 1 + 2 = 3; the weight 1 + 0.4."""
    weight, alpha = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight, alpha], lr=0.1)
    OwnRate(optimizer, [alpha], 5)
    ((weight - 3).square() + (alpha - 3).square()).backward()
    optimizer.step()
    assert (weight.item(), alpha.item()) == (pytest.approx(1.4), pytest.approx(3.0))


def fitted(root, folder, callback, epochs=2, checkpoint=None, module_class=Decays, **options):
    torch.manual_seed(1)
    module = module_class(net(use_physics_mask=True, drop_path=0.0, drop_rate=0.0), warmup_epochs=1, max_epochs=9)
    run = trainer(folder, callback, max_epochs=epochs, **options)
    run.fit(module, datamodule=data(root), ckpt_path=checkpoint)
    return module, run


class OwnGroup(Decays):
    """The same optimiser with a third group, at five times the rate."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        groups = configured["optimizer"].param_groups
        own = list(self.net.blocks[0].attn.bias.parameters())
        for group in groups:
            group["params"] = [p for p in group["params"] if not any(p is other for other in own)]
        groups = [*groups, {"params": own, "weight_decay": 0.0, "lr": 5 * groups[0]["lr"]}]
        optimizer = torch.optim.AdamW([{k: v for k, v in g.items() if k != "initial_lr"} for g in groups], lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": schedule}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_callbacks_factor_trains_as_a_group_of_its_own_does(tmp_path, accumulated):
    source = tiny_data.write(tmp_path / "data")
    options = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 1.0}
    ours, run = fitted(source, tmp_path, TerrainCallback(lr_factor=5), **options)
    by_hand, _ = fitted(source, tmp_path, TerrainCallback(), module_class=OwnGroup, **options)
    plain, _ = fitted(source, tmp_path, TerrainCallback(), **options)
    for (name, one), other in zip(ours.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other), name
    moved = [(m.net.blocks[0].attn.bias.elevation_alpha - 1).abs().item() for m in (ours, plain)]
    assert moved[0] > 2 * moved[1] > 0
    assert len(run.optimizers[0].param_groups) == 2
    assert not run.optimizers[0]._optimizer_step_pre_hooks


def test_a_factor_of_one_changes_nothing(tmp_path):
    source = tiny_data.write(tmp_path / "data")
    ours, _ = fitted(source, tmp_path, TerrainCallback(lr_factor=1))
    plain, _ = fitted(source, tmp_path, TerrainCallback())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_a_run_with_a_factor_resumes_as_if_it_had_not_stopped(tmp_path):
    source = tiny_data.write(tmp_path / "data")
    whole, _ = fitted(source, tmp_path, TerrainCallback(lr_factor=5))
    _, first = fitted(source, tmp_path, TerrainCallback(lr_factor=5), epochs=1)
    first.save_checkpoint(tmp_path / "1.ckpt")
    resumed, _ = fitted(source, tmp_path, TerrainCallback(lr_factor=5), checkpoint=tmp_path / "1.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class Fails(Decays):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("in the middle of a step")
        return super().training_step(batch, batch_idx)


def test_a_step_that_fails_leaves_the_groups_whole(tmp_path):
    source = tiny_data.write(tmp_path / "data")
    module = Fails(net(use_physics_mask=True), warmup_epochs=1, max_epochs=9)
    run = trainer(tmp_path, TerrainCallback(lr_factor=5))
    with pytest.raises(RuntimeError, match="in the middle"):
        run.fit(module, datamodule=data(source))
    groups = run.optimizers[0].param_groups
    assert len(groups) == 2
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), "ten", True])
def test_a_factor_is_a_number_above_zero(factor):
    with pytest.raises(InputError, match="lr_factor is a"):
        TerrainCallback(lr_factor=factor)


def test_an_optimizer_with_one_rate_for_all_is_refused():
    alpha = nn.Parameter(torch.ones(()))
    with pytest.raises(InputError, match="L-BFGS has one learning rate"):
        OwnRate(torch.optim.LBFGS([alpha]), [alpha], 2.0)


class Mixed(LightningDataModule):
    """Sources as upstream's pretraining has them, named by key."""

    def __init__(self, **transforms):
        super().__init__()
        self.transforms = transforms
        names = ["2m_temperature", "10m_u_component_of_wind", "10m_v_component_of_wind"]
        self.save_hyperparameters({"dict_in_variables": {key: names for key in transforms}})

    def get_lat_lon(self):
        return tiny_data.LAT, tiny_data.LON


def reader_of_mixed(tmp_path, **sources):
    np.savez(
        tmp_path / "z.npz", orography=np.linspace(0, 3000, 128).reshape(8, 16), lat=tiny_data.LAT, lon=tiny_data.LON
    )
    module = LightningModule()
    module.net = net(use_physics_mask=True, bias_args={"elevation_file": str(tmp_path / "z.npz")})
    run = SimpleNamespace(datamodule=Mixed(**sources))
    TerrainCallback().setup(run, module, "fit")
    return module.net.terrain


def test_mixed_sources_have_to_agree_on_what_is_read(tmp_path):
    one = Normalize(np.array([280.0, 1.0, 2.0]), np.array([20.0, 5.0, 4.0]))
    other = Normalize(np.array([270.0, 1.0, 2.0]), np.array([15.0, 5.0, 4.0]))  # temperature is not read
    third = Normalize(np.array([270.0, 1.5, 2.0]), np.array([15.0, 5.0, 4.0]))
    reader = reader_of_mixed(tmp_path, a=one, b=other)
    assert reader.wind_mean.tolist() == [1.0, 2.0]
    assert "elevation_m" in reader.sources
    with pytest.raises(InputError, match="mixes 'a' and 'c', which standardise '10m_u_component_of_wind' differently"):
        reader_of_mixed(tmp_path, a=one, c=third)
