"""Whether a bias is alive: its strength, its record over training, and interventions that leave no trace."""

import csv
import math
import shutil

import numpy as np
import pytest
import terrains
import tiny_data
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import CSVLogger
from test_cli import training
from test_training import data, net
from torch import nn

from climax_elevation import Attention3D, InputError, PhysicsBias, biased_attention
from climax_elevation.block import BiasedAttention
from climax_elevation.cli import main
from climax_elevation.diagnostics import (
    INTERVENTIONS,
    BiasMonitor,
    assess,
    effects,
    intervention,
    open_run,
    read_record,
)
from climax_elevation.diagnostics import strength as module
from climax_elevation.diagnostics.interventions import ScaledBias
from climax_elevation.diagnostics.strength import Seen, logits_and_bias, measure, row_step
from climax_elevation.host.module import GlobalForecastModule
from climax_elevation.training import TerrainCallback, read_datamodule


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data.write(tmp_path_factory.mktemp("data"))


# ---- strength -----------------------------------------------------------------------------------


def seen(bias, inputs, tokens, batch=1, heads=2, logits=True, seed=0):
    """Attention of random tokens in float64; without logits, of queries that are zero."""
    torch.manual_seed(seed)
    attention = BiasedAttention(Attention3D(8, num_heads=heads, qkv_bias=True).double(), bias)
    if not logits:
        nn.init.zeros_(attention.qkv.weight)
        nn.init.zeros_(attention.qkv.bias)
    return Seen(attention, torch.randn(batch, tokens, 8, dtype=torch.float64), inputs, None)


def test_three_patches_by_hand():
    """Patches at 0, 1000 and 2000 m, alpha 1, equal logits.

    b = [[0, -1, -2], [0, 0, -1], [0, 0, 0]]: the largest is 2, the mean 4 / 9. Row 0 attends by
    (1, 1/e, 1/e^2) / 1.50321 = (0.66524, ...) where it was 1/3: it moves 0.33191; row 1 by
    (1, 1, 1/e) / 2.36788, whose last is 0.15536: it moves 0.17797; row 2 moves nothing.
    """
    bias = PhysicsBias(wind=False)
    found = measure(seen(bias, (torch.tensor([[0.0, 1000.0, 2000.0]]),), 3, logits=False))
    assert found.largest == [2.0, 2.0]
    assert found.mean == pytest.approx([4 / 9] * 2)
    assert found.share == [1.0, 1.0]
    assert found.most_moved == pytest.approx([0.33191] * 2, abs=1e-5)
    assert found.moved == pytest.approx([(0.33191 + 0.17797) / 3] * 2, abs=1e-5)
    assert not found.inert


@pytest.mark.parametrize("case", terrains.EVERY_BIAS)
def test_every_bias_against_a_plain_loop(case, monkeypatch):
    terrain = terrains.global_terrain()
    bias = terrains.make(case, terrain, num_heads=2)
    what = seen(bias, bias.inputs(terrain), 32, batch=2)
    monkeypatch.setattr(module, "HELD", 32 * 64 * 5)  # a few rows at a time
    found = measure(what)
    q, k, _ = what.attention.project(what.x)
    b = bias(*what.bias_inputs).expand(2, 2, 32, 32).detach().numpy()
    a = (what.attention.scale * q @ k.transpose(2, 3)).detach().numpy()
    for head in range(2):
        of_bias, of_logits, moved = [], [], []
        for sample in range(2):
            for i in range(32):
                x, y = a[sample, head, i], b[sample, head, i]
                plain, biased = np.exp(x) / np.exp(x).sum(), np.exp(x + y) / np.exp(x + y).sum()
                of_bias.append(y.var())
                of_logits.append(x.var())
                moved.append(np.abs(biased - plain).sum() / 2)
        assert found.largest[head] == pytest.approx(np.abs(b[:, head]).max())
        assert found.mean[head] == pytest.approx(np.abs(b[:, head]).mean())
        assert found.share[head] == pytest.approx(np.mean(of_bias) / (np.mean(of_bias) + np.mean(of_logits)))
        assert found.moved[head] == pytest.approx(np.mean(moved))
        assert found.most_moved[head] == pytest.approx(np.max(moved))


