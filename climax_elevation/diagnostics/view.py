"""What the attention of a trained model looks like from a place, along a line, and where its forecasts err."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool2d

from climax_elevation.checks import one_of
from climax_elevation.diagnostics.interventions import PARTS, forecasts, pixels_forecast
from climax_elevation.diagnostics.run import Run
from climax_elevation.diagnostics.strength import (
    Seen,
    encode,
    evaluating,
    logits_and_bias,
    one_sample,
    terrain_blocks,
    watch,
)
from climax_elevation.errors import InputError
from climax_elevation.host.shards import Normalize
from climax_elevation.terrain.reader import TerrainReader
from climax_elevation.terrain.sphere import EARTH_RADIUS_M, unit_vectors

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

ROOM = 0.75  # of the distance between patches: a place farther than that from every centre is outside the grid

Array = NDArray[np.floating]

Place = tuple[float, float]
"""Latitude and longitude, degrees."""


@dataclass(frozen=True)
class Field:
    """Values on a grid.

    Attributes:
        lat, lon: Degrees, of rows and columns, `[H]` and `[W]`, or of each point, `[H, W]`; in any order.
        values: `[H, W]`.
    """

    lat: Array
    lon: Array
    values: Array

    @property
    def unwrapped(self) -> Array:
        """Longitudes that do not jump at the dateline or at Greenwich."""
        return np.unwrap(self.lon, period=360)


@dataclass(frozen=True)
class View:
    """What a model's attention looks like from one place.

    Attributes:
        lat, lon: Centres of the patches, degrees, `[h, w]`.
        elevation_m: `[h, w]`.
        place: Row and column of the place.
        reads: Bias with which the place reads every patch, `[h, w]`.
        is_read: Bias with which every patch reads the place, `[h, w]`.
        without: Share of the place's attention that every patch has without the bias, `[h, w]`, sums to 1.
        with_bias: The same with it.
        of: Which block, head and sample, in words.
    """

    lat: Array
    lon: Array
    elevation_m: Array
    place: tuple[int, int]
    reads: Array
    is_read: Array
    without: Array
    with_bias: Array
    of: str

    def field(self, values: Array) -> Field:
        """Values a patch on the map."""
        return Field(self.lat, self.lon, values)

    @property
    def ground(self) -> Field:
        """The elevation."""
        return self.field(self.elevation_m)


@dataclass(frozen=True)
class Transect:
    """A line over the patches between two places.

    Attributes:
        distance_km: From the first place, `[N]`.
        rows, columns: Of the patches along it, `[N]`.
        ends: The places, in words.
    """

    distance_km: Array
    rows: NDArray[np.integer]
    columns: NDArray[np.integer]
    ends: tuple[str, str]


def view_from(
    run: Run,
    place: Place | None,
    *,
    part: str = "val",
    sample: int = 0,
    block: int | None = None,
    head: int | None = None,
) -> View:
    """Bias and attention of one patch with all others.

    Args:
        run: Of a model with a terrain bias.
        place: Whose patch; None: the patch with the steepest rise to a neighbour.
        part: "val" or "test".
        sample: Number of the forecast in it.
        block: Index of a block with a bias; None: the first.
        head: Index of a head; None: the mean of all.

    Raises:
        InputError: If the place is outside the grid, or there is no such sample, block or head.
    """
    blocks = terrain_blocks(run.module)
    block = min(blocks) if block is None else block
    if block not in blocks:
        raise InputError(f"block {block} has no terrain bias; those that have: {', '.join(map(str, blocks))}")
    heads = blocks[block].attn.num_heads
    if head is not None and not 0 <= head < heads:
        raise InputError(f"head is from 0 to {heads - 1}, not {head}")
    terrain, seen = _look(run, one_of("part", part, PARTS), sample, block)
    lat, lon = _centres(terrain)
    chosen = steepest_rise(terrain) if place is None else _patch(lat, lon, terrain.grid, place)
    picked = _from_patch(seen, chosen, slice(None) if head is None else slice(head, head + 1))
    reads, is_read, without, with_bias = (values.reshape(terrain.grid).cpu().numpy() for values in picked)
    which = "mean of heads" if head is None else f"head {head}"
    return View(
        lat=lat.reshape(terrain.grid),
        lon=lon.reshape(terrain.grid),
        elevation_m=terrain.elevation_m[0].reshape(terrain.grid).cpu().numpy(),
        place=(chosen // terrain.grid[1], chosen % terrain.grid[1]),
        reads=reads,
        is_read=is_read,
        without=without,
        with_bias=with_bias,
        of=f"block {block}, {which}, forecast {sample} of {part}",
    )


def _look(run: Run, part: str, sample: int, block: int) -> tuple[Terrain, Seen]:
    """Terrain of one sample, and what the attention of a block works on in it."""
    batch = _batch_of_one(run, part, sample)
    caught: dict[int, Seen] = {}
    with evaluating(run.module), watch(run.module, caught.__setitem__):
        encode(run.module, batch)
        net: Any = run.module.net
        device = next(net.parameters()).device
        terrain = net.terrain(batch[0].to(device), batch[2].to(device), batch[3])
    return _of_region(terrain, batch[5:], net.patch_size), one_sample(caught[block], 0)


def _of_region(terrain: Terrain, region: Sequence[dict[str, Any]], patch_size: int) -> Terrain:
    """What lies in the rectangle of patches that is forecast, as a grid of its own."""
    if not region:
        return terrain
    rows, columns = (pixels.stop // patch_size - pixels.start // patch_size for pixels in pixels_forecast(region))
    return replace(terrain.select(region[0]["patch_ids"]), grid=(rows, columns), patch_ids=None)


def _batch_of_one(run: Run, part: str, sample: int) -> tuple[Any, ...]:
    seen = 0
    for x, y, lead_times, *names in getattr(run.datamodule, f"{part}_dataloader")():
        if 0 <= sample - seen < len(x):
            one = slice(sample - seen, sample - seen + 1)
            return (x[one], y[one], lead_times[one], *names)
        seen += len(x)
    raise InputError(f"{part} has forecasts 0 to {seen - 1}, and not {sample}")


def _from_patch(seen: Seen, patch: int, heads: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """b[i, :], b[:, i] and the attention of i without and with b, in raster order, means over `heads`."""
    tokens = seen.x.shape[1]
    place = torch.arange(tokens, device=seen.x.device) if seen.order is None else seen.order[0].argsort()
    at = int(place[patch])
    with torch.no_grad():
        logits, reads = logits_and_bias(seen, slice(at, at + 1), slice(0, tokens))
        _, is_read = logits_and_bias(seen, slice(0, tokens), slice(at, at + 1))
    without, with_bias = logits.softmax(dim=-1), (logits + reads).softmax(dim=-1)
    rows = (reads[:, 0], is_read[..., 0], without[:, 0], with_bias[:, 0])
    reads, is_read, without, with_bias = (row[heads].mean(dim=0)[place] for row in rows)
    return reads, is_read, without, with_bias


def _centres(terrain: Terrain) -> tuple[Array, Array]:
    terrain.require(("lat", "lon"), "a map")
    lat, lon = (axis.double().cpu().numpy() for axis in (terrain.lat, terrain.lon))  # type: ignore[union-attr]
    # eastward from the first column on, over the dateline if need be
    return lat, np.unwrap(lon.reshape(terrain.grid), axis=1, period=360).ravel()


def steepest_rise(terrain: Terrain) -> int:
    """The patch with the steepest rise to a neighbour."""
    height = terrain.elevation_m[:1].unflatten(1, terrain.grid)
    return int((max_pool2d(height, 3, stride=1, padding=1) - height).argmax())


def _vectors(lat: Any, lon: Any) -> Tensor:
    return unit_vectors(torch.as_tensor(lat, dtype=torch.float64), torch.as_tensor(lon, dtype=torch.float64))


def _patch(lat: Array, lon: Array, grid: tuple[int, int], place: Place) -> int:
    """The patch whose centre is nearest."""
    if not all(map(math.isfinite, place)):
        raise InputError(f"a place has a finite latitude and longitude, degrees, not ({place[0]:g}, {place[1]:g})")
    centres = _vectors(lat, lon)
    nearest = (centres - _vectors(*place)).norm(dim=-1)
    chosen = int(nearest.argmin())
    if not -90 <= place[0] <= 90 or nearest[chosen] > ROOM * _spacing(centres, grid, chosen):
        raise InputError(
            f"{_words(place)} is outside the grid, whose patches have centres from {latitude_words(lat.min())} to "
            f"{latitude_words(lat.max())} and {longitude_words(lon.min())} to {longitude_words(lon.max())}"
        )
    return chosen


def _spacing(centres: Tensor, grid: tuple[int, int], patch: int) -> float:
    """The larger distance from a patch to a neighbour in its row or column."""
    on_grid = centres.unflatten(0, grid)
    row, column = divmod(patch, grid[1])
    steps = [
        on_grid[:, column].diff(dim=0).norm(dim=-1)[max(0, row - 1) : row + 1],
        on_grid[row].diff(dim=0).norm(dim=-1)[max(0, column - 1) : column + 1],
    ]
    return float(torch.cat(steps).max())


def transect(view: View, start: Place, end: Place) -> Transect:
    """The patches along the great circle between two places.

    Raises:
        InputError: If a place is outside the grid, or both are in one patch.
    """
    lat, lon, grid = view.lat.ravel(), view.lon.ravel(), view.lat.shape
    first, last = (_patch(lat, lon, (grid[0], grid[1]), place) for place in (start, end))
    if first == last:
        raise InputError("a transect goes from one patch to another, and both places are in the same")
    centres = _vectors(lat, lon)
    a, b = _vectors(*start), _vectors(*end)
    angle = float(torch.acos((a @ b).clamp(-1, 1)))
    finest = float((centres.unflatten(0, grid).diff(dim=0).norm(dim=-1)).min()) if grid[0] > 1 else angle / len(lat)
    share = torch.linspace(0, 1, max(2, int(4 * angle / finest) + 1), dtype=torch.float64)[:, None]
    points = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / np.sin(angle)
    patches = (points @ centres.T).argmax(dim=1).numpy()
    changes = np.flatnonzero(np.diff(patches)) + 1
    runs = np.split(np.arange(len(patches)), changes)
    middle = np.array([share[each, 0].mean().item() for each in runs])
    along = np.array([patches[each[0]] for each in runs])
    return Transect(
        middle * angle * EARTH_RADIUS_M / 1e3,
        along // grid[1],
        along % grid[1],
        (_words(start), _words(end)),
    )


def _words(place: Place) -> str:
    return f"{latitude_words(place[0])}, {longitude_words(place[1])}"


def latitude_words(lat: float) -> str:
    """Degrees north or south, as all pictures and messages about them have it."""
    return _degrees(lat, "NS", (0,))


def longitude_words(lon: float) -> str:
    """Degrees east or west of Greenwich, whatever the data count from."""
    return _degrees((lon + 180) % 360 - 180, "EW", (0, -180))


def _degrees(value: float, sides: str, no_side: tuple[int, ...]) -> str:
    value = round(float(value), 6)
    return f"{abs(value):g}°" + ("" if value in no_side else f" {sides[value < 0]}")


def error_field(run: Run, part: str, variable: str | None) -> tuple[Field, str]:
    """Root mean square error of a variable at each pixel over a part of the data, and the variable's name.

    Raises:
        InputError: If the part is unknown, or the run does not forecast the variable.
    """
    loader = getattr(run.datamodule, f"{one_of('part', part, PARTS)}_dataloader")
    total, count = torch.zeros(()), 0
    lat, lon = map(np.asarray, run.datamodule.get_lat_lon())
    with evaluating(run.module):
        for y, predicted, names, (rows, columns) in forecasts(run.module, run.datamodule, loader()):
            variable = one_of("variable", names[0] if variable is None else variable, names)
            error = (predicted - y)[:, names.index(variable)].double().square()
            total, count = total.to(error) + error.sum(dim=0), count + len(error)
            region = lat[rows], lon[columns]
    assert variable is not None
    return Field(*region, (total / count).sqrt().cpu().numpy()), variable


def ground_field(run: Run, part: str) -> Field:
    """Elevation in metres: of the pixels where the input has it, else of the patches where the bias reads a file.

    Raises:
        InputError: If there is neither.
    """
    x, _, lead_times, names, _, *region = next(islice(getattr(run.datamodule, f"{part}_dataloader")(), 1))
    rows, columns = pixels_forecast(region)
    reader = next((module for module in run.module.modules() if isinstance(module, TerrainReader)), None)
    channel = "orography" if reader is None else reader.elevation_variable
    if channel in names:
        transforms = run.datamodule.transforms
        metres = Normalize(transforms.mean, transforms.std).inverse()(x[:1])[0, names.index(channel)]
        lat, lon = run.datamodule.get_lat_lon()
        return Field(np.asarray(lat)[rows], np.asarray(lon)[columns], metres[rows, columns].numpy())
    if reader is None:
        raise InputError(f"error maps show the terrain, and the run's input has no {channel!r}")
    with evaluating(run.module):
        device = next(run.module.parameters()).device
        terrain = reader(x.to(device), lead_times.to(device), names)
        terrain = _of_region(terrain, region, reader.patch_size)
    lat, lon = (axis.reshape(terrain.grid) for axis in _centres(terrain))
    return Field(lat, lon, terrain.elevation_m[0].reshape(terrain.grid).cpu().numpy())
