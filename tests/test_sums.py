"""Sums of biases, and biases by name with arguments for each part."""

from types import SimpleNamespace

import pytest
import torch
from terrains import EVERY_BIAS, global_terrain, make

from climax_elevation import InputError, PhysicsBias, attach, biased_attention, build_bias
from climax_elevation.bias import AdvectionBias, SumBias
from climax_elevation.host import StandInClimaX


def test_a_sum_is_the_sum_by_hand():
    z = torch.tensor([[0.0, 1000.0]])
    bias = build_bias(
        "physics+multiplicative", num_heads=1, physics={"wind": False, "alpha_init": 2.0}, multiplicative=None
    )
    values = bias((z,), (z,))[0, 0]
    # up: -2 + log(1 / (1 + e)) = -2 - 1.3133; level: log(1/2)
    assert values[0, 1].item() == pytest.approx(-3.3133, abs=1e-4)
    assert values[0, 0].item() == pytest.approx(-0.6931, abs=1e-4)


@pytest.mark.parametrize("case", ["sum", "sum of three"])
def test_a_sum_is_its_parts_with_every_gradient(case):
    terrain = global_terrain()
    bias = make(case, terrain)
    assert isinstance(bias, SumBias)
    inputs = bias.inputs(terrain)
    parts = sum(part(*given) for part, given in zip(bias.parts, inputs, strict=True))
    got = bias(*inputs)
    torch.testing.assert_close(got, parts, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), list(bias.parameters())),
        torch.autograd.grad((parts * weights).sum(), list(bias.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_each_part_has_its_own_arguments_and_keys():
    bias = build_bias("physics+relative_2d", num_heads=4, physics={"alpha_init": 3.0, "wind": False})
    assert bias.physics.elevation_alpha.item() == 3.0
    assert {name for name, _ in bias.named_parameters()} == {"physics.elevation_alpha", "relative_2d.bias_table"}
    assert bias.needs == frozenset()
    assert build_bias("physics + advection", num_heads=4, grid=(4, 8)).needs == {"speed", "u", "v", "lead_hours"}


def test_factors_of_a_sum_are_its_parts_side_by_side():
    terrain = global_terrain()
    torch.manual_seed(0)
    both = [AdvectionBias(4, terrain.grid).double(), AdvectionBias(4, terrain.grid, width_scale=2.0).double()]
    bias = SumBias({"near": both[0], "far": both[1]})
    bias.prepare(terrain)
    inputs = bias.inputs(terrain)
    f, g = bias.factors(*inputs)
    assert f.shape[-1] == g.shape[-1] == 6
    torch.testing.assert_close((f @ g.transpose(-1, -2)).softmax(-1), bias(*inputs).softmax(-1), rtol=1e-9, atol=1e-12)
    mixed = SumBias({"near": both[0], "hills": PhysicsBias(wind=False).double()})
    mixed.prepare(terrain)
    assert mixed.factors(*mixed.inputs(terrain)) is None


def test_shared_names_stand_beside_the_parts():
    model = StandInClimaX(
        ["orography", "t"],
        [8, 16],
        embed_dim=32,
        depth=2,
        num_heads=4,
        use_physics_mask=True,
        bias_type="physics+relative_2d",
        bias_args={
            "blocks": [1],
            "static_terrain": True,
            "physics": {"wind": False},
            "relative_2d": {"num_buckets": 8},
        },
    )
    assert set(dict(model.blocks[1].attn.bias.named_parameters())) == {
        "physics.elevation_alpha",
        "relative_2d.bias_table",
    }
    assert model.blocks[1].attn.bias.relative_2d.bias_table.shape == (8, 8, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("physics+physics", {}, "a sum names each bias once"),
        ("physics+hills", {}, "unknown bias 'hills'; available: "),
        ("physics+", {}, "unknown bias ''"),
        (
            "physics+relative_2d",
            {"alpha_init": 1.0},
            r"physics, relative_2d; for a part.*\{physics: \{...\}\}",
        ),
        ("physics+relative_2d", {"physics": {"alpha": 1}}, "unknown argument 'alpha' for bias 'physics'"),
        ("physics+relative_2d", {"physics": 2.0}, "arguments of 'physics' in 'physics.relative_2d' are a dictionary"),
        ("physics", {"num_heads_": 2}, "unknown argument 'num_heads_'"),
    ],
)
def test_mistakes_are_one_sentence(name, arguments, message):
    with pytest.raises(InputError, match=message):
        build_bias(name, num_heads=4, **arguments)
    host = SimpleNamespace()
    with pytest.raises(InputError, match=message):
        attach(host, name, **arguments)


def test_every_case_of_the_tests_is_buildable_by_name():
    for name, arguments in EVERY_BIAS.values():
        build_bias(name, num_heads=4, grid=(4, 8), **arguments)


def test_a_sum_has_factors_only_where_all_its_parts_have():
    advection = AdvectionBias(4, (4, 8))
    assert SumBias({"one": advection, "other": AdvectionBias(4, (4, 8))}).has_factors
    assert not SumBias({"near": advection, "hills": PhysicsBias()}).has_factors


def test_parts_with_factors_are_columns_beside_the_others_tiles(monkeypatch):
    terrain = global_terrain()
    bias = make("sum of three", terrain)
    q, k, v = (torch.randn(2, 4, 32, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    learned = [q, k, v, *bias.parameters()]

    def attention(engine):
        out = biased_attention(q, k, v, bias, bias.inputs(terrain), engine=engine)
        return [out, *torch.autograd.grad(out.square().sum(), learned)]

    expected = attention("dense")
    monkeypatch.setattr(AdvectionBias, "pairwise", None)
    for found, wanted in zip(attention("tiled"), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
