"""How a terrain bias is attached: the arguments of `attach`, `bias_args` of a configuration, told in one place."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any

from climax_elevation.attention import ENGINES, check_engine
from climax_elevation.checks import acting, one_of, positive, true_or_false
from climax_elevation.errors import InputError
from climax_elevation.terrain.controls import CONTROLS
from climax_elevation.terrain.order import PATCH_ORDERS

HIGHEST_SEED = 2**32 - 1
WIND_FIELDS = frozenset({"u", "v", "speed"})
ACTS_WITH = {"control_seed": {"control": "permuted"}}
WHAT = {"wind_variables": "wind", "land_variable": "land", "grid_spacing_m": "distances"}


def _option(default: Any, of_type: str, unit: str, text: str, of: Iterable[str] = ()) -> Any:
    """`of`: fields of `Terrain`, of which a bias has to look at one for the option to act; (): it always does."""
    return field(default=default, metadata={"type": of_type, "unit": unit, "help": text, "of": frozenset(of)})


@dataclass(frozen=True)
class AttachOptions:
    """What `attach` takes for every bias. Each field knows its type, its unit and what it is for.

    Raises:
        InputError: If a value is not of its kind or out of its range.
    """

    blocks: Sequence[int] | str = _option(
        (0,), 'list or "all"', "", "blocks whose attention is biased, each with its own parameters"
    )
    elevation_variable: str = _option("orography", "str", "", "channel that holds the orography")
    wind_variables: Sequence[str] = _option(
        ("10m_u_component_of_wind", "10m_v_component_of_wind"),
        "two names",
        "",
        "channels that hold eastward and northward wind; read if the bias needs wind",
        of=WIND_FIELDS,
    )
    land_variable: str = _option(
        "land_sea_mask", "str", "", "channel that holds the share of land; read if the bias needs it", of=("land",)
    )
    elevation_file: str | None = _option(
        None, "path", "m", "static field (.nc, .npz, .npy) instead of the channel; a finer one is averaged by area"
    )
    stats_dir: str | None = _option(
        None,
        "path",
        "",
        "folder with normalize_mean.npz, normalize_std.npz, lat.npy, lon.npy; a data module's statistics come "
        "through climax_elevation.training.TerrainCallback instead",
    )
    engine: str = _option("auto", "|".join(("auto", *ENGINES)), "", "how attention is computed")
    static_terrain: bool = _option(
        False, "bool", "", "the channel is the same for all samples, which is checked: one bias serves a batch"
    )
    terrain_is_flat: bool = _option(
        False, "bool", "", "all ground lies within 10 m of zero, and that is meant: it is no standardised channel"
    )
    grid_spacing_m: float | None = _option(
        None,
        "float",
        "m",
        "distance between pixels of a plane grid, where advection and structure have no latitudes; rows go from south "
        "to north",
        of=("spacing_m",),
    )
    patch_order: str = _option(
        "raster",
        "|".join(PATCH_ORDERS),
        "",
        "order of the tokens in biased blocks; wind, upwind patches first, changes nothing but rounding",
    )
    control: str = _option(
        "none",
        "|".join(CONTROLS),
        "",
        "what biases see in the place of the ground, to tell what terrain does from what else a bias does: 0 m "
        "everywhere, east and west exchanged, or the heights of the patches shuffled",
    )
    control_seed: int = _option(0, "int", "", "by which control: permuted shuffles")

    def __post_init__(self) -> None:
        for name in ("static_terrain", "terrain_is_flat"):
            true_or_false(name, getattr(self, name))
        for name in ("elevation_file", "stats_dir"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str | PathLike) or not str(value)):
                raise InputError(f"{name} is a path, not {value!r}")
        for name in ("elevation_variable", "land_variable"):
            if not _is_name(getattr(self, name)):
                raise InputError(f"{name} names a channel, not {getattr(self, name)!r}")
        check_blocks(self.blocks)
        check_engine(self.engine)
        one_of("patch_order", self.patch_order, PATCH_ORDERS)
        one_of("control", self.control, CONTROLS)
        if self.grid_spacing_m is not None:
            positive("grid_spacing_m", self.grid_spacing_m, "metres")
        seed = self.control_seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= HIGHEST_SEED:
            raise InputError(f"control_seed is a whole number from 0 to {HIGHEST_SEED}, not {seed!r}")
        named = isinstance(self.wind_variables, Sequence) and not isinstance(self.wind_variables, str)
        winds = self.wind_variables if named else ()
        if len(winds) != 2 or not all(map(_is_name, winds)) or winds[0] == winds[1]:
            raise InputError(
                f"wind_variables names two different channels, eastward and northward wind, not {self.wind_variables!r}"
            )

        acting(vars(self), self.usual(), ACTS_WITH)

    def check_read(self, bias_type: str, read: frozenset[str] | None) -> None:
        """Raise InputError for an option that was set, of what no bias reads.

        Args:
            bias_type: How messages name the bias.
            read: Optional fields of `Terrain` that biases and the order of tokens look at; None: any.
        """
        for option in fields(self):
            of, value = option.metadata["of"], getattr(self, option.name)
            was_set = (tuple(value) if isinstance(value, list) else value) != option.default
            if read is not None and of and not of & read and was_set:
                raise InputError(
                    f"{option.name} has no effect: the bias {bias_type!r} with these arguments does not look at "
                    f"{WHAT[option.name]}: leave {option.name} out, or choose another bias"
                )

    @classmethod
    def usual(cls) -> dict[str, Any]:
        """The defaults."""
        return {option.name: option.default for option in fields(cls)}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of all options."""
        return tuple(option.name for option in fields(cls))

    @classmethod
    def described(cls) -> str:
        """The lines of a docstring about them."""
        texts = [f"{option.name}: {_sentence(option.metadata)}" for option in fields(cls)]
        margins = " " * 8, " " * 12
        filled = [textwrap.fill(text, 116, initial_indent=margins[0], subsequent_indent=margins[1]) for text in texts]
        return "".join(f"{text}\n" for text in filled)

    @classmethod
    def table(cls) -> str:
        """The table of docs/add.md about them, in Markdown."""
        head = "| argument | type | unit | default | |\n|---|---|---|---|---|\n"
        return head + "".join(
            f"| `{option.name}` | {_cells(option.metadata, option.default)} |\n" for option in fields(cls)
        )


def _sentence(metadata: Any) -> str:
    unit = f", {metadata['unit']}" if metadata["unit"] else ""
    return f"{metadata['help'][0].upper()}{metadata['help'][1:]} ({metadata['type']}{unit})."


def check_blocks(blocks: Sequence[int] | str, last: int | None = None) -> None:
    """Raise InputError unless `blocks` may name blocks, the last of which has the index `last` where that is known."""
    if blocks == "all":
        return
    indices = () if isinstance(blocks, str) or not isinstance(blocks, Sequence) else blocks
    highest = float("inf") if last is None else last
    if indices is not blocks or not all(type(index) is int and 0 <= index <= highest for index in indices):
        known = "on" if last is None else f"to {last}"
        raise InputError(f'blocks is "all" or a list of indices from 0 {known}, not {blocks!r}')
    if not indices or len(set(indices)) < len(indices):
        raise InputError(f"blocks names at least one block, and none twice, not {list(indices)!r}")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _cells(metadata: Any, default: Any) -> str:
    kind = metadata["type"]
    kind = ", ".join(f"`{choice}`" for choice in kind.split("|")) if "|" in kind else kind
    default = default if isinstance(default, str) else json.dumps(default)
    return " | ".join((kind, metadata["unit"], f"`{default}`", metadata["help"]))
