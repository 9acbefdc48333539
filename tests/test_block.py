"""PhysicsGuidedBlockCorrected: timm's block with a bias, and nothing else changed."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn

from climax_elevation import Attention3D, InputError, PhysicsBias, PhysicsGuidedBlockCorrected, downsample_elevation
from climax_elevation.block import TerrainBlock, timm_block
from climax_elevation.host import StandInClimaX
from climax_elevation.terrain.plausible import looks_standardised, values_known


def tokens(batch=2, length=9, dim=32, seed=0):
    torch.manual_seed(seed)
    return torch.randn(batch, length, dim)


def test_keys_are_timms_and_the_scalars():
    block = PhysicsGuidedBlockCorrected(32, 4)
    plain = timm_block(32, 4, 4.0, qkv_bias=True, drop=0.0)
    added = set(block.state_dict()) - set(plain.state_dict())
    assert added == {"attn.bias.elevation_alpha", "attn.bias.wind_beta"}
    assert set(plain.state_dict()) < set(block.state_dict())
    missing = block.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing.missing_keys) == added
    assert not missing.unexpected_keys


def test_without_strength_it_is_timms_block_and_with_it_is_not():
    plain = timm_block(32, 4, 4.0, qkv_bias=True, drop=0.0).eval()
    x, z = tokens(), torch.rand(1, 9) * 4000
    outputs = {}
    for alpha in (0.0, 1.0):
        block = PhysicsGuidedBlockCorrected(32, 4, wind=False, alpha_init=alpha).eval()
        block.load_state_dict(plain.state_dict(), strict=False)
        outputs[alpha] = block(x, z)
    # float32 rounding of one attention: the same mathematics in another order
    torch.testing.assert_close(outputs[0.0], plain(x), rtol=1e-5, atol=1e-5)
    assert (outputs[1.0] - plain(x)).abs().max() > 1e-3


def test_norm_residual_and_mlp_are_all_there():
    """Attention alone, as the document's option B calls it, would lose all three."""
    block = PhysicsGuidedBlockCorrected(32, 4, wind=False).eval()
    x, z = tokens(), torch.rand(1, 9) * 4000
    y = x + block.attn(block.norm1(x), (z,))
    torch.testing.assert_close(block(x, z), y + block.mlp(block.norm2(y)))


def test_drop_path_and_dropout_are_the_hosts():
    block = PhysicsGuidedBlockCorrected(32, 4, drop=0.25, drop_path=0.5)
    assert block.drop_path1.drop_prob == block.drop_path2.drop_prob == 0.5
    assert {m.p for name, m in block.named_modules() if isinstance(m, nn.Dropout) and "attn_drop" not in name} == {0.25}


class Nothing(nn.Module):
    def forward(self, x):
        return 0 * x


def test_each_drop_path_stands_before_its_residual():
    x, z = tokens(), torch.rand(1, 9) * 4000
    block = PhysicsGuidedBlockCorrected(32, 4, wind=False).eval()
    block.drop_path1 = Nothing()
    torch.testing.assert_close(block(x, z), x + block.mlp(block.norm2(x)))
    block.drop_path2 = Nothing()
    assert torch.equal(block(x, z), x)
    block.drop_path1 = nn.Identity()
    torch.testing.assert_close(block(x, z), x + block.attn(block.norm1(x), (z,)))


@pytest.mark.parametrize("engine", ["auto", "sdpa", "tiled", "dense"])
def test_attention_dropout_acts_in_training_alone(engine):
    host = timm_block(32, 4, 4.0, qkv_bias=True, drop=0.0)
    block, x, z = TerrainBlock(host, PhysicsBias(wind=False), engine).eval(), tokens(), torch.rand(1, 9) * 4000
    expected = block(x, (z,))
    block.attn.attn_drop.p = 0.9
    assert torch.equal(block(x, (z,)), expected)
    if engine in ("auto", "sdpa"):
        block.train()
        assert (block(x, (z,)) - block(x, (z,))).abs().max() > 1e-3


