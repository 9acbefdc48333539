"""What the ground is and what the air does over it, a value a patch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from climax_elevation.errors import InputError
from climax_elevation.terrain.plausible import check_finite, values_known
from climax_elevation.terrain.sphere import checked_latitudes

_WIND = ("wind", "give u and v in m/s, or choose a bias without wind (physics and ridge: wind: false)")
_PLACE = (
    "latitudes and longitudes",
    "lay lat.npy and lon.npy beside the statistics in stats_dir, or use a data module that has get_lat_lon",
)
REMEDIES = {
    "u": _WIND,
    "v": _WIND,
    "speed": _WIND,
    "lat": _PLACE,
    "lon": _PLACE,
    "lead_hours": ("a lead time", "choose another bias: climate projection has none, forecasts hand theirs on"),
    "land": ("the share of land", "give a channel of it by land_variable, or land to Terrain, or leave out land: true"),
    "spacing_m": ("the spacing of a plane grid", "give grid_spacing_m"),
}


def downsample_elevation(elevation_field: Tensor, patch_size: int) -> Tensor:
    """Patch means of a field, in row-major order of the patches.

    Args:
        elevation_field: `[B, H, W]`, metres (or any other unit, which is kept).
        patch_size: Side p of a patch, pixels; divides H and W.

    Returns:
        `[B, (H / p) * (W / p)]`.

    Raises:
        InputError: If the field is not [B, H, W] or p does not divide H and W.
    """
    if elevation_field.dim() != 3:
        raise InputError(f"a field is [batch, height, width], not {list(elevation_field.shape)}")
    height, width = elevation_field.shape[1:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise InputError(f"patches of {patch_size} pixels do not tile a field of {height} x {width}; crop it")
    if not elevation_field.is_floating_point():
        elevation_field = elevation_field.float()
    rows = elevation_field.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))
    return rows.mean(dim=(2, 4)).flatten(1)


def downsample_wind(u: Tensor, v: Tensor, patch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patch means of both components, and of the pixels' speeds.

    The mean of speeds is not the speed of the mean wind, in which eddies cancel.

    Args:
        u, v: Eastward and northward wind, `[B, H, W]`, m/s.
        patch_size: As `downsample_elevation`.

    Returns:
        u, v and speed, `[B, (H / p) * (W / p)]` each.
    """
    fields_m_s = (u, v, torch.hypot(u, v))
    u, v, speed = (downsample_elevation(field, patch_size) for field in fields_m_s)
    return u, v, speed


