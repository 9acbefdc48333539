"""Models that are no ClimaX: timm's own VisionTransformer, and blocks that a model holds elsewhere."""

import copy
import inspect
import pickle

import pytest
import torch
from terrains import EVERY_BIAS, global_terrain
from test_attach import VARIABLES, batch, strong, terrain_aware
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from climax_elevation import InputError, Terrain, attach_blocks, bias_off, build_bias, detach, keep_bias, terrain_given
from climax_elevation.block import TerrainBlock
from climax_elevation.diagnostics.strength import assess

GRID = (8, 16)
NO_WIND = {"wind": False}


def model(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"img_size": (64, 128), "patch_size": 8, "in_chans": 5, "embed_dim": 32, "depth": 3, "num_heads": 4}
    made = VisionTransformer(**(shape | {"num_classes": 0, "class_token": False, "global_pool": ""} | changes))
    return strong(made)


def skip_without(argument):
    if argument not in inspect.signature(VisionTransformer).parameters:
        pytest.skip(f"this timm's VisionTransformer has no {argument}")


def terrain_aware_vit(seed=0, bias_type="physics", blocks="all", bias_args=NO_WIND, **changes):
    made = model(seed, **changes)
    attach_blocks(made, bias_type, blocks=blocks, bias_args=bias_args)
    return made


def ground(seed=0, **changes):
    return global_terrain(GRID, seed=seed, dtype=torch.float32, **changes)


def images(seed=1):
    return torch.randn(2, 5, 64, 128, generator=torch.Generator().manual_seed(seed))


def given(made, terrain, x):
    with terrain_given(made, terrain):
        return made(x)


def loss(out):
    """Of no symmetry: the mean square of what a last norm gives is always the same."""
    return (out * torch.linspace(0, 1000, out.numel(), dtype=out.dtype).sin().view_as(out)).mean()


class Elsewhere(nn.Module):
    """Blocks of another name and place, called one by one, on tokens that no `PatchEmbed` of timm made."""

    def __init__(self, depth=2):
        super().__init__()
        self.net = nn.Module()
        self.net.layers = nn.ModuleList([Block(32, 4, qkv_bias=True) for _ in range(depth)])

    def forward(self, tokens):
        for block in self.net.layers:
            tokens = block(tokens)
        return tokens


def test_zero_strength_is_stock_and_full_strength_is_not():
    x, terrain = images(), ground()
    stock = model()(x)
    still = given(terrain_aware_vit(bias_args={"alpha_init": 0.0, "beta_init": 0.3}), terrain, x)
    made = terrain_aware_vit(bias_args={"alpha_init": 1.0})
    assert 0.1 < stock.abs().max() < 100
    assert (still - stock).abs().max() < 1e-5
    assert (given(made, terrain, x) - stock).abs().max() > 1e-2
    assert (given(made, ground(seed=5), x) - given(made, terrain, x)).abs().max() > 1e-2


def test_keys_weights_and_random_numbers_are_the_hosts():
    made, stock = model(), model()
    state = torch.random.get_rng_state()
    attach_blocks(made, "relative_3d", blocks=[0, 2])
    assert torch.equal(torch.random.get_rng_state(), state)
    ours = set(made.state_dict()) - set(stock.state_dict())
    assert ours == {f"blocks.{n}.attn.bias.mlp.{i}.{p}" for n in (0, 2) for i in (0, 2) for p in ("weight", "bias")}
    assert all(torch.equal(made.state_dict()[key], value) for key, value in stock.state_dict().items())
    assert not made.load_state_dict(stock.state_dict(), strict=False).unexpected_keys


@pytest.mark.parametrize("case", EVERY_BIAS)
def test_every_bias_works_and_every_parameter_learns(case):
    name, arguments = EVERY_BIAS[case]
    made, terrain, x = terrain_aware_vit(bias_type=name, bias_args=arguments), ground(), images()
    out = given(made.train(), terrain, x)
    loss(out).backward()
    assert (out - model()(x)).abs().max() > 1e-4
    assert all(parameter.grad is not None for parameter in made.parameters())
    learned = [parameter.grad.abs().max() for key, parameter in made.named_parameters() if ".bias." in key]
    assert max(learned) > 0


