"""The loops in C++: how they come to be there, what happens where they cannot, and their arithmetic."""

import logging
import math
import os
import shutil
import subprocess
import sys
import time
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
def temporary(tmp_path, monkeypatch):
    """Where temporary files go, here and in processes started from here."""
    folder = tmp_path / "temporary"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


@pytest.fixture
def cache(tmp_path, temporary, monkeypatch):
    """The folder of the package under a user's caches, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "climax_elevation"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A library that was compiled once, for tests of where it lies."""
    folder, compiler = tmp_path_factory.mktemp("whole"), compiled._compiler()
    return compiled._compile(compiler, folder, compiled._fingerprint(compiler))


@pytest.fixture
def planted(cache, whole):
    """That library where ours would be, by the right name."""
    cache.mkdir(mode=0o700, parents=True)
    cache.parent.chmod(0o700)
    return Path(shutil.copy(whole, cache))


@pytest.fixture
def folder_in_use(whole, monkeypatch):
    """Asks in which folder the library is found, or would be compiled; a compiler takes seconds."""
    monkeypatch.setattr(compiled, "_compile", lambda _, folder, key: Path(shutil.copy(whole, folder)))
    return lambda: compiled._place(compiled._compiler()).parent


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


def spoil(made, how):
    """What a full disk, a killed copy or another library leaves, in a new file: the old one may be in use."""
    content = {"empty": b"", "cut short": made.read_bytes()[:5000], "no library": b"\x7fELF nothing"}.get(how)
    made.unlink()
    if content is not None:
        made.write_bytes(content)
        return
    source = made.with_suffix(".cpp")
    source.write_text('extern "C" void use_blas(void *, void *) {}')
    subprocess.run([*compiled._compiler(), "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    source.unlink()


@pytest.mark.parametrize("how", ["empty", "cut short", "no library", "without a loop"])
def test_a_spoilt_file_is_compiled_again(planted, whole, how):
    """In a process of its own, since one that has a library at this path would be given it again."""
    spoil(planted, how)
    program = "from climax_elevation import compiled; compiled.load()"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert [path.read_bytes() for path in planted.parent.iterdir()] == [whole.read_bytes()]


@pytest.mark.parametrize("mode", [0o770, 0o702])
@pytest.mark.parametrize("whose", ["the folder", "its parent"])
def test_a_folder_to_which_others_can_write_is_not_used(planted, cache, temporary, folder_in_use, caplog, mode, whose):
    caplog.set_level(logging.INFO)
    assert folder_in_use() == cache
    open_to_others = cache if whose == "the folder" else cache.parent
    open_to_others.chmod(mode)
    (used,) = {folder_in_use() for _ in range(2)}
    assert used == temporary / f"climax_elevation-{os.geteuid()}"
    assert used.stat().st_mode & 0o777 == 0o700
    said = f"compiled loops are not kept in {cache}: other users can write to {open_to_others}"
    assert {record.message for record in caplog.records} == {said}


def test_what_is_compiled_among_temporary_files_is_found_again(planted, cache, temporary, monkeypatch):
    """As where a home is for a group: no start but the first takes a compiler's seconds."""
    cache.chmod(0o770)
    compiled.load()
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    compiled.load()
    assert [folder.name for folder in temporary.iterdir()] == [f"climax_elevation-{os.geteuid()}"]


def test_in_a_folder_for_all_each_has_only_what_is_its_own(cache, folder_in_use):
    """As in /tmp, whose sticky bit keeps others from another's files."""
    cache.parent.mkdir()
    cache.parent.chmod(0o1777)
    assert folder_in_use() == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o1777)  # in which others can put files
    assert folder_in_use() != cache


needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file to another user"
)


@needs_root
@pytest.mark.parametrize("whose", ["the folder", "its parent"])
@pytest.mark.parametrize("by_link", [False, True])
def test_a_folder_of_another_user_is_not_used(planted, cache, folder_in_use, tmp_path, monkeypatch, whose, by_link):
    os.chown(cache if whose == "the folder" else cache.parent, 12345, 12345)
    if by_link:
        (tmp_path / "link").symlink_to(cache.parent)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
    assert folder_in_use() not in (cache, tmp_path / "link" / cache.name)


@needs_root
def test_where_another_user_has_our_temporary_folder_this_process_has_its_own(planted, cache, temporary, folder_in_use):
    """Which anyone could make, before us."""
    cache.chmod(0o777)
    named = temporary / "climax_elevation-0"
    named.mkdir(mode=0o700)
    shutil.copy(planted, named)
    os.chown(named, 12345, 12345)
    compiled._folder_of_this_process.cache_clear()
    used = folder_in_use()
    assert used.parent == temporary
    assert used != named
    assert used.stat().st_mode & 0o777 == 0o700