def patch_centres(lat: Tensor, lon: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Latitude and longitude of patches, degrees, `[L]` each.

    Args:
        lat, lon: Of the pixels, degrees, `[H, W]`.
        patch_size: As `downsample_elevation`.
    """
    radians = torch.deg2rad(lon)
    # a patch may straddle the dateline, so longitudes are averaged on the circle
    fields = (lat, torch.cos(radians), torch.sin(radians))
    north_south, east, north = (downsample_elevation(field[None], patch_size)[0] for field in fields)
    return north_south, torch.rad2deg(torch.atan2(north, east))


@dataclass(frozen=True)
class Terrain:
    """What a bias may know of the ground and the air over it, a value a patch.

    Attributes:
        elevation_m: Patch-mean elevation, metres, `[B or 1, L]`.
        grid: Rows and columns of patches of the whole model, of which the L patches may be a part.
        u, v: Patch-mean eastward and northward wind, m/s, `[B, L]`, or None.
        speed: Patch mean of the pixels' wind speeds, m/s, `[B, L]`, or None.
        lat, lon: Patch centres, degrees, `[L]`, or None.
        lead_hours: Forecast lead time, hours, `[B]`, or None.
        spacing_m: Distance between neighbouring patch centres of a plane grid, metres, or None.
        patch_ids: Row-major indices in `grid` of the L patches, `[L]`; None where they are all.
        land: Share of land of each patch, from 0 to 1, `[B or 1, L]`, or None.
        points: Whether tokens are places that are no grid, such as stations (`of_points`); `grid` is then (1, L).
    """

    elevation_m: Tensor
    grid: tuple[int, int]
    u: Tensor | None = None
    v: Tensor | None = None
    speed: Tensor | None = None
    lat: Tensor | None = None
    lon: Tensor | None = None
    lead_hours: Tensor | None = None
    spacing_m: float | None = None
    patch_ids: Tensor | None = None
    points: bool = False
    land: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("elevation_m", "u", "v", "speed", "lat", "lon", "lead_hours", "patch_ids", "land"):
            value = getattr(self, name)
            if not (isinstance(value, Tensor) or (value is None and name != "elevation_m")):
                raise InputError(f"{name} is a tensor, not {type(value).__name__}: torch.as_tensor makes one")
        if self.elevation_m.dim() != 2:
            raise InputError(f"elevation_m is [batch or 1, patches], not {list(self.elevation_m.shape)}")
        tokens = self.elevation_m.shape[1]
        if self.patch_ids is None and tokens != self.grid[0] * self.grid[1]:
            raise InputError(f"a grid of {self.grid[0]} x {self.grid[1]} patches does not have {tokens} of them")
        for name in ("u", "v", "speed", "lat", "lon", "patch_ids", "land"):
            value = getattr(self, name)
            if value is None:
                continue
            dims, shape = (1, "[patches]") if name in ("lat", "lon", "patch_ids") else (2, "[batch or 1, patches]")
            if value.dim() != dims:
                raise InputError(f"{name} is {shape}, not {list(value.shape)}")
            if value.shape[-1] != tokens:
                raise InputError(f"{name} has {value.shape[-1]} patches, and elevation_m has {tokens}")

    @classmethod
    def of_points(
        cls,
        elevation_m: Tensor,
        lat: Tensor,
        lon: Tensor,
        *,
        u: Tensor | None = None,
        v: Tensor | None = None,
        speed: Tensor | None = None,
        lead_hours: Tensor | None = None,
        land: Tensor | None = None,
    ) -> Terrain:
        """The terrain of places that are no grid, a token each: stations.

        The biases `structure`, `physics`, `relative_3d` with `coords: physical`, `multiplicative` and `adaptive` read
        places, heights and winds alone. The others read rows and columns, or the ground between two patches, and
        refuse.

        Args:
            elevation_m: Metres, `[L]` or `[B or 1, L]`.
            lat, lon: Degrees, `[L]`.
            u, v: Eastward and northward wind, m/s, `[L]` or `[B or 1, L]`.
            speed: Wind speed, m/s, likewise; None: that of u and v, where they are given.
            lead_hours: Forecast lead time, hours, `[B]`.
            land: Share of land around each place, from 0 to 1, `[L]` or `[B or 1, L]`.

        Raises:
            InputError: If there is one place only, numbers are not finite, or two places are the same.
        """
        elevation_m, u, v, speed, land = map(_of_one_sample, (elevation_m, u, v, speed, land))
        if speed is None and isinstance(u, Tensor) and isinstance(v, Tensor):
            speed = torch.hypot(u, v)
        tokens = elevation_m.shape[-1] if getattr(elevation_m, "ndim", 0) else 0
        terrain = cls(elevation_m, (1, tokens), u, v, speed, lat, lon, lead_hours, points=True, land=land)
        if tokens < 2:
            raise InputError(f"attention is between two places or more, not {tokens}: give more stations")
        check_finite(elevation_m, "elevation_m", "metres")
        for name, degrees in (("lat", lat), ("lon", lon)):
            check_finite(degrees, name, "degrees")
        if values_known(lat) and values_known(lon):
            checked_latitudes(lat, lat)
            _check_apart(lat, lon, elevation_m)
        return terrain

    def require_grid(self, who: str) -> None:
        """Raise InputError, naming `who`, unless tokens are patches of a grid."""
        if self.points:
            raise InputError(
                f"{who} needs a grid of patches, and these tokens are places such as stations: choose structure, "
                "physics, relative_3d with coords: physical, multiplicative or adaptive"
            )

    def require(self, names: Iterable[str], who: str) -> None:
        """Raise InputError, naming `who`, unless every optional field of `names` is there."""
        for name in sorted(names):
            if getattr(self, name) is None:
                what, remedy = REMEDIES[name]
                raise InputError(f"{who} needs {what}, and this terrain has none: {remedy}")

    def require_whole(self, who: str) -> None:
        """Raise InputError, naming `who`, unless the patches are all of the rectangular grid, in its order."""
        self.require_grid(who)
        if self.patch_ids is not None:
            raise InputError(
                f"{who} needs the whole grid of {self.grid[0]} x {self.grid[1]} patches once, and got "
                f"{len(self.patch_ids)} of them: call prepare(terrain) with the terrain before select(...)"
            )

    @property
    def ids(self) -> Tensor:
        """Row-major indices in `grid` of the L patches, `[L]`."""
        if self.patch_ids is not None:
            return self.patch_ids
        return torch.arange(self.elevation_m.shape[1], device=self.elevation_m.device)

    @property
    def rows(self) -> Tensor:
        """Row of each patch in `grid`, `[L]`."""
        return self.ids // self.grid[1]

    @property
    def columns(self) -> Tensor:
        """Column of each patch in `grid`, `[L]`."""
        return self.ids % self.grid[1]

    def select(self, patch_ids: Sequence[int] | Tensor) -> Terrain:
        """The terrain of some patches only, in the order given: what ClimaX's regional model sees.

        Args:
            patch_ids: Indices into this terrain's patches.
        """
        ids = torch.as_tensor(patch_ids, dtype=torch.long, device=self.elevation_m.device)
        per_patch = {
            name: value[..., ids]
            for name in ("elevation_m", "u", "v", "speed", "lat", "lon", "land")
            if (value := getattr(self, name)) is not None
        }
        if self.points:
            return replace(self, **per_patch, grid=(1, len(ids)))
        return replace(self, **per_patch, patch_ids=self.ids[ids])


def _of_one_sample(values: Any) -> Any:
    """`[L]` as `[1, L]`."""
    return values[None] if isinstance(values, Tensor) and values.dim() == 1 else values


def _check_apart(lat: Tensor, lon: Tensor, elevation_m: Tensor) -> None:
    """Raise InputError if two places are the same, height included: one of them would tell the other's value."""
    turned = torch.remainder(lon.double(), 360).masked_fill(lat.abs() == 90, 0.0)  # at a pole all are one
    places = torch.stack([lat.double(), turned, elevation_m[0].double()], dim=1)
    _, place, times = places.unique(dim=0, return_inverse=True, return_counts=True)
    if bool((times > 1).any()):
        first, second = (place == times.argmax()).nonzero().flatten()[:2].tolist()
        raise InputError(
            f"tokens {first} and {second} are the same place ({lat[first]:g} N, {lon[first]:g} E): leave one out"
        )