def test_what_is_the_same_for_all_keys_counts_for_nothing():
    terrain = terrains.global_terrain()
    bias = terrains.make("relative_3d", terrain, num_heads=2)
    before = measure(seen(bias, bias.inputs(terrain), 32))
    with torch.no_grad():
        bias.mlp[2].bias += 3.0
    after = measure(seen(bias, bias.inputs(terrain), 32))
    assert after.share == pytest.approx(before.share)
    assert after.moved == pytest.approx(before.moved)
    assert after.largest != pytest.approx(before.largest)


@pytest.mark.parametrize("alpha", [1e-4, 1e-2, 1.0, 10.0])
def test_no_bias_moves_more_than_its_range_allows(alpha):
    """At most tanh(r / 4), r the range of b in the row: reached by two halves of a row, b = 0 and b = r."""
    bias = PhysicsBias(wind=False, alpha_init=alpha, direction="both").double()
    elevation = terrains.global_terrain().elevation_m
    what = seen(bias, (elevation,), 32)
    b = bias(elevation)
    bound = math.tanh((b.amax(-1) - b.amin(-1)).max().item() / 4)
    found = measure(what)
    assert max(found.most_moved) <= bound
    assert found.inert == (alpha <= 1e-2)


@pytest.mark.parametrize("tokens", [1, 63, 128, 192, 512, 2048, 7040, 8192])
def test_rows_are_about_64_and_on_every_column(tokens):
    step = row_step(tokens)
    rows = range(step // 2, tokens, step)
    assert min(tokens, 64) <= len(rows) <= 192
    if tokens == 2048:
        assert len({row % 64 for row in rows}) == 64


def test_long_sequences_are_sampled(monkeypatch):
    """At 2048 tokens, what is held at once stays below the whole: 2 x 2048 x 2048 numbers."""
    terrain = terrains.global_terrain((32, 64), dtype=torch.float32)
    what = seen(PhysicsBias().double(), (terrain.elevation_m, terrain.speed), 2048, batch=2)
    sizes = []

    def noted(*arguments):
        pair = logits_and_bias(*arguments)
        sizes.append(pair[0].numel())
        return pair

    monkeypatch.setattr(module, "logits_and_bias", noted)
    found = measure(what)
    assert max(sizes) <= 2 * 192 * 2048
    b = PhysicsBias()(terrain.elevation_m[:1], terrain.speed).abs()
    assert 0.9 * b.max() <= max(found.largest) <= b.max()
    assert found.mean[0] == pytest.approx(b.mean().item(), rel=0.1)


# ---- assess -------------------------------------------------------------------------------------


def ready(root, batch=True, **bias):
    """A model that knows its units, and a batch."""
    model = net(use_physics_mask=True, bias_type=bias.pop("bias_type", "physics"), bias_args=bias)
    source = data(root)
    read_datamodule(model, source)
    return model, source, next(iter(source.test_dataloader()))


def test_a_report_reads_well_and_changes_nothing(root):
    model, _, batch = ready(root, blocks="all", wind=False, alpha_init=2.0)
    model.blocks[0].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    report = assess(model, batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if "terrain" not in name)
    assert (model.training, model.blocks[0].training, model.blocks[1].attn.training) == (True, False, True)
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert set(report.blocks) == {0, 1}
    assert report.parameters[(1, "elevation_alpha")] == 2.0
    assert "The bias is alive: it moves up to" in str(report)
    assert len(str(report).splitlines()) == 1 + 2 + 2 + 1


def test_an_inert_bias_is_said_to_be_inert(root):
    model, _, batch = ready(root, blocks="all", wind=False, alpha_init=1e-3)
    report = assess(model, batch)
    assert report.inert
    assert str(report).endswith("The bias is inert: in no row, head or block does it move 1% of the attention.")
    with torch.no_grad():
        model.blocks[1].attn.bias.elevation_alpha.fill_(3.0)
    assert "The bias is alive in block 1: " in str(assess(model, batch))


def test_a_model_without_bias_has_nothing_to_assess(root):
    with pytest.raises(InputError, match="this StandInClimaX has no terrain bias: train it with"):
        assess(net(), next(iter(data(root).test_dataloader())))


def test_wind_order_is_seen_through(root):
    model, _, batch = ready(root)
    in_order, _, _ = ready(root, patch_order="wind")
    one, other = assess(model, batch).blocks[0], assess(in_order, batch).blocks[0]
    assert one.share == pytest.approx(other.share, rel=1e-4)


# ---- the record of a training ---------------------------------------------------------------------


class Watcher(Callback):
    """What the monitor should have written, taken another way."""

    def __init__(self):
        self.values, self.gradients = {}, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        alpha = pl_module.net.blocks[0].attn.bias.elevation_alpha
        self.values[trainer.global_step] = alpha.item()
        self.gradients[trainer.global_step] = alpha.grad.item()


def fit(root, folder, *callbacks, epochs=2, checkpoint=None, flags=None, **options):
    torch.manual_seed(1)
    flags = {"use_physics_mask": True, "bias_args": {"blocks": "all"}} if flags is None else flags
    model = GlobalForecastModule(net(**flags), lr=1e-2, warmup_epochs=1, max_epochs=20)
    defaults = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": epochs}
    run = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        enable_checkpointing=False,
        callbacks=[TerrainCallback(), *callbacks],
        **defaults | options,
    )
    run.fit(model, datamodule=data(root), ckpt_path=checkpoint)
    return model, run


