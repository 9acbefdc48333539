"""Torch's other ways to call a block: an engine's outcome depends on its arguments alone."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from terrains import EVERY_BIAS, global_terrain, make
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrize

from climax_elevation import InputError, PhysicsBias, biased_attention, compiled, register_bias
from climax_elevation.bias import AdvectionBias, RidgeBias, SumBias
from climax_elevation.bias.as_data import described, given_values, tensors_of
from climax_elevation.bias.registry import _biases
from climax_elevation.block import PhysicsGuidedBlockCorrected, TerrainBlock, timm_block

TOKENS = 32
ENGINES = ["sdpa", "tiled"]


@pytest.fixture
def registered():
    """Classes of a test, known for as long as it runs."""
    before = dict(_biases)
    yield register_bias
    _biases.clear()
    _biases.update(before)


def block_of(case, engine, terrain):
    torch.manual_seed(0)
    return TerrainBlock(timm_block(32, 4, 2.0, qkv_bias=True, drop=0.0), make(case, terrain), engine).double()


def other_values(module, seed=3):
    """Other parameters, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)).detach().requires_grad_()
        for name, p in module.named_parameters()
    }


def results(run, wanted):
    out = run()
    return [out, *torch.autograd.grad(out.square().sum(), wanted, materialize_grads=True)]


def close(got, expected, rtol=1e-8, atol=1e-9):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", EVERY_BIAS)
def test_functional_call_uses_the_given_parameters_in_both_directions(case, engine):
    terrain = global_terrain()
    block, dense = block_of(case, engine, terrain), block_of(case, "dense", terrain)
    x, inputs = torch.randn(2, TOKENS, 32, dtype=torch.float64), block.attn.bias.inputs(terrain)
    given = other_values(block)
    dense.load_state_dict({**dense.state_dict(), **given})
    got = results(lambda: functional_call(block, given, (x, inputs)), list(given.values()))
    close(got, results(lambda: dense(x, inputs), list(dense.parameters())))


def test_functional_call_of_the_documents_block_with_300_tokens():
    """Long enough for auto to choose tiled."""
    torch.manual_seed(0)
    blocks = [PhysicsGuidedBlockCorrected(32, 4, engine=engine).double() for engine in ("auto", "dense")]
    blocks[1].load_state_dict(blocks[0].state_dict())
    x, z = torch.randn(1, 300, 32, dtype=torch.float64), torch.rand(1, 300, dtype=torch.float64) * 3000
    u = torch.rand(1, 300, dtype=torch.float64) * 9
    given = other_values(blocks[0])
    close(*(results(lambda b=b: functional_call(b, given, (x, z, u, u)), list(given.values())) for b in blocks))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", EVERY_BIAS)
def test_grad_of_torch_func(case, engine):
    terrain = global_terrain()
    x = torch.randn(2, TOKENS, 32, dtype=torch.float64)

    def gradients(engine):
        block = block_of(case, engine, terrain)
        inputs = block.attn.bias.inputs(terrain)
        return grad(lambda p: functional_call(block, p, (x, inputs)).square().sum())(dict(block.named_parameters()))

    got, expected = gradients(engine), gradients("dense")
    close(got.values(), [expected[name] for name in got])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", EVERY_BIAS)
def test_vmap_over_inputs_and_over_models(case, engine):
    terrain = global_terrain()
    block, dense = block_of(case, engine, terrain), block_of(case, "dense", terrain)
    inputs = block.attn.bias.inputs(terrain)
    x = torch.randn(3, 2, TOKENS, 32, dtype=torch.float64)
    expected = torch.stack([dense(one, inputs) for one in x])
    close([vmap(lambda one: block(one, inputs))(x)], [expected])

    models = [block, copy.deepcopy(block)]
    models[1].load_state_dict({**block.state_dict(), **other_values(block)})
    parameters, buffers = stack_module_state(models)
    got = vmap(lambda p, b: functional_call(block, (p, b), (x[0], inputs)))(parameters, buffers)
    close(got, [model(x[0], inputs) for model in models])

    per_sample = vmap(grad(lambda p, one: functional_call(block, p, (one[None], inputs_of_one)).sum()), (None, 0))
    terrain_of_one = global_terrain(batch=1)
    inputs_of_one = block.attn.bias.inputs(terrain_of_one)
    got = per_sample(dict(block.named_parameters()), x[:, 0])
    for sample, one in enumerate(x[:, 0]):
        found = results_of_sum(dense, one[None], inputs_of_one)
        close([got[name][sample] for name in got], [found[name] for name in got])


