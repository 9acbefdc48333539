"""PhysicsBias: by hand, against a plain loop in float64, then properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from climax_elevation import InputError, PhysicsBias

DIRECTIONS = ("key_above", "query_above", "both")


def loop_bias(z, w, alpha, beta, direction, height_scale_m=1000.0, threshold=5.0):
    """The equation, a pair at a time."""
    rows = []
    for b in range(max(z.shape[0], 1 if w is None else w.shape[0])):
        zb = z[min(b, z.shape[0] - 1)]
        wb = None if w is None else w[min(b, w.shape[0] - 1)]
        for i in range(z.shape[1]):
            for j in range(z.shape[1]):
                rise = (zb[j] - zb[i]) / height_scale_m
                if direction == "key_above":
                    penalty = torch.clamp(rise, min=0)
                elif direction == "query_above":
                    penalty = torch.clamp(-rise, min=0)
                else:
                    penalty = torch.abs(rise)
                value = -alpha * penalty
                if wb is not None:
                    value = value * (1 - beta / (1 + torch.exp(-((wb[i] + wb[j]) / 2 - threshold))))
                rows.append(value)
    return torch.stack(rows).reshape(-1, 1, z.shape[1], z.shape[1])


def test_three_patches_by_hand():
    # z = 0, 1000, 3000 m; alpha = 1: from 0 to 1000 m costs 1, to 3000 m costs 3, from 1000 to 3000 m costs 2.
    bias = PhysicsBias(wind=False)(torch.tensor([[0.0, 1000.0, 3000.0]]))
    assert bias.tolist() == [[[[0, -1, -3], [0, 0, -2], [0, 0, 0]]]]


def test_three_patches_by_hand_the_other_ways():
    z = torch.tensor([[0.0, 1000.0, 3000.0]])
    above = PhysicsBias(wind=False, direction="query_above")(z)
    assert above.tolist() == [[[[0, 0, 0], [-1, 0, 0], [-3, -2, 0]]]]
    both = PhysicsBias(wind=False, direction="both", alpha_init=0.5)(z)
    assert both.tolist() == [[[[0, -0.5, -1.5], [-0.5, 0, -1], [-1.5, -1, 0]]]]


def test_wind_by_hand():
    # mean speed 5 m/s is the threshold: sigmoid(0) = 1/2, so m = 1 - 0.3/2 = 0.85
    bias = PhysicsBias()(torch.tensor([[0.0, 2000.0]]), torch.tensor([[3.0, 7.0]]))
    assert bias[0, 0, 0, 1].item() == pytest.approx(-2 * 0.85, rel=1e-6)
    # 20 m/s: sigmoid(15) is 1 to 3e-7, so m = 0.7
    bias = PhysicsBias()(torch.tensor([[0.0, 2000.0]]), torch.tensor([[20.0, 20.0]]))
    assert bias[0, 0, 0, 1].item() == pytest.approx(-2 * 0.7, rel=1e-6)


@pytest.mark.parametrize("wind", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("terrain_batch", [1, 3])
def test_equals_the_plain_loop_with_every_gradient(wind, direction, terrain_batch):
    torch.manual_seed(1)
    z = (torch.rand(terrain_batch, 5, dtype=torch.float64) * 4000).requires_grad_()
    w = (torch.rand(3, 5, dtype=torch.float64) * 12).requires_grad_() if wind else None
    bias = PhysicsBias(
        wind=wind, direction=direction, alpha_init=1.25, **({"beta_init": 0.375} if wind else {})
    ).double()
    alpha = torch.tensor([1.25], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor([0.375], dtype=torch.float64, requires_grad=True)
    got = bias(z, w) if wind else bias(z)
    expected = loop_bias(z, w, alpha, beta, direction)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

    weights = torch.randn_like(expected)
    ours = [bias.elevation_alpha, z] + ([bias.wind_beta, w] if wind else [])
    theirs = [alpha, z] + ([beta, w] if wind else [])
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), ours),
        torch.autograd.grad((expected * weights).sum(), theirs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wind", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("alpha", [0.0, 1.3])
def test_by_hand_it_is_differentiated_as_by_machine(loops, wind, direction, alpha):
    bias = PhysicsBias(wind=wind, direction=direction, alpha_init=alpha).double()
    torch.manual_seed(0)
    z, w, db = torch.rand(1, 12).double() * 4000, torch.rand(1, 12).double() * 12, torch.randn(1, 1, 5, 7).double()
    features = bias.features(z, w) if wind else bias.features(z)
    query, key = bias.tile(features, slice(0, 5), slice(5, 12))
    values, gradients = bias.pullback(query, key, ())
    expected = bias.pairwise(query, key)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    by_machine = torch.autograd.grad(expected, list(bias.parameters()), db)
    by_hand, *of_features = gradients(db)
    assert of_features == [[], []]
    assert list(by_hand) == [name for name, _ in bias.named_parameters()]
    for got, want in zip(by_hand.values(), by_machine, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.0, 50.0])
def test_alpha_has_a_gradient_wherever_it_is(alpha):
    """A clamp to [-10, 0] would stop it at alpha <= 0, and here, with 8000 m of relief, at alpha > 1.25 too."""
    bias = PhysicsBias(wind=False, alpha_init=alpha)
    bias(torch.tensor([[0.0, 8000.0]])).sum().backward()
    assert bias.elevation_alpha.grad.item() == -8.0


def test_five_kilometres_cost_five_alpha():
    """A standardised elevation divided by 1000 m would give about 0.005 here."""
    bias = PhysicsBias(wind=False, alpha_init=1.7)
    assert bias(torch.tensor([[0.0, 5000.0]]))[0, 0, 0, 1].item() == pytest.approx(-5 * 1.7)


def test_wind_acts_over_the_range_of_real_winds():
    """Standardised winds would keep the modulation between 0.98 and 1."""
    z = torch.tensor([[0.0, 1000.0]])
    calm, storm = (PhysicsBias()(z, torch.full((1, 2), speed))[0, 0, 0, 1].item() for speed in (1.0, 15.0))
    assert calm == pytest.approx(-1.0, abs=0.01)
    assert storm == pytest.approx(-0.7, abs=0.01)


def test_without_wind_there_is_no_beta():
    assert [name for name, _ in PhysicsBias(wind=False).named_parameters()] == ["elevation_alpha"]
    assert [name for name, _ in PhysicsBias().named_parameters()] == ["elevation_alpha", "wind_beta"]
    assert all(parameter.shape == (1,) for parameter in PhysicsBias().parameters())


heights = st.lists(st.floats(-430, 8800, width=32), min_size=2, max_size=8)


@settings(max_examples=50, deadline=None)
@given(z=heights, direction=st.sampled_from(DIRECTIONS), seed=st.integers(0, 1000))
def test_permuting_patches_permutes_the_bias(z, direction, seed):
    elevation = torch.tensor([z])
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    bias = PhysicsBias(wind=False, direction=direction)
    assert torch.equal(bias(elevation[:, order]), bias(elevation)[..., order, :][..., order])


@settings(max_examples=50, deadline=None)
@given(z=heights, direction=st.sampled_from(DIRECTIONS))
def test_never_a_reward_and_nothing_on_the_diagonal(z, direction):
    bias = PhysicsBias(wind=False, direction=direction)(torch.tensor([z]))
    assert (bias <= 0).all()
    assert (bias.diagonal(dim1=-2, dim2=-1) == 0).all()


@settings(max_examples=25, deadline=None)
@given(height=st.floats(-430, 8800), speed=st.floats(0, 60))
def test_flat_terrain_biases_nothing(height, speed):
    assert (PhysicsBias()(torch.full((1, 4), height), torch.full((1, 4), speed)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_high_relief_in_any_precision_is_finite_and_float32(dtype):
    bias = PhysicsBias(alpha_init=3.0).to(dtype)
    value = bias(torch.tensor([[-400.0, 0.0, 8000.0]], dtype=dtype), torch.tensor([[0.0, 30.0, 60.0]], dtype=dtype))
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert value.softmax(-1).isfinite().all()


def test_autocast_does_not_reach_the_bias():
    bias, z, w = PhysicsBias(), torch.rand(1, 9) * 8000, torch.rand(1, 9) * 20
    expected = bias(z, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bias(z, w), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"height_scale_m": 0}, "height_scale_m"),
        ({"alpha_init": math.nan}, "alpha_init is a finite number"),
        ({"beta_init": "much"}, "beta_init is a finite number"),
        ({"wind": 1}, "wind is true or false"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        PhysicsBias(**arguments)


def test_missing_and_unwanted_wind_and_wrong_shapes_are_refused():
    z = torch.zeros(1, 4)
    with pytest.raises(InputError, match="got no speed"):
        PhysicsBias()(z)
    with pytest.raises(InputError, match="wind=False, and got a speed"):
        PhysicsBias(wind=False)(z, z)
    with pytest.raises(InputError, match=r"speed is \[batch or 1, 4 tokens\]"):
        PhysicsBias()(z, torch.zeros(1, 3))
    with pytest.raises(InputError, match=r"elevation is \[batch or 1, tokens\]"):
        PhysicsBias(wind=False)(torch.zeros(1, 2, 2))
