"""biased_attention: by hand, then every engine against a plain loop in float64, then precision and factors."""

import math
from dataclasses import replace

import pytest
import torch
from engines import CPU_ENGINES
from torch import nn

from climax_elevation import ElevationBias, InputError, PhysicsBias, biased_attention
from climax_elevation.attention import ENGINES, choose_engine
from climax_elevation.bias import AdaptiveBias, AdvectionBias


def loop_attention(q, k, v, b, scale):
    """softmax(scale q k^T + b) v, a query at a time."""
    out = torch.empty_like(v)
    for n in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                bias = b[min(n, b.shape[0] - 1), min(h, b.shape[1] - 1), i]
                logits = torch.stack([scale * (q[n, h, i] * key).sum() for key in k[n, h]]) + bias
                weights = torch.exp(logits - logits.max())
                out[n, h, i] = (weights[:, None] * v[n, h]).sum(0) / weights.sum()
    return out


def qkv(*shape, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_two_tokens_by_hand(engine):
    # q = 0, so logits are the bias: token 0 reads token 1, ln 3 * 1000 m above it, with weight (1/3) / (1 + 1/3) = 1/4.
    q = torch.zeros(1, 1, 2, 1)
    v = torch.tensor([[[[0.0], [1.0]]]])
    z = torch.tensor([[0.0, 1000 * math.log(3)]])
    out = biased_attention(q, q, v, PhysicsBias(wind=False), (z,), engine=engine)
    assert out.flatten().tolist() == pytest.approx([0.25, 0.5], rel=1e-6)


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("terrain_batch", [1, 2])
@pytest.mark.parametrize("direction", ["key_above", "query_above", "both"])
@pytest.mark.parametrize("wind", [True, False])
def test_engines_equal_the_plain_loop_with_every_gradient(engine, terrain_batch, direction, wind):
    q, k, v = qkv(2, 3, 7, 4)
    z = torch.rand(terrain_batch, 7, dtype=torch.float64) * 4000
    w = torch.rand(2, 7, dtype=torch.float64) * 12
    bias = PhysicsBias(wind=wind, direction=direction).double()
    inputs = (z, w) if wind else (z,)
    got = biased_attention(q, k, v, bias, inputs, engine=engine)
    expected = loop_attention(q, k, v, bias(*inputs), 4**-0.5)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    leaves = [q, k, v, *bias.parameters()]
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_rows_of_attention_sum_to_one(engine):
    q, k, _ = qkv(2, 2, 9, 4)
    ones = torch.ones(2, 2, 9, 4, dtype=torch.float64)
    out = biased_attention(q, k, ones, PhysicsBias(wind=False).double(), (torch.rand(1, 9) * 8000,), engine=engine)
    torch.testing.assert_close(out, ones, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_alpha_zero_is_plain_attention_and_still_learns(engine):
    q, k, v = qkv(2, 2, 9, 4)
    bias = PhysicsBias(wind=False, alpha_init=0.0).double()
    z = torch.rand(1, 9, dtype=torch.float64) * 4000
    out = biased_attention(q, k, v, bias, (z,), engine=engine)
    torch.testing.assert_close(out, nn.functional.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    assert bias.elevation_alpha.grad.abs() > 1e-6


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_samples_do_not_see_each_other(engine):
    q, k, v = qkv(3, 2, 9, 4)
    z = torch.rand(3, 9) * 4000
    bias = PhysicsBias(wind=False)
    together = biased_attention(q, k, v, bias, (z,), engine=engine)
    alone = biased_attention(q[1:2], k[1:2], v[1:2], bias, (z[1:2],), engine=engine)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_high_relief_in_any_precision_has_no_nan(engine, dtype):
    q, k, v = qkv(1, 2, 16, 8, dtype=dtype)
    z = torch.linspace(-400, 8000, 16)[None]
    bias = PhysicsBias(wind=False, alpha_init=5.0)
    out = biased_attention(q, k, v, bias, (z,), engine=engine)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert all(t.isfinite().all() for t in (out, q.grad, k.grad, v.grad, bias.elevation_alpha.grad))


@pytest.mark.parametrize(("dtype", "unit_roundoff"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_the_stated_cost_of_a_mask_in_half_precision(dtype, unit_roundoff):
    """Rounding b to q's type is off by |b| times the unit roundoff; attention follows, weight for weight."""
    z = torch.rand(1, 64, generator=torch.Generator().manual_seed(0)) * 4000
    bias = PhysicsBias(wind=False)
    b = bias(z).double()
    assert (b.to(dtype).double() - b).abs().max() <= b.abs().max() * unit_roundoff
    q = torch.zeros(1, 1, 64, 8, dtype=dtype)
    v = torch.eye(64, dtype=dtype)[None, None]
    weights = biased_attention(q, q, v[..., :8], bias, (z,), engine="sdpa").double()
    exact = b.softmax(-1)[..., :8]
    # the logit's error, and that of the product with v, which is rounded to the same type
    assert ((weights - exact).abs() <= exact * (2 * 4 * unit_roundoff + 4 * unit_roundoff)).all()


def test_auto_is_an_engine_and_an_unknown_one_is_refused():
    q, k, v = qkv(1, 1, 4, 2)
    z = torch.rand(1, 4) * 1000
    bias = PhysicsBias(wind=False)
    torch.testing.assert_close(
        biased_attention(q, k, v, bias, (z,)), biased_attention(q, k, v, bias, (z,), engine="dense")
    )
    with pytest.raises(InputError, match="'flash'; available: 'auto', 'dense', 'sdpa', 'tiled', 'triton'"):
        biased_attention(q, k, v, bias, (z,), engine="flash")


@pytest.mark.parametrize(
    ("tokens", "device", "dtype", "dropout_p", "bias", "expected"),
    [
        (255, "cpu", torch.float32, 0.0, PhysicsBias(), "sdpa"),
        (256, "cpu", torch.float32, 0.0, PhysicsBias(), "tiled"),
        (8192, "cpu", torch.bfloat16, 0.0, PhysicsBias(), "tiled"),
        (8192, "cpu", torch.float32, 0.1, PhysicsBias(), "sdpa"),
        (255, "cpu", torch.float32, 0.0, AdvectionBias(4, (15, 17)), "sdpa"),
        (8192, "cpu", torch.float32, 0.0, AdvectionBias(4, (64, 128)), "tiled"),
        (8192, "cpu", torch.float32, 0.1, AdvectionBias(4, (64, 128)), "sdpa"),
        (8192, "cpu", torch.bfloat16, 0.0, AdvectionBias(4, (64, 128)), "tiled"),
        (2048, "cuda", torch.bfloat16, 0.0, AdaptiveBias(), "sdpa"),
        (2048, "cuda", torch.bfloat16, 0.0, PhysicsBias(), "sdpa"),
        (4096, "cuda", torch.bfloat16, 0.0, PhysicsBias(), "tiled"),
        (8192, "cuda", torch.float32, 0.0, AdvectionBias(4, (64, 128)), "sdpa"),
        (4096, "xpu", torch.bfloat16, 0.0, PhysicsBias(), "tiled"),
    ],
)
def test_auto_goes_by_length_type_and_what_the_bias_offers(tokens, device, dtype, dropout_p, bias, expected):
    chosen = choose_engine("auto", bias, tokens=tokens, device=device, dtype=dtype, dropout_p=dropout_p)
    assert chosen == expected
    assert choose_engine("dense", bias, tokens=tokens, device=device, dtype=dtype) == "dense"


def test_auto_runs_what_it_chose(monkeypatch):
    ran = []
    for name, engine in ENGINES.items():
        attend = lambda *a, engine=engine, name=name: ran.append(name) or engine.attend(*a)  # noqa: E731
        monkeypatch.setitem(ENGINES, name, replace(engine, attend=attend))
    for tokens in (255, 256):
        q = torch.randn(1, 1, tokens, 8)
        biased_attention(q, q, q, PhysicsBias(wind=False), (torch.rand(1, tokens) * 1000,))
    assert ran == ["sdpa", "tiled"]


def test_scale_and_dropout_are_used():
    q, k, v = qkv(1, 2, 32, 4)
    z, bias = torch.rand(1, 32) * 1000, PhysicsBias(wind=False).double()
    for engine in CPU_ENGINES:
        scaled = biased_attention(q, k, v, bias, (z,), scale=0.1, engine=engine)
        torch.testing.assert_close(scaled, loop_attention(q, k, v, bias(z), 0.1), rtol=1e-6, atol=1e-6)
        if engine in ("tiled", "triton"):
            continue  # they refuse dropout, and tests of their own show that
        torch.manual_seed(0)
        dropped = biased_attention(q, k, v, bias, (z,), scale=0.1, dropout_p=0.5, engine=engine)
        assert (dropped - scaled).abs().max() > 0.01


def test_wrong_shapes_are_refused():
    q, k, v = qkv(2, 1, 4, 2)
    bias = PhysicsBias(wind=False)
    with pytest.raises(InputError, match=r"inputs are \[2 or 1, 4 tokens"):
        biased_attention(q, k, v, bias, (torch.zeros(1, 5),))
    with pytest.raises(InputError, match=r"inputs are \[2 or 1, 4 tokens"):
        biased_attention(q, k, v, bias, (torch.zeros(3, 4),))
    with pytest.raises(InputError, match="of one shape"):
        biased_attention(q, k[:, :, :3], v, bias, (torch.zeros(1, 4),))


class Tilt(ElevationBias):
    """b[i, j] = -gamma (z_j - z_i) / 1000 m: rank 1 once the row's constant is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor(0.7))

    def inputs(self, terrain):
        return (terrain.elevation_m,)

    def features(self, elevation):
        return (elevation / 1000,)

    def pairwise(self, query, key):
        return -self.gamma * (key[0][:, None, :] - query[0][:, :, None])[:, None]

    def factors(self, elevation):
        column = (elevation / 1000)[:, None, :, None]
        return -self.gamma * torch.ones_like(column), column


@pytest.mark.parametrize("engine", ["sdpa", "tiled"])
@pytest.mark.parametrize("terrain_batch", [1, 2])
def test_factors_give_the_same_attention_and_gradients(engine, terrain_batch):
    q, k, v = qkv(2, 3, 7, 4)
    z = torch.rand(terrain_batch, 7, dtype=torch.float64) * 4000
    bias = Tilt().double()
    fused, dense = (biased_attention(q, k, v, bias, (z,), engine=name) for name in (engine, "dense"))
    torch.testing.assert_close(fused, dense, rtol=1e-12, atol=1e-12)
    leaves = [q, k, v, bias.gamma]
    weights = torch.randn_like(dense)
    for a, b in zip(
        torch.autograd.grad((fused * weights).sum(), leaves),
        torch.autograd.grad((dense * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("engine", "dtype", "unused"),
    [
        ("sdpa", torch.float64, "pairwise"),
        ("sdpa", torch.float32, "pairwise"),
        ("sdpa", torch.bfloat16, "factors"),
        ("tiled", torch.float64, "pairwise"),
        ("tiled", torch.float32, "pairwise"),
        ("tiled", torch.bfloat16, "pairwise"),  # which it computes in float32
        ("dense", torch.float64, "factors"),
    ],
)
def test_factors_are_used_where_they_are_exact_enough_and_nowhere_else(monkeypatch, engine, dtype, unused):
    def never(*_):
        raise AssertionError(unused)

    monkeypatch.setattr(Tilt, unused, never)
    q, k, v = qkv(1, 1, 16, 4, dtype=dtype)
    assert biased_attention(q, k, v, Tilt(), (torch.rand(1, 16) * 4000,), engine=engine).isfinite().all()


def test_factors_are_not_used_in_half_precision():
    """There they would be wrong by more than the mask: 8 km in bfloat16 is known to 32 m."""
    q, k, v = qkv(1, 1, 16, 4, dtype=torch.bfloat16)
    z = torch.linspace(7000, 8000, 16)[None]
    bias = Tilt()
    exact = biased_attention(q.double(), k.double(), v.double(), bias.double(), (z.double(),), engine="dense")
    half = biased_attention(q, k, v, bias.float(), (z,), engine="sdpa")
    plain = nn.functional.scaled_dot_product_attention(q, k, v)
    plain_exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (half.double() - exact).abs().max() < 2 * (plain.double() - plain_exact).abs().max() + 2.0**-8


@pytest.mark.parametrize("engine", ["auto", *CPU_ENGINES])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dropout_p": -0.1}, "dropout_p is a probability, from 0 to 1, not -0.1"),
        ({"dropout_p": 1.5}, "dropout_p is a probability, from 0 to 1, not 1.5"),
        ({"dropout_p": math.nan}, "dropout_p is a probability, from 0 to 1, not nan"),
        ({"scale": math.inf}, "scale is a finite number, not inf"),
        ({"q": (1, 1, 0, 4)}, r"at least one sample, head, token and channel each, not \[1, 1, 0, 4\]"),
        ({"q": (0, 1, 3, 4)}, r"at least one sample, head, token and channel each, not \[0, 1, 3, 4\]"),
        ({"q": (1, 0, 3, 4)}, r"at least one sample, head, token and channel each, not \[1, 0, 3, 4\]"),
        ({"q": (1, 1, 3, 0)}, r"at least one sample, head, token and channel each, not \[1, 1, 3, 0\]"),
        ({"dtype": torch.int64}, "of one floating-point type, not torch.int64"),
        ({"v_dtype": torch.bfloat16}, "one floating-point type, not torch.float32, torch.float32 and torch.bfloat16"),
        ({"device": "meta"}, "on one device, and have values there, not on meta"),
        ({"z_device": "meta"}, "the bias's inputs are on cpu, as q is, not on meta"),
    ],
)
def test_what_no_attention_can_be_of_is_refused_by_every_engine(engine, changed, message):
    shape, dtype, device = changed.get("q", (1, 1, 3, 4)), changed.get("dtype", torch.float32), changed.get("device")
    q = torch.ones(shape, dtype=dtype, device=device)
    z = torch.ones(1, shape[2], device=changed.get("z_device", device))
    options = {name: value for name, value in changed.items() if name in ("dropout_p", "scale")}
    with pytest.raises(InputError, match=message):
        biased_attention(
            q, q, q.to(changed.get("v_dtype", dtype)), PhysicsBias(wind=False), (z,), engine=engine, **options
        )