@pytest.mark.parametrize("init_values", [None, 1e-2])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_layer_scale_and_query_norm_of_the_host_are_kept(init_values, qk_norm):
    options = {"init_values": init_values}
    if qk_norm:
        try:
            timm_block(32, 4, 4.0, drop=0.0, qk_norm=True)
        except TypeError:
            pytest.skip("this timm has no qk_norm")
        options["qk_norm"] = True
    host = timm_block(32, 4, 4.0, qkv_bias=True, drop=0.0, **options).eval()
    x, z = tokens(), torch.rand(1, 9) * 4000
    expected, keys = host(x), set(host.state_dict())
    block = TerrainBlock(host, PhysicsBias(wind=False, alpha_init=0.0)).eval()
    assert set(block.state_dict()) == keys | {"attn.bias.elevation_alpha"}
    torch.testing.assert_close(block(x, (z,)), expected, rtol=1e-5, atol=1e-6)


def test_every_parameter_gets_a_gradient():
    """A parameter without a use stops distributed training."""
    for wind in (True, False):
        block = PhysicsGuidedBlockCorrected(32, 4, wind=wind)
        u = torch.rand(2, 9) * 10
        block(tokens(), torch.rand(1, 9) * 4000, *((u, u) if wind else ())).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())


def test_wind_of_the_patches_gives_the_speed():
    block = PhysicsGuidedBlockCorrected(32, 4).eval()
    x, z = tokens(), torch.rand(1, 9) * 4000
    u, v = torch.full((2, 9), 3.0), torch.full((2, 9), 4.0)
    torch.testing.assert_close(block(x, z, u, v), block(x, bias_inputs=(z, torch.full((2, 9), 5.0))))


WINDS = ["10m_u_component_of_wind", "10m_v_component_of_wind"]
MEAN = {"orography": 400.0, WINDS[0]: -1.0, WINDS[1]: 0.5}
STD = {"orography": 800.0, WINDS[0]: 5.0, WINDS[1]: 4.0}


