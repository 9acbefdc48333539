"""The way back: fresh = stock, trained differs, off = stock with the trained weights."""

import copy
import pickle

import pytest
import torch
from test_attach import batch, model, predict, strong, terrain_aware
from test_order import model as order_model
from test_order import predict as order_predict
from torch import nn

from climax_elevation import AttachOptions, InputError, attach, bias_off, detach


def trained(**bias_args):
    """A model with terrain whose weights have moved."""
    made = strong(terrain_aware(blocks="all", **bias_args)).train()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        predict(made, *batch()).square().mean().backward()
        optimizer.step()
    return made.eval()


def stock_with_weights_of(made):
    """An unmodified host with the same weights."""
    stock = model()
    host_keys = stock.state_dict().keys()
    stock.load_state_dict({key: value for key, value in made.state_dict().items() if key in host_keys})
    return stock.eval()


def test_detach_gives_the_same_objects_back_with_the_weights_as_they_are():
    made = model(use_physics_mask=False)
    originals, keys = list(made.blocks), list(made.state_dict())
    parts = [list(block.modules()) for block in originals]
    before = {key: value.clone() for key, value in made.state_dict().items()}
    made.use_physics_mask = False
    attach(made, blocks="all", stats_dir=None)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1)
    detach(made)
    assert [id(block) for block in made.blocks] == [id(block) for block in originals]
    assert [[id(part) for part in block.modules()] for block in made.blocks] == [
        [id(p) for p in some] for some in parts
    ]
    assert list(made.state_dict()) == keys
    assert all(torch.equal(value, before[key] + 0.1) for key, value in made.state_dict().items() if "embed" not in key)
    assert not made.use_physics_mask
    assert made.terrain is None
    attach(made)  # and again


@pytest.mark.parametrize("copied", ["no", "deepcopy", "pickle", "assigned"])
def test_off_is_stock_with_the_trained_weights(copied):
    made = trained()
    if copied == "deepcopy":
        made = copy.deepcopy(made)
    elif copied == "pickle":
        made = pickle.loads(pickle.dumps(made))
    elif copied == "assigned":  # other parameters, in the same modules
        made.load_state_dict({key: value.clone() for key, value in made.state_dict().items()}, assign=True)
    stock = stock_with_weights_of(made)
    on = predict(made, *batch())
    with bias_off(made):
        off = predict(made, *batch())
    assert torch.equal(off, predict(stock, *batch()))
    assert (on - off).abs().max() > 1e-4
    assert torch.equal(predict(made, *batch()), on)
    detach(made)
    assert torch.equal(predict(made, *batch()), off)


def test_off_needs_no_terrain_and_ends_also_by_an_error():
    made = trained()
    x, lead_times = batch()
    x[:, 0] = torch.nan  # the orography
    with bias_off(made):
        predict(made, x, lead_times)
    with pytest.raises(RuntimeError, match="stopped"), bias_off(made):
        raise RuntimeError("stopped")
    with pytest.raises(InputError, match="not finite"):
        predict(made, x, lead_times)


def test_off_trains_the_host_alone_and_keeps_the_mode():
    made = trained()
    made.zero_grad()
    with bias_off(nn.Sequential(made)):  # in whatever holds it
        made.train()
        predict(made, *batch()).square().mean().backward()
    assert made.blocks[0].attn.bias.elevation_alpha.grad is None
    assert made.blocks[0].mlp.fc1.weight.grad is not None
    assert all(module.training for module in made.modules())


def test_a_part_that_was_exchanged_stays_exchanged():
    made = trained()
    made.blocks[1].attn.qkv = other = copy.deepcopy(made.blocks[1].attn.qkv)
    made.blocks[1].mlp = mlp = copy.deepcopy(made.blocks[1].mlp)
    detach(made)
    assert made.blocks[1].attn.qkv is other
    assert made.blocks[1].mlp is mlp


def test_where_there_is_none_both_say_so():
    with pytest.raises(InputError, match="this StandInClimaX has no terrain bias: attach one first"):
        detach(model())
    with pytest.raises(InputError, match="has no terrain bias"), bias_off(model()):
        pass


def test_published_order_reads_the_position_embedding_that_was_assigned():
    made = order_model("physics", patch_order="wind_as_published").eval()
    other = order_model("physics", patch_order="wind_as_published").eval()
    state = {key: value * 2 if key == "pos_embed" else value for key, value in made.state_dict().items()}
    other.load_state_dict(state)
    made.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    assert torch.equal(order_predict(made), order_predict(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "flash"}, "unknown engine 'flash'"),
        ({"control": "upside down"}, "unknown control 'upside down'; choose one of 'none', 'flat'"),
        ({"control_seed": -1}, "control_seed is a whole number from 0 to 4294967295, not -1"),
        ({"control_seed": True}, "control_seed is a whole number"),
        ({"patch_order": "storm"}, "unknown patch_order 'storm'"),
        ({"grid_spacing_m": 0}, "grid_spacing_m is a number of metres above 0"),
        ({"wind_variables": "uv"}, "wind_variables names two different channels"),
        ({"wind_variables": None}, "wind_variables names two different channels"),
        ({"wind_variables": [1, 2]}, "wind_variables names two different channels"),
        ({"elevation_variable": None}, "elevation_variable names a channel, not None"),
        ({"elevation_file": 3}, "elevation_file is a path, not 3"),
        ({"stats_dir": ""}, "stats_dir is a path, not ''"),
        ({"static_terrain": "no"}, "static_terrain is true or false, not 'no'"),
        ({"terrain_is_flat": 1}, "terrain_is_flat is true or false, not 1"),
        ({"blocks": None}, 'blocks is "all" or a list of indices from 0 (on|to 2), not None'),
        ({"blocks": 0}, 'blocks is "all" or a list of indices from 0 (on|to 2), not 0'),
        ({"blocks": "0"}, "blocks is \"all\" or a list of indices from 0 (on|to 2), not '0'"),
        ({"blocks": [True]}, 'blocks is "all" or a list of indices'),
        ({"blocks": [1.5]}, 'blocks is "all" or a list of indices'),
        ({"blocks": []}, "at least one block"),
        ({"blocks": [1, 1]}, "none twice"),
    ],
)
def test_options_check_themselves(changes, message):
    with pytest.raises(InputError, match=message):
        AttachOptions(**changes)
    made = model()
    with pytest.raises(InputError, match=message):
        attach(made, **changes)
    assert not hasattr(made, "terrain") or made.terrain is None
