"""What a plan says of memory, against what a real forward keeps for backward."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny_data
import torch

from climax_elevation.host import StandInClimaX
from climax_elevation.upstream.memory import counted, kept_by_bias, kept_by_network

BATCH, TOLERANCE = 3, 0.05
CPU = torch.device("cpu")
STATISTICS = {"orography": 378.0, "10m_u_component_of_wind": 1.0, "10m_v_component_of_wind": 1.0}
CASES = [
    *(("physics", engine, one) for engine in ("dense", "sdpa", "tiled") for one in (True, False)),
    *(("relative_3d", engine, True) for engine in ("dense", "sdpa", "tiled")),
    *((name, "sdpa", True) for name in ("structure", "advection", "ridge", "relative_2d", "physics+relative_3d")),
]


def network(**options):
    torch.manual_seed(0)
    size = {"img_size": [16, 32], "patch_size": 2, "embed_dim": 64, "depth": 3, "decoder_depth": 2, "num_heads": 4}
    return StandInClimaX(tiny_data.VARIABLES, **size, **options)


def batch():
    x = torch.randn(BATCH, 4, 16, 32) / 10
    x[:, 0] = torch.rand(16, 32) * 4 - 0.4
    return x, None, torch.full((BATCH,), 0.24), tiny_data.VARIABLES, tiny_data.VARIABLES, None, None


def really_kept(net, autocast=nullcontext):
    with counted(list(net.parameters())) as total, autocast():
        net(*batch())[1].square().mean()
    return total()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("autocast", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["32", "bf16"])
def test_without_a_bias(parallel, autocast):
    net = network(parallel_patch_embed=parallel)
    estimated = kept_by_network(net, 4, BATCH, CPU, autocast)
    assert estimated == pytest.approx(really_kept(net, autocast), rel=TOLERANCE)


@pytest.mark.parametrize(("name", "engine", "one"), CASES)
def test_with_a_bias(name, engine, one):
    """128 tokens, of which 32 and 64 were tried; the estimate is of what the bias adds, too."""
    plain = really_kept(network())
    arguments = {"blocks": "all", "engine": engine, "static_terrain": one}
    net = network(use_physics_mask=True, bias_type=name, bias_args=arguments)
    net.terrain.set_statistics(dict.fromkeys(STATISTICS, 0.0), STATISTICS, "a test")
    net.terrain.set_grid(torch.linspace(-70, 70, 16).numpy(), torch.arange(0, 360, 11.25).numpy(), "a test")
    state = torch.get_rng_state()
    more = kept_by_bias(net.blocks[0], engine, 128, BATCH, one_ground=one, device=CPU)
    without = kept_by_network(net, 4, BATCH, CPU, nullcontext)
    assert torch.equal(torch.get_rng_state(), state)
    real = really_kept(net)
    assert without + 3 * more == pytest.approx(real, rel=TOLERANCE)
    assert 3 * more == pytest.approx(real - plain, rel=2 * TOLERANCE)


PEAK = """
import sys, threading, time
import torch
from contextlib import nullcontext
from climax_elevation.host import StandInClimaX
from climax_elevation.upstream.memory import kept_by_bias, kept_by_network, of_weights

engine, batch, cpu = sys.argv[1], 4, torch.device("cpu")
torch.set_num_threads(1)
names = [f"v{i}" for i in range(12)] + ["orography"]
bias = {"blocks": "all", "engine": engine, "static_terrain": True, "wind": False}
flag = {"use_physics_mask": engine != "off", "bias_args": bias if engine != "off" else None}
net = StandInClimaX(names, [64, 128], 4, embed_dim=128, depth=4, decoder_depth=1, num_heads=8, **flag)
estimate = of_weights(net, 1) + kept_by_network(net, 13, batch, cpu, nullcontext)
if engine != "off":
    net.terrain.set_statistics({"orography": 378.0}, {"orography": 841.0}, "a script")
    estimate += 4 * kept_by_bias(net.blocks[0], engine, 512, batch, one_ground=True, device=cpu)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
x = torch.randn(batch, 13, 64, 128)
x[:, 12] = (4000 * torch.rand(64, 128) - 378) / 841


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096


peak, over, start = [0], threading.Event(), resident()


def watch():
    while not over.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)


watching = threading.Thread(target=watch)
watching.start()
for _ in range(2):
    optimizer.zero_grad()
    net(x, None, torch.full((batch,), 0.24), names, names, None, None)[1].square().mean().backward()
    optimizer.step()
over.set()
watching.join()
print(estimate, peak[0] - start + sum(4 * weight.numel() for weight in net.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads what is resident as Linux tells it")
@pytest.mark.parametrize("engine", ["off", "dense", "sdpa", "tiled"])
def test_the_peak_of_real_steps(engine):
    """In a process of its own, whose allocator gives back what is freed."""
    own = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    run = [sys.executable, "-c", PEAK, engine]
    done = subprocess.run(run, env=os.environ | own, capture_output=True, text=True, timeout=300, check=True)
    estimated, measured = map(int, done.stdout.split())
    assert 0.8 * measured < estimated < 1.05 * measured