@pytest.mark.parametrize("given", ["fields", "elevation of patches", "told"])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_fields_give_the_bias_that_attach_gives(patch_size, given):
    torch.manual_seed(0)
    model = StandInClimaX(
        ["orography", *WINDS], [8, 16], patch_size, embed_dim=32, depth=1, num_heads=4, use_physics_mask=True
    ).eval()
    model.terrain.set_statistics(MEAN, STD, "a test")
    x = torch.randn(2, 3, 8, 16)
    x[:, 0] = torch.rand(2, 8, 16) * 4 - 0.5  # 0 to 3600 m
    arguments = model.terrain.for_blocks(model.blocks, x, None, ["orography", *WINDS])[0]
    mean, std = (torch.tensor(list(values.values()))[:, None, None] for values in (MEAN, STD))
    z, u, v = (x * std + mean).unbind(1)
    if given == "elevation of patches":  # the published call
        z = downsample_elevation(z, patch_size)
    block = PhysicsGuidedBlockCorrected(32, 4, patch_size=patch_size if given == "told" else None).eval()
    block.load_state_dict(model.blocks[0].state_dict())
    seen = []
    block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    embedded = tokens(length=128 // patch_size**2)
    out = block(embedded, z, u, v)
    expected = model.blocks[0].attn.bias(*arguments["bias_inputs"])
    torch.testing.assert_close(block.attn.bias(*seen[0]), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out, model.blocks[0](embedded, **arguments), rtol=1e-5, atol=1e-5)
    if patch_size > 1:  # and not that of the mean wind's speed
        u, v = (downsample_elevation(wind, patch_size) for wind in (u, v))
        block(embedded, z, u, v)
        assert (block.attn.bias(*seen[1]) - expected).abs().max() > 0.01


def test_fields_of_another_grid_are_refused():
    block, windless = PhysicsGuidedBlockCorrected(32, 4), PhysicsGuidedBlockCorrected(32, 4, wind=False)
    x, z, field = tokens(length=8), torch.zeros(1, 8), torch.zeros(1, 4, 8)
    assert windless(x, field).shape == x.shape
    for shape in ((1, 4, 6), (1, 2, 8), (1, 1, 1), (1, 1, 32)):  # of 3 pixels, of 2, of none, of 2 x 2 in one row
        with pytest.raises(InputError, match=f"a field of {shape[1]} x {shape[2]} pixels is not 8 square patches"):
            windless(x, torch.zeros(shape))
    with pytest.raises(InputError, match="4 x 6 pixels is not 8 square patches"):
        block(x, z, torch.zeros(1, 4, 6), torch.zeros(1, 4, 6))
    with pytest.raises(InputError, match="4 x 8 pixels is not 8 patches of 4 x 4"):
        PhysicsGuidedBlockCorrected(32, 4, wind=False, patch_size=4)(x, field)
    with pytest.raises(InputError, match=r"of one shape, not \[1, 8\] and \[1, 4, 8\]"):
        block(x, z, z, field)
    with pytest.raises(InputError, match=r"\[2 or 1, 8 tokens, ...\], not \[1, 1, 4, 8\]"):
        windless(x, field[None])
    with pytest.raises(InputError, match="patch_size is a whole number of 1 or more, not 0"):
        PhysicsGuidedBlockCorrected(32, 4, patch_size=0)


def standardised(shape=(1, 9), seed=0):
    z = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 4000
    return (z - z.mean()) / z.std()


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.full((1, 9), math.nan), "elevation_patches has values that are not finite"),
        (torch.tensor([[0.0] * 8 + [math.inf]]), "elevation_patches has values that are not finite"),
        (standardised(), "looks standardised: give metres, or build the block with terrain_is_flat=True"),
        (standardised((1, 6, 6)), "looks standardised"),
        (torch.linspace(0, 5000, 9)[None] * 9.80665, "is it geopotential"),
        (torch.linspace(-900, 0, 9)[None], "outside -500 to 9000 m"),
        (torch.zeros(1, 9, dtype=torch.complex64), "real numbers, .*, not torch.complex64"),
        (torch.zeros(1, 9, dtype=torch.bool), "real numbers, .*, not torch.bool"),
    ],
)
def test_what_cannot_be_metres_is_refused(z, message):
    with pytest.raises(InputError, match=message):
        PhysicsGuidedBlockCorrected(32, 4, wind=False)(tokens(), z)


@pytest.mark.parametrize(
    "z",
    [
        torch.zeros(1, 9),
        torch.full((1, 9), -3.0),
        torch.arange(9)[None],  # whole numbers, and a low coast
        torch.linspace(-1, 9, 9)[None],  # a polder
        torch.linspace(-0.2, 0.3, 9)[None],
        torch.tensor([[0.0] * 8 + [5.0]]),  # nothing below the sea
        torch.linspace(-4, 9.9, 9)[None],
        torch.linspace(-500, 9000, 9)[None],
    ],
)
def test_flat_and_low_ground_is_ground(z):
    block = PhysicsGuidedBlockCorrected(32, 4, wind=False)
    x = tokens()
    torch.testing.assert_close(block(x, z), block(x, bias_inputs=(z.float(),)))


def test_flat_ground_may_be_meant():
    block, x = PhysicsGuidedBlockCorrected(32, 4, wind=False, terrain_is_flat=True), tokens()
    assert block(x, standardised()).isfinite().all()
    with pytest.raises(InputError, match="not finite"):
        block(x, torch.full((1, 9), math.nan))


@pytest.mark.parametrize("component", [0, 1])
def test_wind_that_is_not_finite_is_refused(component):
    wind = [torch.zeros(1, 9), torch.zeros(1, 9)]
    wind[component][0, 4] = math.nan
    with pytest.raises(InputError, match=f"{'uv'[component]}_wind has values that are not finite"):
        PhysicsGuidedBlockCorrected(32, 4)(tokens(), torch.zeros(1, 9), *wind)