def results_of_sum(block, x, inputs):
    names, parameters = zip(*block.named_parameters(), strict=True)
    found = torch.autograd.grad(block(x, inputs).sum(), parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def test_a_second_derivative_is_refused_where_there_is_none():
    terrain = global_terrain()
    bias = make("physics", terrain)
    q = torch.randn(2, 4, TOKENS, 8, dtype=torch.float64, requires_grad=True)
    out = biased_attention(q, q, q, bias, bias.inputs(terrain), engine="tiled")
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(InputError, match="'tiled' has no second derivative: choose 'dense'"):
        first.sum().backward()


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_tiled_compiles_whole_and_agrees_with_dense(case):
    terrain = global_terrain()
    block, dense = block_of(case, "tiled", terrain), block_of(case, "dense", terrain)
    x, inputs = torch.randn(2, TOKENS, 32, dtype=torch.float64), block.attn.bias.inputs(terrain)
    made = torch.compile(block, fullgraph=True, backend="aot_eager")
    close(*(results(lambda b=b: b(x, inputs), list(b.parameters())) for b in (made, dense)))
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["physics", "relative_3d", "sum of three"])
def test_tiled_under_inductor(case):
    if compiled.library() is None:
        pytest.skip("there is no C++ compiler, which inductor wants on CPUs")
    terrain = global_terrain()
    block, dense = block_of(case, "tiled", terrain), block_of(case, "dense", terrain)
    x, inputs = torch.randn(2, TOKENS, 32, dtype=torch.float64), block.attn.bias.inputs(terrain)
    made = torch.compile(block, fullgraph=True)
    close(*(results(lambda b=b: b(x, inputs), list(b.parameters())) for b in (made, dense)))
    torch._dynamo.reset()


