"""The loops in C++: how they come to be there, what happens where they cannot, and their arithmetic."""

import logging
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_tiled import both

from climax_elevation import PhysicsBias, biased_attention, compiled
from climax_elevation.attention.partial_softmax import attend, differentiate
from climax_elevation.compiled import NotCompiled


@pytest.fixture(autouse=True)
def needs_a_compiler():
    if compiled.library() is None:
        pytest.skip("needs a C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "climax_elevation"


def test_it_compiles_once(cache, monkeypatch):
    compiled.load()
    (made,) = cache.iterdir()
    before = made.stat().st_mtime_ns
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    compiled.load()
    assert made.stat().st_mtime_ns == before


def test_other_sources_are_compiled_anew(cache, monkeypatch):
    compiled.load()
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-DANOTHER"))
    compiled.load()
    assert len(list(cache.iterdir())) == 2


def test_processes_that_come_together_all_get_it(cache):
    command = [sys.executable, "-c", "from climax_elevation import compiled; compiled.load()"]
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: subprocess.run(command, capture_output=True), range(3)))
    assert [run.returncode for run in done] == [0, 0, 0], done
    assert len(list(cache.iterdir())) == 1


def test_a_folder_that_cannot_be_written_to_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiled.load()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CXX": "no-such-compiler"}, "CXX, 'no-such-compiler', is not there; install GCC or Clang"),
        ({"PATH": ""}, "none of c\\+\\+, g\\+\\+, clang\\+\\+ is there"),
        ({"CLIMAX_ELEVATION_COMPILED": "0"}, "CLIMAX_ELEVATION_COMPILED is 0: unset it"),
    ],
)
def test_why_there_are_none_is_said(cache, monkeypatch, variables, message):
    monkeypatch.delenv("CXX", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NotCompiled, match=message):
        compiled.load()


def test_a_compiler_that_fails_leaves_nothing(cache, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'error: no headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NotCompiled, match="broken fails: error: no headers; try another, as CXX"):
        compiled.load()
    assert not list(cache.iterdir())


def test_without_them_attention_works_and_says_so_once(cache, monkeypatch, caplog):
    monkeypatch.setenv("CLIMAX_ELEVATION_COMPILED", "0")
    compiled.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            q, z = torch.randn(1, 2, 9, 8), torch.rand(1, 9) * 3000
            dense, *tiled = (
                biased_attention(q, q, q, PhysicsBias(wind=False), (z,), engine=engine)
                for engine in ("dense", "tiled", "tiled")
            )
    finally:
        compiled.library.cache_clear()
    torch.testing.assert_close(tiled, [dense, dense])
    assert [record.message for record in caplog.records] == [
        "attention on the CPU is slower than it could be: CLIMAX_ELEVATION_COMPILED is 0: unset it to have its "
        "loops compiled"
    ]


def softmax(logits):
    """One query's weights, as compiled loops have them, from logits `[keys]`."""
    keys = len(logits)
    one = logits.new_ones(1, 1, 1, 1)
    highest, sums, out = (logits.new_full((1, 1, 1), value) for value in (-math.inf, 0, 0))
    out = logits.new_zeros(1, 1, 1, keys)
    k, v = logits.new_zeros(1, 1, keys, 1), torch.eye(keys, dtype=logits.dtype)[None, None]
    attend(one, k, v, logits[None, None].contiguous(), (highest, sums, out), 1.0)
    return out.flatten(), highest.item(), sums.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exponential_is_right_to_the_last_places_over_all_its_range(dtype):
    logits = -torch.cat([torch.linspace(0, 87, 20011), torch.logspace(-30, 2, 1001)]).to(dtype)
    logits = logits[logits > -87]
    weights, highest, _ = softmax(logits)
    assert highest == logits.max()
    exact = (logits.double() - highest).exp()
    error = ((weights.double() - exact) / exact).abs().max().item()
    assert error < (2.5e-7 if dtype == torch.float32 else 1e-15)


def test_the_exponential_has_the_range_of_its_type():
    """Also above 0, as a wind far below its threshold has it; dv of one query is e^(b - logsumexp)."""
    x = torch.cat([torch.linspace(-87, 88.72, 20011), torch.tensor([0.0, 88.0, 88.01, 88.3, 88.5])])
    beyond = torch.tensor([88.8, 89.0, 100.0, 1e4, 3e38, math.inf])
    powers = exponential(torch.cat([x, beyond, -beyond, torch.tensor([math.nan])]))
    exact = x.double().exp()
    assert ((powers[: len(x)].double() - exact) / exact).abs().max() < 2.5e-7
    assert powers[len(x) : -1].tolist() == [math.inf] * 6 + [0.0] * 6
    assert powers[-1].isnan()


def exponential(x):
    """As compiled loops have it."""
    keys = len(x)
    one, zero, many = x.new_ones(1, 1, 1, 1), x.new_zeros(1, 1, 1), x.new_zeros(1, 1, keys, 1)
    of_qkv = [torch.zeros_like(t) for t in (one, many, many)]
    b, at_most = x[None, None].contiguous(), x.new_zeros(1, 1, 1, 1)
    differentiate((at_most, many, many, one, zero, zero), b, of_qkv, torch.zeros_like(b), 1.0)
    return of_qkv[2].flatten()


@pytest.mark.parametrize("threshold", [-1000.0, -180.0, 100.0, 180.0, 1000.0, 1e30])
def test_any_threshold_of_wind_is_as_the_reference_has_it(threshold):
    torch.manual_seed(0)
    bias = PhysicsBias(alpha_init=3.0, beta_init=0.8, wind_threshold_m_s=threshold)
    z, w = torch.rand(1, 300) * 3000, torch.rand(1, 300) * 20
    q, k, v = torch.randn(3, 1, 2, 300, 8)
    found = []
    for engine in ("dense", "tiled"):
        out = biased_attention(q, k, v, bias, (z, w), engine=engine)
        found.append([out, *torch.autograd.grad(out.square().sum(), [*bias.parameters()])])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_is_far_below_has_no_weight_and_what_is_not_a_number_spoils_its_row_alone():
    weights, highest, total = softmax(torch.tensor([0.0, -1e30, -math.inf, -88.0]))
    assert weights.tolist() == [1, 0, 0, 0]
    assert (highest, total) == (0, 1)
    assert softmax(torch.tensor([0.0, math.nan]))[0].isnan().all()


def test_a_softmax_over_keys_that_come_in_parts():
    """By hand: logits 0, log 2 and then log 5: the weights are 1, 2 and 5 eighths."""
    q, zeros = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 2, 1)
    gathered = torch.full((1, 1, 1), -math.inf), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1)
    for logits, values in (([0.0, math.log(2)], [8.0, 16.0]), ([math.log(5), -math.inf], [40.0, 1.0])):
        v, b = torch.tensor(values)[None, None, :, None], torch.tensor(logits)[None, None]
        attend(q, zeros, v, b, gathered, 1.0)
    highest, sums, out = (float(value) for value in gathered)
    assert highest == pytest.approx(math.log(5))
    assert sums == pytest.approx(8 / 5)
    assert out / sums == pytest.approx((8 + 2 * 16 + 5 * 40) / 8)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 512, 513, 1030])