def test_coordinates_straight_to_attention_are_looked_at():
    coords = torch.rand(1, 9, 3)
    coords[0, 3, 1] = math.nan
    with pytest.raises(InputError, match="coords_3d has values that are not finite"):
        Attention3D(32, 4)(tokens(), coords)
    coords = torch.rand(1, 9, 3)
    coords[..., 2] = standardised()
    assert Attention3D(32, 4)(tokens(), coords).isfinite().all()  # which scales it anyway
    with pytest.raises(InputError, match="elevation in coords_3d is .* looks standardised"):
        Attention3D(32, 4, coords="physical")(tokens(), coords)


def test_a_standardised_orography_looks_so_and_its_metres_do_not(data):
    import numpy as np

    with np.load(data / "era5_orography_5.625deg.npz") as constants:
        z = torch.from_numpy(constants["orography"]).float().flatten()
    assert looks_standardised((z - z.mean()) / z.std())
    assert not looks_standardised(z)


def test_what_looks_standardised_is_within_ten_of_zero():
    z = torch.linspace(-1, 1, 400)
    assert looks_standardised(torch.cat([z, torch.tensor([9.9])]))
    assert not looks_standardised(torch.cat([z, torch.tensor([10.1])]))
    assert not looks_standardised(torch.cat([z, torch.tensor([-10.1])]))
    assert not looks_standardised(z + 1.1)  # nothing below 0
    assert not looks_standardised(torch.cat([z, torch.full((800,), 2.0)]))  # a mean of 1.3
    assert not looks_standardised(z / 3)
    assert not looks_standardised(z * 5)


def test_numbers_are_looked_at_only_where_that_costs_nothing():
    assert values_known(torch.zeros(2))
    assert values_known(nn.Parameter(torch.zeros(2)))
    assert not values_known(torch.zeros(2, device="meta"))
    seen = []
    torch.func.vmap(lambda t: seen.append(values_known(t)) or t)(torch.zeros(2, 3))
    torch.func.grad(lambda t: seen.append(values_known(t)) or t.sum())(torch.zeros(3))
    with torch._subclasses.FakeTensorMode():
        seen.append(values_known(torch.zeros(2)))
    assert seen == [False] * 3


def test_another_device_or_no_numbers_are_one_sentence():
    block, x, z = PhysicsGuidedBlockCorrected(32, 4), tokens(), torch.zeros(1, 9)
    with pytest.raises(InputError, match="elevation_patches is on meta, and the tokens are on cpu: move it there"):
        block(x, z.to("meta"), z, z)
    with pytest.raises(InputError, match="v_wind is on meta, and the tokens are on cpu"):
        block(x, z, z, z.to("meta"))
    with pytest.raises(InputError, match="not torch.float32 on meta"):
        block.to("meta")(x.to("meta"), z.to("meta"), z.to("meta"), z.to("meta"))
    with pytest.raises(InputError, match="floating-point numbers .*, not torch.int64 on cpu"):
        block(x.long(), z, z, z)


def test_fields_under_vmap_and_in_exported_programs():
    block, x = PhysicsGuidedBlockCorrected(32, 4, engine="sdpa").eval(), tokens()
    z, u, v = torch.rand(2, 1, 6, 6) * 3000, *(torch.rand(2, 2, 1, 6, 6) * 9)
    expected = torch.stack([block(x, *one) for one in zip(z, u, v, strict=True)])
    torch.testing.assert_close(torch.func.vmap(block, (None, 0, 0, 0))(x, z, u, v), expected, rtol=1e-5, atol=1e-5)
    program = torch.export.export(block, (x, z[0], u[0], v[0])).module()
    torch.testing.assert_close(program(x, z[1], u[1], v[1]), expected[1], rtol=1e-5, atol=1e-5)


def test_permuting_tokens_with_their_terrain_permutes_the_output():
    block = PhysicsGuidedBlockCorrected(32, 4).eval()
    x, z, u = tokens(), torch.rand(1, 9) * 4000, torch.rand(2, 9) * 9
    order = torch.randperm(9)
    permuted = block(x[:, order], z[:, order], u[:, order], u[:, order])
    torch.testing.assert_close(permuted, block(x, z, u, u)[:, order], rtol=1e-5, atol=1e-6)


