"""The engine "triton": its kernels on a GPU, or else in Triton's interpreter, equal dense in every gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from terrains import global_terrain, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from climax_elevation import InputError, PhysicsBias, RelativePositionBias3D, biased_attention
from climax_elevation.attention.engines import triton as engine
from climax_elevation.bias import AdaptiveBias
from climax_elevation.block import TerrainBlock, timm_block

pytestmark = pytest.mark.skipif(not engine.INSTALLED, reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # batch, heads, tokens, head width, terrains
    (1, 2, 1, 8, 1),
    (2, 2, 21, 24, 1),
    (2, 1, 19, 96, 2),
    (3, 1, 32, 16, 3),  # tiles fill it evenly
]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles, and blocks of the relative bias, that a few dozen tokens fill several of."""
    launch = engine.Launch(16, 16, 4, 1)
    monkeypatch.setattr(
        engine, "LAUNCHES", {(size, 128): engine.Launches(launch, launch, launch) for size in (2, 4, 8)}
    )
    monkeypatch.setattr(engine, "PAIRS", {engine.MOST_UNITS: engine.Launch(8, 16, 4, 1)})
    monkeypatch.setattr(engine, "BLOCK_HELD", 1)  # 16 rows
    monkeypatch.setattr(engine, "BLOCK_COLUMNS", 16)


def random(*shape, dtype=torch.float64, scale=1.0):
    return (torch.rand(*shape, dtype=dtype) * scale).to(DEVICE).requires_grad_()


def both(bias, inputs, batch, heads, tokens, width, **options):
    """Output and every gradient, those of the inputs too, of dense and of triton attention, in float64."""
    bias = bias.double().to(DEVICE)
    q, k, v, weights = (random(batch, heads, tokens, width, scale=4) - 2 for _ in range(4))
    learned = [q, k, v, *bias.parameters(), *inputs]
    for name in ("dense", "triton"):
        out = biased_attention(q, k, v, bias, inputs, engine=name, **options)
        yield [out, *torch.autograd.grad((out * weights).sum(), learned)]


def assert_equal(results):
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", ["key_above", "query_above", "both"])
@pytest.mark.parametrize("wind", [True, False])
def test_physics_equals_dense_with_every_gradient(small_tiles, shape, direction, wind):
    torch.manual_seed(0)
    batch, heads, tokens, width, terrains = shape
    z = (random(terrains, tokens) * 12).round().mul(250).detach().requires_grad_()  # with ties
    inputs = (z, random(batch, tokens, scale=12)) if wind else (z,)
    assert_equal(both(PhysicsBias(wind=wind, direction=direction), inputs, batch, heads, tokens, width, scale=0.3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hidden_dim", [16, 40])
def test_relative_3d_equals_dense_with_every_gradient(small_tiles, shape, hidden_dim):
    torch.manual_seed(0)
    batch, heads, tokens, width, terrains = shape
    coords = random(terrains, tokens, 3)
    assert_equal(both(RelativePositionBias3D(heads, hidden_dim), (coords,), batch, heads, tokens, width))


@pytest.mark.parametrize("alpha", [0.0, -0.5])
def test_strengths_that_do_not_penalise_learn_too(small_tiles, alpha):
    torch.manual_seed(0)
    inputs = (random(1, 20, scale=8000), random(1, 20, scale=12))
    assert_equal(both(PhysicsBias(alpha_init=alpha), inputs, 2, 1, 20, 8))


@pytest.mark.parametrize("case", ["physics", "relative_3d"])
def test_the_tiles_that_are_used_equal_dense(case):
    """Of float32, at its precision; 64 tokens fill them evenly, 70 do not."""
    for grid in ((8, 8), (7, 10)):
        terrain = global_terrain(grid, batch=1, dtype=torch.float32)
        bias = make(case, terrain, num_heads=2).float().to(DEVICE)
        inputs = tuple(values.to(DEVICE) for values in bias.inputs(terrain))
        tokens = grid[0] * grid[1]
        q, k, v = (random(1, 2, tokens, 48, dtype=torch.float32, scale=2) for _ in range(3))
        results = []
        for name in ("dense", "triton"):
            out = biased_attention(q, k, v, bias, inputs, engine=name)
            results.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v, *bias.parameters()])])
        for expected, got in zip(*results, strict=True):
            assert (got - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-3


@pytest.mark.parametrize("case", ["physics", "relative_3d"])
def test_two_runs_are_the_same_to_the_last_bit(small_tiles, case):
    terrain = global_terrain((5, 7), dtype=torch.float32)
    bias = make(case, terrain, num_heads=1).float().to(DEVICE)
    inputs = tuple(values.to(DEVICE) for values in bias.inputs(terrain))
    q, k, v = (random(2, 1, 35, 16, dtype=torch.float32) for _ in range(3))
    runs = []
    for _ in range(2):
        out = biased_attention(q, k, v, bias, inputs, engine="triton")
        runs.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v, *bias.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["physics", "relative_3d"])