def rows(folder, **wanted):
    return [
        row for row in read_record(folder / "bias.csv") if all(getattr(row, k) == value for k, value in wanted.items())
    ]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_record_is_what_was(root, tmp_path, accumulated):
    watcher = Watcher()
    model, run = fit(root, tmp_path, BiasMonitor(2), watcher, accumulate_grad_batches=accumulated)
    steps = list(range(0, run.global_step, 2))
    assert len(steps) > 1
    alpha = {"block": 0, "parameter": "elevation_alpha"}
    values = [(row.step, row.value) for row in rows(tmp_path, quantity="value", **alpha)]
    last = (run.global_step, model.net.blocks[0].attn.bias.elevation_alpha.item())
    assert values == [*((step, watcher.values[step]) for step in steps), last]
    gradients = [(row.step, row.value) for row in rows(tmp_path, quantity="gradient", **alpha)]
    assert gradients == [(step, watcher.gradients[step]) for step in steps]
    for quantity in ("largest", "mean", "share", "moved", "most_moved"):
        found = rows(tmp_path, block=1, quantity=quantity)
        assert [(row.step, row.head) for row in found] == [(step, head) for step in steps for head in (0, 1)]
        assert all(0 < row.value < 100 for row in found)
    with (tmp_path / "bias.csv").open() as file:
        assert file.readline() == "step,block,parameter,head,quantity,value\n"


def test_the_first_record_is_of_the_first_batch(root, tmp_path):
    """Step 0 of the record, and `assess` of the untrained model on that batch (dropout comes before block 1)."""
    fit(root, tmp_path, BiasMonitor(), epochs=1, max_steps=1, flags=quiet())
    torch.manual_seed(1)
    model, source = net(**quiet()), data(root)
    read_datamodule(model, source)
    expected = assess(model, next(iter(source.train_dataloader()))).blocks[0]
    assert [row.value for row in rows(tmp_path, step=0, block=0, quantity="share")] == pytest.approx(expected.share)


def quiet(**bias):
    return {"use_physics_mask": True, "drop_path": 0.0, "drop_rate": 0.0, "bias_args": bias}


def test_training_is_the_same_bit_for_bit(root, tmp_path):
    """With dropout: a random number more would show."""
    plain, _ = fit(root, tmp_path / "plain")
    watched, _ = fit(root, tmp_path / "watched", BiasMonitor(1))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert not any(part._forward_pre_hooks for part in watched.modules())


