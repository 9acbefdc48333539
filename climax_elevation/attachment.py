"""What a patched ClimaX calls at the end of its constructor."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from climax_elevation.attention import check_engine
from climax_elevation.bias import ElevationBias, PhysicsBias, build_bias
from climax_elevation.bias.build import check_arguments
from climax_elevation.block import PhysicsGuidedBlockCorrected, TerrainBlock, check_host_block
from climax_elevation.checks import one_of, positive
from climax_elevation.errors import InputError
from climax_elevation.terrain.elevation_file import read_elevation_file
from climax_elevation.terrain.order import PATCH_ORDERS
from climax_elevation.terrain.reader import CONTROLS, TerrainReader
from climax_elevation.terrain.stats_dir import read_folder

logger = logging.getLogger(__name__)

WIND_FIELDS = {"u", "v", "speed"}


class Host(nn.Module):
    """What `attach` relies on in a ClimaX model; for type checkers, never built."""

    blocks: nn.ModuleList
    img_size: Sequence[int]
    patch_size: int
    default_vars: Sequence[str]
    use_physics_mask: bool
    terrain: TerrainReader


def attach(
    model: nn.Module,
    bias_type: str = "physics",
    *,
    blocks: Sequence[int] | str = (0,),
    elevation_variable: str = "orography",
    wind_variables: Sequence[str] = ("10m_u_component_of_wind", "10m_v_component_of_wind"),
    elevation_file: str | None = None,
    stats_dir: str | None = None,
    engine: str = "auto",
    static_terrain: bool = False,
    terrain_is_flat: bool = False,
    grid_spacing_m: float | None = None,
    patch_order: str = "raster",
    control: str = "none",
    control_seed: int = 0,
    **bias_args: Any,
) -> None:
    """Make the attention of a ClimaX model's blocks terrain-aware, in place.

    The chosen blocks are replaced by blocks that hold the same submodules under the same keys and
    one bias each, `blocks.N.attn.bias.*`; the model gains `terrain`, which reads metres and m/s from
    its input. Weights and random numbers of the host are left as they were. Everything is checked
    before anything is changed.

    Args:
        model: Has `blocks` (timm's), `img_size`, `patch_size` and `default_vars`, as ClimaX does.
        bias_type: One of `available_biases()`, or several with "+" between.
        blocks: Indices of the blocks, or "all".
        elevation_variable: Channel that holds the orography.
        wind_variables: Channels of eastward and northward wind; read if the bias needs wind.
        elevation_file: Elevation in metres (.nc, .npz, .npy), instead of the channel.
        stats_dir: Folder with normalize_mean.npz and normalize_std.npz; a data module's statistics
            come through `climax_elevation.training.TerrainCallback` instead.
        engine: As `biased_attention`.
        static_terrain: The orography channel is the same in every sample, so one bias serves a batch.
        terrain_is_flat: All ground lies within 10 m of zero, and is not a standardised channel.
        grid_spacing_m: Distance between pixels of a plane grid, where `advection` has no latitudes; the rows
            go from south to north.
        patch_order: "raster"; "wind", upwind patches first (which changes nothing but rounding); or
            "wind_as_published", with the position embedding left behind. See `climax_elevation.terrain.order`.
        control: "none"; or what biases see in the place of the ground, to tell what terrain does from what else a
            bias does: "flat" (0 m everywhere), "mirrored" (east and west exchanged) or "permuted" (the heights of
            the patches shuffled).
        control_seed: By which they are shuffled, 0 or more.
        bias_args: The bias's own arguments, by name; for a sum, a dictionary for each part.

    Raises:
        InputError: For an unknown name (the message lists the valid ones), a block or variable that
            the model does not have, or a file that does not fit.
    """
    _check_names(bias_type, bias_args)
    check_engine(engine)
    host_model = _checked_host(model)
    chosen = _chosen_blocks(len(host_model.blocks), blocks)
    hosts = {index: host_model.blocks[index] for index in chosen}
    for host in hosts.values():
        check_host_block(host)
    one_of("patch_order", patch_order, PATCH_ORDERS)
    if patch_order == "wind_as_published" and (0 not in chosen or not hasattr(model, "pos_embed")):
        raise InputError("patch_order wind_as_published acts where tokens enter: it needs block 0 among blocks")
    grid = (host_model.img_size[0] // host_model.patch_size, host_model.img_size[1] // host_model.patch_size)
    biases = {index: _build(bias_type, host, grid, bias_args) for index, host in hosts.items()}
    needs_wind = patch_order != "raster" or any(bias.needs & WIND_FIELDS for bias in biases.values())
    reader = TerrainReader(
        host_model.img_size,
        host_model.patch_size,
        elevation_variable=elevation_variable,
        wind_variables=_pair(wind_variables) if needs_wind else None,
        elevation_file=None if elevation_file is None else read_elevation_file(elevation_file, elevation_variable),
        static_terrain=static_terrain,
        terrain_is_flat=terrain_is_flat,
        grid_spacing_m=None if grid_spacing_m is None else positive("grid_spacing_m", grid_spacing_m, "metres"),
        patch_order=patch_order,
        control=one_of("control", control, CONTROLS),
        control_seed=_seed(control_seed),
    ).to(next(model.parameters()).device)
    _check_variables(host_model.default_vars, reader, elevation_file)
    if stats_dir is not None:
        read_folder(reader, stats_dir)
    if patch_order == "wind_as_published":
        reader.host = (model,)

    for index, bias in biases.items():
        host_model.blocks[index] = _terrain_block(hosts[index], bias, engine)
    host_model.terrain = reader
    host_model.use_physics_mask = True
    logger.info(
        "terrain: bias %s in blocks %s of %d, elevation from %s",
        bias_type,
        ", ".join(map(str, chosen)),
        len(host_model.blocks),
        elevation_file or f"channel {elevation_variable!r}",
    )


def _check_names(bias_type: str, bias_args: dict[str, Any]) -> None:
    own = [
        name
        for name, parameter in inspect.signature(attach).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    check_arguments(bias_type, bias_args, shared=own)


def _checked_host(model: nn.Module) -> Host:
    missing = [name for name in ("blocks", "img_size", "patch_size", "default_vars") if not hasattr(model, name)]
    if missing:
        raise InputError(f"a ClimaX model has {', '.join(missing)}, and {type(model).__name__} does not")
    if not hasattr(model, "use_physics_mask"):
        raise InputError(
            f"this {type(model).__name__} does not hand terrain to its blocks: apply the patch (climax-elevation patch "
            "apply PATH), or train it with climax-elevation train"
        )
    if hasattr(model, "terrain"):
        raise InputError(f"this {type(model).__name__} has a terrain bias already; attach once, to a new model")
    return cast(Host, model)


def _chosen_blocks(depth: int, blocks: Sequence[int] | str) -> list[int]:
    if blocks == "all":
        return list(range(depth))
    if isinstance(blocks, str) or not all(isinstance(index, int) and 0 <= index < depth for index in blocks):
        raise InputError(f'blocks is "all" or a list of indices from 0 to {depth - 1}, not {blocks!r}')
    if not blocks or len(set(blocks)) < len(blocks):
        raise InputError(f"blocks names at least one block, and none twice, not {list(blocks)!r}")
    return sorted(blocks)


def _build(bias_type: str, host: nn.Module, grid: tuple[int, int], bias_args: dict[str, Any]) -> ElevationBias:
    attention = cast(Any, host.attn)
    # what the bias draws must not shift the random numbers that the host draws after this
    with torch.random.fork_rng(devices=[]):
        bias = build_bias(bias_type, num_heads=attention.num_heads, grid=grid, **bias_args)
    return bias.to(attention.qkv.weight.device, attention.qkv.weight.dtype)


def _seed(control_seed: int) -> int:
    if isinstance(control_seed, bool) or not isinstance(control_seed, int) or not 0 <= control_seed < 2**32:
        raise InputError(f"control_seed is a whole number from 0 to {2**32 - 1}, not {control_seed!r}")
    return control_seed


def _pair(wind_variables: Sequence[str]) -> tuple[str, str]:
    if isinstance(wind_variables, str) or len(wind_variables) != 2:
        raise InputError(f"wind_variables names two channels, eastward and northward wind, not {wind_variables!r}")
    return (wind_variables[0], wind_variables[1])


def _check_variables(known: Sequence[str], reader: TerrainReader, elevation_file: str | None) -> None:
    if elevation_file is None and reader.elevation_variable not in known:
        raise InputError(
            f"the model's default_vars ({', '.join(known)}) lack {reader.elevation_variable!r}: add it, name another "
            "with elevation_variable, or give elevation_file in metres"
        )
    for name in reader.wind_variables or ():
        if name not in known:
            raise InputError(
                f"the bias needs wind, and the model's default_vars ({', '.join(known)}) lack {name!r}: add it, name "
                "another with wind_variables, or set wind: false"
            )


def _terrain_block(host: nn.Module, bias: ElevationBias, engine: str) -> TerrainBlock:
    if isinstance(bias, PhysicsBias):
        return PhysicsGuidedBlockCorrected.adopt(host, bias, engine)
    return TerrainBlock(host, bias, engine)