def test_the_gradient_of_alpha_is_that_of_finite_differences():
    made, terrain, x = terrain_aware_vit(blocks=[0]).double(), ground(), images().double()
    alpha = made.blocks[0].attn.bias.elevation_alpha
    loss(given(made, terrain, x)).backward()
    values = []
    for step in (1e-4, -2e-4):
        with torch.no_grad():
            alpha.add_(step)
            values.append(loss(given(made, terrain, x)))
    assert alpha.grad.abs() > 1e-6
    assert torch.isclose(alpha.grad, (values[0] - values[1]) / 2e-4, rtol=1e-4)


def test_blocks_compute_what_attach_has_them_compute_in_a_climax():
    """The same weights, the same tokens, and the terrain that the stand-in read: the same numbers."""
    climax = strong(terrain_aware(blocks="all"))
    x, lead_times = batch()
    terrain = climax.terrain(x, lead_times, VARIABLES)
    vit = model(img_size=(8, 16), patch_size=2, norm_layer=nn.LayerNorm)
    attach_blocks(vit, "physics", blocks="all")
    vit.blocks.load_state_dict(climax.blocks.state_dict())
    tokens = torch.randn(2, 32, 32)
    arguments = climax.terrain.for_blocks(climax.blocks, x, lead_times, VARIABLES)
    with terrain_given(vit, terrain):
        for index, block in enumerate(vit.blocks):
            assert torch.equal(block(tokens), climax.blocks[index](tokens, **arguments[index]))
            values = climax.blocks[index].attn.bias(*arguments[index]["bias_inputs"])
            assert torch.equal(block.attn.bias(*block.handed_in.bias_inputs), values)


def test_of_a_stack_of_another_name_the_grid_is_said():
    made, terrain = Elsewhere(), ground()
    tokens = torch.randn(2, 128, 32)
    with pytest.raises(InputError, match="stack is the path of the ModuleList.*not 'blocks'; this Elsewhere has net.l"):
        attach_blocks(made)
    with pytest.raises(InputError, match=r"give grid=\(rows, columns\) of the patches of this Elsewhere, not None"):
        attach_blocks(made, stack="net.layers")
    stock = made(tokens)
    attach_blocks(made, "physics", stack="net.layers", blocks=[1], grid=GRID)
    assert {key for key in made.state_dict() if ".bias." in key} == {
        "net.layers.1.attn.bias.elevation_alpha",
        "net.layers.1.attn.bias.wind_beta",
    }
    assert (given(made, terrain, tokens) - stock).abs().max() > 1e-4
    report = None
    with terrain_given(made, terrain):
        report = assess(made, tokens, run=lambda net, x: net(x))
    assert list(report.blocks) == [1]


def test_without_terrain_there_is_a_sentence_and_never_plain_attention():
    for bias_type in ("physics", "relative_3d"):
        made, x = terrain_aware_vit(bias_type=bias_type, bias_args=None), images()
        with pytest.raises(InputError, match="no terrain was handed in: call the model inside `with terrain_given"):
            made(x)
        given(made, ground(), x)
        with pytest.raises(InputError, match="no terrain was handed in"):
            made(x)
        with pytest.raises(RuntimeError, match="stopped"), terrain_given(made, ground()):
            raise RuntimeError("stopped")
        with pytest.raises(InputError, match="no terrain was handed in"):
            made(x)


def test_terrains_nest():
    made, x = terrain_aware_vit(), images()
    first, second = (given(made, ground(seed), x) for seed in (0, 1))
    with terrain_given(made, ground(0)):
        assert torch.equal(given(made, ground(1), x), second)
        assert torch.equal(made(x), first)


