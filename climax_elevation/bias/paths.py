"""The highest ground between every two patches: static geometry, computed once a grid and kept."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias
from weakref import WeakValueDictionary
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from climax_elevation.errors import InputError
from climax_elevation.terrain.fields import Terrain
from climax_elevation.terrain.sphere import shorter_turn, unit_vectors

logger = logging.getLogger(__name__)

STEPS_A_METRE = 2.0  # what is kept is rounded to half metres, as int16: up to 16 km
SAMPLES_A_PATCH = 2  # along a path, at least
VERSION = 1  # of what is kept on disk


@dataclass(frozen=True, eq=False)
class PathExcess:
    """How far the ground on the straight path between two patches rises above the higher of them.

        excess[i, j] = max over the path from i to j of z - max(z_i, z_j) >= 0

    It is symmetric, and 0 on the diagonal, between neighbours and along a slope.

    Attributes:
        half_metres: `[L, L]`, int16, in half metres.
        elevation_m: The ground that it was computed from, `[1, L]`.
    """

    half_metres: Tensor
    elevation_m: Tensor

    def to(self, device: torch.device) -> PathExcess:
        """The same on another device."""
        if self.half_metres.device == device:
            return self
        return PathExcess(self.half_metres.to(device), self.elevation_m.to(device))

    def __deepcopy__(self, memo: dict[int, Any]) -> PathExcess:
        return self  # it never changes


# for the blocks that share a grid, on each device
_known: WeakValueDictionary[tuple[str, torch.device], PathExcess] = WeakValueDictionary()


@torch.inference_mode(False)  # what is kept serves training too
def path_excess(terrain: Terrain, cache_dir: Path | None = None) -> PathExcess:
    """`PathExcess` of a whole grid, from memory or `cache_dir` where it is known, else computed and kept there.

    A path is a great circle where latitudes depend on rows and evenly spaced longitudes on columns alone,
    over the dateline where the grid goes around the globe; else it is a straight line of rows and columns.
    It is sampled twice a patch or more, at equal distances; each sample has the height of the nearest patch, at
    the grid's edge where it leaves the grid.

    Args:
        terrain: Of the whole grid; one ground for all samples.
        cache_dir: Folder for the file `terrain_paths_<key>.npz`, whose key is of grid and elevation.

    Raises:
        InputError: If the grid is not whole, or the ground differs between samples.
    """
    terrain.require_whole("a path across the ground")
    elevation = terrain.elevation_m[:1].detach().cpu().float().clone()
    if not bool((terrain.elevation_m == terrain.elevation_m[:1]).all()):
        raise InputError(
            "a path across the ground wants one elevation for all samples, and it differs within a batch: give "
            "elevation_file, or choose another bias"
        )
    walk = _walk(terrain)
    key = hashlib.sha256(repr((VERSION, terrain.grid, walk)).encode() + elevation.numpy().tobytes()).hexdigest()[:16]
    device = terrain.elevation_m.device
    known = _known.get((key, device))
    if known is None:
        file = None if cache_dir is None else cache_dir / f"terrain_paths_{key}.npz"
        half_metres = _read(file, elevation.shape[1])
        if half_metres is None:
            logger.info("terrain: highest ground between %d x %d patches, along %s", *terrain.grid, walk.name)
            half_metres = excess_half_metres(elevation[0].reshape(terrain.grid), walk)
            _write(file, half_metres)
        known = _known[key, device] = PathExcess(half_metres, elevation).to(device)
    return known


@dataclass(frozen=True)
class GridLines:
    """Straight lines of rows and columns, which look the same from every column."""

    rows: int
    periodic: bool = False  # whether the columns go once around the globe
    name: ClassVar[str] = "straight lines of the grid"

    def cells(self, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        """Paths from each row to each row, `turn` columns on.

        Returns:
            Row, and columns from the start, of each sample, `[rows * rows, samples]`; the number of samples
            after the first, `[rows * rows]`: what follows repeats the end.
        """
        start = torch.arange(self.rows, dtype=torch.float64)
        rise = (start[None, :] - start[:, None]).flatten()
        count = _samples(torch.hypot(rise, torch.tensor(float(turn))))
        share = _shares(count)
        row = torch.floor(start.repeat_interleave(self.rows)[:, None] + share * rise[:, None] + 0.5)
        return row.long(), torch.floor(share * turn + 0.5).long(), count


@dataclass(frozen=True)
class GreatCircles:
    """Great circles on a grid of latitudes by evenly spaced longitudes, in degrees."""

    lat: tuple[float, ...]
    lon_step: float
    periodic: bool
    name: ClassVar[str] = "great circles"

    def cells(self, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        lat = torch.tensor(self.lat, dtype=torch.float64)
        rows, step = len(lat), self.lon_step
        start = unit_vectors(lat, torch.zeros_like(lat)).repeat_interleave(rows, 0)
        end = unit_vectors(lat, torch.full_like(lat, turn * step)).repeat(rows, 1)
        angle = torch.atan2(torch.linalg.cross(start, end).norm(dim=-1), (start * end).sum(-1))
        onward = end - angle.cos()[:, None] * start
        # to the opposite side of the Earth all ways are as long: over the north pole
        pole = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) - start[:, 2:] * start
        onward = torch.where(onward.norm(dim=-1, keepdim=True) > 1e-9, onward, pole)
        onward = torch.nn.functional.normalize(onward, dim=-1, eps=1e-12)
        spacing = min(abs(step), float(lat.diff().abs().min()) if rows > 1 else abs(step))
        count = _samples(torch.rad2deg(angle) / spacing)
        along = (_shares(count) * angle[:, None])[..., None]
        place = along.cos() * start[:, None] + along.sin() * onward[:, None]
        ascending = lat if rows == 1 or lat[0] < lat[-1] else lat.flip(0)
        row = torch.bucketize(
            torch.rad2deg(torch.asin(place[..., 2].clamp(-1, 1))), (ascending[1:] + ascending[:-1]) / 2
        )
        if ascending is not lat:
            row = rows - 1 - row
        column = torch.rad2deg(torch.atan2(place[..., 1], place[..., 0])) / step
        return row, torch.floor(column + 0.5).long(), count


Walk: TypeAlias = GridLines | GreatCircles


def excess_half_metres(elevation_m: Tensor, walk: Walk) -> Tensor:
    """`PathExcess.half_metres` of elevations `[rows, columns]` along the paths of `walk`."""
    rows, columns = elevation_m.shape
    ends = torch.maximum(elevation_m.flatten()[:, None], elevation_m.flatten()).unflatten(0, (rows, columns))
    ends = ends.unflatten(2, (rows, columns))
    excess = torch.zeros(rows, columns, rows, columns, dtype=torch.int16)
    turns = columns // 2 + 1 if walk.periodic else columns
    for turn in range(turns):
        starts = torch.arange(columns if walk.periodic else columns - turn)
        stops = (starts + turn) % columns
        top = _highest(elevation_m, walk, turn, starts).unflatten(0, (rows, rows)).permute(2, 0, 1)
        found = ((top - ends[:, starts, :, stops]) * STEPS_A_METRE).round().to(torch.int16)
        # the same path there and back
        excess[:, starts, :, stops] = torch.maximum(excess[:, starts, :, stops], found)
        back = found.transpose(1, 2)
        excess[:, stops, :, starts] = torch.maximum(excess[:, stops, :, starts], back)
    return excess.reshape(rows * columns, rows * columns)


def _highest(elevation_m: Tensor, walk: Walk, turn: int, starts: Tensor) -> Tensor:
    """Highest patch on the path from each row to each, `turn` columns on, by start: `[rows * rows, starts]`."""
    columns = elevation_m.shape[1]
    # window[r, o] is row r as seen from every start, o - (columns - 1) columns on
    reach = torch.arange(-(columns - 1), columns)[:, None] + starts
    reach = reach % columns if walk.periodic else reach.clamp(0, columns - 1)
    window = elevation_m[:, reach].flatten(0, 1)
    row, column, count = walk.cells(turn)
    if walk.periodic:
        column = column % columns
    at = row * (2 * columns - 1) + column.clamp(-(columns - 1), columns - 1) + columns - 1
    longest_first = count.argsort(descending=True)
    at, ended = at[longest_first], torch.bincount(count, minlength=at.shape[1] + 1).cumsum(0)
    top = window[at[:, 0]]
    for sample in range(1, at.shape[1]):
        going = len(at) - int(ended[sample - 1])  # paths of so many samples or more
        torch.maximum(top[:going], window[at[:going, sample]], out=top[:going])
    return top[longest_first.argsort()]


def _samples(patches: Tensor) -> Tensor:
    """Into how many equal steps a path of so many patches is cut.

    An odd number: then no sample is half way, where rows and columns that are even in number would have it lie
    between two patches and rounding decide. A hair less than 2 is 2.
    """
    return torch.ceil(SAMPLES_A_PATCH * patches - 1e-9).long() | 1


def _shares(count: Tensor) -> Tensor:
    """0, 1/n, ..., 1 of each path, `[paths, longest + 1]`; 1 where it has ended."""
    steps = torch.arange(int(count.max()) + 1, dtype=torch.float64)
    return (steps / count[:, None]).clamp(max=1)


def _walk(terrain: Terrain) -> Walk:
    rows, columns = terrain.grid
    if terrain.lat is not None and terrain.lon is not None and columns > 1:
        lat = terrain.lat.detach().cpu().double().reshape(rows, columns)
        lon = terrain.lon.detach().cpu().double().reshape(rows, columns)
        step = shorter_turn(lon.diff(dim=1))
        mean_step = float(step.mean())
        near = 0.01 * abs(mean_step)
        straight = bool(((lat - lat[:, :1]).abs() < near).all() and ((step - mean_step).abs() < near).all())
        level = bool((shorter_turn(lon - lon[:1]).abs() < near).all())
        if straight and level and abs(mean_step) > 0:
            mean_step = round(mean_step, 6)
            periodic = abs(abs(mean_step) * columns - 360) < abs(mean_step) / 2
            return GreatCircles(tuple(round(value, 6) for value in lat[:, 0].tolist()), mean_step, periodic)
    return GridLines(rows)


def _read(file: Path | None, tokens: int) -> Tensor | None:
    if file is None or not file.is_file():
        return None
    try:
        with np.load(file) as arrays:
            half_metres = torch.from_numpy(arrays["half_metres"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        logger.warning("%s cannot be read (%s): computed again", file, error)
        return None
    return half_metres if half_metres.shape == (tokens, tokens) else None


def _write(file: Path | None, half_metres: Tensor) -> None:
    """Whole or not at all, since other processes may read it."""
    if file is None:
        return
    try:
        # a name of its own for each process: several may write at once
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".terrain_paths-") as folder:
            part = Path(folder) / file.name
            np.savez_compressed(part, half_metres=half_metres.numpy())
            os.replace(part, file)
    except OSError as error:
        logger.warning("%s cannot be written (%s): it will be computed at every start", file, error)
