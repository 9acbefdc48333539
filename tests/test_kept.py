"""At inference over one ground a bias is computed once, where that is asked for: the same numbers, and no others."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from terrains import EVERY_BIAS, global_terrain, make
from timm.models.vision_transformer import Block
from torch import nn

from climax_elevation import InputError, PhysicsBias, keep_bias
from climax_elevation.attention.kept import KeptBias
from climax_elevation.block import TerrainBlock

GRID = (16, 32)  # two tiles of queries for "tiled"


def block_over(case, grid=GRID, engine="auto", dtype=torch.float32):
    """A block in evaluation, tokens, and what it takes of its terrain."""
    terrain = global_terrain(grid, batch=1)
    torch.manual_seed(0)
    block = TerrainBlock(Block(32, 4), make(case, terrain).to(dtype), engine).to(dtype).eval()
    return block, torch.randn(2, grid[0] * grid[1], 32, dtype=dtype), block.terrain_inputs(terrain)["bias_inputs"]


@pytest.fixture
def counted(monkeypatch):
    """A block that keeps a bias without wind, tokens, inputs, and what was computed of the bias."""
    block, x, inputs = block_over("physics without wind", (4, 8), "dense")
    calls = []
    pairwise = type(block.attn.bias).pairwise
    monkeypatch.setattr(
        type(block.attn.bias), "pairwise", lambda self, *sides: calls.append(1) or pairwise(self, *sides)
    )
    keep_bias(block)
    return block, x, inputs, calls


@torch.no_grad()
@pytest.mark.parametrize("case", EVERY_BIAS)
@pytest.mark.parametrize("engine", ["sdpa", "tiled"])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_kept_gives_the_same_numbers(case, engine, autocast):
    block, x, inputs = block_over(case, engine=engine)
    with torch.autocast("cpu", enabled=autocast):
        expected = block(x, inputs)
        keep_bias(block)
        for _ in range(3):
            assert torch.equal(block(x, inputs), expected)


@torch.no_grad()
def test_it_is_computed_once(counted):
    block, x, inputs, calls = counted
    for _ in range(4):
        block(x, tuple(t.clone() for t in inputs))
    assert len(calls) == 1


@torch.no_grad()
def test_without_being_asked_nothing_is_kept(counted):
    block, x, inputs, calls = counted
    block.train().eval()
    for _ in range(3):
        block(x, inputs)
    assert len(calls) == 3


@torch.no_grad()
@pytest.mark.parametrize(
    "change", ["parameter", "its data", "terrain", "direction", "height_scale_m", "type", "engine"]
)
def test_a_change_is_noticed(counted, change):
    block, x, inputs, _ = counted
    bias = block.attn.bias
    before = block(x, inputs)
    if change == "parameter":
        bias.elevation_alpha.mul_(2)
    elif change == "its data":
        bias.elevation_alpha.data = bias.elevation_alpha.data * 2
    elif change == "terrain":
        inputs = (inputs[0] + 500 * torch.arange(32),)
    elif change == "direction":
        bias.direction = "query_above"
    elif change == "height_scale_m":
        bias.height_scale_m = 100.0
    elif change == "type":
        bias.double()
    else:
        block.attn.engine = "sdpa"
    found = block(x, inputs)
    assert torch.equal(block(x, inputs), found)
    block.attn.kept = None
    assert torch.equal(block(x, inputs), found)
    assert change in ("type", "engine") or (found - before).abs().max() > 1e-3


class OtherFormula(PhysicsBias):
    """The same parameters and settings, and another bias."""

    def pairwise(self, query, key):
        return 2 * super().pairwise(query, key)


@torch.no_grad()
def test_another_formula_is_noticed():
    block, x, inputs = block_over("physics without wind", (4, 8), "dense")
    keep_bias(block)
    block(x, inputs)
    block.attn.bias.__class__ = OtherFormula
    kept = block(x, inputs)
    block.attn.kept = None
    assert torch.equal(kept, block(x, inputs))


@torch.no_grad()
def test_of_a_bias_with_settings_that_are_no_plain_data_nothing_is_kept(counted):
    block, x, inputs, calls = counted
    block.attn.bias.table = {"height": 1.0}  # can be changed where it is
    for _ in range(2):
        block(x, inputs)
    assert len(calls) == 2


def test_training_drops_it_and_gradients_are_what_they_are(counted):
    block, x, inputs, calls = counted
    with torch.no_grad():
        block(x, inputs)
    values = weakref.ref(block.attn.kept._computed.values)
    block(x, inputs).sum().backward()  # in evaluation, with gradients: not from what is kept
    assert len(calls) == 2
    assert block.attn.bias.elevation_alpha.grad.abs() > 0
    nn.Sequential(block).train()
    gc.collect()
    assert values() is None
    assert block.attn.kept is None


@torch.no_grad()
def test_copies_and_files_hold_none_of_it(counted):
    block, x, inputs, _ = counted
    expected = block(x, inputs)
    saved = io.BytesIO()
    torch.save(block, saved)
    assert saved.tell() < 4 * sum(p.numel() for p in block.parameters()) + 60_000
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.attn.kept._computed is None
        other.attn.bias.elevation_alpha.mul_(2)
        assert (other(x, inputs) - expected).abs().max() > 1e-4
        assert torch.equal(block(x, inputs), expected)
    assert not any("kept" in key for key in block.state_dict())


@torch.no_grad()
def test_winds_and_grounds_that_differ_between_samples_are_not_kept():
    block, x, inputs = block_over("physics", (4, 8))
    keep_bias(block)
    expected = block(x, inputs)
    several = tuple(t.expand(2, -1).clone() for t in inputs)
    block.attn.kept = KeptBias()
    torch.testing.assert_close(block(x, several), expected)
    assert block.attn.kept._computed is None


@torch.inference_mode()
def test_what_was_kept_in_inference_mode_serves_without_it():
    block, x, inputs = block_over("physics without wind")
    keep_bias(block)
    expected = block(x, inputs)
    with torch.inference_mode(False), torch.no_grad():
        plain = x.clone()
        assert torch.equal(block(plain, tuple(t.clone() for t in inputs)), expected)


def test_it_is_asked_for_in_evaluation_where_there_is_a_bias():
    block, *_ = block_over("physics", (4, 8))
    with pytest.raises(InputError, match="the model is in training: call model.eval"):
        keep_bias(block.train())
    with pytest.raises(InputError, match="this Linear has no terrain bias to keep: attach one first"):
        keep_bias(nn.Linear(2, 2).eval())
