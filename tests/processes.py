"""Gradients of every bias in several processes, against those of one: run by torchrun from test_processes.py.

    torchrun --nproc-per-node N tests/processes.py OUT

Each rank writes OUT/RANK.json: for each case and way, the largest difference of a gradient, over the largest entry of
the same gradient.
"""

import json
import logging
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy
from terrains import EVERY_BIAS
from test_attach import MEAN, STD, VARIABLES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from climax_elevation.host import StandInClimaX

LAT, LON = torch.linspace(-70, 70, 8).numpy(), torch.arange(0, 360, 22.5).numpy()
BATCH = 4
OPTIONS = {
    "engine dense": ("physics", {"engine": "dense"}),
    "engine tiled": ("physics+relative_3d", {"engine": "tiled"}),
    "ground of each sample": ("physics", {"static_terrain": False}),
    "one block": ("physics", {"blocks": [1]}),
    "direction both": ("physics", {"direction": "both"}),
    "direction query_above": ("physics", {"direction": "query_above"}),
    "alpha 0": ("physics", {"alpha_init": 0.0}),
    "beta 0": ("physics", {"beta_init": 0.0}),
    "zero_init": ("relative_3d", {"zero_init": True}),
    "patch_order wind": ("physics", {"patch_order": "wind"}),
    "patch_order wind_as_published": ("relative_2d", {"patch_order": "wind_as_published"}),
    "control flat": ("physics", {"control": "flat"}),
    "control mirrored": ("ridge", {"control": "mirrored"}),
    "control permuted": ("relative_3d", {"control": "permuted"}),
    "a plane": ("advection", {"grid_spacing_m": 3000.0}),
    "land": ("structure", {"land": True, "land_variable": "2m_temperature", "static_terrain": False}),
    "a file of elevation": ("physics+relative_3d", {"elevation_file": "a file", "elevation_variable": "ground"}),
    "scales": ("ridge", {"height_scale_m": 500.0, "wind_threshold_m_s": 3.0, "alpha_init": 2.0, "beta_init": 0.5}),
}
CASES = EVERY_BIAS | OPTIONS


@cache
def file_of_hills():
    """In a folder of this process."""
    hills = 1500 + 1500 * np.sin(LON / 40) * np.cos(LAT / 30)[:, None]
    path = Path(tempfile.mkdtemp()) / "ground.npz"
    np.savez(path, ground=hills.astype(np.float32), lat=LAT, lon=LON)
    return str(path)


def model(case):
    name, arguments = CASES[case]
    if "elevation_file" in arguments:
        arguments = arguments | {"elevation_file": file_of_hills()}
    torch.manual_seed(0)
    made = StandInClimaX(
        VARIABLES,
        [8, 16],
        embed_dim=16,
        depth=2,
        decoder_depth=1,
        num_heads=4,
        drop_path=0.0,
        drop_rate=0.0,
        use_physics_mask=True,
        bias_type=name,
        bias_args={"blocks": "all", "static_terrain": True} | arguments,
    )
    share = {"2m_temperature": 0.5}  # the mean and the standard deviation of what is read as land
    made.terrain.set_statistics(MEAN | share, STD | share, "a test")
    if case != "a plane":
        made.terrain.set_grid(LAT, LON, "a test")
    return made.double()


def loss(net, samples):
    """Mean over samples, so that the mean over processes is that of the whole batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 4, 8, 16, generator=generator, dtype=torch.float64) / 10
    x[:, 0] = torch.rand(8, 16, generator=generator) * 4 - 0.5  # 0 to 2800 m
    lead_times = torch.tensor([0.06, 0.24, 0.12, 0.06], dtype=torch.float64)
    return net(x[samples], None, lead_times[samples], VARIABLES, VARIABLES, None, None)[1].square().mean()


def gradients(net):
    """By name; those that FSDP2 spreads over processes, whole."""
    return {
        name: getattr(parameter.grad, "full_tensor", lambda g=parameter.grad: g)()
        for name, parameter in net.named_parameters()
    }


def alone(case):
    net = model(case)
    loss(net, slice(None)).backward()
    return gradients(net)


def with_ddp(case, mine):
    net = model(case)
    shared = DistributedDataParallel(net, find_unused_parameters=False)
    loss(shared, mine).backward()
    return gradients(net)


def with_fsdp2(case, mine):
    net, mesh = model(case), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    loss(net, mine).backward()
    return gradients(net)


class Module(LightningModule):
    """All cases at once: Lightning begins slowly."""

    def __init__(self, mine):
        super().__init__()
        self.nets, self.mine = nn.ModuleList(model(case) for case in CASES), mine
        self.found = []

    def training_step(self, batch, batch_idx):
        return sum(loss(net, self.mine) for net in self.nets)

    def on_before_optimizer_step(self, optimizer):
        self.found = [{n: g.clone() for n, g in gradients(net).items()} for net in self.nets]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def with_lightning(mine):
    """The gradients of each case."""
    module = Module(mine)
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=DDPStrategy(find_unused_parameters=False),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([0]))
    return dict(zip(CASES, module.found, strict=True))


def apart(found, expected):
    """The largest difference, relative to the largest entry of the same gradient, if that is more than rounding."""
    assert found.keys() == expected.keys()
    rounding = 1e-12 * max(value.abs().max() for value in expected.values())
    return max(
        ((found[name] - value).abs().max() / value.abs().max().clamp_min(rounding)).item()
        for name, value in expected.items()
    )


def main(out):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    ways = {"DDP": with_ddp} | ({"FSDP2": with_fsdp2} if world == 2 else {})
    lightnings = with_lightning(mine)
    found = {}
    for case in CASES:
        expected = alone(case)
        found[case] = {name: apart(way(case, mine), expected) for name, way in ways.items()}
        found[case]["Lightning"] = apart(lightnings[case], expected)
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
