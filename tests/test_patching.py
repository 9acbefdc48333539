"""A series of patches is applied as a whole or not at all, to what it was made for and to nothing else."""

import difflib
import os
import re
import shutil
import stat
import subprocess
from itertools import groupby

import pytest

from climax_elevation.cli import main
from climax_elevation.errors import InputError
from climax_elevation.upstream import find_climax, locate, overlay, patching
from climax_elevation.upstream.patching import PREFIX, State, apply, check, package_folder, replace_all, revert
from climax_elevation.upstream.series import SERIES, Patch, blob_id, read_patches

TOY = {
    "arch.py": "first\nkeep\nsecond\nkeep\nsecond\nmiddle\nthird\n",
    "regional_forecast/arch.py": "one\ntwo\nthree\n",
    "climate_projection/arch.py": "alpha\nbeta\n",
    "train.py": "old\nkeep\n",
}
TOY_PATCHED = {
    "arch.py": "first\nkeep\nadded\nsecond\nkeep\nsecond\nmiddle\nchanged\n",
    "regional_forecast/arch.py": "one\ntwo\nthree\nfour\n",
    "climate_projection/arch.py": "beta\n",
    "train.py": "new\nkeep\n",
}


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    run = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def toy_patch(name):
    lines = difflib.unified_diff(
        TOY[name].splitlines(True),
        TOY_PATCHED[name].splitlines(True),
        f"a/src/climax/{name}",
        f"b/src/climax/{name}",
        n=1,
    )
    old, new = (blob_id(texts[name].encode()) for texts in (TOY, TOY_PATCHED))
    header = f"Why.\n\ndiff --git a/src/climax/{name} b/src/climax/{name}\nindex {old}..{new} 100644\n"
    series = "today" if name == "train.py" else "terrain"
    return Patch(f"{series}/{name.replace('/', '-')}.patch", series, (header + "".join(lines)).encode())


def changed_in_the_package():
    files = {name for patch in patching.read_patches() for name in patch.files}
    return {name.removeprefix(PREFIX) for name in files if name.startswith(PREFIX)}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An unpatched checkout of four short files, with a patch each."""
    folder = tmp_path / "checkout"
    package = folder / "src" / "climax"
    for name, text in TOY.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    (package / "utils").mkdir()
    patches = sorted((toy_patch(name) for name in TOY), key=lambda patch: SERIES.index(patch.series))
    monkeypatch.setattr(patching, "read_patches", lambda: patches)
    return folder


@pytest.fixture(params=["toy", "ClimaX"])
def checkout(request, tmp_path):
    """The toy, and a copy of real ClimaX where there is one."""
    if request.param == "toy":
        return request.getfixturevalue("toy")
    folder = tmp_path / "checkout"
    source = package_folder(request.getfixturevalue("climax"))
    shutil.copytree(source, folder / "src" / "climax", ignore=shutil.ignore_patterns("__pycache__"))
    revert(folder)
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts}


def target(folder, name="arch.py"):
    return folder / "src" / "climax" / name


def test_apply_and_revert_are_whole_and_repeatable(checkout):
    before = contents(checkout)
    assert check(checkout).state is State.UNPATCHED

    assert ": patched" in apply(checkout)
    patched = contents(checkout)
    assert check(checkout).state is State.PATCHED
    changed = {str(path.relative_to(checkout / "src/climax")) for path in patched if patched[path] != before.get(path)}
    assert changed == changed_in_the_package()
    assert patched.keys() >= before.keys()  # and, as changed says, nothing staged is left behind

    assert "nothing to do" in apply(checkout)
    assert contents(checkout) == patched

    assert "reverted" in revert(checkout)
    assert contents(checkout) == before
    assert "nothing to do" in revert(checkout)
    assert contents(checkout) == before

    apply(checkout)
    assert contents(checkout) == patched


def test_toy_is_patched_as_written(toy):
    apply(toy)
    assert {name: target(toy, name).read_text() for name in TOY} == TOY_PATCHED


@pytest.mark.parametrize("place", [".", "src", "src/climax"])
def test_each_way_to_name_a_copy(toy, place):
    apply(toy / place)
    assert check(toy).state is State.PATCHED


def test_line_endings_and_modes_are_kept(checkout):
    file = target(checkout)
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    file.chmod(0o640)
    before = contents(checkout)
    apply(checkout)
    content = file.read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > before[file].count(b"\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    revert(checkout)
    assert contents(checkout) == before


@pytest.mark.parametrize("action", [apply, revert])
def test_a_failure_half_way_changes_nothing(checkout, monkeypatch, action):
    if action is revert:
        apply(checkout)
    before = contents(checkout)
    replace = os.replace
    calls = []

    def failing(source, destination):
        calls.append(destination)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(InputError, match=r"disk full.*nothing was changed"):
        action(checkout)
    assert contents(checkout) == before


def test_interrupting_leaves_nothing_staged(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("before")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_all({file: b"after"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "before"


@pytest.mark.parametrize("action", [apply, revert])
def test_half_patched_is_told_and_mended_either_way(checkout, action):
    unpatched = contents(checkout)
    apply(checkout)
    patched = contents(checkout)
    target(checkout).write_bytes(unpatched[target(checkout)])

    found = check(checkout)
    assert found.state is State.HALF
    assert "regional_forecast/arch.py" in found.sentence
    action(checkout)
    assert contents(checkout) == (patched if action is apply else unpatched)


@pytest.mark.parametrize("action", [apply, revert])
def test_local_changes_are_refused_with_the_commit(checkout, action):
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "another version")
    target(checkout).write_bytes(target(checkout).read_bytes() + b"# mine\n")
    before = contents(checkout)

    found = check(checkout)
    assert found.state is State.MODIFIED
    assert found.modified == ("arch.py",)
    with pytest.raises(InputError) as error:
        action(checkout)
    message = str(error.value)
    assert "arch.py is neither" in message
    assert git(checkout, "rev-parse", "HEAD")[:7] in message
    assert patching.COMMIT[:7] in message
    assert contents(checkout) == before


@pytest.fixture
def whole(climax, tmp_path):
    """A copy of ClimaX's checkout, with what is around the package."""
    if not (climax / "pyproject.toml").is_file():
        pytest.skip("this ClimaX is an installation, without what is around the package")
    folder = tmp_path / "whole"
    shutil.copytree(climax, folder, ignore=shutil.ignore_patterns(".git", "__pycache__", "assets", "snakemake_configs"))
    revert(folder)
    return folder


