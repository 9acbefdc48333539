"""Models that are no ClimaX: any stack of timm's blocks, whose terrain the caller hands in."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from climax_elevation.attachment import built_bias, chosen_blocks, terrain_block
from climax_elevation.attention import check_engine
from climax_elevation.bias.build import check_arguments
from climax_elevation.block import HandedIn, TerrainBlock, check_host_block
from climax_elevation.checks import count, true_or_false
from climax_elevation.errors import InputError
from climax_elevation.terrain.fields import Terrain
from climax_elevation.terrain.reader import judged_land, judged_terrain, no_channel

logger = logging.getLogger(__name__)

HANDED_IN = "the terrain that was handed in"  # as errors name it
NO_GRID = (8, 8)
"""What a bias for points is told of the grid: lengths that begin as shares of a grid begin as those of 64 patches."""


def attach_blocks(
    model: nn.Module,
    bias_type: str = "physics",
    *,
    stack: str = "blocks",
    blocks: Sequence[int] | str = (0,),
    grid: tuple[int, int] | None = None,
    points: bool = False,
    engine: str = "auto",
    terrain_is_flat: bool = False,
    bias_args: Mapping[str, Any] | None = None,
) -> None:
    """Make the attention of timm's blocks terrain-aware, in whatever model holds them, in place.

    The chosen blocks are replaced by blocks that hold the same submodules under the same keys and one bias each,
    `<stack>.N.attn.bias.*`. The model's own code is not touched, and reads no terrain: each forward happens inside
    `with terrain_given(model, terrain):`. Weights and random numbers of the host are left as they were. Everything is
    checked before anything is changed. `detach` undoes it.

    Args:
        model: Calls each block with tokens `[B, L, D]` alone, which are all patches of a grid in row-major order and
            nothing else: no class token, no registers, no dropped patches.
        bias_type: One of `available_biases()`, or several with "+" between.
        stack: Dotted path of the ModuleList or Sequential that holds the blocks.
        blocks: Indices in it, or "all".
        grid: Rows and columns of patches; None: `model.patch_embed.grid_size`, as timm's `PatchEmbed` has it.
        points: Tokens are places that are no grid, as many as the terrain has that is handed in (`Terrain.of_points`).
        engine: As `biased_attention`.
        terrain_is_flat: All ground lies within 10 m of zero, and that is meant: it is no standardised channel.
        bias_args: The bias's own arguments, by name; for a sum, a dictionary for each part.

    Raises:
        InputError: For an unknown name (the message lists the valid ones), blocks that are not timm's, tokens that are
            no patches, or a grid that is not known.
    """
    arguments = dict(bias_args or {})
    check_arguments(bias_type, arguments)
    check_engine(engine)
    true_or_false("terrain_is_flat", terrain_is_flat)
    holder = _stack(model, stack)
    chosen = chosen_blocks(len(holder), blocks)
    hosts = {index: holder[index] for index in chosen}
    for index, host in hosts.items():
        if isinstance(host, TerrainBlock):
            raise InputError(f"{stack}.{index} has a terrain bias already: detach it first, or choose other blocks")
        check_host_block(host)
    if true_or_false("points", points) and grid is not None:
        raise InputError("points are no grid: give grid, or points=True, not both")
    place = None if points else _grid(model, grid)
    biases = {index: built_bias(bias_type, host, place or NO_GRID, arguments) for index, host in hosts.items()}

    for index, bias in biases.items():
        block = terrain_block(hosts[index], bias, engine)
        block.handed_in = HandedIn(place, terrain_is_flat)
        holder[index] = block
    logger.info(
        "terrain: bias %s in %s %s of %d, %s, elevation handed in",
        bias_type,
        stack,
        ", ".join(map(str, chosen)),
        len(holder),
        "at points" if place is None else f"on a grid of {place[0]} x {place[1]} patches",
    )


@contextmanager
def terrain_given(model: nn.Module, terrain: Terrain) -> Iterator[None]:
    """Hand terrain to the blocks of `attach_blocks`, for as long as this lasts.

    Args:
        model: That `attach_blocks` made terrain-aware, or a module that holds it, compiled or not.
        terrain: Of the batch that the model is called with, in metres, m/s and degrees; of one ground for all
            samples, or of one a sample.

    Raises:
        InputError: If the model has no such block, or the terrain is of another grid, lacks what the bias needs, or
            cannot be metres and m/s. On GPUs numbers are looked at as they arrive, about a step later.
    """
    blocks = [block for block in model.modules() if isinstance(block, TerrainBlock) and block.handed_in is not None]
    if not blocks:
        raise InputError(f"this {type(model).__name__} has no terrain bias to hand terrain to: attach_blocks first")
    places = [block.handed_in for block in blocks if block.handed_in is not None]
    given = []
    for block, place in zip(blocks, places, strict=True):
        place.check(terrain)
        beside = no_channel(terrain.elevation_m)
        judged_terrain(terrain, beside, HANDED_IN, "", "u and v", place.terrain_is_flat)
        if terrain.land is not None:
            judged_land(terrain.land, HANDED_IN)
        block.attn.bias.prepare(terrain)  # at every call, since the ground may be another
        given.append(block.attn.bias.inputs(terrain))
    before = [(place.bias_inputs, place.tokens) for place in places]
    try:
        for place, own in zip(places, given, strict=True):
            place.bias_inputs, place.tokens = own, terrain.elevation_m.shape[1]
        yield
    finally:
        for place, earlier in zip(places, before, strict=True):
            place.bias_inputs, place.tokens = earlier


def _stack(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, nn.ModuleList | nn.Sequential):
        stacks = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
        raise InputError(
            f"stack is the path of the ModuleList or Sequential that holds the blocks, not {path!r}; this "
            f"{type(model).__name__} has {', '.join(filter(None, stacks)) or 'none'}"
        )
    return found


def _grid(model: nn.Module, grid: tuple[int, int] | None) -> tuple[int, int]:
    others = getattr(model, "num_prefix_tokens", 0)  # timm's name for how many come before the patches
    if others:
        raise InputError(
            f"this {type(model).__name__} has {others} token{'s' * (others > 1)} that are no patches, which have no "
            "place on the ground: build it with class_token=False and reg_tokens=0"
        )
    known = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    found = known if grid is None else grid
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != 2:
        raise InputError(f"give grid=(rows, columns) of the patches of this {type(model).__name__}, not {found!r}")
    rows, columns = (count("grid", side) for side in found)
    if known is not None and (rows, columns) != tuple(known):
        raise InputError(
            f"grid is {rows} x {columns}, and the model's patch_embed makes {known[0]} x {known[1]} patches: leave it "
            "out"
        )
    return rows, columns