def test_errors_are_no_larger_than_those_of_unbiased_attention(dtype, case):
    """Against float64: output and gradients of q, k and v, on terrain that biases by several logits."""
    torch.manual_seed(0)
    exact = [torch.randn(1, 2, 128, 32, dtype=torch.float64, device=DEVICE) for _ in range(4)]
    if case == "physics":
        inputs = (torch.rand(1, 128, dtype=torch.float64, device=DEVICE) * 8000,)
        bias = PhysicsBias(wind=False).to(DEVICE)
    else:
        inputs = (torch.rand(1, 128, 3, dtype=torch.float64, device=DEVICE),)
        bias = RelativePositionBias3D(2).to(DEVICE)
        with torch.no_grad():
            bias.mlp[2].weight.mul_(10)

    def run(attend, of_type):
        q, k, v = (t.to(dtype).to(of_type).requires_grad_() for t in exact[:3])
        out = attend(q, k, v)
        assert out.dtype == of_type
        return [out.detach(), *torch.autograd.grad(out, [q, k, v], exact[3].to(dtype).to(of_type))]

    def error(attend):
        pairs = zip(run(attend, dtype), run(attend, torch.float64), strict=True)
        return [((got.double() - true).norm() / true.norm()).item() for got, true in pairs]

    def attend(q, k, v):
        of_type = bias.double() if q.dtype == torch.float64 else bias.float()
        return biased_attention(q, k, v, of_type, inputs, engine="dense" if q.dtype == torch.float64 else "triton")

    plain = error(nn.functional.scaled_dot_product_attention)
    biased = error(attend)
    # the same roundings in another order: half as much again is allowed; the interpreter cuts bfloat16 off instead of
    # rounding it, which doubles an error that is then no longer even on average
    allowed = 3 if DEVICE == "cpu" and dtype == torch.bfloat16 else 1.5
    assert all(ours <= allowed * theirs for ours, theirs in zip(biased, plain, strict=True)), (biased, plain)


@pytest.mark.parametrize("case", ["physics", "physics without wind", "relative_3d"])
def test_a_block_compiles_whole_and_checkpoints(case):
    terrain = global_terrain(dtype=torch.float32)
    bias = make(case, terrain).float()
    made = TerrainBlock(timm_block(32, 4, 4.0, qkv_bias=True, drop=0.0), bias, engine="triton").to(DEVICE)
    inputs = tuple(values.to(DEVICE) for values in bias.inputs(terrain))
    x = torch.randn(2, 32, 32, device=DEVICE, requires_grad=True)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    results = []
    for out in (made(x, inputs), compiled(x, inputs), checkpoint(made, x, inputs, use_reentrant=False)):
        results.append([out, *torch.autograd.grad(out.square().sum(), list(made.parameters()))])
    for expected, *others in zip(*results, strict=True):
        for got in others:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_frozen_parameters_get_no_gradient_and_the_others_theirs(small_tiles):
    terrain = global_terrain()
    bias = make("physics", terrain).to(DEVICE)
    bias.wind_beta.requires_grad_(False)
    inputs = tuple(values.to(DEVICE) for values in bias.inputs(terrain))
    q = random(2, 1, 32, 8)
    biased_attention(q, q, q, bias, inputs, engine="triton").square().sum().backward()
    assert bias.wind_beta.grad is None
    assert bias.elevation_alpha.grad.abs() > 0
    with torch.no_grad():
        assert not biased_attention(q, q, q, bias, inputs, engine="triton").requires_grad


