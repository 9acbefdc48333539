"""Two processes that train one block: the gradient of the whole batch, with every engine of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from terrains import global_terrain, make
from torch.nn.parallel import DistributedDataParallel

from climax_elevation.block import TerrainBlock, timm_block

CASES = ["physics", "relative_3d", "sum of three"]


def block(case, engine):
    bias = make(case, global_terrain(dtype=torch.float64))
    torch.manual_seed(0)
    return TerrainBlock(timm_block(32, 4, 4.0, qkv_bias=True, drop=0.0), bias, engine).double()


def gradients(run, of, samples):
    terrain = global_terrain(batch=4)
    x = torch.randn(4, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))[samples]
    mine = type(terrain)(terrain.elevation_m, terrain.grid, terrain.u[samples], terrain.v[samples],
                         terrain.speed[samples], terrain.lat, terrain.lon, terrain.lead_hours[samples])
    run(x, of.attn.bias.inputs(mine)).square().mean().backward()
    return {name: parameter.grad for name, parameter in of.named_parameters()}


def main(rank, port, out):
    dist.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
    found = {}
    for case in CASES:
        for engine in ("sdpa", "tiled"):
            shared = block(case, engine)
            found[case, engine] = gradients(DistributedDataParallel(shared), shared, slice(2 * rank, 2 * rank + 2))
            alone = block(case, "dense")
            found[case, engine, "alone"] = gradients(alone, alone, slice(None))
    torch.save(found, out / f"{rank}.pt")


main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
"""


def test_gradients_are_those_of_the_whole_batch(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, str(tmp_path / "run.py"), str(rank), str(tmp_path / "meet"), str(tmp_path)] for rank in (0, 1)
    ]
    runs = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    for run in runs:
        errors = run.communicate(timeout=240)[1]
        assert run.returncode == 0, errors
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        pairs = [key for key in found if len(key) == 2]
        assert len(pairs) == 6
        for key in pairs:
            for name, expected in found[(*key, "alone")].items():
                torch.testing.assert_close(found[key][name], expected, rtol=1e-9, atol=1e-12, msg=f"{key} {name}")
