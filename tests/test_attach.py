"""The flag on a whole model: off changes nothing, on adds the plugin's keys and nothing else."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from climax_elevation import InputError, PhysicsGuidedBlockCorrected, attach
from climax_elevation.host import StandInClimaX

WINDS = ["10m_u_component_of_wind", "10m_v_component_of_wind"]
VARIABLES = ["orography", "2m_temperature", *WINDS]
MEAN = {"orography": 400.0, "2m_temperature": 280.0, WINDS[0]: -1.0, WINDS[1]: 0.5}
STD = {"orography": 800.0, "2m_temperature": 20.0, WINDS[0]: 5.0, WINDS[1]: 4.0}


def model(seed=0, **flags):
    torch.manual_seed(seed)
    return StandInClimaX(
        VARIABLES, img_size=[8, 16], patch_size=2, embed_dim=32, depth=3, decoder_depth=1, num_heads=4, **flags
    )


def terrain_aware(seed=0, **bias_args):
    made = model(seed, use_physics_mask=True, bias_args=bias_args)
    made.terrain.set_statistics(MEAN, STD, "a test")
    return made


def strong(made):
    """Weights of standard deviation 0.02 would leave attention almost uniform, and any bias almost unseen."""
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and ".bias." not in name:
                parameter.mul_(10)
    return made.eval()


def batch(seed=1):
    torch.manual_seed(seed)
    x = torch.randn(2, 4, 8, 16)
    x[:, 0] = torch.rand(8, 16) * 4 - 0.5  # 0 to 2800 m
    return x, torch.tensor([0.72, 0.72])


def predict(made, x, lead_times):
    return made(x, None, lead_times, VARIABLES, VARIABLES, None, None)[1]


def test_attaching_leaves_weights_and_random_numbers_alone():
    off = model()
    after_off = torch.rand(1)
    for parallel in (False, True):
        off = model(parallel_patch_embed=parallel)
        after_off = torch.rand(1)
        on = model(parallel_patch_embed=parallel, use_physics_mask=True, bias_args={"blocks": "all"})
        assert torch.equal(torch.rand(1), after_off)
        ours = [key for key in on.state_dict() if key.startswith("terrain.") or ".attn.bias." in key]
        assert set(on.state_dict()) - set(ours) == set(off.state_dict())
        assert all(torch.equal(on.state_dict()[key], value) for key, value in off.state_dict().items())


def test_key_names_survive_the_hosts_loaders():
    """Those rename keys with channel, drop head and token_embeds, and spare pos_embed and var_embed from decay."""
    ours = set(terrain_aware(blocks="all").state_dict()) - set(model().state_dict())
    assert ours
    assert not [k for k in ours for word in ("channel", "head", "token_embeds", "pos_embed", "var_embed") if word in k]


@pytest.mark.parametrize("blocks", [[0], [1, 2], "all"])
def test_zero_strength_is_the_host_and_full_strength_is_not(blocks):
    x, lead_times = batch()
    plain = predict(strong(model()), x, lead_times)
    still = predict(strong(terrain_aware(alpha_init=0, blocks=blocks)), x, lead_times)
    moved = predict(strong(terrain_aware(alpha_init=1, blocks=blocks)), x, lead_times)
    assert plain.abs().max() < 100
    assert (still - plain).abs().max() < 1e-5
    assert (moved - plain).abs().max() > 1e-4


def test_blocks_of_a_model_in_evaluation_are_in_evaluation():
    """Dropout of attention weights would be at work in one block otherwise."""
    made = model(use_physics_mask=False).eval()
    attach(made)
    assert not any(module.training for module in made.blocks.modules())


def test_the_chosen_blocks_and_no_others():
    made = terrain_aware(blocks=[0, 2])
    assert [isinstance(block, PhysicsGuidedBlockCorrected) for block in made.blocks] == [True, False, True]
    assert "PhysicsGuidedBlockCorrected" in repr(made)
    assert "PhysicsBias" in repr(made)


def test_every_parameter_learns_and_alpha_moves():
    made = terrain_aware(blocks="all")
    x, lead_times = batch()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2, weight_decay=0)
    predict(made.train(), x, lead_times).square().mean().backward()
    assert all(p.grad is not None for p in made.parameters())
    alphas = [block.attn.bias.elevation_alpha for block in made.blocks]
    assert all(alpha.grad.abs() > 0 for alpha in alphas)
    optimizer.step()
    assert all(alpha.item() != 1.0 for alpha in alphas)


def test_a_plain_checkpoint_loads_with_only_the_plugins_keys_missing():
    made = terrain_aware()
    result = made.load_state_dict(model(seed=5).state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith("terrain.") or ".attn.bias." in key for key in result.missing_keys)
    x, lead_times = batch()
    assert predict(made.eval(), x, lead_times).isfinite().all()


def test_copies_are_independent():
    made = terrain_aware().eval()
    x, lead_times = batch()
    before = predict(made, x, lead_times)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(predict(other, x, lead_times), before)
        with torch.no_grad():
            other.blocks[0].attn.bias.elevation_alpha.add_(10)
            other.terrain.elevation_std.mul_(1.5)
        assert not torch.equal(predict(other, x, lead_times), before)
    assert torch.equal(predict(made, x, lead_times), before)


def test_statistics_from_a_folder(tmp_path):
    np.savez(tmp_path / "normalize_mean.npz", **{k: np.array([v]) for k, v in MEAN.items()})
    np.savez(tmp_path / "normalize_std.npz", **{k: np.array([v]) for k, v in STD.items()})
    np.save(tmp_path / "lat.npy", np.linspace(-70, 70, 8))
    np.save(tmp_path / "lon.npy", np.arange(16) * 22.5)
    made = model(use_physics_mask=True, bias_args={"stats_dir": str(tmp_path)}).eval()
    x, lead_times = batch()
    assert torch.equal(predict(made, x, lead_times), predict(terrain_aware().eval(), x, lead_times))
    assert made.terrain.lat[0].item() == pytest.approx(-60)
    (tmp_path / "normalize_std.npz").unlink()
    with pytest.raises(InputError, match=r"has no normalize_std\.npz"):
        model(use_physics_mask=True, bias_args={"stats_dir": str(tmp_path)})


def test_an_elevation_file_serves_a_model_without_orography(tmp_path):
    np.save(tmp_path / "z.npy", np.random.default_rng(0).uniform(0, 4000, (8, 16)))
    torch.manual_seed(0)
    made = StandInClimaX(["2m_temperature"], img_size=[8, 16], embed_dim=32, depth=1, num_heads=4)
    plain = copy.deepcopy(made)
    attach(made, elevation_file=str(tmp_path / "z.npy"), wind=False)
    arguments = (batch()[0][:, 1:2], None, torch.zeros(2), ["2m_temperature"], ["2m_temperature"], None, None)
    assert (strong(made)(*arguments)[1] - strong(plain)(*arguments)[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("bias_args", "message"),
    [
        ({"alpha": 1}, r"unknown argument 'alpha' for bias 'physics'; valid: blocks, .*alpha_init, beta_init"),
        ({"blocks": [3]}, "indices from 0 to 2"),
        ({"blocks": "first"}, "indices from 0 to 2"),
        ({"blocks": []}, "at least one block"),
        ({"blocks": [0, 0]}, "none twice"),
        ({"engine": "fast"}, "unknown engine 'fast'"),
        ({"control": "tilted"}, "unknown control 'tilted'"),
        ({"elevation_variable": "height"}, "lack 'height'"),
        ({"wind_variables": ["u", "v"]}, "lack 'u'"),
        ({"wind_variables": "u"}, "names two different channels"),
        ({"elevation_file": "none.nc"}, "does not exist"),
        ({"direction": "up"}, "unknown direction"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(bias_args, message):
    made = model()
    keys, parts = set(made.state_dict()), dict(made.named_modules())
    with pytest.raises(InputError, match=message):
        attach(made, **bias_args)
    assert set(made.state_dict()) == keys
    assert dict(made.named_modules()) == parts


def test_attaching_twice_and_to_other_models_is_refused():
    with pytest.raises(InputError, match="has a terrain bias already"):
        attach(terrain_aware())
    with pytest.raises(InputError, match="a ClimaX model has blocks"):
        attach(nn.Linear(1, 1))
    unpatched = model()
    del unpatched.use_physics_mask
    with pytest.raises(InputError, match="climax-elevation patch apply"):
        attach(unpatched)
    with pytest.raises(InputError, match="unknown bias 'hills'"):
        attach(model(), "hills")


def test_half_precision_training_step_has_no_nan():
    made = terrain_aware(blocks="all")
    x, lead_times = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = predict(made, x, lead_times).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())


def test_what_is_read_is_said_again_when_its_source_changes(caplog):
    made = terrain_aware()
    x, lead_times = batch()
    with caplog.at_level("INFO"):
        for _ in range(2):
            predict(made, x, lead_times)
        made.load_state_dict(made.state_dict())
        predict(made, x, lead_times)
    assert sum("terrain: elevation" in record.message for record in caplog.records) == 2


def test_the_first_forward_says_the_engine_that_it_uses(caplog):
    """Not that of the constructor's device and type."""
    made, x, lead_times = terrain_aware(), *batch()
    with caplog.at_level("INFO"), torch.autocast("cpu", torch.bfloat16):
        predict(made, x, lead_times)
        predict(made, x, lead_times)
    lines = [record.message for record in caplog.records if "engine" in record.message]
    assert len(lines) == 1
    assert re.search(r"elevation \d+ to \d+ m .*engine sdpa \(\d+ tokens, bfloat16 on cpu\)$", lines[0])