def test_queries_as_a_layer_cuts_them_equal_their_copies(small_tiles):
    """Views of one projection, as in a block, are read in place; the output lies as the next layer reads it."""
    terrain = global_terrain()
    bias = make("physics", terrain).to(DEVICE)
    inputs = tuple(values.to(DEVICE) for values in bias.inputs(terrain))
    q, k, v = random(2, 32, 3 * 4 * 8).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
    cut = biased_attention(q, k, v, bias, inputs, engine="triton")
    copied = biased_attention(q.contiguous(), k, v.contiguous(), bias, inputs, engine="triton")
    assert torch.equal(cut, copied)
    assert cut.transpose(1, 2).is_contiguous()


def test_what_has_no_kernel_is_refused_with_a_remedy():
    q = torch.zeros(1, 1, 4, 8, device=DEVICE)
    z = torch.zeros(1, 4, device=DEVICE)
    coords = torch.zeros(1, 4, 3, device=DEVICE)
    physics = PhysicsBias(wind=False).to(DEVICE)

    class Other(PhysicsBias):
        """What it computes may be another bias."""

    def refused(match, bias=physics, inputs=(z,), v=q, **options):
        with pytest.raises(InputError, match=match):
            biased_attention(q, q, v, bias, inputs, engine="triton", **options)

    refused("'triton' has no attention dropout: choose 'sdpa'", dropout_p=0.1)
    refused("biases 'physics' and 'relative_3d' .* not for this AdaptiveBias: choose 'tiled'", AdaptiveBias(), (z, z))
    refused("not for this Other", Other(wind=False))
    refused("not for this RelativePositionBias3D", RelativePositionBias3D(1, coords="physical"), (coords,))
    refused("not for this RelativePositionBias3D", RelativePositionBias3D(1, engine.MOST_UNITS + 1), (coords,))
    refused("heads of one width up to 128 .* not of 8 and 4: choose 'tiled'", v=q[..., :4])


@pytest.mark.skipif(DEVICE == "cuda", reason="is about a machine without a GPU")
def test_without_a_gpu_it_says_so_and_the_package_loads_no_kernel():
    program = """
import sys, torch, climax_elevation
assert "climax_elevation.attention.triton_kernels" not in sys.modules
q, z = torch.zeros(1, 1, 4, 8), torch.zeros(1, 4)
climax_elevation.biased_attention(q, q, q, climax_elevation.PhysicsBias(wind=False), (z,), engine="triton")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=compiling())
    assert "InputError: the engine 'triton' runs on a CUDA or ROCm GPU, not on cpu: choose 'tiled'" in ended.stderr


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(engine, "INSTALLED", False)
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(InputError, match="needs the package triton, which is missing: choose 'tiled'"):
        biased_attention(q, q, q, PhysicsBias(wind=False), (torch.zeros(1, 4),), engine="triton")


def test_every_kernel_compiles_for_gpus_without_spilling_registers():
    script = Path(__file__).parent / "gpu_targets.py"
    if not Path(sys.modules["triton"].__file__).parent.joinpath("backends", "nvidia", "bin", "cuobjdump").is_file():
        pytest.skip("needs NVIDIA's assembler, which comes with triton for Linux")
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, env=compiling())
    assert ended.returncode == 0, ended.stderr
    for name, used in json.loads(ended.stdout).items():
        assert used["shared"] <= {"80": 163, "90": 227}[name.split()[0]] * 1024, (name, used)
        assert used["stack"] <= 64, (name, used)  # bytes a thread


def compiling():
    """The environment without the interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