def test_a_setting_that_changes_is_noticed_by_a_compiled_block():
    terrain = global_terrain()
    block, dense = block_of("physics", "tiled", terrain), block_of("physics", "dense", terrain)
    x, inputs = torch.randn(2, TOKENS, 32, dtype=torch.float64), block.attn.bias.inputs(terrain)
    made = torch.compile(block, fullgraph=True, backend="aot_eager")
    before = made(x, inputs)
    for each in (block, dense):
        each.attn.bias.direction = "both"
    assert (dense(x, inputs) - before).abs().max() > 1e-3
    close([made(x, inputs)], [dense(x, inputs)])
    torch._dynamo.reset()


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_an_exported_program_computes_the_same_in_another_process(case, tmp_path):
    terrain = global_terrain()
    block = block_of(case, "tiled", terrain)
    for child in block.attn.bias.modules():  # what the constructor has not seen
        if isinstance(child, PhysicsBias):
            child.direction = "both"
    x, inputs = torch.randn(2, TOKENS, 32, dtype=torch.float64), block.attn.bias.inputs(terrain)
    expected = block(x, inputs)
    torch.export.save(torch.export.export(block, (x, inputs)), tmp_path / "block.pt2")
    torch.save({"x": x, "inputs": inputs, "expected": expected}, tmp_path / "case.pt")
    program = """
        import sys, torch, climax_elevation
        from climax_elevation import PhysicsBias
        others = [PhysicsBias(alpha_init=a) for a in range(5)]  # which once took the number of the exported one
        case = torch.load(sys.argv[1] + "/case.pt", weights_only=True)
        block = torch.export.load(sys.argv[1] + "/block.pt2").module()
        torch.testing.assert_close(block(case["x"], case["inputs"]), case["expected"], rtol=1e-9, atol=1e-10)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_a_description_makes_the_same_function_and_draws_no_random_number(case):
    terrain = global_terrain()
    bias = make(case, terrain)
    description = described(bias)
    torch.manual_seed(0)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    again = given_values(description, list(tensors_of(bias).values()))
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(again(*bias.inputs(terrain)), bias(*bias.inputs(terrain)))


def test_what_is_no_data_is_named():
    class Unregistered(PhysicsBias):
        pass

    with pytest.raises(InputError, match="Unregistered is not registered: decorate it with @register_bias"):
        described(Unregistered())
    with pytest.raises(InputError, match="Unregistered is not registered"):
        described(SumBias({"physics": PhysicsBias(), "mine": Unregistered()}))
    bias = PhysicsBias()
    bias.table = torch.zeros(3)
    with pytest.raises(InputError, match="'table' of PhysicsBias is no number, word or tuple of such"):
        described(bias)


def test_a_program_of_another_version_is_refused():
    bias = PhysicsBias()
    with pytest.raises(InputError, match="unknown bias 'pysics'"):
        given_values(described(bias).replace("'physics'", "'pysics'"), [])
    with pytest.raises(InputError, match="here it has elevation_alpha, wind_beta: use the version"):
        given_values(described(bias).replace("'wind_beta'", "'gamma'"), [])


class Softplus(nn.Module):
    def forward(self, value):
        return nn.functional.softplus(value)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wind", [True, False])
def test_a_parametrised_alpha_is_the_one_that_acts(engine, wind):
    terrain = global_terrain()
    bias = make("physics" if wind else "physics without wind", terrain)
    parametrize.register_parametrization(bias, "elevation_alpha", Softplus())
    agrees_with_dense(bias, terrain, engine)


def agrees_with_dense(bias, terrain, engine):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 4, TOKENS, 8, dtype=torch.float64).requires_grad_() for _ in range(3))
    wanted = [q, k, v, *bias.parameters()]
    inputs = bias.inputs(terrain)
    close(*(results(lambda e=e: biased_attention(q, k, v, bias, inputs, engine=e), wanted) for e in (engine, "dense")))


def with_a_third_parameter():
    class Third(PhysicsBias):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.tensor(0.5))

        def features(self, elevation, speed=None):
            height, *rest = super().features(elevation, speed)
            return (height * self.gamma.to(height.dtype), *rest)

    return Third()


def with_a_pairwise_of_its_own():
    class Doubled(AdvectionBias):
        def pairwise(self, query, key):
            return 2 * super().pairwise(query, key)

    return Doubled(4, (4, 8))


def with_features_of_its_own():
    class Wider(AdvectionBias):
        def features(self, position, travel):
            pull, constant, place = super().features(position, travel)
            return pull / 2, constant / 2, place

    return Wider(4, (4, 8))


def with_a_mixin():
    class Halves:
        def pairwise(self, query, key):
            return super().pairwise(query, key) / 2

    class Halved(Halves, PhysicsBias):
        pass

    return Halved()


def a_difference():
    class Difference(SumBias):
        def pairwise(self, query, key):
            first, second = (part.pairwise(q, k) for part, q, k in zip(self.parts, query, key, strict=True))
            return first - second

    return Difference({"one": AdvectionBias(4, (4, 8)), "other": AdvectionBias(4, (4, 8), width_scale=2.0)})


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize(
    "make_bias",
    [with_a_third_parameter, with_a_pairwise_of_its_own, with_features_of_its_own, with_a_mixin, a_difference],
)
def test_what_a_subclass_overrides_counts(make_bias, engine):
    terrain = global_terrain()
    torch.manual_seed(0)
    bias = make_bias().double()
    bias.prepare(terrain)
    agrees_with_dense(bias, terrain, engine)


def test_fast_paths_that_still_belong_stay():
    class Named(AdvectionBias):
        pass

    class Faster(PhysicsBias):
        def pairwise(self, query, key):
            return super().pairwise(query, key)

        def pullback(self, query, key, wanted, out=None):
            return super().pullback(query, key, wanted, out)

    assert Named(4, (4, 8)).has_factors
    assert AdvectionBias(4, (4, 8)).has_factors
    assert not RidgeBias().has_factors
    assert "pullback" in vars(Faster)


def test_a_forward_of_its_own_is_refused():
    with pytest.raises(InputError, match="Mine overrides forward, which engines do not call: override features"):

        class Mine(PhysicsBias):
            def forward(self, *inputs):
                return 2 * super().forward(*inputs)


def test_a_registered_bias_of_ones_own_is_compiled_and_copied(registered):
    @registered("steep")
    class Steep(PhysicsBias):
        def __init__(self, power: float = 2.0) -> None:
            super().__init__(wind=False)
            self._power = power

        def pairwise(self, query, key):
            return super().pairwise(query, key) ** self._power

    terrain = global_terrain()
    torch.manual_seed(0)
    blocks = [
        TerrainBlock(timm_block(32, 4, 2.0, qkv_bias=True, drop=0.0), Steep(3.0), engine).double()
        for engine in ("tiled", "dense")
    ]
    blocks[1].load_state_dict(blocks[0].state_dict())
    x, inputs = torch.randn(2, TOKENS, 32, dtype=torch.float64), blocks[0].attn.bias.inputs(terrain)
    made = torch.compile(blocks[0], fullgraph=True, backend="aot_eager")
    close([made(x, inputs)], [blocks[1](x, inputs)])
    for block in blocks:
        block.attn.bias._power = 2.0
    close([made(x, inputs)], [blocks[1](x, inputs)])
    torch._dynamo.reset()


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_copies_go_ways_of_their_own(case):
    terrain = global_terrain()
    bias = make(case, terrain)
    q = torch.randn(2, 4, TOKENS, 8, dtype=torch.float64)
    for other in (copy.deepcopy(bias), pickle.loads(pickle.dumps(bias))):
        assert described(other) == described(bias)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        for which in (other, bias):
            inputs = which.inputs(terrain)
            dense, got = (biased_attention(q, q, q, which, inputs, engine=engine) for engine in ("dense", "tiled"))
            torch.testing.assert_close(got, dense, rtol=1e-9, atol=1e-10)