@needs_root
def test_a_file_of_another_user_is_not_run(planted):
    os.chown(planted, 12345, 12345)
    compiled.load()
    assert planted.stat().st_uid == 0


def test_a_file_that_others_can_write_to_or_that_is_a_link_is_not_run(planted, folder_in_use, tmp_path):
    key = planted.name.split("-")[1]
    assert compiled._kept(planted.parent, key) == planted
    planted.chmod(0o722)
    assert compiled._kept(planted.parent, key) is None
    planted.chmod(0o700)
    planted.symlink_to(shutil.move(planted, tmp_path / "elsewhere.so"))
    assert compiled._kept(planted.parent, key) is None


def test_a_free_umask_leaves_what_is_compiled_to_its_user(cache):
    before = os.umask(0)
    try:
        compiled.load()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (cache.parent, cache, *cache.iterdir())] == [0o700] * 3


def test_a_cache_that_cannot_be_written_to_is_read(planted, temporary, folder_in_use, monkeypatch):
    """As in an image whose disk is read-only: where the library is not there, it is compiled elsewhere."""
    access = os.access
    readable = planted.parent.resolve()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).resolve() != readable and access(path, mode))
    assert folder_in_use() == planted.parent
    planted.unlink()
    assert folder_in_use().parent == temporary


def test_a_user_without_a_home_has_a_temporary_folder(temporary, folder_in_use, monkeypatch):
    def nowhere(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(nowhere))
    assert folder_in_use().parent == temporary


def test_torch_may_lie_where_its_package_does_not(cache, tmp_path, monkeypatch):
    """As conda's and distributions' does: the library that this process has loaded counts."""
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    compiled.load()


def test_a_torch_whose_products_cannot_be_found_is_said(cache, monkeypatch):
    monkeypatch.setattr(compiled, "_torch_libraries", lambda: ["/absent/libtorch_cpu.so", compiled.__file__])
    with pytest.raises(NotCompiled, match="this torch has no BLAS that can be called"):
        compiled.load()


def test_a_file_where_the_folder_would_be_is_passed_over(cache, temporary, folder_in_use):
    cache.parent.touch()
    assert folder_in_use().parent == temporary


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CXX": "no-such-compiler"}, "CXX, 'no-such-compiler', is not there; install GCC or Clang"),
        ({"CXX": "g++ '"}, "is no command \\(No closing quotation\\): mend or unset it"),
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


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("not a program", "cannot be run \\(Exec format error\\); try another compiler, as CXX"),
        ("#!/bin/sh\nprintf '\\377' >&2\nexit 1\n", "fails: .*; try another, as CXX"),
        ("#!/bin/sh\nexit 0\n", "fails: exit status 0; try another, as CXX"),
        ('#!/bin/sh\ntouch made.cpp\nexec {compiler} -shared -o "$(eval echo \\${$#})" made.cpp\n', "without use_blas"),
    ],
)
def test_a_compiler_that_is_none_is_said(cache, tmp_path, monkeypatch, program, message):
    broken = tmp_path / "broken"
    broken.write_text(program.replace("{compiler}", compiled._compiler()[0]))
    broken.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NotCompiled, match=message):
        compiled.load()


def test_without_them_attention_works_and_says_so_once(cache, monkeypatch, caplog):
    monkeypatch.setenv("CLIMAX_ELEVATION_COMPILED", "0")
    compiled._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            q, z = torch.randn(1, 2, 9, 8), torch.rand(1, 9) * 3000
            dense, *tiled = (
                biased_attention(q, q, q, PhysicsBias(wind=False), (z,), engine=engine)
                for engine in ("dense", "tiled", "tiled")
            )
    finally:
        compiled._library.cache_clear()
    torch.testing.assert_close(tiled, [dense, dense])
    assert [record.message for record in caplog.records] == [
        "attention on the CPU is slower than it could be: CLIMAX_ELEVATION_COMPILED is 0: unset it to have its "
        "loops compiled"
    ]


def test_threads_that_come_together_load_once_and_hear_it_once(monkeypatch, caplog):
    """As the first tiles do."""
    loaded = []

    def slowly():
        loaded.append(1)
        time.sleep(0.1)
        raise NotCompiled("as a test says")

    monkeypatch.setattr(compiled, "load", slowly)
    compiled._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING), ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda _: compiled.library(), range(8))) == [None] * 8
    finally:
        compiled._library.cache_clear()
    assert len(loaded) == len(caplog.records) == 1


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