@pytest.mark.parametrize(
    ("terrain", "message"),
    [
        (ground(), "the physics bias needs wind, and this terrain has none"),
        (global_terrain((16, 8)), "all those of a grid of 8 x 16, and the terrain is of 16 x 8"),
        (global_terrain((4, 8)), "a grid of 8 x 16, and the terrain is of 4 x 8"),
        (ground().select(range(64)), "the terrain is of 64 patches of 8 x 16"),
        (Terrain(torch.randn(1, 128), GRID), "the terrain that was handed in is .* looks standardised"),
        (Terrain(torch.full((1, 128), 50_000.0), GRID), "is 50000 to 50000 m, outside"),
        (Terrain(torch.full((1, 128), torch.nan), GRID), "values that are not finite"),
    ],
    ids=["no wind", "transposed", "smaller", "region", "standardised", "geopotential", "not finite"],
)
def test_terrain_that_cannot_be_is_refused(terrain, message):
    made = terrain_aware_vit(bias_args=None)
    if "needs wind" in message:
        terrain = Terrain(terrain.elevation_m, GRID)
    with pytest.raises(InputError, match=message), terrain_given(made, terrain):
        pass
    with pytest.raises(InputError, match="no terrain was handed in"):
        made(images())


def test_flat_ground_may_be_meant():
    made = model()
    attach_blocks(made, terrain_is_flat=True, bias_args=NO_WIND)
    assert given(made, Terrain(torch.randn(1, 128), GRID), images()).isfinite().all()


@pytest.mark.parametrize("changes", [{"class_token": True, "global_pool": "token"}, {"reg_tokens": 4}])
def test_tokens_that_are_no_patches_are_refused(changes):
    skip_without(next(iter(changes)))
    made = model(**changes)
    with pytest.raises(InputError, match="token.* that are no patches, .* class_token=False and reg_tokens=0"):
        attach_blocks(made)
    assert not any(isinstance(part, TerrainBlock) for part in made.modules())


def test_dropped_patches_are_refused():
    skip_without("patch_drop_rate")
    made = terrain_aware_vit(patch_drop_rate=0.5)
    given(made, ground(), images())
    with pytest.raises(InputError, match="a block got 64 tokens, and the grid of 8 x 16 has 128 patches"):
        given(made.train(), ground(), images())


def test_tokens_beside_patches_that_no_attribute_tells_of_are_refused():
    made = Elsewhere()
    attach_blocks(made, stack="net.layers", grid=GRID, bias_args=NO_WIND)
    with pytest.raises(InputError, match="a block got 129 tokens, .* no class token"):
        given(made, ground(), torch.randn(2, 129, 32))


class Own(Block):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bias_type": "phisics"}, "unknown bias 'phisics'"),
        ({"bias_args": {"alpha": 1}}, "unknown argument 'alpha' for bias 'physics'"),
        ({"blocks": [3]}, "blocks is .all. or a list of indices from 0 to 2"),
        ({"stack": "norm"}, "not 'norm'; this VisionTransformer has blocks"),
        ({"engine": "flash"}, "unknown engine 'flash'"),
        ({"grid": (16, 8)}, "grid is 16 x 8, and the model's patch_embed makes 8 x 16 patches"),
        ({"grid": (8, 0)}, "grid is a whole number of 1 or more"),
        ({"grid": 8}, r"give grid=\(rows, columns\)"),
        ({"terrain_is_flat": 1}, "terrain_is_flat is true or false"),
    ],
)
def test_mistakes_change_nothing(arguments, message):
    made = model()
    blocks = list(made.blocks)
    with pytest.raises(InputError, match=message):
        attach_blocks(made, **arguments)
    assert list(made.blocks) == blocks


