"""PhysicsGuidedBlockCorrected: timm's block with a bias, and nothing else changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

from climax_elevation import InputError, PhysicsBias, PhysicsGuidedBlockCorrected
from climax_elevation.block import TerrainBlock, timm_block


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


def test_autocast_keeps_the_bias_exact_and_the_block_in_half():
    block = PhysicsGuidedBlockCorrected(32, 4, wind=False).eval()
    x, z = tokens(), torch.rand(1, 9) * 8000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = block(x, z)
    # bfloat16 keeps 8 bits: a few such roundings through the block
    torch.testing.assert_close(half.float(), block(x, z), rtol=0.05, atol=0.05)
    assert half.isfinite().all()
