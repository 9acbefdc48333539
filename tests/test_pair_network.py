"""The network over pairs, in compiled loops and in torch's operations, beside the equation written out."""

import math

import pytest
import torch

from climax_elevation.bias import pair_network as module
from climax_elevation.bias.pair_network import pair_network


def plain(query, key, weight, bias):
    hidden = (query[:, :, None] + key[:, None]).relu()
    return torch.einsum("hu,nqku->nhqk", weight, hidden) + bias[:, None, None]


def test_two_queries_and_one_key_by_hand(loops):
    """Unit 0 is on for both, unit 1 off for both, unit 2 on for the second query alone."""
    query = torch.tensor([[[1.0, -3.0, -2.0], [2.0, -4.0, 5.0]]])
    key = torch.tensor([[[0.5, 1.0, 0.0]]])
    weight, bias = torch.tensor([[2.0, 100.0, -1.0]]), torch.tensor([0.25])
    # 2 * 1.5 + 0.25;  2 * 2.5 - 5 + 0.25
    assert pair_network(query, key, weight, bias).tolist() == [[[[3.25], [0.25]]]]


@pytest.mark.parametrize("held", [1, 150, 10**6])
@pytest.mark.parametrize("shift", [0.0, 50.0, -50.0])
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "units"), [(1, 1, 1, 1), (3, 9, 7, 6), (13, 70, 33, 7), (8, 66, 64, 64)]
)
def test_equals_the_equation_with_every_gradient(loops, monkeypatch, heads, queries, keys, units, shift, held):
    """Whatever is no multiple of what a processor takes at once; shifted by 50, units are all on, or all off."""
    monkeypatch.setattr(module, "HIDDEN_HELD", held)
    generator = torch.Generator().manual_seed(0)

    def numbers(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    given = numbers(2, queries, units) + shift, numbers(2, keys, units), numbers(heads, units), numbers(heads)
    weights = numbers(2, heads, queries, keys)
    found = []
    for run in (plain, pair_network):
        learned = [t.requires_grad_() for t in given]
        out = run(*learned)
        found.append([out, *torch.autograd.grad((out * weights).sum(), learned)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-9)


def test_where_q_and_k_cancel_the_unit_has_no_gradient(loops):
    """relu's gradient at 0 is 0, on either path."""
    query, key = torch.zeros(1, 3, 2, requires_grad=True), torch.zeros(1, 4, 2)
    pair_network(query, key, torch.ones(1, 2), torch.zeros(1)).sum().backward()
    assert not query.grad.any()


def test_what_is_not_a_number_is_not_lost(loops):
    query, key = torch.tensor([[[math.nan], [1.0]]]), torch.ones(1, 1, 1)
    values = pair_network(query, key, torch.ones(1, 1), torch.zeros(1)).flatten()
    assert values[0].isnan()
    assert values[1] == 2


def test_training_goes_on_after_inference(loops):
    """As after Lightning's validation: what inference keeps, training can write to."""
    vars(module._kept).clear()
    query = torch.randn(1, 5, 4)
    with torch.inference_mode():
        pair_network(query, query, torch.ones(1, 4), torch.zeros(1))
    pair_network(query.requires_grad_(), query, torch.ones(1, 4), torch.zeros(1)).sum().backward()
    assert query.grad.abs().sum() > 0


def test_its_shape_is_known_without_numbers():
    with torch._subclasses.FakeTensorMode():
        values = pair_network(torch.zeros(2, 3, 5), torch.zeros(2, 4, 5), torch.zeros(6, 5), torch.zeros(6))
    assert values.shape == (2, 6, 3, 4)