def test_blocks_of_another_kind_are_refused():
    made = model(block_fn=Own)
    with pytest.raises(InputError, match="Own has a forward of its own, .*: build the model with timm's Block"):
        attach_blocks(made)
    made = terrain_aware_vit(blocks=[0])
    with pytest.raises(InputError, match="blocks.0 has a terrain bias already"):
        attach_blocks(made, blocks=[0])
    attach_blocks(made, "relative_2d", blocks=[1])  # another bias beside it
    assert given(made, ground(), images()).isfinite().all()
    with pytest.raises(InputError, match="has no terrain bias to hand terrain to"), terrain_given(model(), ground()):
        pass


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_are_independent_and_hold_no_terrain(copied):
    made, x = terrain_aware_vit(), images()
    with terrain_given(made, ground()):
        before = made(x)
        other = copy.deepcopy(made) if copied == "deepcopy" else pickle.loads(pickle.dumps(made))
    with pytest.raises(InputError, match="no terrain was handed in"):
        other(x)
    assert torch.equal(given(other, ground(), x), before)
    with torch.no_grad():
        other.blocks[0].attn.bias.elevation_alpha.add_(10)
    assert torch.equal(given(made, ground(), x), before)
    assert not torch.equal(given(other, ground(), x), before)


def test_off_and_detached_are_stock_with_the_weights_of_today():
    made, x = terrain_aware_vit(), images()
    originals = [block.host[0] for block in made.blocks]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.1)
    stock = model()
    stock.load_state_dict({key: value for key, value in made.state_dict().items() if key in stock.state_dict()})
    expected, on = stock(x), given(made, ground(), x)
    with bias_off(made):
        assert torch.equal(made(x), expected)
    assert torch.equal(given(made, ground(), x), on)
    with terrain_given(made, ground()), bias_off(nn.Sequential(made)):
        assert torch.equal(made(x), expected)
    detach(made)
    assert [id(block) for block in made.blocks] == [id(block) for block in originals]
    assert torch.equal(made(x), expected)
    with pytest.raises(InputError, match="has no terrain bias"):
        detach(made)


def test_the_bias_may_be_kept():
    made, x = terrain_aware_vit(bias_type="relative_3d", bias_args=None), images()
    with torch.no_grad():
        first = given(made, ground(), x)
        keep_bias(made)
        assert torch.equal(given(made, ground(), x), first)
        values = made.blocks[0].attn.kept._computed.values
        assert torch.equal(given(made, ground(), x), first)
        assert made.blocks[0].attn.kept._computed.values is values
        assert not torch.equal(given(made, ground(seed=3), x), first)


def test_compiled_whole_it_notices_other_terrain():
    made, x = terrain_aware_vit(), images()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for terrain in (ground(0), ground(1), ground(2, terrain_batch=2)):
        expected = given(made, terrain, x)
        assert torch.allclose(given(compiled, terrain, x), expected, atol=1e-5)
    with pytest.raises(Exception, match="no terrain was handed in"):
        compiled(x)


def test_checkpointed_activations_want_the_terrain_for_the_backward_too():
    made, x = terrain_aware_vit().train(), images()
    loss(given(made, ground(), x)).backward()
    expected = made.blocks[0].attn.bias.elevation_alpha.grad.clone()
    made.zero_grad()
    made.set_grad_checkpointing()
    with terrain_given(made, ground()):
        loss(made(x)).backward()
    assert torch.allclose(made.blocks[0].attn.bias.elevation_alpha.grad, expected, rtol=1e-4)
    value = loss(given(made, ground(), x))
    with pytest.raises(InputError, match="its backward too where activations are checkpointed"):
        value.backward()


def test_dropout_of_attention_rests_where_the_host_does():
    made = terrain_aware_vit(attn_drop_rate=0.5)  # attached while in evaluation
    assert torch.equal(given(made, ground(), images()), given(made, ground(), images()))
    assert not any(module.training for module in made.modules())


def test_the_strength_of_a_bias_is_measured():
    made = terrain_aware_vit(blocks=[0, 2])
    with terrain_given(made, ground()):
        report = assess(made, images(), run=lambda net, x: net(x))
    assert list(report.blocks) == [0, 2]
    assert not report.inert
    assert report.blocks[0].largest[0] == pytest.approx(
        build_bias("physics", num_heads=4, wind=False)(ground().elevation_m).abs().max().item(), rel=0.2
    )
