"""The tiled engine: equal to dense whatever the tiles, in every gradient, in every precision."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from terrains import EVERY_BIAS, global_terrain, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from climax_elevation import InputError, PhysicsBias, RelativePositionBias3D, biased_attention
from climax_elevation.attention import bias_tiles, partial_softmax
from climax_elevation.attention.engines import tiled
from climax_elevation.block import TerrainBlock, timm_block

pytestmark = pytest.mark.usefixtures("loops")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that a few dozen tokens fill several of, none of them evenly."""
    use_tiles(monkeypatch, side=7, tile_held=200, buffer_held=100)


def use_tiles(monkeypatch, *, side, tile_held, buffer_held):
    for module in (tiled, bias_tiles):
        monkeypatch.setattr(module, "SIDE", side)
    monkeypatch.setattr(bias_tiles, "TILE_HELD", tile_held)
    monkeypatch.setattr(partial_softmax, "BUFFER_HELD", buffer_held)


def both(bias, inputs, batch, heads, tokens, seed=0, **options):
    """Output and every gradient of dense and of tiled attention, in float64."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, 8, dtype=torch.float64).requires_grad_() for _ in range(3))
    weights = torch.randn(batch, heads, tokens, 8, dtype=torch.float64)
    learned = [q, k, v, *bias.parameters()]
    for engine in ("dense", "tiled"):
        out = biased_attention(q, k, v, bias, inputs, engine=engine, **options)
        yield [out, *torch.autograd.grad((out * weights).sum(), learned)]


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_many_small_tiles_equal_dense_with_every_gradient(small_tiles, case):
    terrain = global_terrain((5, 9), batch=2)
    bias = make(case, terrain, num_heads=3)
    for expected, got in zip(*both(bias, bias.inputs(terrain), 2, 3, 45, scale=0.5), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 40),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    shared=st.booleans(),
    tie=st.integers(1, 3000),
    held=st.tuples(st.integers(1, 40), st.integers(50, 4000), st.integers(1, 4000)),
    seed=st.integers(0, 1000),
)
def test_any_shape_terrain_and_tile_equals_dense(tokens, batch, heads, shared, tie, held, seed):
    """Terrain of one or of every sample, with ties where `tie` is small."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(0, tie, (1 if shared else batch, tokens), generator=generator).double()
    w = torch.rand(batch, tokens, generator=generator, dtype=torch.float64) * 12
    with pytest.MonkeyPatch.context() as patched:
        use_tiles(patched, **dict(zip(("side", "tile_held", "buffer_held"), held, strict=True)))
        torch.manual_seed(seed)
        for bias, inputs in (
            (PhysicsBias(direction="both").double(), (z, w)),
            (RelativePositionBias3D(heads, 4).double(), (torch.stack([z, w[:1].expand_as(z), z * 2], -1),)),
        ):
            for expected, got in zip(*both(bias, inputs, batch, heads, tokens, seed), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


def test_heads_of_another_width_for_values(small_tiles):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 30, 8, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, 2, 30, 5, dtype=torch.float64)
    z, bias = torch.rand(1, 30, dtype=torch.float64) * 3000, PhysicsBias(wind=False).double()
    dense, got = (biased_attention(q, k, v, bias, (z,), engine=engine) for engine in ("dense", "tiled"))
    torch.testing.assert_close(got, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["physics", "relative_3d", "sum of three"])