def test_what_is_around_the_package_is_patched_with_it(whole):
    before = contents(whole)
    apply(whole)
    patched = contents(whole)
    new = {str(path.relative_to(whole)) for path in patched.keys() - before.keys()}
    around = {"configs/terrain.yaml", "docs/reference/terrain.md", "tests/test_terrain.py"}
    assert new == around | {"src/climax/utils/cli.py"}
    assert all(stat.S_IMODE((whole / name).stat().st_mode) == 0o644 for name in new)
    assert b"gpus:" not in patched[whole / "configs/global_forecast_climax.yaml"]
    revert(whole)
    assert contents(whole) == before


@pytest.mark.parametrize("action", [apply, revert])
def test_a_failure_between_new_files_leaves_none(whole, monkeypatch, action):
    if action is revert:
        apply(whole)
    before = contents(whole)
    last = "tests/test_terrain.py" if action is apply else "src/climax/regional_forecast/train.py"
    replace = os.replace
    failed = []

    def failing(source, destination):
        if str(destination).endswith(last) and not failed:
            failed.append(destination)
            raise OSError("disk full")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(InputError, match=r"disk full.*nothing was changed"):
        action(whole)
    assert failed
    assert contents(whole) == before


def test_a_users_own_yaml_is_left_alone_and_named(whole):
    file = whole / "configs" / "global_forecast_climax.yaml"
    file.write_text(file.read_text().replace("max_epochs: 100\n", "max_epochs: 7\n"))
    (whole / "tests" / "test_terrain.py").write_text("mine = True\n")
    before = contents(whole)
    told = apply(whole)
    for name in ("configs/global_forecast_climax.yaml", "tests/test_terrain.py"):
        assert name in told.partition("left alone")[2]
        assert name in check(whole).left
        assert contents(whole)[whole / name] == before[whole / name]
    assert check(whole).state is State.PATCHED
    assert "nothing to do" in apply(whole)
    revert(whole)
    assert contents(whole) == before


