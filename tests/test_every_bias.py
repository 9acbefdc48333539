"""What holds for every bias: engines, blocks, gradients, copies, precision, compilation."""

import copy
import itertools
import pickle

import pytest
import torch
from engines import CPU_ENGINES, TRITON_CASES
from terrains import EVERY_BIAS, GRID, global_terrain, make
from test_attach import MEAN, STD, VARIABLES, strong

from climax_elevation import (
    Attention3D,
    InputError,
    RelativePositionBias3D,
    available_biases,
    biased_attention,
    build_bias,
)
from climax_elevation.bias import SumBias
from climax_elevation.bias.base import ElevationBias, leaves, literal, map_tensors
from climax_elevation.block import TerrainBlock, timm_block
from climax_elevation.host import StandInClimaX

LAT, LON = torch.linspace(-70, 70, 8).numpy(), torch.arange(0, 360, 22.5).numpy()
TOKENS = GRID[0] * GRID[1]


def model(case=None, blocks="all", **bias_args):
    torch.manual_seed(0)
    flags = {}
    if case:
        name, arguments = EVERY_BIAS[case]
        flags = {
            "use_physics_mask": True,
            "bias_type": name,
            "bias_args": {"blocks": blocks, "static_terrain": True, **arguments, **bias_args},
        }
    made = StandInClimaX(VARIABLES, [8, 16], patch_size=2, embed_dim=32, depth=3, decoder_depth=1, num_heads=4, **flags)
    if case:
        made.terrain.set_statistics(MEAN, STD, "a test")
        made.terrain.set_grid(LAT, LON, "a test")
    return made


def predict(made, seed=1):
    torch.manual_seed(seed)
    x = torch.randn(2, 4, 8, 16)
    x[:, 0] = torch.rand(8, 16) * 4 - 0.5  # 0 to 2800 m
    return made(x, None, torch.tensor([0.06, 0.24]), VARIABLES, VARIABLES, None, None)[1]


