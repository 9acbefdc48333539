"""The module on a ClimaX model that reads its standardised input as metres, m/s and patches."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from climax_elevation.errors import InputError
from climax_elevation.files import check_degrees
from climax_elevation.terrain.controls import controlled, shuffled
from climax_elevation.terrain.elevation_file import ElevationField
from climax_elevation.terrain.fields import Terrain, downsample_elevation, downsample_wind, patch_centres
from climax_elevation.terrain.plausible import HIGHEST_M, LOWEST_M
from climax_elevation.watch import judge, judged, settle

logger = logging.getLogger(__name__)

FASTEST_M_S = 150.0  # twice the strongest 10 m wind ever measured
GROUND_MAY_MOVE_M = 1.0  # rounding of a standardised channel, and no more
LAND_MAY_MOVE = 0.01  # likewise
SAME_SCALE = 6.0  # of an elevation file's deviation to the channel's, which gravity multiplies by 9.8
LEAST_CORRELATION = 0.9  # of an elevation file with the orography channel
LEVEL_M = 1e-3  # a standard deviation below this is rounding; of a standardised channel:
LEVEL_CHANNEL = 1e-5
LAND = (-0.01, 1.01)  # shares, with room for rounding
UNITS = {"elevation": "metres", "wind": "m/s", "land": "shares from 0 to 1"}
WITHOUT = {
    "elevation": "give bias_args.elevation_file, in metres",
    "wind": "set bias_args.wind: false",
    "land": "leave out land: true",
}
HOURS_PER_LEAD_TIME = 100.0  # ClimaX feeds lead times in hundreds of hours


class TerrainReader(nn.Module):
    """Makes a `Terrain` from a ClimaX model's input, in metres and m/s, or says why it cannot.

    Elevation comes from a static field in metres (`elevation_file`) or from the orography channel
    with the mean and standard deviation that standardised it; wind likewise from its two channels:

        z = patch_mean(x_orography) * std + mean,        w = patch_mean(sqrt(u^2 + v^2))

    What it learns from files or from a data module is kept in buffers, NaN until set, that go into
    the checkpoint. Two sources of the same thing have to agree.

    Args:
        img_size: Height and width of the input, pixels.
        patch_size: Side of a patch, pixels.
        elevation_variable: Name of the orography channel.
        wind_variables: Names of the eastward and northward wind channels; None: no wind is read.
        elevation_file: A field in metres with its coordinates, already read; replaces the channel.
        static_terrain: The channel is the same for all samples: it is read once a batch.
        terrain_is_flat: Elevations within 10 m of zero are meant, not a standardised channel.
        grid_spacing_m: Distance between pixels of a plane grid, metres; None: latitudes and longitudes tell.
        control: One of `CONTROLS`: what biases see in the place of the ground.
        control_seed: By which "permuted" shuffles.
        land_variable: Name of the channel of the share of land; None: it is not read.
    """

    _engines = ""  # that are in use, where blocks are known

    elevation_m: Tensor
    elevation_mean: Tensor
    elevation_std: Tensor
    wind_mean: Tensor
    wind_std: Tensor
    land_mean: Tensor
    land_std: Tensor
    lat: Tensor
    lon: Tensor

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: int,
        *,
        elevation_variable: str,
        wind_variables: tuple[str, str] | None,
        elevation_file: ElevationField | None = None,
        static_terrain: bool = False,
        terrain_is_flat: bool = False,
        grid_spacing_m: float | None = None,
        control: str = "none",
        control_seed: int = 0,
        land_variable: str | None = None,
    ) -> None:
        super().__init__()
        self.img_size = (int(img_size[0]), int(img_size[1]))
        self.patch_size = int(patch_size)
        self.grid = (self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size)
        self.elevation_variable = elevation_variable
        self.wind_variables = wind_variables
        self.land_variable = land_variable
        self.static_terrain = static_terrain
        self.terrain_is_flat = terrain_is_flat
        self.spacing_m = None if grid_spacing_m is None else grid_spacing_m * self.patch_size
        self.control = control
        tokens = self.grid[0] * self.grid[1]
        shapes = {"elevation_m": (1, tokens), "elevation_mean": (), "elevation_std": (), "wind_mean": (2,)}
        shapes |= {"wind_std": (2,), "lat": (tokens,), "lon": (tokens,)}
        if land_variable is not None:
            shapes |= {"land_mean": (), "land_std": ()}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.full(shape, math.nan, dtype=torch.float32))
        self.control_order: Tensor
        self.register_buffer("control_order", shuffled(tokens, control_seed), persistent=False)
        self._first_channel: Tensor  # the ground that is static, standardised
        self.register_buffer("_first_channel", torch.full(self.img_size, math.nan), persistent=False)
        self._lacking: dict[str, str] = {}  # kind -> who was asked for statistics, and what it has none of
        self._sources: dict[str, str] = {}  # buffer -> where its value is from; absent: not set
        self._field = elevation_file  # waits here until the data's latitudes are known
        self._announced = False
        if elevation_file is not None and not elevation_file.has_coordinates:
            self._settle_elevation(None, None)

    # ---- what is known -------------------------------------------------------------------------

    def set_statistics(self, mean: dict[str, float], std: dict[str, float], source: str) -> None:
        """Take the statistics that standardised the input; variables that no one reads are ignored.

        Args:
            mean, std: By variable, in the variable's own unit.
            source: Where they are from, for messages.

        Raises:
            InputError: If they disagree with what is known, or a standard deviation is not above 0.
        """
        wanted = {"elevation": (self.elevation_variable,), "wind": self.wind_variables or ()}
        wanted["land"] = () if self.land_variable is None else (self.land_variable,)
        for kind, variables in wanted.items():
            lacking = [name for name in variables if name not in mean or name not in std]
            if lacking:
                self._lacking[kind] = f"{source} has none of {' and '.join(map(repr, lacking))}"
            elif variables:
                for name in variables:
                    if not 0 < std[name] < math.inf:
                        raise InputError(
                            f"the standard deviation of {name!r} from {source} is above 0, not {std[name]}"
                        )
                    if not math.isfinite(mean[name]):
                        raise InputError(f"the mean of {name!r} from {source} is a finite number, not {mean[name]}")
                shape = getattr(self, f"{kind}_mean").shape
                self._store(f"{kind}_mean", np.reshape([mean[name] for name in variables], shape), source)
                self._store(f"{kind}_std", np.reshape([std[name] for name in variables], shape), source)

    def set_grid(self, lat: np.ndarray, lon: np.ndarray, source: str) -> None:
        """Take the latitudes and longitudes of the input's pixels.

        Args:
            lat, lon: Degrees, `[H]` and `[W]`, or both `[H, W]`.
            source: Where they are from, for messages.

        Raises:
            InputError: If they do not fit the input, or disagree with what is known.
        """
        lat, lon = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
        check_degrees(lat, lon, source)
        if lat.ndim == 1 and lon.ndim == 1:
            fits = (len(lat), len(lon)) == self.img_size
            if fits:
                self._settle_elevation(lat, lon)
            lat, lon = np.meshgrid(lat, lon, indexing="ij")
        else:
            fits = lat.shape == lon.shape == self.img_size
        if not fits:
            raise InputError(
                f"the model's img_size is {list(self.img_size)}, and {source} has {lat.shape[0]} latitudes "
                f"and {lon.shape[-1]} longitudes"
            )
        centres = patch_centres(torch.from_numpy(lat), torch.from_numpy(lon), self.patch_size)
        self._store("lat", centres[0], source)
        self._store("lon", centres[1], source)

    @property
    def sources(self) -> dict[str, str]:
        """Where each buffer that is set has its value from."""
        return dict(self._sources)

    def _settle_elevation(self, lat: np.ndarray | None, lon: np.ndarray | None) -> None:
        """Lay the elevation file's field on the data's grid."""
        if self._field is None:
            return
        laid = torch.from_numpy(self._field.on_grid(self.img_size, lat, lon))
        self._store("elevation_m", downsample_elevation(laid[None], self.patch_size), self._field.source)
        self._field = None

    def _store(self, name: str, value: Tensor | np.ndarray, source: str) -> None:
        buffer: Tensor = getattr(self, name)
        new = torch.as_tensor(value).to(buffer.device, buffer.dtype)
        if name in self._sources:
            self._check_agreement(name, new, source)
        buffer.copy_(new)
        self._sources[name] = source
        self._changed()
        if name in ("elevation_m", "elevation_std"):
            self._check_scale()

    def _check_scale(self) -> None:
        """Refuse a field that varies several times as much as the channel: low ground's geopotential passes for metres.

        Raises:
            InputError: If it does.
        """
        if not {"elevation_m", "elevation_std"} <= self._sources.keys():
            return
        varies, std = self.elevation_m.std(correction=0).item(), self.elevation_std.item()
        if varies > SAME_SCALE * std and std != 1:  # 1 is written for level ground, which every forward compares
            raise InputError(
                f"elevation from {self._sources['elevation_m']} varies by {varies:.0f} m (standard deviation of patch "
                f"means), and channel {self.elevation_variable!r} by {std:.3g} m by {self._sources['elevation_std']}: "
                "is it geopotential (divide by 9.80665), or are the statistics of other data?"
            )

    def _check_agreement(self, name: str, new: Tensor, source: str) -> None:
        known: Tensor = getattr(self, name)
        apart = (known - new).abs()
        if name == "lon":
            apart = torch.minimum(apart, 360 - apart)
        if (apart > 1e-4 * (1 + known.abs())).any():
            raise InputError(
                f"terrain.{name} from {self._sources[name]} ({_summary(known)}) and from {source} "
                f"({_summary(new)}) disagree: use data standardised as the checkpoint's were, or remove the "
                "one that is wrong (keys terrain.* of the checkpoint, stats_dir or elevation_file of the config)"
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # What is NaN in the checkpoint was never set there and must not wipe out what is set here.
        incoming = dict(state_dict)
        loaded = []
        for name, known in self._buffers.items():
            saved = incoming.get(prefix + name)
            if known is None or saved is None or saved.shape != known.shape:
                continue
            if saved.isnan().all():
                incoming[prefix + name] = known
            elif name in self._sources:
                self._check_agreement(name, saved.to(known), "the checkpoint")
                incoming[prefix + name] = known
            else:
                loaded.append(name)
        super()._load_from_state_dict(
            incoming, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._sources |= dict.fromkeys(loaded, "the checkpoint")
        self._changed()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        settle()  # no checkpoint of a model that has learned from a batch which is refused a step later
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Any, recurse: bool = True) -> TerrainReader:
        # Buffers follow the model to its device, not to half precision: 8000 m would lose metres.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    # ---- every forward -------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        lead_times: Tensor | None,
        variables: Sequence[str],
    ) -> Terrain:
        """Read the terrain of a batch.

        Args:
            x: Standardised input, `[B, V, H, W]`.
            lead_times: Hours / 100, `[B]`, as ClimaX feeds them; None: there is none.
            variables: Names of the V channels.

        Raises:
            InputError: If a quantity or its unit is unknown, or the values of any batch cannot be metres or m/s. On
                GPUs numbers are looked at as they arrive, about a step later.
        """
        self._check_known(x, variables)
        if not self._announced and self.static_terrain and "elevation_m" not in self._sources:
            self._remember(x[0, list(variables).index(self.elevation_variable)])
        with torch.autocast(x.device.type, enabled=False):
            u, v, speed = self._wind(x, variables)
            terrain = Terrain(
                elevation_m=self._elevation(x, variables),
                grid=self.grid,
                u=u,
                v=v,
                speed=speed,
                lat=self.lat if "lat" in self._sources else None,
                lon=self.lon if "lon" in self._sources else None,
                lead_hours=None if lead_times is None else lead_times.float() * HOURS_PER_LEAD_TIME,
                spacing_m=self.spacing_m,
                land=self._land(x, variables),
            )
        terrain = replace(terrain, elevation_m=self._judged(terrain, x, variables))
        if not self._announced:
            self._announce(terrain)
        return controlled(terrain, self.control, self.control_order)

    def _elevation(self, x: Tensor, variables: Sequence[str]) -> Tensor:
        if "elevation_m" in self._sources:
            return self.elevation_m
        channel = x[:, list(variables).index(self.elevation_variable)].float()
        if self.static_terrain:
            channel = channel[:1]
        return downsample_elevation(channel, self.patch_size) * self.elevation_std + self.elevation_mean

    def _wind(self, x: Tensor, variables: Sequence[str]) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
        if self.wind_variables is None:
            return None, None, None
        channels = [list(variables).index(name) for name in self.wind_variables]
        winds = x[:, channels].float() * self.wind_std[:, None, None] + self.wind_mean[:, None, None]
        u, v = winds.unbind(1)
        return downsample_wind(u, v, self.patch_size)

    def _land(self, x: Tensor, variables: Sequence[str]) -> Tensor | None:
        if self.land_variable is None:
            return None
        channel = x[:, list(variables).index(self.land_variable)].float()
        moved = torch.zeros_like(self.land_std)
        if self.static_terrain:
            moved = (channel - channel[:1]).detach().abs().amax() * self.land_std
            channel = channel[:1]
        land = downsample_elevation(channel, self.patch_size) * self.land_std + self.land_mean
        return judged_land(land, f"channel {self.land_variable!r}", moved)

    # ---- checks, at every forward --------------------------------------------------------------

    def _check_known(self, x: Tensor, variables: Sequence[str]) -> None:
        """Everything that the terrain is made from is there."""
        if x.dim() != 4 or x.shape[1] != len(variables) or tuple(x.shape[2:]) != self.img_size:
            raise InputError(
                f"the input is [batch, {len(variables)} variables, {self.img_size[0]}, {self.img_size[1]}], "
                f"not {list(x.shape)}"
            )
        if self._field is not None:
            self._settle_elevation(None, None)
        self.check_channels(variables)

    def check_channels(self, variables: Sequence[str]) -> None:
        """Raise InputError unless an input of these variables has all that is read, and its units are known."""
        if "elevation_m" not in self._sources and self._field is None:
            self._check_channel(self.elevation_variable, "elevation", variables)
        for name in self.wind_variables or ():
            self._check_channel(name, "wind", variables)
        if self.land_variable is not None:
            self._check_channel(self.land_variable, "land", variables)

    def _check_channel(self, name: str, kind: str, variables: Sequence[str]) -> None:
        without = WITHOUT[kind]
        if name not in variables:
            raise InputError(
                f"the terrain bias reads {name!r}, and the input has only {', '.join(variables)}: add it, or {without}"
            )
        if f"{kind}_std" not in self._sources:
            raise InputError(
                f"the terrain bias needs the mean and standard deviation that standardised {name!r}, to have it in "
                f"{UNITS[kind]}{self._asked(kind)}: add "
                "climax_elevation.training.TerrainCallback to the trainer's callbacks, or set bias_args.stats_dir to "
                f"the folder of normalize_mean.npz and normalize_std.npz, or {without}"
            )

    def _asked(self, kind: str) -> str:
        """Who was asked for statistics in vain."""
        return f" ({self._lacking[kind]})" if kind in self._lacking else ""

    def _judged(self, terrain: Terrain, x: Tensor, variables: Sequence[str]) -> Tensor:
        """The elevation, once it is known, or on its way to being known, that all of this batch is as it should be."""
        winds = " and ".join(self.wind_variables or ())
        beside = self._of_channel(x.detach(), variables)
        return judged_terrain(terrain, beside, self._origin, self.elevation_variable, winds, self.terrain_is_flat)

    def _of_channel(self, x: Tensor, variables: Sequence[str]) -> list[Tensor]:
        """How far static ground moves, metres; correlation with a file, and the standard deviations of both."""
        nothing, one, *_ = no_channel(self.elevation_m)
        if self.elevation_variable not in variables:
            return no_channel(self.elevation_m)
        channel = x[:, list(variables).index(self.elevation_variable)].float()
        if "elevation_m" in self._sources:
            pair = downsample_elevation(channel, self.patch_size), self.elevation_m.expand(len(channel), -1)
            seen, of_file = (field - field.mean(dim=1, keepdim=True) for field in pair)
            spreads = [deviation.square().mean(dim=1).sqrt() for deviation in (seen, of_file)]
            correlation = (seen * of_file).mean(dim=1) / (spreads[0] * spreads[1]).clamp_min(1e-12)
            return [nothing, correlation.min(), spreads[0].min(), spreads[1].min()]
        if not self.static_terrain:
            return no_channel(self.elevation_m)
        return [(channel - self._first_channel).abs().amax() * self.elevation_std, one, nothing, nothing]

    @property
    def _origin(self) -> str:
        return self._sources.get("elevation_m", f"channel {self.elevation_variable!r}")

    @torch.compiler.disable
    def _remember(self, channel: Tensor) -> None:
        self._first_channel.copy_(channel.detach())

    def _changed(self) -> None:
        """What is known is not what it was."""
        self._announced = False

    @torch.compiler.disable
    def _announce(self, terrain: Terrain) -> None:
        """Say once what is read."""
        self._announced = True
        low, high = (round(extreme.item()) for extreme in terrain.elevation_m.aminmax())
        control = "" if self.control == "none" else f"; control: biases see it {self.control}"
        logger.info(
            "terrain: elevation %d to %d m (patch means, from %s%s)%s%s",
            low,
            high,
            self._origin,
            control,
            _wind_range(terrain.speed),
            self._engines,
        )

    def extra_repr(self) -> str:
        return f"grid={self.grid}, patch_size={self.patch_size}, known={sorted(self._sources)}"


def _summary(values: Tensor) -> str:
    if values.numel() <= 2:
        return ", ".join(f"{value:.6g}" for value in values.flatten().tolist())
    return f"{values.min().item():.6g} to {values.max().item():.6g}, mean {values.mean().item():.6g}"


def _wind_range(speed: Tensor | None) -> str:
    return "" if speed is None else f", wind up to {speed.max().item():.1f} m/s"


def judged_terrain(
    terrain: Terrain, beside: Sequence[Tensor], origin: str, channel: str, winds: str, flat: bool
) -> Tensor:
    """The elevation of a terrain whose values are judged.

    Args:
        terrain: Of the whole grid.
        beside: How far static ground moved, metres; of a file with the channel their correlation, and the standard
            deviations of channel and file. `no_channel`, where there is neither.
        origin, channel, winds, flat: As `_check_values`.
    """
    z = terrain.elevation_m.detach().float()
    speed = terrain.speed
    if speed is None and terrain.u is not None and terrain.v is not None:
        speed = torch.hypot(terrain.u, terrain.v)
    fastest = z.new_zeros(()) if speed is None else speed.detach().float().amax()
    numbers = torch.stack([*z.aminmax(), z.std(dim=1, correction=0).min(), fastest, *beside])
    return judged(terrain.elevation_m, numbers, _check_values, origin, channel, winds, flat)


def judged_land(land: Tensor, origin: str, moved: Tensor | None = None) -> Tensor:
    """The share of land, judged like the elevation of `judged_terrain`: whether it is within 0 to 1.

    Args:
        land: The share, `[B or 1, L]`.
        origin: Where it comes from, as errors name it.
        moved: How far it differs between samples where it must not; None: it may.
    """
    values = land.detach().float()
    moved = values.new_zeros(()) if moved is None else moved
    return judged(land, torch.stack([*values.aminmax(), moved]), _check_land, origin)


def no_channel(like: Tensor) -> list[Tensor]:
    """What is beside an elevation that no channel and no file are compared with, on the device of `like`."""
    nothing = like.new_zeros((), dtype=torch.float32)
    return [nothing, nothing + 1, nothing, nothing]


@judge
def _check_values(numbers: list[float], origin: str, channel: str, winds: str, flat: bool) -> None:
    """The values are metres and m/s, and the ground is the one that it is said to be.

    Args:
        numbers: Lowest and highest elevation, the least standard deviation of a sample's, highest wind speed, how far
            the ground moved that is static, and, of a file with the channel, their correlation and both deviations.
        origin: Where the elevation is from.
        channel: Name of the orography channel.
        winds: Names of the wind channels.
        flat: That all ground lies near 0 m is meant.
    """
    low, high, spread, fastest, moved, correlation, of_channel, of_file = numbers
    if not math.isfinite(low + high):
        raise InputError(f"elevation from {origin} has values that are not finite: fill them (0 m over sea)")
    if low < LOWEST_M or high > HIGHEST_M:
        raise InputError(
            f"patch-mean elevation from {origin} is {low:.0f} to {high:.0f} m, outside {LOWEST_M:.0f} to "
            f"{HIGHEST_M:.0f} m: is it geopotential (divide by 9.80665), or standardised by other statistics?"
        )
    if not flat and max(-low, high) < 10 and spread < 5:
        raise InputError(
            f"patch-mean elevation from {origin} is {low:.2f} to {high:.2f} m, which looks standardised: give the "
            "statistics or the field in metres, or set terrain_is_flat: true if the ground is so flat"
        )
    if not moved <= GROUND_MAY_MOVE_M:
        raise InputError(
            f"static_terrain is true, and {channel!r} differs between samples, by up to {moved:.0f} m: set "
            "static_terrain: false"
        )
    if not math.isfinite(of_channel):
        raise InputError(
            f"channel {channel!r}, which {origin} is compared with, has values that are not finite: fill them"
        )
    if (of_file < LEVEL_M) != (of_channel < LEVEL_CHANNEL) and correlation < LEAST_CORRELATION:
        level_one, other = (origin, f"channel {channel!r}") if of_file < LEVEL_M else (f"channel {channel!r}", origin)
        raise InputError(
            f"elevation from {level_one} is level, and from {other} it is not: is one of them of another region, or "
            "filled with one value?"
        )
    if of_file >= LEVEL_M and not correlation >= LEAST_CORRELATION:
        raise InputError(
            f"elevation from {origin} and channel {channel!r} correlate by {correlation:.2f}, below "
            f"{LEAST_CORRELATION}: is the file flipped, rolled, or of another region?"
        )
    if not fastest <= FASTEST_M_S:
        raise InputError(
            f"patch-mean wind speed reaches {fastest:.0f} m/s, above {FASTEST_M_S:.0f}: are {winds} standardised by "
            "other statistics?"
        )


@judge
def _check_land(numbers: list[float], origin: str) -> None:
    low, high, moved = numbers
    if not LAND[0] <= low <= high <= LAND[1]:
        raise InputError(
            f"the share of land from {origin} is {low:.2f} to {high:.2f}, and not within 0 to 1: is it "
            "standardised by other statistics, or in per cent?"
        )
    if not moved <= LAND_MAY_MOVE:
        raise InputError(
            f"static_terrain is true, and the share of land from {origin} differs between samples, by up to "
            f"{moved:.2f}: set static_terrain: false"
        )
