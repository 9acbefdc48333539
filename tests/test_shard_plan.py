"""How many shards: enough for readers that take whole ones, none of them left out, none across a gap."""

import pytest

from climax_elevation import InputError
from climax_elevation.data.times import TimeAxis, plan_shards


def planned(processes, steps=(40, 12, 9), gaps=(), predict_range=2, shard_steps=100):
    """Numbers of steps of the shards of each part."""
    ends = [0]
    for count in steps:
        ends.append(ends[-1] + count)
    stamps = tuple(f"2000-01-{1 + hour // 24:02d}T{hour % 24:02d}:00:00" for hour in range(ends[-1]))
    parts = {name: range(*pair) for name, pair in zip(("train", "val", "test"), zip(ends, ends[1:]), strict=True)}  # noqa: B905, RUF007
    axis = TimeAxis(stamps, 1.0, tuple(gaps))
    shards = plan_shards(
        axis, parts, shard_steps=shard_steps, predict_range=predict_range, step_bytes=4, processes=processes
    )
    found = {name: [] for name in parts}
    reached = 0
    for shard in shards:
        assert shard.start == reached, "nothing is left out between shards"
        assert not any(shard.start < gap < shard.stop for gap in gaps)
        reached = shard.stop
        found[shard.file.partition("/")[0]].append(shard.stop - shard.start)
    assert reached == ends[-1]
    return found


def test_one_process_has_what_there_was():
    assert planned(1) == {"train": [40], "val": [12], "test": [9]}


@pytest.mark.parametrize("processes", [2, 3])
def test_each_part_is_a_multiple(processes):
    found = planned(processes)
    assert [len(lengths) for lengths in found.values()] == [processes] * 3
    assert all(max(lengths) - min(lengths) <= 1 for lengths in found.values())


def test_more_shards_than_processes_are_rounded_up():
    assert len(planned(4, steps=(40, 12, 12), shard_steps=8)["train"]) == 8  # five would have done


def test_the_longest_piece_between_gaps_is_cut_first():
    assert planned(4, steps=(40, 12, 12), gaps=[10])["train"] == [10, 10, 10, 10]
    assert planned(4, steps=(40, 12, 12), gaps=[34])["train"] == [11, 11, 12, 6]


def test_a_part_that_is_too_short_says_how_many_it_allows():
    with pytest.raises(InputError, match=r"test has 9 time steps, which make 1 to 3 shards .* no multiple of 4"):
        planned(4)
    with pytest.raises(InputError, match=r"train has 12 time steps in 3 pieces .* 3 to 3 shards .* no multiple of 2"):
        planned(2, steps=(12, 12, 9), gaps=[4, 8], predict_range=3)