@pytest.mark.parametrize("engine", ["auto", "tiled"])
@pytest.mark.parametrize("case", EVERY_BIAS)
def test_a_model_that_first_forecasts_in_inference_mode_then_trains(case, engine):
    """As Lightning does, which looks at some of the validation data before it trains."""
    made, same = model(case, engine=engine), model(case, engine=engine)
    with torch.inference_mode():
        predict(made)
    for each in (made, same):
        predict(each).square().sum().backward()
    for (name, parameter), other in zip(made.named_parameters(), same.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    predict(made)


def test_every_registered_bias_is_tested_here():
    assert {part for name, _ in EVERY_BIAS.values() for part in name.split("+")} == set(available_biases())


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        (case, engine)
        for case, engine in itertools.product(EVERY_BIAS, CPU_ENGINES)
        if engine != "triton" or case in TRITON_CASES
    ],
)
def test_engines_equal_dense_with_every_gradient(case, engine):
    terrain = global_terrain()
    bias = make(case, terrain)
    inputs = bias.inputs(terrain)
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 4, TOKENS, 8, dtype=torch.float64).requires_grad_() for _ in range(3))
    weights = torch.randn(2, 4, TOKENS, 8, dtype=torch.float64)
    learned = [q, k, v, *bias.parameters()]
    results = []
    for name in ("dense", engine):
        out = biased_attention(q, k, v, bias, inputs, engine=name)
        results.append((out, *torch.autograd.grad((out * weights).sum(), learned)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_shape_type_and_batch(case):
    terrain = global_terrain()
    bias = make(case, terrain)
    values = bias(*bias.inputs(terrain))
    assert values.dtype == torch.float64
    assert values.shape[0] in (1, 2)
    assert values.shape[1] in (1, 4)
    assert values.shape[2:] == (TOKENS, TOKENS)
    assert values.isfinite().all()
    single = bias.float()(*map_tensors(lambda t: t.float() if t.is_floating_point() else t, bias.inputs(terrain)))
    assert single.dtype == torch.float32
    # a row's constant is nothing to softmax; float32 keeps logits of up to a few hundred to 1e-4
    torch.testing.assert_close(single.softmax(-1).double(), values.softmax(-1), rtol=1e-3, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bias(*bias.inputs(terrain)), bias(*bias.inputs(terrain)))
        assert bias(*bias.inputs(terrain)).dtype == torch.float32


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_some_queries_with_all_keys_are_rows_of_the_whole(case):
    terrain = global_terrain()
    bias = make(case, terrain)
    inputs = bias.inputs(terrain)
    features = bias.features(*inputs)
    rows = bias.pairwise(map_tensors(lambda values: values[:, 5:9], features), features)
    torch.testing.assert_close(rows, bias(*inputs)[:, :, 5:9], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_reordered_inputs_give_the_reordered_bias(case):
    terrain = global_terrain()
    bias = make(case, terrain)
    inputs = bias.inputs(terrain)
    order = torch.stack([torch.randperm(TOKENS, generator=torch.Generator().manual_seed(s)) for s in (0, 1)])
    whole = bias(*inputs).expand(2, -1, -1, -1)
    expected = torch.stack([values[:, o][:, :, o] for values, o in zip(whole, order, strict=True)])
    got = bias(*bias.reordered(inputs, order))
    torch.testing.assert_close(got.softmax(-1), expected.softmax(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_a_region_is_a_cut_of_the_whole(case):
    """But for normalised coordinates, whose scale is that of the region; up to a row's constant."""
    terrain, ids = global_terrain(), [3, 4, 5, 11, 12, 13, 21]
    bias = make(case, terrain)
    cut = bias(*bias.inputs(terrain.select(ids)))
    parts = bias.parts if type(bias) is SumBias else [bias]
    expected = sum(_cut(part, terrain, ids) for part in parts)
    # 1e-6 is added to what normalised coordinates are divided by, twice
    normalised = any(isinstance(part, RelativePositionBias3D) and part.coords == "normalized" for part in parts)
    torch.testing.assert_close(cut.softmax(-1), expected.softmax(-1), rtol=1e-5 if normalised else 1e-9, atol=1e-12)
    assert (cut - cut[..., :1]).abs().max() > 1e-3


def _cut(bias, terrain, ids):
    inputs = bias.inputs(terrain)
    if isinstance(bias, RelativePositionBias3D) and bias.coords == "normalized":
        return bias(inputs[0][:, ids])  # the largest difference is that of the region, as the published formula has it
    return bias(*inputs)[:, :, ids][:, :, :, ids]


@pytest.mark.parametrize("case", EVERY_BIAS)
@pytest.mark.parametrize("blocks", [[0], [1, 2], "all"])
def test_in_a_model_it_changes_outputs_and_every_parameter_learns(case, blocks):
    made = model(case, blocks)
    plain = predict(strong(model()))
    assert (predict(strong(made)) - plain).abs().max() > 1e-4
    assert sum(isinstance(block, TerrainBlock) for block in made.blocks) == (3 if blocks == "all" else len(blocks))
    predict(made.train()).square().mean().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        if ".bias." in name and not name.endswith("mlp.2.bias"):  # that is the same for all keys
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_the_hosts_weights_and_random_numbers_are_left_alone(case):
    plain = model()
    drawn = torch.rand(1)
    made = model(case)
    assert torch.equal(torch.rand(1), drawn)
    state = made.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    added = set(state) - set(plain.state_dict())
    assert added
    assert all(key.startswith("terrain.") or ".attn.bias." in key for key in added)
    words = ("channel", "head", "token_embeds", "pos_embed", "var_embed")  # what upstream's loaders look for
    assert not [key for key in added for word in words if word in key]


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_copies_and_checkpoints(case):
    made = strong(model(case))
    before = predict(made)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(predict(other), before)
        with torch.no_grad():
            for parameter in other.blocks[0].attn.bias.parameters():
                parameter.add_(torch.rand_like(parameter))
        assert not torch.equal(predict(other), before)
    assert torch.equal(predict(made), before)
    fresh = model(case)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(predict(fresh.eval()), before)
    assert not [key for key, value in made.state_dict().items() if value.numel() > 5000]  # no path, no pair


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_a_training_step_in_bfloat16_is_finite(case):
    made = model(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = predict(made.train()).float().square().mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_a_block_compiles_whole_without_a_graph_break(case):
    terrain = global_terrain(dtype=torch.float32)
    bias = make(case, terrain).float()
    block = TerrainBlock(timm_block(32, 4, 4.0, qkv_bias=True, drop=0.0), bias).eval()
    x = torch.randn(2, TOKENS, 32)
    inputs = bias.inputs(terrain)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, inputs), block(x, inputs), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_relative_3d_is_shown_as_attention_3d():
    made = model("relative_3d", [1])
    assert [isinstance(block.attn, Attention3D) for block in made.blocks] == [False, True, False]
    assert "Attention3D" in repr(made)


def test_what_a_bias_needs_and_the_terrain_lacks_is_named():
    terrain = global_terrain()
    bare = type(terrain)(terrain.elevation_m, terrain.grid)
    for case, what in (
        ("physics", "wind"),
        ("adaptive", "wind"),
        ("ridge", "wind"),
        ("advection", "latitudes and longitudes|a lead time|wind"),
        ("relative_3d physical", "latitudes and longitudes"),
    ):
        with pytest.raises(InputError, match=f"the .* bias.* needs ({what}), and this terrain has none: "):
            make(case, terrain).inputs(bare)


def test_lead_times_and_places_that_a_model_lacks_are_named():
    made = model("advection")
    with pytest.raises(InputError, match="advection bias needs a lead time"):
        made.terrain.for_blocks(made.blocks, torch.zeros(1, 4, 8, 16), None, VARIABLES)
    torch.manual_seed(0)
    name, arguments = EVERY_BIAS["relative_3d physical"]
    made = StandInClimaX(
        VARIABLES,
        [8, 16],
        embed_dim=32,
        depth=1,
        num_heads=4,
        use_physics_mask=True,
        bias_type=name,
        bias_args=arguments,
    )
    made.terrain.set_statistics(MEAN, STD, "a test")
    with pytest.raises(InputError, match=r"needs latitudes and longitudes.*lat\.npy"):
        predict(made)


def test_a_bias_that_needs_the_grid_says_so():
    with pytest.raises(InputError, match="'advection' needs grid"):
        build_bias("advection", num_heads=4)


def test_nested_inputs_are_walked_in_order():
    a, b, c = (torch.full((1,), float(n)) for n in range(3))
    assert [t.item() for t in leaves(((a, (b,)), c))] == [0, 1, 2]
    assert map_tensors(lambda t: t.item() + 1, ((a, (b,)), c)) == ((1, (2,)), 3)


def test_plain_data_is_plain_all_through():
    assert literal((1, "a", (2.5, None, True))) == "(1, 'a', (2.5, None, True))"
    assert literal([1, {"a": [2]}]) == "[1, {'a': [2]}]"
    for value in (
        torch.zeros(1),
        (1, torch.zeros(1)),
        [1, torch.zeros(1)],
        {"a": 1, "b": int},
        (1, [int]),
        float("nan"),
    ):
        assert literal(value) is None
    assert literal((1, 2), lasting=True) == "(1, 2)"
    for value in ([1], {"a": 1}, (1, [2])):  # which can be changed in their place
        assert literal(value) is not None
        assert literal(value, lasting=True) is None


def test_what_a_bias_does_not_define_is_named():
    class Empty(ElevationBias):
        pass

    for name, arguments in (("inputs", (None,)), ("features", (None,)), ("pairwise", ((), ()))):
        with pytest.raises(NotImplementedError, match=rf"Empty does not define {name}\("):
            getattr(Empty(), name)(*arguments)
