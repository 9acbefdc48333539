"""What a patched ClimaX calls at the end of its constructor."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from climax_elevation.bias import ElevationBias, PhysicsBias, build_bias
from climax_elevation.bias.build import check_arguments
from climax_elevation.block import PhysicsGuidedBlockCorrected, TerrainBlock, check_host_block
from climax_elevation.errors import InputError
from climax_elevation.options import WIND_FIELDS, AttachOptions, check_blocks
from climax_elevation.seam import TerrainSeam
from climax_elevation.terrain.elevation_file import read_elevation_file
from climax_elevation.terrain.reader import TerrainReader
from climax_elevation.terrain.stats_dir import read_folder

logger = logging.getLogger(__name__)


class Host(nn.Module):
    """What `attach` relies on in a ClimaX model; for type checkers, never built."""

    blocks: nn.ModuleList
    img_size: Sequence[int]
    patch_size: int
    default_vars: Sequence[str]
    use_physics_mask: bool
    terrain: TerrainSeam


def _signature(function: Callable[..., None]) -> inspect.Signature:
    """With the options by name, each with its default, in the place of what is written out once elsewhere."""
    own = inspect.signature(function, eval_str=True)
    model, bias_type, _ = own.parameters.values()
    kinds = inspect.Parameter
    named = [
        kinds(option.name, kinds.KEYWORD_ONLY, default=option.default, annotation=option.type)
        for option in fields(AttachOptions)
    ]
    return own.replace(parameters=[model, bias_type, *named, kinds("bias_args", kinds.VAR_KEYWORD, annotation=Any)])


def attach(model: nn.Module, bias_type: str = "physics", **arguments: Any) -> None:
    """Make the attention of a ClimaX model's blocks terrain-aware, in place.

    The chosen blocks are replaced by blocks that hold the same submodules under the same keys and
    one bias each, `blocks.N.attn.bias.*`; the model gains `terrain`, which reads metres and m/s from
    its input. Weights and random numbers of the host are left as they were. Everything is checked
    before anything is changed. `detach` undoes it.

    Args:
        model: Has `blocks` (timm's), `img_size`, `patch_size` and `default_vars`, as ClimaX does.
        bias_type: One of `available_biases()`, or several with "+" between.
        OPTIONS
        bias_args: The bias's own arguments, by name; for a sum, a dictionary for each part.

    Raises:
        InputError: For an unknown name (the message lists the valid ones), a block or variable that
            the model does not have, or a file that does not fit.
    """
    check_arguments(bias_type, arguments, shared=AttachOptions.names())
    shared = {name: arguments.pop(name) for name in AttachOptions.names() if name in arguments}
    host_model = _checked_host(model)
    chosen = chosen_blocks(len(host_model.blocks), shared.get("blocks", AttachOptions.blocks))
    options = AttachOptions(**shared)
    hosts = {index: host_model.blocks[index] for index in chosen}
    for host in hosts.values():
        check_host_block(host)
    if options.patch_order == "wind_as_published" and (0 not in chosen or not hasattr(model, "pos_embed")):
        raise InputError("patch_order wind_as_published acts where tokens enter: it needs block 0 among blocks")
    grid = (host_model.img_size[0] // host_model.patch_size, host_model.img_size[1] // host_model.patch_size)
    biases = {index: built_bias(bias_type, host, grid, arguments) for index, host in hosts.items()}
    needs_wind = options.patch_order != "raster" or any(bias.needs & WIND_FIELDS for bias in biases.values())
    options.check_read(bias_type, _read_by(biases.values(), WIND_FIELDS if needs_wind else frozenset()))
    needs_land = any("land" in bias.needs for bias in biases.values())
    seam = _seam(host_model, options, needs_wind, needs_land).to(next(model.parameters()).device)
    _check_variables(host_model.default_vars, seam, options.elevation_file)
    if options.stats_dir is not None:
        read_folder(seam, options.stats_dir)
        seam.cache_dir = Path(options.stats_dir)

    for index, bias in biases.items():
        host_model.blocks[index] = terrain_block(hosts[index], bias, options.engine)
    host_model.terrain = seam
    host_model.use_physics_mask = True
    logger.info(
        "terrain: bias %s in blocks %s of %d, elevation from %s",
        bias_type,
        ", ".join(map(str, chosen)),
        len(host_model.blocks),
        options.elevation_file or f"channel {options.elevation_variable!r}",
    )


attach.__doc__ = (attach.__doc__ or "").replace("        OPTIONS\n", AttachOptions.described())
attach.__signature__ = _signature(attach)  # type: ignore[attr-defined]


def detach(model: nn.Module) -> None:
    """Give a model its own blocks back: the objects that were replaced, under the same keys, with today's weights.

    Args:
        model: That `attach` or `attach_blocks` made terrain-aware, or a module that holds it.

    Raises:
        InputError: If it has no terrain bias.
    """
    host, places = _attached(model)
    for stack, name, block in places:
        stack.add_module(name, block.release())
    if host is not None:
        del host.terrain
        host.terrain = None  # type: ignore[assignment]  # as ClimaX has it
        host.use_physics_mask = False


@contextmanager
def bias_off(model: nn.Module) -> Iterator[None]:
    """Compute without the bias: as the unmodified host would with the weights that it has now.

    Args:
        model: That `attach` or `attach_blocks` made terrain-aware, or a module that holds it.

    Raises:
        InputError: If it has no terrain bias.
    """
    host, places = _attached(model)
    try:
        for stack, name, block in places:
            stack.add_module(name, block.release())
        if host is not None:
            host.use_physics_mask = False
        yield
    finally:
        for stack, name, block in places:
            stack.add_module(name, block.train(stack.get_submodule(name).training))
        if host is not None:
            host.use_physics_mask = True


def _attached(model: nn.Module) -> tuple[Host | None, list[tuple[nn.Module, str, TerrainBlock]]]:
    """The ClimaX among the modules of `model`, or None; and each block that has a bias, with where it stands."""
    host: Host | None = None
    for module in model.modules():
        if isinstance(getattr(module, "terrain", None), TerrainSeam) and hasattr(module, "blocks"):
            host = cast(Host, module)
            break
    places = [
        (stack, name, block)
        for stack in model.modules()
        for name, block in stack.named_children()
        if isinstance(block, TerrainBlock)
        and (block.handed_in is not None or (host is not None and stack is host.blocks))
    ]
    if not places:
        raise InputError(f"this {type(model).__name__} has no terrain bias: attach one first")
    return host, places


def _seam(model: Host, options: AttachOptions, needs_wind: bool, needs_land: bool) -> TerrainSeam:
    file = options.elevation_file
    eastward, northward = options.wind_variables
    return TerrainSeam(
        model.img_size,
        model.patch_size,
        patch_order=options.patch_order,
        host=model if options.patch_order == "wind_as_published" else None,
        elevation_variable=options.elevation_variable,
        wind_variables=(eastward, northward) if needs_wind else None,
        elevation_file=None if file is None else read_elevation_file(file, options.elevation_variable),
        static_terrain=options.static_terrain,
        terrain_is_flat=options.terrain_is_flat,
        grid_spacing_m=options.grid_spacing_m,
        control=options.control,
        control_seed=options.control_seed,
        land_variable=options.land_variable if needs_land else None,
    )


def _read_by(biases: Collection[ElevationBias], others: frozenset[str]) -> frozenset[str] | None:
    """Optional fields of `Terrain` that biases look at, and others; None: it is not known which."""
    known = [bias.needs | bias.reads for bias in biases if bias.reads is not None]
    return others.union(*known) if len(known) == len(biases) else None


def _checked_host(model: nn.Module) -> Host:
    missing = [name for name in ("blocks", "img_size", "patch_size", "default_vars") if not hasattr(model, name)]
    if missing:
        raise InputError(f"a ClimaX model has {', '.join(missing)}, and {type(model).__name__} does not")
    if not hasattr(model, "use_physics_mask"):
        raise InputError(
            f"this {type(model).__name__} does not hand terrain to its blocks: apply the patch (climax-elevation patch "
            "apply PATH), or train it with climax-elevation train"
        )
    if getattr(model, "terrain", None) is not None:
        raise InputError(f"this {type(model).__name__} has a terrain bias already; attach once, to a new model")
    return cast(Host, model)


def chosen_blocks(depth: int, blocks: Sequence[int] | str) -> list[int]:
    """Indices of blocks, sorted; InputError unless they are some of so many."""
    check_blocks(blocks, depth - 1)
    return list(range(depth)) if isinstance(blocks, str) else sorted(blocks)


def built_bias(bias_type: str, host: nn.Module, grid: tuple[int, int], bias_args: dict[str, Any]) -> ElevationBias:
    """The bias of a host's block, where and of the type that the block is."""
    attention = cast(Any, host.attn)
    # what the bias draws must not shift the random numbers that the host draws after this
    with torch.random.fork_rng(devices=[]):
        bias = build_bias(bias_type, num_heads=attention.num_heads, grid=grid, **bias_args)
    return bias.to(attention.qkv.weight.device, attention.qkv.weight.dtype)


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
    if reader.land_variable is not None and reader.land_variable not in known:
        raise InputError(
            f"the bias needs the share of land, and the model's default_vars ({', '.join(known)}) lack "
            f"{reader.land_variable!r}: add it, name another with land_variable, or leave out land: true"
        )


def terrain_block(host: nn.Module, bias: ElevationBias, engine: str) -> TerrainBlock:
    """The block in the place of a host's, in its mode."""
    if isinstance(bias, PhysicsBias):
        block: TerrainBlock = PhysicsGuidedBlockCorrected.adopt(host, bias, engine)
    else:
        block = TerrainBlock(host, bias, engine)
    for made in (block, block.attn, *bias.modules()):  # and not what is the host's
        made.training = host.training
    return block
