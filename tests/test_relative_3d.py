"""RelativePositionBias3D: by hand, against the published formula pair by pair, then what it means."""

import math

import pytest
import torch
from terrains import global_terrain

from climax_elevation import (
    Attention3D,
    InputError,
    RelativePositionBias3D,
    Terrain,
    compute_patch_coords_3d,
)
from climax_elevation.block import TerrainBlock, timm_block


def loop_bias(bias, coords, offset):
    """The MLP of every pair's offset, one pair at a time."""
    (w1, b1), (w2, b2) = ((bias.mlp[n].weight, bias.mlp[n].bias) for n in (0, 2))
    samples = []
    for c in coords:
        tokens = len(c)
        samples.append(
            torch.stack(
                [
                    torch.stack([w2 @ torch.clamp(w1 @ offset(c, i, j) + b1, min=0) + b2 for j in range(tokens)])
                    for i in range(tokens)
                ]
            )
        )
    return torch.stack(samples).permute(0, 3, 1, 2)


def normalised(c, i, j):
    largest = torch.stack([torch.stack([(c[a] - c[b]).abs() for b in range(len(c))]).amax(0) for a in range(len(c))])
    return (c[i] - c[j]) / (largest.amax(0) + 1e-6)


def physical(c, i, j):
    """East and north in 1000 km and up in km, the shorter way around."""
    radius = 6.371
    turn = c[i, 0] - c[j, 0]
    if turn > 180:
        turn = turn - 360
    if turn < -180:
        turn = turn + 360
    middle = (c[i, 1] + c[j, 1]) / 2 * math.pi / 180
    return torch.stack(
        [
            radius * torch.cos(middle) * turn * math.pi / 180,
            radius * (c[i, 1] - c[j, 1]) * math.pi / 180,
            (c[i, 2] - c[j, 2]) / 1000,
        ]
    )


def log_spaced(c, i, j):
    offset = physical(c, i, j)
    return torch.sign(offset) * torch.log(1 + torch.abs(offset))


def places(batch=2, tokens=6, seed=0):
    torch.manual_seed(seed)
    scale = torch.tensor([360.0, 170.0, 4000.0], dtype=torch.float64)
    return torch.rand(batch, tokens, 3, dtype=torch.float64) * scale - torch.tensor([180.0, 85.0, 0.0])


def test_two_tokens_by_hand():
    # offsets (1, 0, 0) and (-1, 0, 0) after division by the largest; hidden = relu(2 r_x + 1) = 3 and 0, and
    # the output 5 hidden + 0.5 = 15.5 and 0.5
    bias = RelativePositionBias3D(1, 1).double()
    with torch.no_grad():
        bias.mlp[0].weight.copy_(torch.tensor([[2.0, 0.0, 0.0]]))
        bias.mlp[0].bias.fill_(1.0)
        bias.mlp[2].weight.fill_(5.0)
        bias.mlp[2].bias.fill_(0.5)
    values = bias(torch.tensor([[[0.75, 0.0, 0.0], [0.25, 0.0, 0.0]]], dtype=torch.float64))
    # on the diagonal the offset is 0: hidden 1
    torch.testing.assert_close(values[0, 0].tolist(), [[5.5, 15.5], [0.5, 5.5]], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "offset"),
    [
        ({}, normalised),
        ({"coords": "physical"}, physical),
        ({"coords": "physical", "log_spaced": True}, log_spaced),
    ],
)
def test_equals_the_plain_loop_with_every_gradient(options, offset):
    torch.manual_seed(0)
    bias, coords = RelativePositionBias3D(3, 5, **options).double(), places()
    got, expected = bias(coords), loop_bias(bias, coords, offset)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), list(bias.parameters())),
        torch.autograd.grad((expected * weights).sum(), list(bias.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_patch_coordinates_by_hand():
    # patches of 2 x 2 in a field of 2 x 4: means 100 and 300 m; two columns at 0 and 1/2, one row
    field = torch.tensor([[[100.0, 100.0, 200.0, 400.0], [100.0, 100.0, 300.0, 300.0]]])
    coords = compute_patch_coords_3d(field, (2, 4), 2)
    torch.testing.assert_close(coords, torch.tensor([[[0.0, 0.0, 0.0], [0.5, 0.0, 1.0]]]))
    tall = compute_patch_coords_3d(field.transpose(1, 2), (4, 2), 2)
    torch.testing.assert_close(tall, torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.5, 1.0]]]))
    level = compute_patch_coords_3d(torch.full((1, 2, 4), 700.0), (2, 4), 2)
    assert level[..., 2].tolist() == [[0, 0]]