@pytest.mark.parametrize("bias_type", ["advection", "relative_2d+ridge"])
def test_parameters_of_heads_and_arrays(root, tmp_path, bias_type):
    flags = {"use_physics_mask": True, "bias_type": bias_type}
    model, _ = fit(root, tmp_path, BiasMonitor(), epochs=1, flags=flags)
    bias = model.net.blocks[0].attn.bias
    last = max(row.step for row in rows(tmp_path))
    if bias_type == "advection":
        found = rows(tmp_path, step=last, parameter="log_kappa")
        assert [(row.head, row.quantity) for row in found] == [(0, "value"), (1, "value")]
        assert [row.value for row in found] == bias.log_kappa.tolist()
    else:
        (norm,) = rows(tmp_path, step=last, parameter="relative_2d.bias_table")
        assert (norm.quantity, norm.value) == ("norm", pytest.approx(bias.relative_2d.bias_table.norm().item()))
        assert rows(tmp_path, parameter="ridge.elevation_alpha", quantity="gradient")


def test_a_resumed_record_is_that_of_a_run_that_did_not_stop(root, tmp_path):
    fit(root, tmp_path / "whole", BiasMonitor(2), flags=quiet())
    _, run = fit(root, tmp_path / "parts", BiasMonitor(2), epochs=1, flags=quiet())
    run.save_checkpoint(tmp_path / "1.ckpt")
    with (tmp_path / "parts" / "bias.csv").open("a") as file:  # later than the checkpoint, and torn off
        file.write("4,0,elevation_alpha,,value,9.0\n5,0,elevation_al")
    fit(root, tmp_path / "parts", BiasMonitor(2), checkpoint=tmp_path / "1.ckpt", flags=quiet())
    whole, parts = ((tmp_path / name / "bias.csv").read_text() for name in ("whole", "parts"))
    assert whole == parts


def test_a_new_run_in_the_same_folder_starts_a_new_record(root, tmp_path):
    for _ in range(2):
        fit(root, tmp_path, BiasMonitor(), epochs=1, flags=quiet())
    assert len(rows(tmp_path, step=0, block=0, parameter="elevation_alpha", quantity="value")) == 1


def test_scalars_go_to_the_logger(root, tmp_path):
    logger = CSVLogger(tmp_path, name="log", version=0)
    fit(root, tmp_path, BiasMonitor(1), logger=logger, log_every_n_steps=1)
    folder = tmp_path / "log" / "version_0"
    with (folder / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["bias/0/elevation_alpha"]]
    values = [row.value for row in rows(folder, block=0, parameter="elevation_alpha", quantity="value")][:-1]
    assert [float(row["bias/0/elevation_alpha"]) for row in logged] == pytest.approx(values)
    assert all(0 < float(row["bias/1/share"]) < 1 for row in logged)
    assert {"bias/1/moved", "bias/0/wind_beta_gradient"} <= set(logged[0])


def test_without_a_bias_there_is_no_record(root, tmp_path):
    fit(root, tmp_path, BiasMonitor(1), flags={})
    assert not (tmp_path / "bias.csv").exists()


