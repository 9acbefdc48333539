"""The variants of earlier code: by hand, and against what was literally computed there."""

import math

import pytest
import torch

from climax_elevation import InputError, PhysicsBias, Terrain, build_bias
from climax_elevation.bias import AdaptiveBias, MultiplicativeBias, RelativePositionBias2D, TopoFlowBias


def test_multiplicative_by_hand():
    # a rise of 1000 m at strength 1: log(1 / (1 + e)) ; down again log(1 / (1 + 1/e)); level log(1/2)
    values = MultiplicativeBias()(torch.tensor([[0.0, 1000.0]], dtype=torch.float64))[0, 0]
    up, down, level = math.log(1 / (1 + math.e)), math.log(1 / (1 + 1 / math.e)), math.log(0.5)
    torch.testing.assert_close(values, torch.tensor([[level, up], [down, level]]), rtol=1e-6, atol=1e-6)


def test_multiplicative_is_the_mask_after_softmax():
    """sigmoid, times the weights, renormalised: outputs and the strength's gradient."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    z = torch.rand(2, 9, dtype=torch.float64) * 4000
    weights = torch.randn_like(logits)
    bias = MultiplicativeBias(strength_init=0.8).double()
    got = (logits + bias(z)).softmax(-1)
    strength = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    mask = torch.sigmoid(-strength * (z[:, None, :] - z[:, :, None]) / 1000)[:, None]
    masked = logits.softmax(-1) * mask
    expected = masked / masked.sum(-1, keepdim=True)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-12)  # 0.8 is not exact in float32
    (a,) = torch.autograd.grad((got * weights).sum(), bias.elevation_strength)
    (b,) = torch.autograd.grad((expected * weights).sum(), strength)
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


def test_multiplicative_at_zero_strength_is_plain_attention():
    z = torch.rand(1, 9) * 4000
    values = MultiplicativeBias(strength_init=0.0)(z)
    assert (values == values[0, 0, 0, 0]).all()


def test_multiplicative_is_finite_on_the_highest_ground():
    bias = MultiplicativeBias(strength_init=20.0)
    values = bias(torch.tensor([[-400.0, 8800.0]]))
    assert values.isfinite().all()
    values.sum().backward()
    assert bias.elevation_strength.grad.isfinite()


def test_adaptive_by_hand():
    # rise 2000 m, winds 5 and 20 m/s: the weaker is at the threshold, sigmoid 1/2
    # 0.2 * -0.5 * 2 * (1 - 0.3 / 2) = -0.17
    values = AdaptiveBias()(torch.tensor([[0.0, 2000.0]]), torch.tensor([[5.0, 20.0]]))
    torch.testing.assert_close(values[0, 0], torch.tensor([[0.0, -0.17], [0.0, 0.0]]))
    assert [(name, p.item()) for name, p in AdaptiveBias().named_parameters()] == [
        ("adaptive_scale", pytest.approx(0.2))
    ]


def test_adaptive_equals_the_plain_loop_with_its_gradient():
    torch.manual_seed(0)
    z, w = torch.rand(2, 5, dtype=torch.float64) * 4000, torch.rand(2, 5, dtype=torch.float64) * 12
    bias = AdaptiveBias(scale_init=0.25).double()
    scale = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    expected = torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            -scale
                            * 0.5
                            * max(0.0, (z[b, j] - z[b, i]).item() / 1000)
                            * (1 - 0.3 / (1 + math.exp(5 - min(w[b, i].item(), w[b, j].item()))))
                            for j in range(5)
                        ]
                    )
                    for i in range(5)
                ]
            )
            for b in range(2)
        ]
    )[:, None]
    got = bias(z, w)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    (a,) = torch.autograd.grad((got * weights).sum(), bias.adaptive_scale)
    (b,) = torch.autograd.grad((expected * weights).sum(), scale)
    torch.testing.assert_close(a, b[None], rtol=1e-12, atol=1e-12)


def bucket(offset, num_buckets=32, max_distance=128):
    """T5's rule for one offset, in plain numbers."""
    half, exact = num_buckets // 2, num_buckets // 4
    first, distance = (half, -offset) if offset < 0 else (0, offset)
    if distance < exact:
        return first + distance
    wide = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (half - exact))
    return first + min(wide, half - 1)