def test_each_series_by_itself(checkout):
    unpatched = contents(checkout)
    for first, second in (SERIES, SERIES[::-1]):
        assert f"patched with {first}" in apply(checkout, first)
        assert [check(checkout, series).state for series in (first, second)] == [State.PATCHED, State.UNPATCHED]
        found = check(checkout)
        assert found.state is State.PARTLY
        assert f"with {first}, not with {second}" in found.sentence
        one = contents(checkout)
        apply(checkout, second)
        assert check(checkout).state is State.PATCHED
        revert(checkout, second)
        assert contents(checkout) == one
        apply(checkout)
        revert(checkout, first)
        assert [check(checkout, series).state for series in (first, second)] == [State.UNPATCHED, State.PATCHED]
        revert(checkout)
        assert contents(checkout) == unpatched
    with pytest.raises(InputError, match="series"):
        apply(checkout, "tomorrow")


def test_the_command_line_takes_a_series(toy, capsys):
    def patch(*arguments):
        status = main(["patch", *arguments, str(toy)])
        return status, "".join(capsys.readouterr())

    assert patch("check") == (0, f"{package_folder(toy)}: unpatched, at 6d5d354\n")
    assert patch("apply", "--series", "terrain")[0] == 0
    assert target(toy).read_text() == TOY_PATCHED["arch.py"]
    assert target(toy, "train.py").read_text() == TOY["train.py"]
    assert patch("check") == (0, f"{package_folder(toy)}: patched with terrain, not with today, from 6d5d354\n")
    assert patch("apply")[0] == 0
    assert {name: target(toy, name).read_text() for name in TOY} == TOY_PATCHED
    assert patch("revert", "--series", "today")[0] == 0
    target(toy).write_text(TOY["arch.py"])
    status, told = patch("check")
    assert (status, "half patched" in told) == (1, True)
    target(toy).write_text("mine\n")
    assert patch("check", "--series", "terrain")[0] == 1
    assert patch("apply", "--series", "terrain")[0] == 2
    assert target(toy).read_text() == "mine\n"


def test_local_changes_matter_only_to_the_series_that_touch_them(toy):
    target(toy, "train.py").write_text("old\nkeep\nmine\n")
    assert check(toy, "today").state is State.MODIFIED
    apply(toy, "terrain")
    assert check(toy, "terrain").state is State.PATCHED
    assert target(toy, "train.py").read_text() == "old\nkeep\nmine\n"


def test_some_patches_of_a_series_are_half_of_it(checkout):
    """As after some of `git am`."""
    before = contents(checkout)
    apply(checkout, "today")
    first = patching.read_patches()[0]
    for name in first.files:
        file = target(checkout, name.removeprefix(PREFIX))
        file.write_bytes(before[file])
    found = check(checkout, "today")
    if len({name for patch in patching.read_patches() if patch.series == "today" for name in patch.files}) > 1:
        assert found.state is State.HALF
        assert "half patched with today" in found.sentence
        assert "patch apply --series today" in found.sentence
    apply(checkout, "today")
    assert check(checkout, "today").state is State.PATCHED


def test_a_patched_copy_with_a_hunk_elsewhere_is_not_taken_for_patched(toy):
    apply(toy)
    file = target(toy)
    # between the other "keep" and "second", where git, with a line of context, would revert it all the same
    file.write_text("first\nkeep\nsecond\nkeep\nadded\nsecond\nmiddle\nchanged\n")
    assert check(toy).state is State.MODIFIED


def test_another_repository_around_it_does_not_matter(checkout, monkeypatch):
    outer = checkout.parent
    git(outer, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))  # as a hook may have them
    monkeypatch.setenv("GIT_WORK_TREE", str(outer))
    monkeypatch.setenv("TMPDIR", str(outer))
    monkeypatch.setattr("tempfile.tempdir", str(outer))
    apply(checkout)
    assert check(checkout).state is State.PATCHED


def test_without_git(checkout, monkeypatch):
    before = contents(checkout)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(InputError, match=r"git.*install"):
        apply(checkout)
    assert contents(checkout) == before
    assert check(checkout).state is State.UNPATCHED  # known by content