@pytest.mark.parametrize("told_apart", [True, False])
def test_tiles_of_any_size_are_as_torch_has_them(monkeypatch, columns, told_apart):
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, n, 5, dtype=torch.float64) for n in (7, columns, columns, 7))
    b = torch.randn(3 if told_apart else 1, 7, columns, dtype=torch.float64)
    logsumexp, delta = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    found = []
    for library in (compiled.library(), None):
        monkeypatch.setattr(compiled, "library", lambda library=library: library)
        gathered = q.new_full((2, 3, 7), -math.inf), q.new_zeros(2, 3, 7), q.new_zeros(2, 3, 7, 5)
        attend(q, k, v, b, gathered, 0.3)
        of_qkv, db = [torch.zeros_like(t) for t in (q, k, v)], torch.zeros_like(b)
        differentiate((q, k, v, grad, logsumexp, delta), b, of_qkv, db, 0.3)
        found.append([*gathered, *of_qkv, db])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_tensors_with_gaps_and_repeats_are_read_as_what_they_are():
    """As from a block's one projection, and from `expand`; what a BLAS would refuse is copied."""
    bias, z = PhysicsBias(wind=False).double(), torch.rand(1, 6, dtype=torch.float64) * 3000
    torch.manual_seed(0)
    wide = torch.randn(2, 6, 3, 2, 8, dtype=torch.float64).permute(2, 0, 3, 1, 4)
    turned = torch.randn(3, 2, 2, 8, 6, dtype=torch.float64).mT
    repeated = torch.randn(3, 2, 2, 1, 8, dtype=torch.float64).expand(3, 2, 2, 6, 8)
    for qkv in (wide, turned, repeated):
        found = []
        for engine in ("dense", "tiled"):
            q, k, v = (t.detach().requires_grad_() for t in qkv)
            out = biased_attention(q, k, v, bias, (z,), engine=engine)
            found.append([out, *torch.autograd.grad(out.sum(dim=(1, 2)).mT.sum(), [q, k, v, *bias.parameters()])])
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_one_token_and_many_heads():
    bias = PhysicsBias(wind=False).double()
    for want, got in zip(*both(bias, (torch.zeros(1, 1).double(),), 3, 5, 1), strict=True):
        torch.testing.assert_close(got, want)


def test_sources_are_part_of_the_package():
    here = Path(compiled.__file__).parent
    assert all((here / name).is_file() for name in (*compiled.SOURCES, *compiled.HEADERS))


def test_a_compiler_may_come_with_arguments(cache, monkeypatch):
    monkeypatch.setenv("CXX", " ".join([*compiled._compiler(), "-DANOTHER"]))
    compiled.load()
    assert len(list(cache.iterdir())) == 1
