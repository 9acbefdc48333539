"""`bias_args` on the command line: each value reaches the bias as what it is, with both hosts."""

import pytest
import tiny_data
from test_launch import ON, forecasting

from climax_elevation import InputError, build_bias
from climax_elevation.bias.build import SumBias
from climax_elevation.bias.registry import register_bias
from climax_elevation.checks import acting
from climax_elevation.train import train
from climax_elevation.upstream import lightning

ARGS = "--model.net.init_args.bias_args"
TYPE = "--model.net.init_args.bias_type"


@pytest.fixture
def built(host, tmp_path, monkeypatch):
    """The blocks that a command line makes, and the `bias_args` of its configuration."""
    made = []

    check, stop = lightning.check_settings, lightning.stop_at_plan
    monkeypatch.setattr(lightning, "check_settings", lambda config: (made.append(config), check(config)))
    monkeypatch.setattr(lightning, "stop_at_plan", lambda *run: (made.append(run[1].net), stop(*run)))
    root = tiny_data.write(tmp_path / "shards")

    def build(*options):
        made.clear()
        train("global_forecast", host, [*forecasting(root, tmp_path / "out"), ON, *options], plan=True)
        config, net = made
        return net.blocks, config["model"]["net"]["init_args"]["bias_args"]

    return build


def test_numbers_words_and_truth_keep_their_types(built):
    given = {"alpha_init": 0.5, "wind": False, "direction": "both", "height_scale_m": 500}
    written = [
        f"{ARGS}.alpha_init=0.5",
        f"{ARGS}.wind=false",
        f"{ARGS}.direction=both",
        f"{ARGS}.height_scale_m",
        "500",
    ]
    blocks, saved = built(*written, f"{ARGS}.blocks=[1]", f"{ARGS}.static_terrain=true", f"{ARGS}.engine=dense")
    bias = blocks[1].attn.bias
    assert (bias.elevation_alpha.item(), bias.wind, bias.direction) == (0.5, False, "both")
    assert (bias.height_scale_m, blocks[1].attn.engine) == (500.0, "dense")
    assert not hasattr(bias, "wind_beta")
    assert not hasattr(blocks[0].attn, "bias")
    assert saved == given | {"blocks": [1], "static_terrain": True, "engine": "dense"}


def test_exponents_lists_and_nothing(built):
    blocks, saved = built(f"{ARGS}.alpha_init=1e-4", f"{ARGS}.blocks=all", f"{ARGS}.elevation_file=null")
    assert [block.attn.bias.elevation_alpha.item() for block in blocks] == pytest.approx([1e-4] * 2)
    assert saved == {"alpha_init": 1e-4, "blocks": "all", "elevation_file": None}


def test_of_a_sum(built):
    written = [f"{ARGS}.physics.direction=both", f"{ARGS}.physics.wind=false", f"{ARGS}.relative_3d.hidden_dim=8"]
    blocks, saved = built(f"{TYPE}=physics+relative_3d", *written, f"{ARGS}.blocks=[0]")
    bias = blocks[0].attn.bias
    assert isinstance(bias, SumBias)
    assert (bias.physics.direction, bias.physics.wind) == ("both", False)
    assert bias.relative_3d.mlp[0].out_features == 8
    assert saved == {"physics": {"direction": "both", "wind": False}, "relative_3d": {"hidden_dim": 8}, "blocks": [0]}


def test_the_last_word_counts(built, tmp_path):
    (tmp_path / "bias.yaml").write_text("model: {net: {init_args: {bias_args: {alpha_init: 0.75, wind: false}}}}\n")
    file = f"--config={tmp_path / 'bias.yaml'}"
    assert built(f"{ARGS}.alpha_init=2", f"{ARGS}.alpha_init=3")[1] == {"alpha_init": 3}
    assert built(f"{ARGS}.alpha_init=2", file, f"{ARGS}.wind=true")[1] == {"alpha_init": 0.75, "wind": True}
    assert built(file, f"{ARGS}.alpha_init=2")[1] == {"alpha_init": 2, "wind": False}
    assert built(f"{ARGS}.wind=false", f"{ARGS}={{alpha_init: 4}}")[1] == {"alpha_init": 4}
    assert built("--model.net.bias_args.alpha_init=0.25")[1] == {"alpha_init": 0.25}  # as the parser lets it be short


def test_a_value_may_refer_to_the_configuration(built):
    with pytest.raises(InputError, match=r"elevation_file /\S+/shards/absent.nc does not exist"):
        built(f"{ARGS}.elevation_file=${{data.root_dir}}/absent.nc")


# ---- options without an effect --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        (
            "physics",
            {"wind": False, "beta_init": 0.0},
            "beta_init has an effect with wind: true alone, and wind is false",
        ),
        ("physics", {"wind": False, "wind_threshold_m_s": 5.5}, "wind_threshold_m_s"),
        ("ridge", {"form": "froude", "beta_init": 0.1}, "beta_init has an effect with form: height alone"),
        ("ridge", {"wind": False, "beta_init": 0.1}, "beta_init has an effect with wind: true alone"),
        ("ridge", {"buoyancy_frequency_per_s": 0.02}, "form: froude alone, and form is height: leave"),
        ("relative_3d", {"log_spaced": True}, "coords: physical"),
        ("physics+relative_2d", {"physics": {"wind": False, "beta_init": 0.4}}, "wind: true"),
    ],
)
def test_what_nothing_reads_is_refused(name, args, sentence):
    with pytest.raises(InputError, match=sentence):
        build_bias(name, num_heads=2, grid=(2, 4), **args)


def test_what_is_the_default_was_not_set():
    build_bias("physics", num_heads=2, wind=False, beta_init=0.3, wind_threshold_m_s=5.0)
    build_bias("ridge", num_heads=2, form="froude", beta_init=0.3)
    acting({"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": {"b": 3}})


def test_a_bias_of_ones_own_says_what_acts_with_what(monkeypatch):
    from climax_elevation import ElevationBias
    from climax_elevation.bias import registry

    monkeypatch.setattr(registry, "_biases", dict(registry._biases))

    @register_bias("own")
    class Own(ElevationBias):
        acts_with = {"depth": {"deep": True}}  # noqa: RUF012

        def __init__(self, *, deep: bool = False, depth: int = 3):
            super().__init__()

    build_bias("own", num_heads=1, deep=True, depth=4)
    with pytest.raises(InputError, match="depth has an effect with deep: true alone"):
        build_bias("own", num_heads=1, depth=4)