def test_what_is_not_climax(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        check(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no package climax"):
        check(tmp_path)
    (tmp_path / "climax").mkdir()
    (tmp_path / "climax" / "__init__.py").touch()
    with pytest.raises(InputError, match="unrelated command-line library"):
        check(tmp_path)


def test_published_patches_are_mails_that_say_why_with_little_context():
    patches = read_patches()
    assert {patch.series for patch in patches} == set(SERIES)
    for patch in patches:
        header, _, change = patch.content.decode().partition("diff --git ")
        assert re.match(r"From \S+ .*\nFrom: .+<.+@.+>\nDate: .+\nSubject: \[PATCH \d+/\d+\] .+\n\n", joined(header))
        assert len(header.partition("\n\n")[2].strip()) > 40, f"{patch.name} does not say what it is for"
        assert patch.files
        runs = [len(list(lines)) for same, lines in groupby(change.splitlines(), lambda line: line[:1] == " ") if same]
        assert max(runs, default=0) <= 2, f"{patch.name} has more context than git needs"


def joined(header):
    """Folded lines of a mail's header in one."""
    return re.sub(r"\n[ \t]+", " ", header)


def test_the_flag_costs_few_lines():
    added = [
        line
        for patch in read_patches()
        if patch.series == "terrain"
        for part in patch.content.decode().split("diff --git ")[1:]
        if part.startswith("a/src/climax/arch.py ")
        for line in part.splitlines()
        if line.startswith("+") and not line.startswith("+++")
    ]
    assert 0 < len(added) <= 18


def test_overlay_leaves_the_copy_alone_and_nothing_behind(checkout):
    before = contents(checkout)
    for patched in (False, True):
        with overlay(find_climax(checkout), patched=patched) as folder:
            inside = contents(folder)
            assert (folder / "climax" / "arch.py").is_file()
        assert not folder.exists()
        assert inside
        assert contents(checkout) == before


def test_overlay_is_patched_on_request_only(checkout):
    for done in (False, True):
        if done:
            apply(checkout)
        wanted = {}
        for patched in (False, True):
            with overlay(find_climax(checkout), patched=patched) as folder:
                wanted[patched] = (folder / "climax" / "arch.py").read_bytes()
        assert (wanted[False] == wanted[True]) == done


def test_overlay_takes_local_changes_that_the_patches_fit(toy, caplog):
    target(toy).write_text(TOY["arch.py"] + "mine\n")
    with overlay(find_climax(toy), patched=True) as folder:
        assert (folder / "climax" / "arch.py").read_text() == TOY_PATCHED["arch.py"] + "mine\n"
    assert "arch.py is neither" in caplog.text

    target(toy).write_text("something else\n")
    with pytest.raises(InputError, match="patches do not fit"), overlay(find_climax(toy), patched=True):
        pass


def test_overlay_leaves_out_what_somebody_has_done_already(toy, caplog):
    target(toy, "train.py").write_text("newer\nkeep\n")
    with overlay(find_climax(toy), patched=True) as folder:
        assert (folder / "climax" / "train.py").read_text() == "newer\nkeep\n"
        assert (folder / "climax" / "arch.py").read_text() == TOY_PATCHED["arch.py"]
    assert "today/train.py.patch does not fit its local changes" in caplog.text


def test_order_of_looking_for_climax(toy, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(toy, other)
    installed = tmp_path / "installed"
    shutil.copytree(toy / "src", installed)
    (installed / "climax" / "__init__.py").touch()  # or a ClimaX that is really installed would come first
    monkeypatch.syspath_prepend(installed)
    monkeypatch.setenv("CLIMAX_SRC", str(other))
    assert find_climax(toy).package == toy / "src" / "climax"
    assert find_climax(toy).origin == "given"
    assert find_climax().package == other / "src" / "climax"
    monkeypatch.delenv("CLIMAX_SRC")
    assert find_climax().package == installed / "climax"
    assert find_climax().origin == "installed"


def test_wrong_environment_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIMAX_SRC", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"CLIMAX_SRC: .*absent does not exist"):
        find_climax()


def test_the_unrelated_package_is_not_taken_for_climax(tmp_path, monkeypatch):
    (tmp_path / "climax").mkdir()
    (tmp_path / "climax" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("CLIMAX_SRC", raising=False)
    with pytest.raises(locate.ClimaXNotFound, match="unrelated command-line library"):
        find_climax()
