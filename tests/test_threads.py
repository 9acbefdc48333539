"""Parts of a computation on threads of their own, and what they leave behind."""

import threading

import pytest
import torch
from terrains import EVERY_BIAS, global_terrain, make
from test_tiled import both, use_tiles

from climax_elevation import biased_attention
from climax_elevation.attention.engines import tiled
from climax_elevation.bias.as_data import with_tensors
from climax_elevation.compiled.threads import at_once, shares


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_shares_are_in_order_and_much_of_a_size(three_threads):
    cpu = torch.device("cpu")
    assert shares(1000, 256, cpu) == [slice(0, 384), slice(384, 704), slice(704, 1000)]
    assert shares(256, 256, cpu) == [slice(0, 256)]
    assert shares(5, 2, cpu) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert shares(1000, 256, torch.device("cuda")) == [slice(0, 1000)]
    assert shares(16, 1, cpu, others=2) == [slice(0, 16)]
    assert shares(1, 1, cpu, others=1) == [slice(0, 1)]


@pytest.mark.parametrize("side", [1, 7, 65, 512])
def test_shares_are_all_there_is_and_no_token_twice(three_threads, side):
    for count in range(1, 1600, 13):
        for others in (1, 2, 4):
            parts = shares(count, side, torch.device("cpu"), others)
            assert [place for part in parts for place in range(part.start, part.stop)] == list(range(count))
            assert all(part.stop > part.start for part in parts)


def test_tasks_run_on_one_thread_each_and_record_nothing(three_threads):
    seen = []
    at_once([lambda: seen.append((torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()))] * 3)
    assert [entry[:2] for entry in seen] == [(1, False)] * 3
    assert torch.get_num_threads() == 3
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]
    assert torch.is_grad_enabled()


def test_an_error_comes_through_and_the_number_of_threads_is_as_before(three_threads):
    with pytest.raises(ZeroDivisionError):
        at_once([lambda: None, lambda: 1 // 0])
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_three_threads_equal_dense_with_every_gradient(three_threads, monkeypatch, case):
    """Tiles of one query and key at the least, so that each thread has many."""
    use_tiles(monkeypatch, side=4, tile_held=200, buffer_held=100)
    terrain = global_terrain((5, 9), batch=2)
    bias = make(case, terrain, num_heads=3)
    for expected, got in zip(*both(bias, bias.inputs(terrain), 2, 3, 45), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_more_threads_than_tiles_take_some_heads_each(loops, case):
    """Of one tile of tokens, five heads on four threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        terrain = global_terrain((5, 9), batch=2)
        bias = make(case, terrain, num_heads=5)
        heads, tokens = tiled._shares(torch.zeros(2, 5, 45, 8))
        assert (heads, tokens) == ([slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 5)], [slice(0, 45)])
        for expected, got in zip(*both(bias, bias.inputs(terrain), 2, 5, 45), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    finally:
        torch.set_num_threads(before)


def test_inference_mode_is_that_of_the_thread_that_asks(three_threads):
    """As in Lightning's test loop: a tensor made in inference mode is written to by all threads."""
    terrain = global_terrain((16, 32), batch=2)
    bias = make("physics", terrain)
    q, k, v = torch.randn(3, 2, 4, 512, 8).unbind(0)
    expected = biased_attention(q, k, v, bias, bias.inputs(terrain), engine="dense")
    with torch.inference_mode():
        q, k, v = (t.clone() for t in (q, k, v))
        got = biased_attention(q, k, v, bias, bias.inputs(terrain), engine="tiled")
        assert got.is_inference()
    torch.testing.assert_close(got, expected.detach(), check_dtype=False, rtol=1e-4, atol=1e-5)
    seen = []
    at_once([lambda: seen.append(torch.is_inference_mode_enabled())] * 3)
    assert seen == [False] * 3


def test_a_twin_shares_its_parameters_and_replaces_them_alone():
    bias = make("sum of three", global_terrain())
    other = with_tensors(bias, {})
    assert other is not bias
    assert [id(p) for p in other.parameters()] == [id(p) for p in bias.parameters()]
    before = bias.ridge.elevation_alpha
    other.ridge.elevation_alpha = torch.nn.Parameter(torch.tensor(9.0))
    assert bias.ridge.elevation_alpha is before