def test_buckets_by_hand():
    # 0 to 7 have a bucket each; 8 is the first of eight that widen up to 128; the other sign begins at 16
    table = RelativePositionBias2D(1)
    offsets = torch.tensor([0, 1, 7, 8, 11, 12, 127, 128, 500, -1, -7, -8, -128])
    assert table._bucket(offsets).tolist() == [0, 1, 7, 8, 8, 9, 15, 15, 15, 17, 23, 24, 31]


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (4, 2)])
def test_buckets_equal_the_rule_for_one(num_buckets, max_distance):
    table = RelativePositionBias2D(1, num_buckets=num_buckets, max_distance=max_distance)
    offsets = list(range(-300, 301))
    assert table._bucket(torch.tensor(offsets)).tolist() == [bucket(n, num_buckets, max_distance) for n in offsets]


def test_relative_2d_equals_the_plain_loop_with_its_gradient():
    torch.manual_seed(0)
    rows, columns = 4, 8
    bias = RelativePositionBias2D(3).double()
    (position,) = bias.inputs(Terrain(torch.zeros(1, rows * columns), (rows, columns)))
    got = bias(position)
    places = [(128 * (n % columns) // columns, 128 * (n // columns) // rows) for n in range(rows * columns)]
    expected = torch.stack(
        [torch.stack([bias.bias_table[bucket(x2 - x1), bucket(y2 - y1)] for x2, y2 in places]) for x1, y1 in places]
    ).permute(2, 0, 1)[None]
    assert torch.equal(got, expected)
    weights = torch.randn_like(expected)
    (a,) = torch.autograd.grad((got * weights).sum(), bias.bias_table)
    (b,) = torch.autograd.grad((expected * weights).sum(), bias.bias_table)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_relative_2d_tells_left_from_right_and_up_from_down():
    bias = RelativePositionBias2D(1)
    values = bias(*bias.inputs(Terrain(torch.zeros(1, 9), (3, 3))))[0, 0]
    assert len({values[4, key].item() for key in (1, 3, 4, 5, 7)}) == 5
    assert values[4, 5] == values[3, 4]  # the same step to the right


def test_topoflow_is_the_table_and_rising_ground():
    torch.manual_seed(0)
    terrain = Terrain(torch.rand(1, 12) * 4000, (3, 4))
    bias = TopoFlowBias(2)
    physics = PhysicsBias(alpha_init=2.0, wind=False)
    expected = bias.relative_2d(*bias.relative_2d.inputs(terrain)) + physics(terrain.elevation_m)
    assert torch.equal(bias(*bias.inputs(terrain)), expected)
    assert {name for name, _ in bias.named_parameters()} == {"relative_2d.bias_table", "physics.elevation_alpha"}
    assert bias.needs == frozenset()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("multiplicative", {"height_scale_m": -1}, "height_scale_m is a number of metres above 0, not -1"),
        ("multiplicative", {"strength_init": "much"}, "strength_init is a finite number"),
        ("adaptive", {"scale_init": math.inf}, "scale_init is a finite number"),
        ("relative_2d", {"num_buckets": 6}, "num_buckets is a multiple of 4, not 6"),
        ("relative_2d", {"max_distance": 8}, "max_distance is above num_buckets / 4 = 8, not 8"),
        ("topoflow", {"direction": "down"}, "unknown direction 'down'"),
        ("topoflow", {"beta_init": 1}, "unknown argument 'beta_init' for bias 'topoflow'; valid: num_buckets"),
    ],
)
def test_bad_arguments_are_refused(name, arguments, message):
    with pytest.raises(InputError, match=message):
        build_bias(name, num_heads=2, **arguments)


def test_wrong_shapes_are_refused():
    with pytest.raises(InputError, match=r"elevation is \[batch or 1, tokens\]"):
        MultiplicativeBias()(torch.zeros(4))
    with pytest.raises(InputError, match=r"speed is \[batch or 1, 4 tokens\]"):
        AdaptiveBias()(torch.zeros(1, 4), torch.zeros(1, 5))
    with pytest.raises(InputError, match=r"positions are \[batch or 1, tokens, 2\]"):
        RelativePositionBias2D(1)(torch.zeros(1, 4, 3).long())


def test_elevation_of_another_shape_is_refused_by_adaptive():
    with pytest.raises(InputError, match=r"elevation is \[batch or 1, tokens\] in metres, not \[1, 4, 1\]"):
        AdaptiveBias()(torch.zeros(1, 4, 1), torch.zeros(1, 4))
