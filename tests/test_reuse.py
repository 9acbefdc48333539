"""At inference over one ground a bias is computed once, and whatever changes is noticed."""

import pytest
import torch
from terrains import global_terrain, make

from climax_elevation import biased_attention
from climax_elevation.attention import reuse


@pytest.fixture
def counted(monkeypatch):
    """A bias without wind, its inputs, attention with it, and how often it was computed whole."""
    terrain = global_terrain((4, 8), batch=2)
    bias = make("physics without wind", terrain)
    calls = []
    pairwise = bias.pairwise
    monkeypatch.setattr(bias, "pairwise", lambda *sides: calls.append(1) or pairwise(*sides))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 32, 8, dtype=torch.float64) for _ in range(3))
    return (
        bias,
        bias.inputs(terrain),
        lambda inputs, engine="auto": biased_attention(q, k, v, bias, inputs, engine=engine),
        calls,
    )


@torch.no_grad()
def test_it_is_computed_twice_and_then_no_more(counted):
    _, inputs, attend, calls = counted
    expected = attend(inputs, engine="dense")
    calls.clear()
    for _ in range(5):
        torch.testing.assert_close(attend(tuple(t.clone() for t in inputs)), expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 2  # once to be seen, once to be kept


@torch.no_grad()
@pytest.mark.parametrize("change", ["parameter", "parameter's data", "terrain"])
def test_a_change_is_noticed(counted, change):
    bias, inputs, attend, _ = counted
    before = [attend(inputs) for _ in range(3)][-1]
    if change == "parameter":
        bias.elevation_alpha.mul_(2)
    elif change == "parameter's data":
        bias.elevation_alpha.data = bias.elevation_alpha.data * 2
    else:
        inputs = (inputs[0] + torch.arange(32),)
    expected = attend(inputs, engine="dense")
    assert (expected - before).abs().max() > 1e-3
    for _ in range(3):
        torch.testing.assert_close(attend(inputs), expected, rtol=1e-12, atol=1e-12)


def test_with_gradients_nothing_is_kept(counted):
    bias, inputs, attend, calls = counted
    for _ in range(3):
        attend(inputs).sum().backward()
    assert len(calls) >= 3
    assert reuse._seen.get(bias) is None


@torch.no_grad()
def test_winds_that_change_and_grounds_that_differ_are_not_kept(monkeypatch):
    terrain = global_terrain((4, 8), batch=1)
    bias = make("physics", terrain)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 32, 8, dtype=torch.float64) for _ in range(3))
    for step in range(4):
        z, w = bias.inputs(terrain)
        biased_attention(q, k, v, bias, (z, w + step))
        assert reuse._seen[bias].values is None
    monkeypatch.setattr(reuse, "REUSED_HELD", 100)
    assert reuse.reused_bias(bias, (z, w), 4) is None
    assert reuse.reused_bias(bias, (z.expand(2, -1), w), 4) is None