def test_patch_coordinates_have_the_documents_defaults():
    field = torch.rand(1, 128, 256) * 4000
    assert torch.equal(compute_patch_coords_3d(field), compute_patch_coords_3d(field, (128, 256), 2))
    with pytest.raises(InputError, match=r"an elevation field is \[batch, 128, 256\], not \[1, 64, 128\]"):
        compute_patch_coords_3d(field[:, ::2, ::2])


def test_a_field_with_holes_is_refused():
    field = torch.rand(1, 4, 6)
    field[0, 2, 2] = math.nan
    with pytest.raises(InputError, match="elevation_field has values that are not finite"):
        compute_patch_coords_3d(field, (4, 6), 2)


def test_a_model_sees_what_compute_patch_coords_3d_gives():
    torch.manual_seed(0)
    field = torch.rand(2, 8, 12) * 4000
    elevation = field.reshape(2, 4, 2, 6, 2).mean(dim=(2, 4)).flatten(1)
    (coords,) = RelativePositionBias3D(2).inputs(Terrain(elevation, (4, 6)))
    torch.testing.assert_close(coords, compute_patch_coords_3d(field, (8, 12), 2))


def test_a_region_keeps_its_true_positions():
    terrain = global_terrain()
    (coords,) = RelativePositionBias3D(2).inputs(terrain.select([10, 11, 19]))
    assert coords[0, :, 0].tolist() == [2 / 8, 3 / 8, 3 / 8]
    assert coords[0, :, 1].tolist() == [1 / 4, 1 / 4, 2 / 4]


def test_physical_offsets_do_not_know_the_dateline():
    bias = RelativePositionBias3D(2, coords="physical").double()
    east = torch.tensor([[[179.0, 10.0, 0.0], [-179.0, 12.0, 500.0]]], dtype=torch.float64)
    turned = east + torch.tensor([90.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(bias(east), bias(turned), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias(east), bias(east + torch.tensor([360.0, 0, 0])), rtol=1e-12, atol=1e-12)


def test_a_physical_bias_means_the_same_on_a_finer_grid():
    """The same places have the same bias, whatever lies between them; normalised coordinates do not transfer so."""
    coarse, fine = places(1, 6), torch.cat([places(1, 6), places(1, 20, seed=1) * 1.05], dim=1)
    physical = RelativePositionBias3D(2, coords="physical").double()
    torch.testing.assert_close(physical(fine)[..., :6, :6], physical(coarse), rtol=1e-12, atol=1e-12)
    normalised = RelativePositionBias3D(2).double()
    assert (normalised(fine)[..., :6, :6] - normalised(coarse)).abs().max() > 1e-3


def test_attention_3d_has_timms_keys_and_the_mlps():
    attention = Attention3D(32, 4, qkv_bias=True)
    assert set(attention.state_dict()) == {
        "qkv.weight",
        "qkv.bias",
        "proj.weight",
        "proj.bias",
        "bias.mlp.0.weight",
        "bias.mlp.0.bias",
        "bias.mlp.2.weight",
        "bias.mlp.2.bias",
    }
    assert attention.rel_pos_bias_3d is attention.bias
    assert "qkv.bias" not in Attention3D(32, 4).state_dict()


def test_attention_3d_without_coordinates_is_plain_and_with_them_is_not():
    torch.manual_seed(0)
    attention, x = Attention3D(32, 4).eval(), torch.randn(2, 9, 32)
    coords = compute_patch_coords_3d(torch.rand(2, 3, 3) * 4000, (3, 3), 1)
    q, k, v = attention.qkv(x).reshape(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) * 8**-0.5
    plain = attention.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 32))
    torch.testing.assert_close(attention(x), plain, rtol=1e-5, atol=1e-6)
    biased = (logits + attention.rel_pos_bias_3d(coords)).softmax(-1) @ v
    torch.testing.assert_close(
        attention(x, coords), attention.proj(biased.transpose(1, 2).reshape(2, 9, 32)), rtol=1e-5, atol=1e-6
    )
    assert (attention(x, coords) - plain).abs().max() > 1e-4


