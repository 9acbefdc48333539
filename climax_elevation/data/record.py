"""What a prepared folder holds, and its record, `prepare.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = "prepare.json"
COMPLETE = "complete"
RECUT = "recut"  # its key for what shards were cut anew from, and how


@dataclass(frozen=True)
class Prepared:
    """What `prepare` left in OUT.

    Attributes:
        out: The folder: `root_dir` in ClimaX's configuration.
        variables: The channels, ClimaX's names.
        shape: H and W, `img_size` in ClimaX's configuration.
        steps: Time steps of each partition, each counted once.
        shards: Number of shards of each partition.
        predict_range: Steps between input and target, for which the shards hold all pairs.
        hours_per_step: Rounded, `hrs_each_step` in ClimaX's configuration; a mean, for months; None: not known.
        shards_written: How many shards this call wrote; the others were there.
        changed: Whether this call wrote anything.
        commands: Two lines that train on it, without the bias and with it; none, where it has no configuration.
    """

    out: Path
    variables: tuple[str, ...]
    shape: tuple[int, int]
    steps: Mapping[str, int]
    shards: Mapping[str, int]
    predict_range: int
    hours_per_step: float | None
    shards_written: int
    changed: bool
    commands: tuple[str, ...]


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder; None where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def repeats(folder: Path) -> dict[str, int]:
    """How many of its first steps a shard has in common with the one before, by file; without those that follow none.

    Args:
        folder: Of a partition's folder, the one above.
    """
    listed = (read_record(folder) or {}).get("shards")
    shards = [shard for shard in listed if isinstance(shard, dict)] if isinstance(listed, list) else []
    return {str(shard.get("file")): shard["repeats"] for shard in shards if isinstance(shard.get("repeats"), int)}
