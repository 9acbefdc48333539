"""The stand-in computes what unmodified ClimaX computed, and says what is wrong with its input."""

import copy
import hashlib
import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.write_reference import CASES, NAMES, build, run, shapes

from climax_elevation import InputError
from climax_elevation.host import StandInClimaX, metrics
from climax_elevation.host.model import grid_sinusoids, sinusoids
from climax_elevation.upstream import find_climax, overlay

FOLDER = Path(__file__).parent / "reference"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
SMALL: dict[str, Any] = {"img_size": [8, 16], "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "reference.npz") as archive:
        return dict(archive)


def test_reference_is_the_manifests() -> None:
    digest = hashlib.sha256((FOLDER / "reference.npz").read_bytes()).hexdigest()
    assert digest == MANIFEST["sha256"]["reference.npz"]
    assert {case: {name: MANIFEST["cases"][case][name] for name in CASES[case]} for case in CASES} == CASES


@pytest.mark.parametrize("case", CASES)
def test_equals_unmodified_climax(case: str, reference: dict[str, np.ndarray]) -> None:
    computed = run(build(StandInClimaX, case), metrics, case)
    recorded = {
        name.removeprefix(f"{case}/"): value for name, value in reference.items() if name.startswith(f"{case}/")
    }
    assert set(computed) == set(recorded) - {"pos_embed", "var_embed"}
    assert recorded["encoded"].std(axis=1).mean() > 0.1  # tokens that were all alike would prove nothing
    for name, values in computed.items():
        # float32 in another order of operations, values up to about 10
        np.testing.assert_allclose(values, recorded[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_state_dict_has_upstreams_keys_in_their_order(case: str) -> None:
    model = build(StandInClimaX, case)
    assert shapes(model) == MANIFEST["cases"][case]["state_dict"]


@pytest.mark.parametrize("case", CASES)
def test_fresh_embeddings_equal_upstreams(case: str, reference: dict[str, np.ndarray]) -> None:
    fresh = StandInClimaX(NAMES, **CASES[case]["model"])
    for name in ("pos_embed", "var_embed"):
        # one rounding to float32
        np.testing.assert_allclose(getattr(fresh, name).detach(), reference[f"{case}/{name}"], atol=1e-7)


def test_fresh_weights_are_as_the_paper_has_them() -> None:
    torch.manual_seed(0)
    for parallel in (False, True):
        state = StandInClimaX(NAMES, **SMALL | {"embed_dim": 256}, parallel_patch_embed=parallel).state_dict()
        drawn = [
            name for name in state if name.endswith(("proj.weight", "fc1.weight", "head.0.weight", "proj_weights"))
        ]
        for name in drawn:
            # 4,096 values and more: the standard deviation is known to 1 %, the mean to 0.0003
            assert state[name].std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(state[name].mean().item()) < 1.5e-3, name
        assert torch.equal(state["norm.weight"], torch.ones(256))
        assert not state["blocks.0.mlp.fc1.bias"].any()
        assert not state["var_query"].any()


def test_sinusoids_by_hand() -> None:
    # width 4: frequencies 1 and 1/100; position 2 gives sin 2, sin 0.02, cos 2, cos 0.02
    expected = torch.tensor([[0.9092974, 0.0199987, -0.4161468, 0.9998000]], dtype=torch.float64)
    torch.testing.assert_close(sinusoids(torch.tensor([2]), 4), expected, atol=1e-7, rtol=0)
    # the second patch of the first row: column 1 in the first half, row 0 in the second
    of_one, of_zero = sinusoids(torch.tensor([1, 0]), 4)
    assert torch.equal(grid_sinusoids((2, 3), 8)[1], torch.cat([of_one, of_zero]))


def test_parallel_and_serial_embedding_are_one_function() -> None:
    serial, parallel = StandInClimaX(NAMES, **SMALL), StandInClimaX(NAMES, **SMALL, parallel_patch_embed=True)
    with torch.no_grad():
        for index, embedding in enumerate(serial.token_embeds):
            parallel.token_embeds.proj_weights[index] = embedding.proj.weight
            parallel.token_embeds.proj_biases[index] = embedding.proj.bias
    x = torch.randn(2, 3, 8, 16)
    chosen = [4, 0, 2]
    # sums of 16 products in another order
    torch.testing.assert_close(serial.token_embeds(x, chosen), parallel.token_embeds(x, chosen), atol=1e-6, rtol=0)


def test_one_sample_on_one_patch() -> None:
    model = StandInClimaX(["a"], **SMALL | {"img_size": [4, 4]})
    losses, predictions = model(torch.randn(1, 1, 4, 4), None, torch.ones(1), ["a"], ["a"], None, None)
    assert losses is None
    assert predictions.shape == (1, 1, 4, 4)


def test_every_parameter_gets_a_gradient() -> None:
    for parallel in (False, True):
        model = StandInClimaX(NAMES, **SMALL, parallel_patch_embed=parallel)
        x = torch.randn(2, 5, 8, 16)
        losses, _ = model(x, x, torch.ones(2), NAMES, NAMES, [metrics.lat_weighted_mse], np.linspace(-70, 70, 8))
        assert losses is not None
        losses[0]["loss"].backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_copies_are_independent() -> None:
    model = StandInClimaX(NAMES, **SMALL).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    arguments = (torch.randn(1, 5, 8, 16), torch.ones(1), NAMES)
    before = model.forward_encoder(*arguments)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other.forward_encoder(*arguments), before)
        with torch.no_grad():
            other.norm.bias += 1
        assert not torch.equal(other.forward_encoder(*arguments), before)
        assert torch.equal(model.forward_encoder(*arguments), before)


def test_the_flag_off_ignores_its_arguments_and_attaches_nothing() -> None:
    torch.manual_seed(0)
    plain = StandInClimaX(NAMES, **SMALL)
    torch.manual_seed(0)
    off = StandInClimaX(NAMES, **SMALL, use_physics_mask=False, bias_type="physics", bias_args={"blocks": [0]})
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), off.state_dict().values(), strict=True))
    assert list(plain.state_dict()) == list(off.state_dict())
    assert not hasattr(off, "terrain")


