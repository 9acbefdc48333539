"""Torch's own tools: DDP and FSDP2 with every bias, older shapes of scalars, and long runs."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_data
import torch
from processes import CASES
from terrains import EVERY_BIAS, GRID, global_terrain, make
from test_every_bias import model, predict
from test_launch import ON, forecasting
from test_training import data, net, trainer
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from climax_elevation import ElevationBias, InputError, build_bias
from climax_elevation.bias.as_data import described, given_values, tensors_of
from climax_elevation.bias.base import like_parameters
from climax_elevation.block import TerrainBlock, timm_block
from climax_elevation.diagnostics import BiasMonitor
from climax_elevation.host import StandInClimaX
from climax_elevation.host.module import GlobalForecastModule
from climax_elevation.train import train
from climax_elevation.training import TerrainCallback

pytestmark = pytest.mark.slow

AGREE = 1e-6
STEPS = 2000


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    """What each process found; see processes.py."""
    out = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("processes.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={request.param}", str(script), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(request.param)]


def test_gradients_are_those_of_one_process(found):
    for of_rank in found:
        assert of_rank.keys() == CASES.keys()
        ways = {"DDP", "Lightning", "FSDP2"} if len(found) == 2 else {"DDP", "Lightning"}
        assert all(of_case.keys() == ways for of_case in of_rank.values())
        worst = {(case, way): off for case, ways in of_rank.items() for way, off in ways.items() if not off < AGREE}
        assert not worst


# ---- shapes --------------------------------------------------------------------------------------


def older(state):
    """A state_dict as it was when scalars had no dimension; and others that have one are left."""
    return {
        key: value.reshape(()) if value.shape == (1,) and ".bias." in key else value for key, value in state.items()
    }


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_no_parameter_lacks_a_dimension(case):
    made = make(case, global_terrain())
    assert all(parameter.dim() for parameter in made.parameters())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", EVERY_BIAS)
def test_scalars_without_a_dimension_load(case, assign):
    made = model(case)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1)
    saved = older(made.state_dict())
    kept = dict(saved)
    fresh = model(case)
    fresh.load_state_dict(saved, assign=assign)
    assert {key: value.shape for key, value in fresh.state_dict().items()} == {
        key: value.shape for key, value in made.state_dict().items()
    }
    assert torch.equal(predict(fresh.eval()), predict(made.eval()))
    assert saved.keys() == kept.keys()
    assert all(saved[key] is kept[key] for key in kept)  # the caller's are left as they were
    predict(fresh.train()).square().mean().backward()


def test_one_number_is_what_a_scalar_takes():
    bias = build_bias("physics", num_heads=1)
    with pytest.raises(RuntimeError, match="size mismatch for elevation_alpha"):
        bias.load_state_dict({"elevation_alpha": torch.zeros(2), "wind_beta": torch.zeros(())})
    own = {"a": torch.zeros(1), "b": torch.zeros(()), "c": torch.zeros(1, 1)}
    shapes = {
        name: tensor.shape for name, tensor in like_parameters(dict.fromkeys("abcd", torch.ones(())), own).items()
    }
    assert shapes == {"a": (1,), "b": (), "c": (), "d": ()}


def test_a_program_exported_with_scalars_without_a_dimension_runs():
    bias = make("physics", global_terrain())
    given = [tensor.detach().reshape(()).requires_grad_() for tensor in tensors_of(bias).values()]
    for engine in ("dense", "tiled"):
        terrain, block = global_terrain(), TerrainBlock(timm_block(32, 4, 2.0, qkv_bias=True, drop=0.0), bias, engine)
        x, inputs = torch.randn(2, GRID[0] * GRID[1], 32, dtype=torch.float64), bias.inputs(terrain)
        out = block.double()(x, inputs)
        block.attn.bias = given_values(described(bias), given)
        again = block(x, inputs)
        torch.testing.assert_close(again, out)
        assert [g.shape for g in torch.autograd.grad(again.square().sum(), given)] == [(), ()]
        block.attn.bias = bias


class Scalar(ElevationBias):
    """Of another package, with a parameter that FSDP2 does not take."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor(0.5))

    def inputs(self, terrain):
        return (terrain.elevation_m,)

    def features(self, elevation):
        return (elevation / 1000,)

    def pairwise(self, query, key):
        return self.gamma * (query[0][:, :, None] - key[0][:, None])[:, None]


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_scalar_of_another_package_is_named(one_process):
    block = TerrainBlock(timm_block(32, 4, 2.0, qkv_bias=True, drop=0.0), Scalar())
    with pytest.raises(ValueError, match=r"Change attn\.bias\.gamma to a 1D tensor|gamma"):
        fully_shard(block, mesh=one_process)
    with_dimension = Scalar()
    with_dimension.load_state_dict({"gamma": torch.tensor([0.25])})  # as torch has it: the other way around
    assert with_dimension.gamma.shape == ()