def test_a_last_layer_of_zeros_is_the_host_and_still_learns():
    torch.manual_seed(0)
    host = timm_block(32, 4, 4.0, qkv_bias=True, drop=0.0).eval()
    x, coords = torch.randn(2, 9, 32), torch.rand(1, 9, 3)
    plain = host(x)
    block = TerrainBlock(host, RelativePositionBias3D(4, zero_init=True))
    torch.testing.assert_close(block(x, (coords,)), plain, rtol=1e-5, atol=1e-6)
    block(x, (coords,)).square().sum().backward()
    assert block.attn.bias.mlp[2].weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("shape", [(9, 3), (1, 9, 2), (1, 3, 3, 3)])
def test_coordinates_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match=r"coordinates are \[batch or 1, tokens, 3\], not"):
        RelativePositionBias3D(2)(torch.zeros(shape))


def test_latitudes_beyond_the_poles_are_refused():
    exchanged = torch.tensor([[[10.0, 120.0, 0.0], [20.0, 130.0, 0.0]]])
    with pytest.raises(InputError, match=r"within \[-90, 90\], not 120 to 130: are latitude and longitude exchanged"):
        RelativePositionBias3D(2, coords="physical")(exchanged)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coords": "polar"}, "unknown coords 'polar'; choose one of 'normalized', 'physical'"),
        ({"log_spaced": True}, "log_spaced has an effect with coords: physical alone, and coords is normalized"),
        ({"hidden_dim": 0}, "hidden_dim is a whole number of 1 or more"),
        ({"zero_init": "yes"}, "zero_init is true or false"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        RelativePositionBias3D(2, **arguments)


@pytest.mark.parametrize(
    ("field", "img_size", "patch", "message"),
    [
        (torch.zeros(4, 6), (4, 6), 2, r"an elevation field is \[batch, 4, 6\], not \[4, 6\]"),
        (torch.zeros(1, 6, 4), (4, 6), 2, r"\[batch, 4, 6\], not \[1, 6, 4\]"),
        (torch.zeros(1, 4, 5), (4, 5), 2, "patches of 2 pixels do not tile"),
    ],
)
def test_fields_that_do_not_fit_are_refused(field, img_size, patch, message):
    with pytest.raises(InputError, match=message):
        compute_patch_coords_3d(field, img_size, patch)


def test_defaults_are_the_documents():
    bias = RelativePositionBias3D(8)
    assert sum(parameter.numel() for parameter in bias.parameters()) == (3 + 1) * 64 + (64 + 1) * 8
    assert Attention3D(32, 4).bias.mlp[0].out_features == 64
    assert not any(parameter.any() for parameter in RelativePositionBias3D(8, zero_init=True).mlp[2].parameters())


def test_the_poles_are_latitudes():
    coords = torch.tensor([[[0.0, 90.0, 0.0], [0.0, -90.0, 2800.0]]])
    assert RelativePositionBias3D(2, coords="physical")(coords).isfinite().all()