def test_what_is_missing_is_an_error_never_plain_attention():
    block, x, z = PhysicsGuidedBlockCorrected(32, 4), tokens(), torch.zeros(1, 9)
    with pytest.raises(InputError, match="needs elevation_patches"):
        block(x)
    with pytest.raises(InputError, match="needs u_wind and v_wind"):
        block(x, z)
    with pytest.raises(InputError, match="needs u_wind and v_wind"):
        block(x, z, z)
    with pytest.raises(InputError, match="wind=False, and got wind"):
        PhysicsGuidedBlockCorrected(32, 4, wind=False)(x, z, z, z)
    with pytest.raises(InputError, match="inputs are"):
        PhysicsGuidedBlockCorrected(32, 4, wind=False)(x, torch.zeros(1, 8))
    with pytest.raises(InputError, match="not both"):
        block(x, z, bias_inputs=(z, z))
    with pytest.raises(InputError, match="unknown engine"):
        PhysicsGuidedBlockCorrected(32, 4, engine="fast")


def test_a_block_that_is_not_timms_is_refused():
    with pytest.raises(InputError, match="built as timm's Block"):
        TerrainBlock(nn.TransformerEncoderLayer(32, 4), PhysicsBias())
    host = timm_block(32, 4, 4.0, drop=0.0)
    host.attn.relative_position = nn.Linear(1, 1)
    with pytest.raises(InputError, match="built as timm's Attention"):
        TerrainBlock(host, PhysicsBias())


def test_defaults_are_those_of_the_bias():
    own = inspect.signature(PhysicsGuidedBlockCorrected.__init__).parameters
    for name, parameter in inspect.signature(PhysicsBias.__init__).parameters.items():
        assert name == "self" or own[name].default == parameter.default, name


def test_defaults_are_the_documents():
    block = PhysicsGuidedBlockCorrected(32, 4)
    bias = block.attn.bias
    assert (bias.elevation_alpha.item(), bias.wind_beta.item()) == (1.0, pytest.approx(0.3))
    assert (bias.height_scale_m, bias.wind_threshold_m_s, bias.direction) == (1000.0, 5.0, "key_above")
    assert (block.mlp.fc1.out_features, block.attn.qkv.bias is not None) == (128, True)
    assert {m.p for m in block.modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert isinstance(block.drop_path1, nn.Identity)
    assert isinstance(block.norm1, nn.LayerNorm)
    assert not block.terrain_is_flat
    attention = Attention3D(64)
    assert (attention.num_heads, attention.qkv.bias) == (8, None)
    assert {m.p for m in attention.modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert attention.bias.coords == "normalized"
    assert not attention.bias.log_spaced
    assert attention.bias.mlp[2].weight.any()
    assert {block.attn.engine, attention.engine} == {"auto"}


def test_copies_are_independent():
    block = PhysicsGuidedBlockCorrected(32, 4, wind=False).eval()
    x, z = tokens(), torch.rand(1, 9) * 4000
    before = block(x, z)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x, z), before)
        with torch.no_grad():
            other.attn.bias.elevation_alpha.add_(5)
        assert not torch.equal(other(x, z), before)
    assert torch.equal(block(x, z), before)


def test_compiles_whole_without_a_graph_break():
    block = PhysicsGuidedBlockCorrected(32, 4)
    x, z, u = tokens(), torch.rand(1, 9) * 4000, torch.rand(2, 9) * 9
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, z, u, u), block(x, z, u, u), rtol=1e-5, atol=1e-5)
    z, u, v = torch.rand(1, 6, 6) * 4000, *(torch.rand(2, 2, 6, 6) * 9)
    torch.testing.assert_close(compiled(x, z, u, v), block(x, z, u, v), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_autocast_keeps_the_bias_exact_and_the_block_in_half():
    block = PhysicsGuidedBlockCorrected(32, 4, wind=False).eval()
    x, z = tokens(), torch.rand(1, 9) * 8000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = block(x, z)
    # bfloat16 keeps 8 bits: a few such roundings through the block
    torch.testing.assert_close(half.float(), block(x, z), rtol=0.05, atol=0.05)
    assert half.isfinite().all()