def test_older_scalars_load_into_a_model_that_is_sharded(one_process):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    made = model("physics")
    with torch.no_grad():
        made.blocks[1].attn.bias.elevation_alpha.fill_(3.0)
    saved = older(made.state_dict())
    sharded = model("physics")
    for block in sharded.blocks:
        fully_shard(block, mesh=one_process)
    set_model_state_dict(sharded, saved, options=StateDictOptions(full_state_dict=True))
    assert sharded.blocks[1].attn.bias.elevation_alpha.full_tensor().tolist() == [3.0]
    assert torch.equal(predict(sharded.eval()), predict(made.eval()))


def test_terrain_that_mixed_precision_has_rounded_is_refused(one_process):
    """FSDP2 casts what a block is called with, metres too; autocast does not."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for options in ({"mp_policy": policy}, {}):
        made = model("physics")
        for block in made.blocks:
            fully_shard(block, mesh=one_process, **options)
        with torch.autocast("cpu", torch.bfloat16):
            if not options:
                assert predict(made).isfinite().all()
                continue
            with pytest.raises(InputError, match="came to a block as torch.bfloat16.*torch.autocast"):
                predict(made)


# ---- older checkpoints in a training --------------------------------------------------------------


def without_dimensions(file):
    """A checkpoint as a version without dimensions would have written it, its optimiser's state included."""
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["state_dict"] = older(checkpoint["state_dict"])
    for optimizer in checkpoint["optimizer_states"]:
        for state in optimizer["state"].values():
            state |= {name: value.reshape(()) for name, value in state.items() if value.shape == (1,)}
    torch.save(checkpoint, file)


def test_a_run_goes_on_from_an_older_checkpoint(tmp_path):
    source = tiny_data.write(tmp_path / "data")

    def fit(epochs, checkpoint=None):
        torch.manual_seed(1)
        module = GlobalForecastModule(net(use_physics_mask=True), lr=1e-2, warmup_epochs=1, max_epochs=9)
        run = trainer(tmp_path, TerrainCallback(lr_factor=2.0), max_epochs=epochs)
        run.fit(module, datamodule=data(source), ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.state_dict()

    fit(1)
    expected = fit(2, tmp_path / "1.ckpt")
    without_dimensions(tmp_path / "1.ckpt")
    got = fit(2, tmp_path / "1.ckpt")
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("host", ["stand-in", "ClimaX"])
def test_older_scalars_are_pretrained_weights(request, tmp_path, capsys, caplog, host):
    """Upstream drops what is of another shape than the model's."""
    climax = request.getfixturevalue("climax") if host == "ClimaX" else request.getfixturevalue("no_climax")
    shards = tiny_data.write(tmp_path / "shards")
    small = [*forecasting(shards, tmp_path / "out"), ON, "--trainer.fast_dev_run=true"]
    state = {"net.blocks.0.attn.bias.elevation_alpha": torch.tensor(4.0)}
    state["net.pos_embed"] = torch.zeros(1, 32, 16)  # upstream wants it
    torch.save({"state_dict": state}, tmp_path / "old.ckpt")
    with caplog.at_level("INFO", "climax_elevation"):
        train("global_forecast", climax, [*small, f"--model.pretrained_path={tmp_path}/old.ckpt"])
    assert "net.blocks.0.attn.bias.elevation_alpha moved from 4 to" in caplog.text
    assert "Removing key net.blocks" not in capsys.readouterr().out


# ---- long runs ------------------------------------------------------------------------------------


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts memory and descriptors as Linux tells them")
def test_neither_memory_nor_descriptors_grow(tmp_path):
    """Training on shards, with a record of the bias: many epochs, each with its own reading and validation."""
    from pytorch_lightning import Callback

    seen = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step % 500 == 0:
                gc.collect()
                seen.append((len(os.listdir("/proc/self/fd")), len(gc.get_objects()), resident_bytes()))

    torch.manual_seed(0)
    made = StandInClimaX(
        tiny_data.VARIABLES, [8, 16], 4, embed_dim=16, depth=1, decoder_depth=1, num_heads=2, use_physics_mask=True
    )
    module = GlobalForecastModule(made, lr=1e-4, warmup_epochs=1, max_epochs=STEPS + 1)
    callbacks = [TerrainCallback(lr_factor=2.0), BiasMonitor(every_n_steps=100), Count()]
    run = trainer(tmp_path, *callbacks, max_epochs=-1, max_steps=STEPS, enable_checkpointing=False, limit_val_batches=1)
    run.fit(module, datamodule=data(tiny_data.write(tmp_path / "data", train=(12, 12, 12, 12, 12, 12, 12))))
    assert run.global_step == STEPS
    assert len(seen) == STEPS // 500
    descriptors, objects, resident = zip(*seen, strict=True)
    assert descriptors[-1] == descriptors[0]
    # one object a step would be 1000 between the second count and the last
    assert objects[-1] - objects[1] < 200, objects
    # one token vector of the batch a step, 4 x 8 x 16 numbers, would be 2 MB
    assert resident[-1] - resident[1] < 1.5e6, resident
