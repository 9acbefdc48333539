"""Prepared shards cut anew: the same pairs and bytes, in as many files as are asked for, and OUT whole or absent."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepare_data import contents, era5, read, shard_files, write

from climax_elevation import InputError
from climax_elevation.cli import main
from climax_elevation.data.prepare import prepare
from climax_elevation.data.record import RECORD, repeats
from climax_elevation.host.shards import GlobalForecastDataModule

PARTS = ("train", "val", "test")


def prepared(folder, pieces, lengths, common, record=True):
    """Shards of `a`, counted up over all parts and pieces, and `b`, in float64.

    Args:
        pieces: For each part, steps of each piece without a gap.
        lengths: Of the shards, used in turn.
        common: Steps that shards of a piece have in common; 0: none.
    """
    value, number, listed, hour = 0, 0, [], 0
    for part, counts in zip(PARTS, pieces, strict=True):
        index = 0
        for count in counts:
            start = 0
            hour += 5  # a gap, of one step of one hour
            while start == 0 or start + common < count:
                length = max(lengths[number % len(lengths)], common + 1)
                stop = min(count, start + length)
                steps = np.arange(value + start, value + stop, dtype=np.float32)[:, None, None, None]
                arrays = {"a": np.repeat(steps, 4, axis=2), "b": np.repeat(steps.astype(np.float64) / 3, 4, axis=2)}
                path = folder / part / f"{index:05d}_x.npz"
                path.parent.mkdir(parents=True, exist_ok=True)
                (np.savez if number % 2 else np.savez_compressed)(path, **arrays)
                first, last = (
                    str(np.datetime64("2000-01-01T00:00:00") + np.timedelta64(hour + at, "h"))
                    for at in (start, stop - 1)
                )
                listed.append(
                    {"file": f"{part}/{path.name}", "first": first, "last": last, "repeats": common if start else None}
                )
                start, index, number = max(stop - common, start + 1), index + 1, number + 1
                if stop == count:
                    break
            value, hour = value + count, hour + count
    np.savez(folder / "normalize_mean.npz", a=np.zeros(1), b=np.zeros(1))
    np.savez(folder / "normalize_std.npz", a=np.ones(1), b=np.ones(1))
    for part in ("val", "test"):
        np.savez(folder / part / "climatology.npz", a=np.zeros((1, 4, 1)), b=np.zeros((1, 4, 1)))
    np.save(folder / "lat.npy", np.arange(4.0))
    np.save(folder / "lon.npy", np.arange(1.0))
    if record:
        content = {"state": "complete", "options": {"predict_range": 1}, "hours_per_step": 1.0, "shards": listed}
        (folder / RECORD).write_text(json.dumps(content))
    return folder


def expected(pieces, ahead):
    """Inputs and targets of each part, by their number."""
    found, value = {}, 0
    for part, counts in zip(PARTS, pieces, strict=True):
        found[part] = set()
        for count in counts:
            found[part] |= {(step, step + ahead) for step in range(value, value + count - ahead)}
            value += count
    return found


def by_number(folder, part, ahead):
    found = Counter()
    for path in shard_files(folder, part):
        shard = dict(np.load(path))
        assert shard["a"].dtype == np.float32
        assert shard["b"].dtype == np.float64
        steps = shard["a"][:, 0, 0, 0].astype(int)
        np.testing.assert_array_equal(shard["a"], np.repeat(steps[:, None, None, None], 4, axis=2))
        np.testing.assert_array_equal(shard["b"], shard["a"].astype(np.float64) / 3)
        found.update(zip(steps.tolist(), steps[ahead:].tolist(), strict=False))
    return found


counts = st.lists(st.integers(2, 25), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.tuples(counts, counts, counts),
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    common=st.integers(0, 3),
    ahead=st.integers(1, 4),
    processes=st.integers(1, 5),
    shard_steps=st.one_of(st.none(), st.integers(3, 30)),
)
def test_the_pairs_are_those_that_there_are(tmp_path, pieces, lengths, common, ahead, processes, shard_steps):
    """Uneven shards, gaps, shards with steps in common: all pairs of each stretch of time, by both readers."""
    folder, out = tmp_path / "in", tmp_path / "out"
    for each in (folder, out):
        shutil.rmtree(each, ignore_errors=True)
    prepared(folder, pieces, lengths, common)
    before = contents(folder)
    try:
        done = prepare(folder, out, processes=processes, shard_steps=shard_steps, predict_range=ahead)
    except InputError:
        wanted = [[count - ahead for count in part if count > ahead] for part in pieces]
        some = all(wanted)
        longer = shard_steps is None or shard_steps > ahead
        enough = all(sum(part) // processes * processes >= len(part) for part in wanted)
        assert not (some and longer and enough), "it could have been cut"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
        return
    finally:
        assert contents(folder) == before
    kept = expected(pieces, ahead)
    for part in PARTS:
        found = by_number(out, part, ahead)
        assert set(found) == kept[part]
        assert done.shards[part] == len(shard_files(out, part))
        assert done.shards[part] % processes == 0
        if shard_steps is not None and processes == 1:
            assert all(len(np.load(path)["a"]) <= shard_steps for path in shard_files(out, part))
        if processes == 1:
            assert set(found.values()) == {1}
    for lead in {1, ahead}:  # each once, though shards have more steps in common than 1
        module = GlobalForecastDataModule(str(out), ["a"], 3, predict_range=lead)
        once = Counter((int(x[0, 0, 0]), int(y[0, 0, 0])) for x, y, *_ in module.data_val)
        # a piece that is too short for `ahead` is left out
        used = [[count for count in part if count > ahead] for part in pieces]
        assert len(once) == sum(count - lead for count in used[1])
        assert set(once) <= expected(pieces, lead)["val"]
        assert set(once.values()) == {1}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(era5(steps=100), tmp_path_factory.mktemp("source") / "s.nc")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    return prepare(source, tmp_path_factory.mktemp("prepared") / "whole", predict_range=2, patch_size=2).out


def test_it_is_what_the_source_would_have_given(source, whole, tmp_path):
    """Shards and all beside them, but for the record of what was done."""
    done = prepare(whole, tmp_path / "out", processes=3)
    direct = prepare(source, tmp_path / "direct", processes=3, predict_range=2, patch_size=2)
    ours, theirs = contents(done.out), contents(direct.out)
    records = [json.loads(files.pop(RECORD)) for files in (ours, theirs)]
    for name in ("normalize_mean.npz", "normalize_std.npz", "val/climatology.npz", "test/climatology.npz"):
        here, there = (dict(np.load(folder / name)) for folder in (done.out, direct.out))
        for key, values in here.items():
            np.testing.assert_allclose(values, there[key], rtol=2e-7 if "climatology" in name else 1e-12)
        # summed up in another order there; here they are those of the source, as they were
        assert ours.pop(name) == (whole / name).read_bytes()
        theirs.pop(name)
    assert ours == theirs
    assert records[0]["shards"] == records[1]["shards"]
    assert (done.steps, done.shards, done.variables) == (direct.steps, direct.shards, direct.variables)
    assert (done.shape, done.hours_per_step) == (direct.shape, direct.hours_per_step)
    assert done.shards == {"train": 3, "val": 3, "test": 3}
    text = (done.out / "config.yaml").read_text()
    assert text == (direct.out / "config.yaml").read_text().replace("direct", "out")


def test_there_and_back(whole, tmp_path):
    there = prepare(whole, tmp_path / "there", processes=4, shard_steps=5).out
    back = prepare(there, tmp_path / "back").out
    ours, theirs = contents(back), contents(whole)
    assert [json.loads(files.pop(RECORD))["shards"] for files in (ours, theirs)].count(
        json.loads((whole / RECORD).read_text())["shards"]
    ) == 2
    assert ours == theirs


def test_another_lead_time(whole, tmp_path):
    out = prepare(whole, tmp_path / "out", shard_steps=16, predict_range=5).out
    assert set(repeats(out).values()) == {5}
    assert "  predict_range: 5 # steps" in (out / "config.yaml").read_text()
    assert "lead time: 30 h" in (out / "config.yaml").read_text()
    np.testing.assert_array_equal(read(out, "train")["orography"], read(whole, "train")["orography"])


def test_an_edited_configuration_stays(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "moved")
    text = (folder / "config.yaml").read_text().replace("embed_dim: 64", "embed_dim: 32")
    (folder / "config.yaml").write_text(text)
    (folder / "notes.txt").write_text("mine")
    out = prepare(folder, tmp_path / "out").out
    assert "embed_dim: 32" in (out / "config.yaml").read_text()
    assert f'root_dir: "{out}"' in (out / "config.yaml").read_text()
    assert (out / "notes.txt").read_text() == "mine"


def test_the_command_line_says_what_there_is(whole, tmp_path, capsys):
    assert main(["prepare", str(whole), str(tmp_path / "out"), "--processes", "4"]) == 0
    said = capsys.readouterr().out
    assert "train 80 steps in 4 shards, val 10 steps in 4 shards, test 10 steps in 4 shards" in said
    assert main(["prepare", str(whole), str(tmp_path / "out"), "--processes", "4"]) == 0
    before = contents(tmp_path / "out")
    assert main(["prepare", str(whole), str(tmp_path / "out"), "--processes", "2"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_what_an_older_version_prepared(whole, source, tmp_path):
    """Its shards had nothing in common, and their times say which go on after one another."""
    older = tmp_path / "older"
    fields = read(whole, "train")
    shutil.copytree(whole, older, ignore=shutil.ignore_patterns("0*.npz"))
    record = json.loads((whole / RECORD).read_text()) | {"format": 1}
    stamps = [str(np.datetime64("2000-01-01T00:00:00") + np.timedelta64(6 * step, "h")) for step in range(100)]
    record["shards"] = []
    # a gap, of which no step is left, after the first 30 steps
    for part, start, stop in (
        ("train", 0, 30),
        ("train", 31, 50),
        ("train", 50, 80),
        ("val", 80, 90),
        ("test", 90, 100),
    ):
        name = f"{part}/{start:05d}.npz"
        values = {key: read(whole, part)[key] if part != "train" else all_[start:stop] for key, all_ in fields.items()}
        np.savez(older / name, **values)
        record["shards"].append({"file": name, "first": stamps[start], "last": stamps[stop - 1]})
    (older / RECORD).write_text(json.dumps(record))
    out = prepare(older, tmp_path / "out", shard_steps=40).out
    assert [len(np.load(path)["orography"]) for path in shard_files(out, "train")] == [30, 25, 26]  # 28, 23, 24 pairs
    assert [path.name for path in shard_files(out, "train")][1] == "00001_2000-01-08T18.npz"
    again = prepare(source, older, predict_range=2, patch_size=2)  # the command that began it goes on as it began
    assert again.shards == {"train": 3, "val": 1, "test": 1}


def climaxs_own(folder, names=("1979_0", "1979_1", "1979_2", "1980_0", "1980_1", "1980_2"), steps=6):
    """As ClimaX's scripts write it: no record, each year's end missing where it is a leap year."""
    pieces = [[steps] * len(names), [8], [8]]
    prepared(folder, pieces, [steps], 0, record=False)
    for path, name in zip(shard_files(folder, "train"), names, strict=True):
        path.rename(path.with_name(f"{name}.npz"))
    return folder


def test_climaxs_own_shards_go_on_within_a_year(tmp_path):
    folder = climaxs_own(tmp_path / "in")
    out = prepare(folder, tmp_path / "out", shard_steps=100, predict_range=3).out
    assert [len(np.load(path)["a"]) for path in shard_files(out, "train")] == [18, 18]
    assert set(by_number(out, "train", 3)) == {(n, n + 3) for n in range(33) if not 15 <= n < 18}
    more = prepare(folder, tmp_path / "more", processes=3, predict_range=3).out
    assert set(by_number(more, "train", 3)) == set(by_number(out, "train", 3))
    again = prepare(more, tmp_path / "again", shard_steps=100).out  # a record is there now
    assert [len(np.load(path)["a"]) for path in shard_files(again, "train")] == [18, 18]


@pytest.mark.parametrize("names", [("1979_0", "1979_2", "1980_0"), ("x_0", "x_1", "x_2"), ("2_00", "2_01", "2_02")])
def test_shards_of_which_nobody_knows_are_cut_one_by_one(tmp_path, names):
    folder = climaxs_own(tmp_path / "in", names)
    out = prepare(folder, tmp_path / "out", shard_steps=100, predict_range=3).out
    assert [len(np.load(path)["a"]) for path in shard_files(out, "train")] == [6, 6, 6]
    with pytest.raises(InputError, match="train has 9 pairs of fields 3 steps apart in 3 pieces without a gap"):
        prepare(folder, tmp_path / "many", processes=10, predict_range=3)


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 0xFF
    path.write_bytes(data)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


MISTAKES = {
    "nothing ahead": (lambda f: (f / RECORD).unlink(), {}, "has no prepare.json, .* give predict_range"),
    "begun": (lambda f: change(f / RECORD, state="begun"), {}, "not prepared to its end: repeat the command"),
    "no record": (lambda f: (f / RECORD).write_text("{"), {}, "prepare.json is damaged"),
    "no shards": (lambda f: change(f / RECORD, shards=3), {}, "prepare.json is damaged"),
    "missing": (lambda f: shard_files(f, "train")[0].unlink(), {}, "is missing, which prepare.json names"),
    "another": (lambda f: np.savez(f / "train" / "9.npz", a=1), {}, "9.npz is not named in prepare.json"),
    "cut short": (lambda f: shard_files(f, "train")[0].write_bytes(b"PK"), {}, "is damaged"),
    "bits": (lambda f: damage(shard_files(f, "train")[0]), {}, "is damaged .*CRC"),
    "unlike": (lambda f: np.savez(shard_files(f, "val")[0], orography=np.zeros((5, 1, 2, 2))), {}, "lacks 2m_temp"),
    "levels": (None, {"levels": [500]}, "is prepared already, .* the option levels has no effect there"),
    "regrid": (None, {"regrid": "5.625"}, "the option regrid has no effect"),
    "patches": (None, {"patch_size": 4}, "the option patch_size has no effect"),
    "too long": (None, {"predict_range": 30}, "val has 10 time steps, too few for predict_range 30"),
    "too short": (None, {"shard_steps": 2}, "must be longer than predict_range 2"),
    "too many": (None, {"processes": 70}, "val has 8 pairs .* no multiple of 70"),
    "none": (None, {"processes": 0}, "processes must be at least 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence_and_nothing_is_left(whole, tmp_path, mistake):
    spoil, options, message = MISTAKES[mistake]
    folder = shutil.copytree(whole, tmp_path / "in")
    if spoil:
        spoil(folder)
    before = contents(folder)
    with pytest.raises(InputError, match=message):
        prepare(folder, tmp_path / "new" / "out", **options)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_two_folders_and_folders_in_one_another(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "in")
    with pytest.raises(InputError, match="is prepared already, .* name it alone"):
        prepare([folder, whole], tmp_path / "out")
    for out in (folder, folder / "out", tmp_path):
        with pytest.raises(InputError, match="lie in one another"):
            prepare(folder, out)
    assert contents(folder) == contents(whole)


def test_a_full_disk_leaves_nothing(whole, tmp_path, monkeypatch):
    fsync, written = os.fsync, []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="no space left on the disk of .* nothing is left there"):
            prepare(whole, tmp_path / "new" / "out", shard_steps=8)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="the shards need .* GiB, the disk"):
        prepare(whole, tmp_path / "out", shard_steps=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_killed_half_way_there_is_no_folder_and_the_same_command_makes_it(whole, tmp_path, how):
    program = (
        "import os, signal, sys\n"
        "from climax_elevation.cli import main\n"
        # tests that a shell runs in the background ignore Ctrl-C, and so would what they start
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "fsync, written = os.fsync, []\n"
        "def kill(descriptor):\n"
        "    fsync(descriptor)\n"
        "    written.append(descriptor)\n"
        f"    len(written) == 3 and os.kill(os.getpid(), signal.{how})\n"
        "os.fsync = kill\n"
        "sys.exit(main(['prepare', sys.argv[1], sys.argv[2], '--shard-steps', '8']))\n"
    )
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", program, str(whole), str(out)], check=False, timeout=120, capture_output=True, text=True
    )
    assert killed.returncode == (-signal.SIGKILL if how == "SIGKILL" else 130)
    assert not out.exists()
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([".out.partial"] if how == "SIGKILL" else [])
    prepare(whole, out, shard_steps=8)
    assert contents(out) == contents(prepare(whole, tmp_path / "clean", shard_steps=8).out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "out"]


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    """A stretch of 60 MB in two shards, cut to a fiftieth: what is held at a time is a few of the new ones."""
    import tracemalloc

    folder = tmp_path / "in"
    listed = []
    for number in range(2):
        values = np.zeros((500, 1, 60, 128), np.float32)
        values[:] = np.arange(500)[:, None, None, None]
        (folder / "train").mkdir(parents=True, exist_ok=True)
        np.savez(folder / "train" / f"{number}.npz", a=values, b=values)
        listed.append({"file": f"train/{number}.npz", "repeats": 0 if number else None})
    (folder / RECORD).write_text(json.dumps({"state": "complete", "options": {"predict_range": 1}, "shards": listed}))
    tracemalloc.start()
    done = prepare(folder, tmp_path / "out", shard_steps=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.shards == {"train": 53}
    step = 2 * 60 * 128 * 4
    assert peak < 8 * 20 * step, peak / step
    assert 1000 * step > 6 * peak


def test_what_is_cut_anew_is_trained_on(no_climax, tmp_path):
    """tiny_data's own folder, which has no record and no dates."""
    from test_launch import check_run, forecasting

    from climax_elevation.train import train

    folder = tiny_data.write(tmp_path / "in", train=(9, 7, 12))
    out = prepare(folder, tmp_path / "out", processes=2, predict_range=2).out
    train("global_forecast", None, forecasting(out, tmp_path / "run"))
    check_run(tmp_path / "run")
