"""What the forecast loses when its terrain, its wind or its bias is changed: the same weights, evaluated again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from climax_elevation.bias.base import ElevationBias, Tensors, leaves
from climax_elevation.checks import finite, one_of
from climax_elevation.data.format import PARTITIONS
from climax_elevation.diagnostics.strength import evaluating, terrain_blocks
from climax_elevation.host.metrics import lat_weighted_rmse
from climax_elevation.host.shards import Normalize
from climax_elevation.seam import TerrainSeam
from climax_elevation.terrain.controls import level

if TYPE_CHECKING:
    from climax_elevation.terrain.fields import Terrain

PARTS = PARTITIONS[1:]  # that a run was not trained on
PERMUTATION_SEED = 0


class ScaledBias(ElevationBias):
    """Another bias times a constant: b = factor * inner."""

    def __init__(self, inner: ElevationBias, factor: float) -> None:
        super().__init__()
        self.inner = inner
        self.factor = finite("factor", factor)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs

    @property
    def numbers_a_pair(self) -> int:  # type: ignore[override]
        return self.inner.numbers_a_pair

    def prepare(self, terrain: Terrain, cache_dir: Path | None = None) -> None:
        self.inner.prepare(terrain, cache_dir)

    def inputs(self, terrain: Terrain) -> Tensors:
        return self.inner.inputs(terrain)

    def reordered(self, inputs: Tensors, order: Tensor) -> Tensors:
        return self.inner.reordered(inputs, order)

    def features(self, *inputs: Any) -> Tensors:
        return self.inner.features(*inputs)

    def tile(self, features: Tensors, rows: slice, columns: slice) -> tuple[Tensors, Tensors]:
        return self.inner.tile(features, rows, columns)

    def pairwise(self, query: Tensors, key: Tensors) -> Tensor:
        return self.factor * self.inner.pairwise(query, key)

    @property
    def has_factors(self) -> bool:
        return self.inner.has_factors

    def factors(self, *inputs: Any) -> tuple[Tensor, Tensor] | None:
        pair = self.inner.factors(*inputs)
        return None if pair is None else (self.factor * pair[0], pair[1])


@contextmanager
def scaled_bias(model: nn.Module, factor: float) -> Iterator[None]:
    """Every bias of `model` is `factor` times itself; parameters are the same objects, and untouched."""
    engines = {block: block.attn.engine for block in terrain_blocks(model).values()}
    with _other_biases(model, lambda bias: ScaledBias(bias, factor)):
        try:
            for block in engines:
                block.attn.engine = "auto"  # an engine made for some biases does not take this one
            yield
        finally:
            for block, engine in engines.items():
                block.attn.engine = engine


@contextmanager
def changed_terrain(model: nn.Module, change: Callable[[Terrain], Terrain]) -> Iterator[None]:
    """The biases of `model`, and nothing else in it, see `change(terrain)` in the place of the terrain.

    Copies of the biases take their place, so that what they prepare for another ground goes with them.
    """
    reader = next(part for part in model.modules() if isinstance(part, TerrainSeam))
    with _other_biases(model, copy.deepcopy), reader.replaced(change):
        yield


@contextmanager
def _other_biases(model: nn.Module, make: Callable[[ElevationBias], ElevationBias]) -> Iterator[None]:
    own = {block: block.attn.bias for block in terrain_blocks(model).values()}
    others = {block: make(bias) for block, bias in own.items()}
    try:
        for block, bias in others.items():
            block.attn.bias = bias
        yield
    finally:
        for block, bias in own.items():
            block.attn.bias = bias


def permuted(terrain: Terrain) -> Terrain:
    """The same elevations at other patches, by a fixed permutation."""
    generator = torch.Generator().manual_seed(PERMUTATION_SEED)
    order = torch.randperm(terrain.elevation_m.shape[1], generator=generator)
    return replace(terrain, elevation_m=terrain.elevation_m[:, order.to(terrain.elevation_m.device)])


def wind_reversed(terrain: Terrain) -> Terrain:
    """Wind from where it blows to; its speed is the same."""
    if terrain.u is None or terrain.v is None:
        return terrain
    return replace(terrain, u=-terrain.u, v=-terrain.v)


TERRAIN_CHANGES: dict[str, Callable[[Terrain], Terrain]] = {
    "elevation zeroed": level,
    "elevation permuted": permuted,
    "wind reversed": wind_reversed,
}
BIAS_FACTORS = {"bias times 0": 0.0, "bias times 0.5": 0.5, "bias times 2": 2.0}
INTERVENTIONS = (*TERRAIN_CHANGES, *BIAS_FACTORS)


def intervention(name: str, model: nn.Module) -> AbstractContextManager[None]:
    """The context in which `model` is evaluated under an intervention, and after which it is as it was.

    Args:
        name: One of `INTERVENTIONS`.
        model: Has a terrain bias.

    Raises:
        InputError: If the name is unknown; on entry, if the model has no terrain bias.
    """
    if one_of("intervention", name, INTERVENTIONS) in BIAS_FACTORS:
        return scaled_bias(model, BIAS_FACTORS[name])
    return changed_terrain(model, TERRAIN_CHANGES[name])


@dataclass(frozen=True)
class Effects:
    """What the interventions did to the error; `str()` of it is a table to print.

    Attributes:
        part: Part of the data that was forecast.
        samples: Number of forecasts.
        trained: Latitude-weighted RMSE by variable, physical units, of the model as it was trained.
        changed: The same for each intervention, None where it changes nothing that the biases read.
    """

    part: str
    samples: int
    trained: dict[str, float]
    changed: dict[str, dict[str, float] | None]

    def change_percent(self, name: str, variable: str) -> float | None:
        """How much higher the error of a variable is under an intervention, per cent; None: not applicable."""
        changed = self.changed[name]
        return None if changed is None else 100 * (changed[variable] / self.trained[variable] - 1)

    def __str__(self) -> str:
        width = max(len(name) for name in (*self.changed, "as trained"))
        columns = {variable: max(len(variable), 24) for variable in self.trained}
        lines = [
            f"Latitude-weighted RMSE over {self.samples} forecasts of {self.part}; changed, with the same weights:",
            " ".join([" " * width, *(f"{variable:>{columns[variable]}}" for variable in self.trained)]),
            " ".join([f"{'as trained':{width}}", *(f"{e:{columns[v]}.5g}" for v, e in self.trained.items())]),
        ]
        for name in self.changed:
            cells = [f"{self._cell(name, variable):>{columns[variable]}}" for variable in self.trained]
            lines.append(" ".join([f"{name:{width}}", *cells]))
        return "\n".join(lines)

    def _cell(self, name: str, variable: str) -> str:
        percent, changed = self.change_percent(name, variable), self.changed[name]
        return "not applicable" if percent is None or changed is None else f"{changed[variable]:.5g} ({percent:+.2f}%)"


def effects(model: nn.Module, datamodule: Any, part: str = "val", *, progress: bool = False) -> Effects:
    """Forecast a part of the data as trained and under every intervention.

    An intervention acts on what the biases see alone: the orography and wind channels that the model embeds
    stay as they are. One that leaves all that the biases read as it was, such as reversed wind for a bias
    that reads its speed, is not applicable.

    Args:
        model: A ClimaX for global forecasts with terrain, or a Lightning module that holds one as `net`.
        datamodule: ClimaX's, set up.
        part: "val" or "test".
        progress: Whether to show a bar.

    Raises:
        InputError: If the part is unknown, or the model has no terrain bias.
    """
    loader = getattr(datamodule, f"{one_of('part', part, PARTS)}_dataloader")
    terrain_blocks(model)
    with evaluating(model):
        applicable = [name for name in INTERVENTIONS if _applies(name, model, next(iter(loader())))]
        with tqdm(total=1 + len(applicable), unit="evaluation", disable=not progress) as bar:
            score = partial(_errors, model, datamodule, loader, bar)
            samples, trained = score()
            changed: dict[str, dict[str, float] | None] = {}
            for name in INTERVENTIONS:
                changed[name] = None
                if name in applicable:
                    with intervention(name, model):
                        changed[name] = score()[1]
    return Effects(part, samples, trained, changed)


def _applies(name: str, model: nn.Module, batch: Sequence[Any]) -> bool:
    """Whether what the blocks are given of the terrain differs."""
    if name in BIAS_FACTORS:
        return True
    net: Any = getattr(model, "net", model)
    device = next(net.parameters()).device
    x, lead_times, variables = batch[0].to(device), batch[2].to(device), batch[3]
    patch_ids = [region["patch_ids"] for region in batch[5:]]

    def given() -> list[Tensor]:
        arguments = net.terrain.for_blocks(net.blocks, x, lead_times, variables, *patch_ids)
        return [tensor for named in arguments.values() for tensor in leaves(tuple(named.values()))]

    before = given()
    with intervention(name, model):
        return any(not torch.equal(one, other) for one, other in zip(before, given(), strict=True))


def _errors(model: nn.Module, datamodule: Any, loader: Callable[[], Any], bar: Any) -> tuple[int, dict[str, float]]:
    """Number of forecasts, and the RMSE of each variable as ClimaX has it: mean over samples of the root."""
    total: dict[str, float] = {}
    samples = 0
    for y, predicted, names, (rows, _) in forecasts(model, datamodule, loader()):
        lat = datamodule.get_lat_lon()[0][rows]
        scores = lat_weighted_rmse(predicted, y, _same, names, lat, torch.zeros(1), "")
        for name in names:
            total[name] = total.get(name, 0.0) + len(y) * scores[f"w_rmse_{name}_"].item()
        samples += len(y)
    bar.update()
    return samples, {name: value / samples for name, value in total.items()}


Pixels = tuple[slice, slice]
"""Rows and columns."""


def pixels_forecast(region: Sequence[dict[str, Any]]) -> Pixels:
    """Which pixels a model forecasts: those of its region, and all where there is none."""
    if not region:
        return slice(None), slice(None)
    (bounds,) = region
    return slice(bounds["min_h"], bounds["max_h"] + 1), slice(bounds["min_w"], bounds["max_w"] + 1)


def forecasts(model: nn.Module, datamodule: Any, batches: Any) -> Iterator[tuple[Tensor, Tensor, list[str], Pixels]]:
    """Truth, forecast (`[B, V, H, W]`, physical units), names of the variables, and which pixels, of each batch."""
    net: Any = getattr(model, "net", model)
    device = next(net.parameters()).device
    lat = datamodule.get_lat_lon()[0]
    transforms = datamodule.output_transforms
    physical = Normalize(transforms.mean, transforms.std).inverse()
    for x, y, lead_times, variables, out_variables, *region in batches:
        rows, columns = pixels_forecast(region)
        y = y.to(device)
        _, predicted = net.forward(x.to(device), y, lead_times.to(device), variables, out_variables, None, lat, *region)
        yield physical(y[..., rows, columns]), physical(predicted.to(y.dtype)), list(out_variables), (rows, columns)


def _same(values: Tensor) -> Tensor:
    return values
