"""What tells the files of a run from others."""

import os
import time
from pathlib import Path

import pytest

from climax_elevation.compare import fingerprints
from climax_elevation.compare.fingerprints import difference, digests, examine, fingerprint
from climax_elevation.errors import InputError


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if files had been written long ago."""
    now = time.time()
    monkeypatch.setattr(fingerprints.time, "time", lambda: now + 3600)


def test_one_that_was_not_written_since_is_not_read_again(
    tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {name: tmp_path / name for name in "ab"}
    for path in paths.values():
        path.write_bytes(b"1")
    known = examine(paths)
    read = []
    monkeypatch.setattr(fingerprints, "_digest", lambda path, bar: read.append(path.name) or "other")
    assert examine(paths, known) == known
    assert not read
    paths["b"].write_bytes(b"2")
    os.utime(paths["b"], ns=tuple(known["b"]["stamp"][3:4] * 2))  # with its time of modification set back
    assert examine(paths, known)["b"]["digest"] == "other"
    assert read == ["b"]


def test_one_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    """A clock may give two changes one time."""
    (tmp_path / "a").write_bytes(b"1")
    known = examine({"a": tmp_path / "a"})
    assert known["a"]["stamp"] is None
    (tmp_path / "a").write_bytes(b"2")
    assert digests(examine({"a": tmp_path / "a"}, known)) != digests(known)


def test_more_than_a_chunk_is_read_to_its_end(tmp_path: Path) -> None:
    found = set()
    for last in (b"", b"1", b"2"):
        (tmp_path / "a").write_bytes(bytes(3 * fingerprints.CHUNK) + last)
        found.add(fingerprint(examine({"a": tmp_path / "a"})))
    assert len(found) == 3


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone cannot be read \\(No such file or directory\\): make it readable"):
        examine({"gone": tmp_path / "gone"})


def test_differences_in_words() -> None:
    assert difference({"a": "1"}, {"a": "1"}) == ""
    assert difference({"a": "1"}, {"a": "2"}) == "a has changed"
    assert difference({"a": "1"}, {}) == "a is gone"
    assert difference({}, {"b": "1", "c": "1", "a": "1"}) == "a is new, and 2 more"


def test_a_name_is_part_of_what_a_file_says(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert fingerprint(examine({"a": tmp_path / "a"})) != fingerprint(examine({"b": tmp_path / "a"}))
