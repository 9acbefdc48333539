"""A trained run that forecasts: its network with its weights, and what it has to be given."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from climax_elevation.attachment import bias_off
from climax_elevation.checks import finite
from climax_elevation.diagnostics.interventions import Pixels, pixels_forecast, scaled_bias
from climax_elevation.diagnostics.run import choose_checkpoint, configured, host_classes, load_weights, read_config
from climax_elevation.diagnostics.strength import terrain_blocks
from climax_elevation.errors import InputError
from climax_elevation.files import check_degrees, load_npy, load_scalars
from climax_elevation.seam import TerrainSeam
from climax_elevation.terrain.reader import HOURS_PER_LEAD_TIME
from climax_elevation.upstream.config import STAND_IN_CLASS

REMEDY = "give the folder of the data that the run was trained on with --data, or copy it there again"
PRECIPITATION = "total_precipitation"

Array = NDArray[np.floating]


@dataclass(frozen=True)
class LoadedRun:
    """A trained network, and what it is to be given.

    Attributes:
        model: ClimaX or the stand-in host, with the checkpoint's weights, in evaluation mode.
        host: Which of the two, in words.
        terrain: Reads the model's input as metres and m/s; None: attention has no terrain bias.
        bias_type: Name of the bias; None: there is none.
        statistics: Mean and standard deviation by which each variable is standardised, in its own unit.
        variables, out_variables: Of the input, in its order; and what is forecast.
        lead_hours: From input to forecast.
        lat, lon: Of the input's rows and columns, degrees, `[H]` and `[W]`; of a 2-D grid means.
        places: Latitudes and longitudes of each pixel of a 2-D grid, `[H, W]`; None: it is none.
        region: What ClimaX's regional model is told of its region; None: all of the input is forecast.
        batch_size: Of the run: what surely fits into memory at once.
        checkpoint: Where the weights are from.
        data: Folder of statistics and coordinates.
    """

    model: nn.Module
    host: str
    terrain: TerrainSeam | None
    bias_type: str | None
    statistics: Mapping[str, tuple[float, float]]
    variables: tuple[str, ...]
    out_variables: tuple[str, ...]
    lead_hours: float
    lat: Array
    lon: Array
    places: tuple[Array, Array] | None
    region: dict[str, Any] | None
    batch_size: int
    checkpoint: Path
    data: Path

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the input, pixels."""
        return len(self.lat), len(self.lon)

    @property
    def pixels(self) -> Pixels:
        """Rows and columns of the input that are forecast."""
        return pixels_forecast([] if self.region is None else [self.region])

    @property
    def bias(self) -> str:
        """The bias in words: its name, blocks, and scalars."""
        if self.terrain is None:
            return "none"
        blocks = terrain_blocks(self.model)
        scalars = [
            f"block {index} {name} {parameter.item():.6g}"
            for index, block in blocks.items()
            for name, parameter in block.attn.bias.named_parameters()
            if parameter.numel() == 1
        ]
        return "; ".join([f"{self.bias_type} in blocks {', '.join(map(str, blocks))}", *scalars])

    def scaled(self, factor: float) -> AbstractContextManager[None]:
        """The context in which the bias is `factor` times itself; 0: attention as without it.

        Raises:
            InputError: If the factor is not finite; on entry, if it is not 1 and there is no bias.
        """
        if finite("bias_scale", factor) == 1:
            return nullcontext()
        return scaled_bias(self.model, factor) if factor else bias_off(self.model)

    def step(self, x: Tensor) -> Tensor:
        """Forecast once.

        Args:
            x: Standardised `variables`, `[B, V, H, W]`.

        Returns:
            Standardised `out_variables`, of the pixels that are forecast, `[B, Vo, h, w]`, float32.
        """
        device = next(self.model.parameters()).device
        x = x.to(device)
        lead_times = torch.full((len(x),), self.lead_hours / HOURS_PER_LEAD_TIME, device=device)
        region = [] if self.region is None else [self.region]
        names = (list(self.variables), list(self.out_variables))
        with torch.no_grad():
            # without a metric the target, here the input, has no effect
            _, predicted = self.model.forward(x, x, lead_times, *names, None, self.lat, *region)
        return predicted.float()

    def standardise(self, values: Array, names: Sequence[str]) -> Tensor:
        """(x - mean) / std of `[..., V, H, W]`, float32."""
        mean, std = self._of(names)
        return (torch.as_tensor(values, dtype=torch.float32) - mean.float()) / std.float()

    def physical(self, values: Tensor, names: Sequence[str]) -> Array:
        """The inverse of `standardise`, float32."""
        mean, std = self._of(names)
        # as ClimaX inverts it, rounding included
        return ((values.cpu() - (-mean / std).float()) / (1 / std).float()).numpy()

    def _of(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        values = torch.tensor([self.statistics[name] for name in names], dtype=torch.float64)[:, :, None, None]
        return values[:, 0], values[:, 1]

    def forecast(self, fields: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """Forecast once, in physical units.

        Args:
            fields: Each of `variables`, `[N, H, W]` in ClimaX's unit, rows and columns as `lat` and `lon`;
                or `[H, W]`, of what does not change.

        Returns:
            Each of `out_variables`, `[N, h, w]`.

        Raises:
            InputError: If a variable is missing, or has another shape.
        """
        missing = [name for name in self.variables if name not in fields]
        if missing:
            raise InputError(f"the run's input has {', '.join(missing)} as well: {', '.join(self.variables)}")
        arrays = {name: np.asarray(fields[name], dtype=np.float32) for name in self.variables}
        samples = max((len(values) for values in arrays.values() if values.ndim == 3), default=1)
        for name, values in arrays.items():
            if values.shape not in ((samples, *self.shape), self.shape):
                raise InputError(
                    f"{name} is [{samples}, {self.shape[0]}, {self.shape[1]}] or [{self.shape[0]}, {self.shape[1]}], "
                    f"not {list(values.shape)}"
                )
        x = np.stack([np.broadcast_to(values, (samples, *self.shape)) for values in arrays.values()], axis=1)
        predicted = self.physical(self.step(self.standardise(x, self.variables)), self.out_variables)
        return {name: predicted[:, index] for index, name in enumerate(self.out_variables)}


def load_run(
    folder: str | Path,
    *,
    checkpoint: str | Path | None = None,
    data: str | Path | None = None,
    climax: str | Path | None = None,
) -> LoadedRun:
    """A finished or running training's network with its weights, and what its input has to be.

    Of the run's data, its statistics, latitudes and longitudes are read, and no shard.

    Args:
        folder: Holds the run's config.yaml and its checkpoints, both at any depth.
        checkpoint: Which one; None: the only one that is not last.ckpt, or else that.
        data: Folder of the run's data, if it is not where the run had it.
        climax: A copy of ClimaX, as `find_climax` takes it, for a run of ClimaX itself.

    Raises:
        InputError: If the folder holds no such run or several, statistics or ClimaX are missing, or the
            checkpoint is of another model.
    """
    folder = Path(folder)
    config = read_config(folder, None if data is None else Path(data))
    chosen = choose_checkpoint(folder, None if checkpoint is None else Path(checkpoint))
    with host_classes(config, None if climax is None else Path(climax)) as (module_class, datamodule_class):
        settings = configured({"data": datamodule_class}, config, build=False).data
        module: Any = configured({"model": module_class}, config).model
        load_weights(module, chosen)
        root = Path(settings.root_dir)
        lat, lon = (load_npy(root / name, REMEDY) for name in ("lat.npy", "lon.npy"))
        check_degrees(lat, lon, root)
        region = _region(settings.region, lat, lon, module.net.patch_size) if "region" in settings else None
    variables = tuple(settings.variables)
    wanted = settings.out_variables or variables
    out_variables = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    statistics = _statistics(root, [*variables, *out_variables])
    terrain = next((part for part in module.modules() if isinstance(part, TerrainSeam)), None)
    if terrain is not None:
        _tell(terrain, statistics, lat, lon, root)
    net = config["model"]["net"]
    module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return LoadedRun(
        model=module.net,
        host="the stand-in host, which is not ClimaX" if net["class_path"] == STAND_IN_CLASS else "ClimaX",
        terrain=terrain,
        bias_type=None if terrain is None else net["init_args"].get("bias_type", "physics"),
        statistics=statistics,
        variables=variables,
        out_variables=out_variables,
        lead_hours=settings.predict_range * settings.hrs_each_step,
        lat=lat,
        lon=lon,
        places=_places(root),
        region=region,
        batch_size=settings.batch_size,
        checkpoint=chosen,
        data=root,
    )


def _region(name: str, lat: Array, lon: Array, patch_size: int) -> dict[str, Any]:
    return importlib.import_module("climax.utils.data_utils").get_region_info(name, lat, lon, patch_size)


def _statistics(root: Path, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    files = [root / f"normalize_{kind}.npz" for kind in ("mean", "std")]
    mean, std = (load_scalars(file, REMEDY, names) for file in files)
    for file, found in zip(files, (mean, std), strict=True):
        missing = [name for name in dict.fromkeys(names) if name not in found]
        if missing:
            raise InputError(f"{file} lacks {', '.join(missing)}, which the run has: {REMEDY}")
    if PRECIPITATION in mean:
        mean[PRECIPITATION] = 0.0  # ClimaX scales precipitation only, so that none stays none
    for name in names:
        if not (math.isfinite(mean[name]) and 0 < std[name] < math.inf):
            raise InputError(
                f"mean and standard deviation of {name!r} in {root} are {mean[name]}, {std[name]}: {REMEDY}"
            )
    return {name: (mean[name], std[name]) for name in names}


def _tell(
    terrain: TerrainSeam, statistics: Mapping[str, tuple[float, float]], lat: Array, lon: Array, root: Path
) -> None:
    """What the run's data module told; the checkpoint has to agree."""
    source = f"the run's data in {root}"
    mean, std = ({name: pair[index] for name, pair in statistics.items()} for index in (0, 1))
    terrain.set_statistics(mean, std, source)
    if "lat" not in terrain.sources:
        terrain.set_grid(lat, lon, source)
    terrain.cache_dir = root


def _places(root: Path) -> tuple[Array, Array] | None:
    files = (root / "lat2d.npy", root / "lon2d.npy")
    if not all(file.is_file() for file in files):
        return None
    return load_npy(files[0], REMEDY), load_npy(files[1], REMEDY)
