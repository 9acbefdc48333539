"""How many shards: enough for readers that take whole ones, none of them left out, none across a gap."""

from itertools import pairwise

import numpy as np
import pytest

from climax_elevation import InputError
from climax_elevation.data.times import TimeAxis, plan_shards


def planned(processes, steps=(40, 12, 9), gaps=(), predict_range=2, shard_steps=100, step_bytes=4):
    """Numbers of steps of the shards of each part, in which every pair is."""
    ends = [0]
    for count in steps:
        ends.append(ends[-1] + count)
    stamps = tuple(
        str(np.datetime64("2000-01-01T00:00:00") + hour * np.timedelta64(1, "h")) for hour in range(ends[-1])
    )
    parts = {name: range(*pair) for name, pair in zip(("train", "val", "test"), pairwise(ends), strict=True)}
    axis = TimeAxis(stamps, 1.0, tuple(gaps))
    shards = plan_shards(
        axis, parts, shard_steps=shard_steps, predict_range=predict_range, step_bytes=step_bytes, processes=processes
    )
    found = {name: [] for name in parts}
    reached = 0
    pairs = set()
    for shard in shards:
        assert not any(shard.start < gap < shard.stop for gap in gaps)
        assert shard.start + (shard.repeats or 0) == reached, "nothing is left out between shards"
        assert (shard.repeats is None) == (shard.start in {0, *ends, *gaps})
        assert shard.repeats is None or predict_range <= shard.repeats < shard.stop - shard.start
        reached = shard.stop
        found[shard.file.partition("/")[0]].append(shard.stop - shard.start)
        pairs |= {(step, step + predict_range) for step in range(shard.start, shard.stop - predict_range)}
    assert reached == ends[-1]
    walls = sorted({*ends, *gaps})
    assert pairs == {
        (step, step + predict_range) for start, stop in pairwise(walls) for step in range(start, stop - predict_range)
    }
    return found


def test_one_process_has_what_there_was():
    assert planned(1) == {"train": [40], "val": [12], "test": [9]}


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_each_part_is_a_multiple_and_shards_of_training_are_equally_long(processes):
    found = planned(processes)
    assert [len(lengths) for lengths in found.values()] == [processes] * 3
    assert len(set(found["train"])) == 1
    # without a pair twice, which would count twice in a mean
    assert [sum(lengths) - 2 * processes for lengths in (found["val"], found["test"])] == [10, 7]


def test_more_shards_than_processes_are_rounded_up():
    assert len(planned(4, steps=(40, 12, 12), shard_steps=10)["train"]) == 8  # five would have done


def test_the_largest_piece_between_gaps_is_cut_first():
    # 8 pairs and 28: eight shards of 5, of which two have the 8. 32 pairs and 4: twelve of 4
    assert planned(1, steps=(40, 12, 12), gaps=[10], shard_steps=12)["train"] == [10, 11, 11, 12]
    assert planned(4, steps=(40, 12, 12), gaps=[10])["train"] == 8 * [7]
    assert planned(4, steps=(40, 12, 12), gaps=[34])["train"] == 12 * [6]


def test_a_stretch_of_time_that_is_too_short_for_equal_shards_is_said(caplog):
    caplog.set_level("INFO")
    lengths = planned(2, steps=(40, 12, 12), gaps=[3])["train"]
    assert lengths == [3, 37]
    assert "train: shards are not equally long, since one stretch of time between gaps has 1 pairs only" in caplog.text


def test_a_part_that_is_too_short_says_how_many_it_allows():
    with pytest.raises(InputError, match=r"test has 7 pairs .* which make 1 to 7 shards, and no multiple of 8"):
        planned(8)
    with pytest.raises(InputError, match=r"train has 3 pairs .* in 3 pieces .* 3 to 3 shards, and no multiple of 2"):
        planned(2, steps=(12, 12, 9), gaps=[4, 8], predict_range=3)


@pytest.mark.parametrize(
    ("steps", "ahead", "shards"),
    [
        (480, 1, 16),  # 40 years of months: 23 shards of 20 pairs, and 8 divides 16
        (120, 1, 4),
        (40, 1, 1),
        (60, 1, 2),
        (324342, 24, 672),  # 37 years of hours
        (324342, 6, 800),
    ],
)
def test_how_many_there_are_where_nobody_asks(steps, ahead, shards):
    found = planned(1, steps=(steps, 2 * ahead, 2 * ahead), predict_range=ahead, shard_steps=None)
    assert {part: len(lengths) for part, lengths in found.items()} == {"train": shards, "val": 1, "test": 1}
    assert max(found["train"]) - min(found["train"]) <= 1


def test_large_steps_make_more_and_not_mostly_repeated_shards():
    """1.40625 degrees and 48 variables: 42 steps of 256 MiB are not enough for 24 hours ahead."""
    found = planned(1, steps=(20000, 48, 48), predict_range=24, shard_steps=None, step_bytes=48 * 128 * 256 * 4)
    assert len(found["train"]) == 96
    assert max(found["train"]) <= 240
    assert sum(found["train"]) < 1.13 * 20000