def test_two_runs_are_the_same_to_the_last_bit(small_tiles, case):
    terrain = global_terrain((5, 9), batch=2, dtype=torch.float32)
    bias = make(case, terrain).float()
    inputs = bias.inputs(terrain)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 45, 16).requires_grad_() for _ in range(3))
    runs = []
    for _ in range(2):
        out = biased_attention(q, k, v, bias, inputs, engine="tiled")
        runs.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v, *bias.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_errors_are_no_larger_than_those_of_unbiased_attention(dtype):
    """Against float64: output and gradients of q, k and v, on terrain that biases by up to 8."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 4, 128, 32, dtype=torch.float64) for _ in range(4)]
    z, bias = torch.rand(1, 128, dtype=torch.float64) * 8000, PhysicsBias(wind=False)

    def run(attend, of_type):
        q, k, v = (t.to(dtype).to(of_type).requires_grad_() for t in exact[:3])
        out = attend(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, [q, k, v], exact[3].to(dtype).to(of_type))]

    def error(attend):
        pairs = zip(run(attend, dtype), run(attend, torch.float64), strict=True)
        return [((got.double() - true).norm() / true.norm()).item() for got, true in pairs]

    plain = error(nn.functional.scaled_dot_product_attention)
    biased = error(
        lambda q, k, v: biased_attention(
            q, k, v, bias.double() if q.dtype == torch.float64 else bias.float(), (z,), engine="tiled"
        )
    )
    # the same roundings in another order: half as much again is allowed
    assert all(ours <= 1.5 * theirs for ours, theirs in zip(biased, plain, strict=True)), (biased, plain)


def block(case, terrain):
    bias = make(case, terrain).float()
    return TerrainBlock(timm_block(32, 4, 4.0, qkv_bias=True, drop=0.0), bias, engine="tiled")


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_a_block_compiles_whole_with_its_gradients(case):
    terrain = global_terrain(dtype=torch.float32)
    made = block(case, terrain)
    inputs = made.attn.bias.inputs(terrain)
    x = torch.randn(2, 32, 32)
    results = []
    for run in (made, torch.compile(made, fullgraph=True, backend="aot_eager")):
        out = run(x, inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(made.parameters()))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["physics", "relative_3d", "ridge"])
def test_activation_checkpointing_gives_the_same_gradients(case):
    terrain = global_terrain(dtype=torch.float32)
    made = block(case, terrain)
    inputs = made.attn.bias.inputs(terrain)
    x = torch.randn(2, 32, 32, requires_grad=True)
    plain = torch.autograd.grad(made(x, inputs).square().sum(), list(made.parameters()))
    again = checkpoint(made, x, inputs, use_reentrant=False)
    for a, b in zip(plain, torch.autograd.grad(again.square().sum(), list(made.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_get_no_gradient_and_the_others_theirs():
    terrain = global_terrain()
    bias = make("physics", terrain)
    bias.wind_beta.requires_grad_(False)
    q, k, v = (torch.randn(2, 4, 32, 8, dtype=torch.float64) for _ in range(3))
    biased_attention(q, k, v, bias, bias.inputs(terrain), engine="tiled").square().sum().backward()
    assert bias.wind_beta.grad is None
    frozen = bias.elevation_alpha.grad.clone()
    bias.elevation_alpha.grad = None
    biased_attention(q, k, v, bias, bias.inputs(terrain), engine="dense").square().sum().backward()
    torch.testing.assert_close(bias.elevation_alpha.grad, frozen, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert not biased_attention(q, k, v, bias, bias.inputs(terrain), engine="tiled").requires_grad


def test_a_subclass_with_a_pairwise_of_its_own_is_not_differentiated_as_its_parent(small_tiles):
    class Twice(PhysicsBias):
        def pairwise(self, query, key):
            return 2 * super().pairwise(query, key)

    bias, z = Twice(wind=False).double(), torch.rand(1, 30, dtype=torch.float64) * 3000
    for expected, got in zip(*both(bias, (z,), 2, 3, 30), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_the_gradient_outlives_the_module():
    terrain = global_terrain()
    bias = make("physics", terrain)
    alpha = bias.elevation_alpha
    q = torch.randn(2, 4, 32, 8, dtype=torch.float64)
    out = biased_attention(q, q, q, bias, bias.inputs(terrain), engine="tiled")
    del bias
    out.square().sum().backward()
    assert alpha.grad.abs() > 0


def test_dropout_is_refused():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(InputError, match="'tiled' has no attention dropout: choose 'sdpa'"):
        biased_attention(q, q, q, PhysicsBias(wind=False), (torch.zeros(1, 4),), dropout_p=0.1, engine="tiled")