@pytest.mark.parametrize("on", [False, True])
def test_patched_climax_imports_the_plugin_with_the_flag_and_not_without(on: bool, climax: Path) -> None:
    program = """
        import sys, torch
        from climax.arch import ClimaX
        on = sys.argv[1] == "True"
        options = {"use_physics_mask": True, "bias_args": {"wind": False}} if on else {}
        model = ClimaX(["orography", "b"], img_size=[8, 16], embed_dim=16, depth=1, num_heads=2, **options)
        if on:
            model.terrain.set_statistics({"orography": 400.0}, {"orography": 800.0}, "a test")
        x = torch.rand(1, 2, 8, 16)
        assert model(x, None, torch.ones(1), ["orography", "b"], ["b"], None, None)[1].isfinite().all()
        print(*[name for name in sys.modules if name.split(".")[0] == "climax_elevation"])
    """
    with overlay(find_climax(climax), patched=True) as folder:
        path = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
        command = [sys.executable, "-c", textwrap.dedent(program), str(on)]
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert ran.returncode == 0, ran.stderr
    assert ("climax_elevation.attachment" in ran.stdout.split()) == on
    assert on or not ran.stdout.split()


def test_the_flag_on_biases_by_metres() -> None:
    """Outputs change with alpha, and not at all where alpha is 0: the rest of the model is untouched."""
    torch.manual_seed(0)
    plain = StandInClimaX(NAMES, **SMALL).eval()
    x = torch.randn(2, 5, 8, 16)
    outputs = {}
    for alpha in (0.0, 1.0):
        torch.manual_seed(0)
        arguments = {"wind": False, "alpha_init": alpha}
        model = StandInClimaX(NAMES, **SMALL, use_physics_mask=True, bias_args=arguments).eval()
        statistics = {"orography": 378.0}, {"orography": 841.0}
        model.terrain.set_statistics(*statistics, source="the test")
        assert torch.equal(model.head[0].weight, plain.head[0].weight)
        outputs[alpha] = model.forward_encoder(x, torch.ones(2), NAMES)
    without = plain.forward_encoder(x, torch.ones(2), NAMES)
    # another attention kernel, and its float32 rounding
    torch.testing.assert_close(outputs[0.0], without, atol=1e-5, rtol=0)
    assert (outputs[1.0] - without).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"default_vars": []}, "none twice"),
        ({"default_vars": "orography"}, "list of variables"),
        ({"default_vars": ["a", "a"]}, "none twice"),
        ({"img_size": [9, 16]}, "crop the data"),
        ({"img_size": [8]}, "a height and a width"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"embed_dim": 18}, "multiple of 4"),
        ({"num_heads": 3}, "num_heads 3"),
    ],
)
def test_wrong_sizes_are_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StandInClimaX(**{"default_vars": NAMES, **SMALL, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.forward_encoder(x, torch.ones(1), ["a", *NAMES[1:]]), "does not know a"),
        (lambda m, x: m(x, None, torch.ones(1), NAMES, ["b"], None, None), "does not know b"),
        (lambda m, x: m.forward_encoder(x[:, :2], torch.ones(1), NAMES), "5 variables"),
        (lambda m, x: m.forward_encoder(x[..., :8], torch.ones(1), NAMES), r"8, 16\], not \[1, 5, 8, 8\]"),
    ],
)
def test_wrong_input_is_said(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(StandInClimaX(NAMES, **SMALL), torch.randn(1, 5, 8, 16))