def test_what_is_no_record_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist: add climax_elevation.diagnostics.BiasMonitor"):
        read_record(tmp_path / "bias.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="is no record of BiasMonitor"):
        read_record(tmp_path / "other.csv")
    with pytest.raises(InputError, match="every_n_steps is a whole number"):
        BiasMonitor(0)


# ---- interventions --------------------------------------------------------------------------------


def forecast(model, batch):
    x, _, lead_times, variables, out_variables = batch
    with torch.no_grad():
        return model.eval().forward(x, None, lead_times, variables, out_variables, None, None)[1]


BIASES = {
    "physics": {},
    "ridge": {"static_terrain": True},
    "advection": {},
    "advection+ridge": {"static_terrain": True},
    "structure": {},
    "topoflow": {},
}


@pytest.mark.parametrize("name", INTERVENTIONS)
@pytest.mark.parametrize("bias_type", BIASES)
def test_an_intervention_acts_and_leaves_no_trace(root, bias_type, name):
    model, _, batch = ready(root, bias_type=bias_type, blocks="all", engine="tiled", **BIASES[bias_type])
    objects = dict(model.named_modules())
    before = forecast(model, batch)
    paths = [part._paths for part in model.modules() if hasattr(part, "_paths")]

    def fails_while_it_lasts():
        with intervention(name, model):
            seen.append(forecast(model, batch))
            raise RuntimeError("while it lasts")

    seen = []
    with pytest.raises(RuntimeError, match="while it lasts"):
        fails_while_it_lasts()
    reads_elevation, reads_direction = bias_type != "advection", "advection" in bias_type
    acts = name.startswith("bias") or (reads_direction if "wind" in name else reads_elevation)
    assert torch.equal(seen[0], before) != acts
    assert torch.equal(forecast(model, batch), before)
    after = dict(model.named_modules())
    assert objects.keys() == after.keys()
    assert {block.attn.engine for block in model.blocks} == {"tiled"}
    assert all(after[place] is part for place, part in objects.items())
    assert all(a is b for a, b in zip(paths, (p._paths for p in after.values() if hasattr(p, "_paths")), strict=True))
    assert not model.terrain._forward_hooks


def test_level_ground_is_no_bias_to_ridge_and_permuted_ground_another_paths(root):
    model, _, batch = ready(root, bias_type="ridge", wind=False)
    with intervention("bias times 0", model):
        plain = forecast(model, batch)
    kept = sorted(root.rglob("*"))
    with intervention("elevation zeroed", model):
        assert torch.allclose(forecast(model, batch), plain, atol=1e-6)
    own = model.blocks[0].attn.bias
    forecast(model, batch)
    with intervention("elevation permuted", model):
        forecast(model, batch)
        copied = model.blocks[0].attn.bias
        assert copied is not own
        assert not torch.equal(copied._paths.half_metres, own._paths.half_metres)
        assert torch.equal(copied._paths.elevation_m.sort().values, own._paths.elevation_m.sort().values)
    assert sorted(root.rglob("*")) == kept  # other paths than the data's are not kept beside it


def test_before_the_first_forward_too(root):
    model, _, batch = ready(root, bias_type="ridge", wind=False)
    with intervention("elevation permuted", model):
        changed = forecast(model, batch)
    fresh, _, _ = ready(root, bias_type="ridge", wind=False)
    assert torch.equal(forecast(model, batch), forecast(fresh, batch))
    assert not torch.equal(changed, forecast(fresh, batch))


def test_a_scale_is_that_of_the_parameter(root):
    model, _, batch = ready(root, wind=False, alpha_init=1.0)
    doubled, _, _ = ready(root, wind=False, alpha_init=2.0)
    with intervention("bias times 2", model):
        assert torch.allclose(forecast(model, batch), forecast(doubled, batch), atol=1e-6)


@pytest.mark.parametrize("engine", ["dense", "sdpa", "tiled", "auto"])
@pytest.mark.parametrize("case", terrains.EVERY_BIAS)
def test_a_scaled_bias_keeps_the_contract(case, engine):
    terrain = terrains.global_terrain()
    inner = terrains.make(case, terrain)
    bias = ScaledBias(inner, 0.5)
    assert (bias.needs, bias.has_factors) == (inner.needs, inner.has_factors)
    assert torch.equal(bias(*bias.inputs(terrain)), 0.5 * inner(*inner.inputs(terrain)))
    q, k, v = torch.randn(3, 2, 4, 32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = ((q @ k.transpose(2, 3)) / 8**0.5 + 0.5 * inner(*inner.inputs(terrain))).softmax(-1) @ v
    assert torch.allclose(biased_attention(q, k, v, bias, bias.inputs(terrain), engine=engine), expected, atol=1e-9)


def test_an_unknown_intervention_lists_the_known():
    with pytest.raises(InputError, match="unknown intervention 'wind flopped'; choose one of 'elevation zeroed'"):
        intervention("wind flopped", nn.Module())


# ---- effects --------------------------------------------------------------------------------------


def test_effects_are_the_errors_that_lightning_finds(root, tmp_path):
    model, run = fit(root, tmp_path)
    found = effects(model, data(root), "test")

    def tested():
        scores = run.test(model, datamodule=data(root), verbose=False)[0]
        return {name: scores[f"test/w_rmse_{name}_1_hours"] for name in tiny_data.TARGETS}

    assert found.trained == pytest.approx(tested(), rel=1e-5)
    assert found.samples == 4
    for block in model.net.blocks:
        block.attn.bias.elevation_alpha.data.zero_()
    assert found.changed["bias times 0"] == pytest.approx(tested(), rel=1e-5)
    assert found.changed["elevation zeroed"] == pytest.approx(tested(), rel=1e-5)
    assert found.changed["wind reversed"] is None
    lines = str(found).splitlines()
    assert lines[0].startswith("Latitude-weighted RMSE over 4 forecasts of test")
    percent = 100 * (tested()["2m_temperature"] / found.trained["2m_temperature"] - 1)
    zeroed = next(line for line in lines if line.startswith("elevation zeroed"))
    assert f"({percent:+.2f}%)" in zeroed
    assert next(line for line in lines if line.startswith("wind reversed")).count("not applicable") == 2


def test_a_bias_of_wind_alone_reads_no_elevation(root):
    model, source, _ = ready(root, bias_type="advection")
    found = effects(model, source, "val")
    assert found.changed["elevation zeroed"] is found.changed["elevation permuted"] is None
    assert found.changed["wind reversed"] is not None
    with pytest.raises(InputError, match="unknown part 'train'"):
        effects(model, source, "train")


# ---- the command ------------------------------------------------------------------------------------


def run_of(host, root, folder, request, monkeypatch):
    if host == "ClimaX":
        pytest.importorskip("torchvision")
        monkeypatch.setenv("CLIMAX_SRC", str(request.getfixturevalue("climax")))
    else:
        request.getfixturevalue("no_climax")
    monitor = "--trainer.callbacks+=climax_elevation.diagnostics.BiasMonitor"
    given = training(
        root,
        f"--trainer.default_root_dir={folder}",
        monitor,
        "--model.net.init_args.bias_args={alpha_init: 2.0, engine: dense}",
    )
    assert main(given) == 0
    return folder


@pytest.mark.parametrize("host", ["stand-in", "ClimaX"])
def test_doctor_examines_a_run_of_train(root, tmp_path, request, monkeypatch, capsys, host):
    run = run_of(host, root, tmp_path / "run", request, monkeypatch)
    capsys.readouterr()
    assert main(["doctor", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "The bias is " in printed
    assert "elevation permuted" in printed
    assert "4 forecasts of val" in printed
    value = read_record(run / "bias.csv")[-2]
    assert f"block 0: elevation_alpha = {value.value:.6g}" in printed
    assert value.parameter == "elevation_alpha"
    moved = shutil.copytree(root, tmp_path / "moved")
    assert main(["doctor", str(run), "--part", "test", "--data", str(moved)]) == 0
    with open_run(run) as opened:
        assert opened.module.net.blocks[0].attn.engine == "auto"
    check_mistakes(run, tmp_path, capsys)


def check_mistakes(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    short, sick = tmp_path / "short.ckpt", tmp_path / "sick.ckpt"
    whole = next(run.rglob("*.ckpt"))
    short.write_bytes(whole.read_bytes()[:-100])
    saved = torch.load(whole, weights_only=True)
    saved["state_dict"]["net.norm.weight"][0] = torch.inf
    torch.save(saved, sick)
    wrong = {
        (str(run), "--checkpoint", str(short)): f"checkpoint {short} is cut short, after {short.stat().st_size} bytes",
        (str(run), "--checkpoint", str(sick)): "has weights that are not finite, the first of them net.norm.weight",
        ("nowhere",): "nowhere is not the folder of a run",
        (str(tmp_path / "empty"),): "has one config.yaml",
        (str(run), "--checkpoint", "none.ckpt"): "checkpoint none.ckpt does not exist",
        (str(run), "--checkpoint", str(run / "config.yaml")): "is no checkpoint, by its first bytes",
        (str(run), "--part", "train"): "unknown part 'train'",
        (str(run), "--data", str(tmp_path / "empty")): "empty",
    }
    for arguments, sentence in wrong.items():
        assert main(["doctor", *arguments]) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: "), error
        assert sentence in error
