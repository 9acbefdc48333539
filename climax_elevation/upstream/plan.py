"""`train --plan`: what a run would be, without starting it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pytorch_lightning import Trainer
from torch import nn

from climax_elevation.block import TerrainBlock
from climax_elevation.data.shares import Share
from climax_elevation.seam import TerrainSeam
from climax_elevation.upstream.schedule import announced

MIB = 2**20
BYTES_A_WEIGHT = 16  # itself, its gradient and Adam's two moments, in float32
SCORES_KEPT = 2  # logits and weights, which plain attention keeps for backward

_wanted: ContextVar[bool] = ContextVar("plan alone", default=False)


class PlanAlone(Exception):
    """The plan is printed, and no more was asked for."""


@contextmanager
def planning(wanted: bool) -> Iterator[None]:
    """Within it, a run ends with `PlanAlone` before it starts, if that is `wanted`."""
    token = _wanted.set(wanted)
    try:
        yield
    except PlanAlone:
        pass
    finally:
        _wanted.reset(token)


def stop_at_plan(trainer: Trainer, module: nn.Module, datamodule: Any, shares: Sequence[Share], processes: int) -> None:
    """Print the plan and raise PlanAlone where no more is wanted; else do nothing."""
    if not _wanted.get():
        return
    print("\n".join(_lines(trainer, module, datamodule, shares, processes)))
    raise PlanAlone


def _lines(trainer: Any, module: nn.Module, datamodule: Any, shares: Sequence[Share], processes: int) -> Iterator[str]:
    net: Any = module.net
    batch_size = int(datamodule.hparams["batch_size"])
    tokens = (int(net.img_size[0]) // int(net.patch_size)) * (int(net.img_size[1]) // int(net.patch_size))
    yield f"host: {type(net).__module__}.{type(net).__qualname__}"
    blocks = [(index, block) for index, block in enumerate(net.blocks) if isinstance(block, TerrainBlock)]
    yield f"bias: {_bias(net, blocks, tokens)}"
    yield f"reader: {'the plugin' if hasattr(datamodule, 'shares') else 'ClimaX'}'s {type(datamodule).__name__}"
    yield (
        f"processes: {processes} ({trainer.num_nodes} nodes of {trainer.num_devices}), "
        f"{type(trainer.strategy).__name__}, {type(trainer.accelerator).__name__}"
    )
    yield from announced(trainer, shares, processes, batch_size)
    yield f"tokens: {tokens} a sample, {tokens * batch_size} a step and process"
    weights = [parameter.numel() for parameter in module.parameters()]
    yield f"parameters: {sum(weights)}, {sum(weights) * BYTES_A_WEIGHT / MIB:.1f} MiB with gradients and Adam's moments"
    yield from _memory(net, blocks, tokens, batch_size)
    for name, folder in _folders(trainer):
        yield f"{name}: {folder}"


def _bias(net: Any, blocks: Sequence[tuple[int, TerrainBlock]], tokens: int) -> str:
    if not blocks:
        return "none"
    kinds = ", ".join(sorted({type(block.attn.bias).__name__ for _, block in blocks}))
    engines = ", ".join(sorted({block.engine_for(tokens) for _, block in blocks}))
    places = ", ".join(str(index) for index, _ in blocks)
    return f"{kinds} in blocks {places} of {len(net.blocks)}, engine {engines}"


def _memory(net: Any, blocks: Sequence[tuple[int, TerrainBlock]], tokens: int, batch_size: int) -> Iterator[str]:
    """What attention with a bias keeps for backward on each device, in float32, by engine."""
    if not blocks:
        return
    heads = int(net.blocks[0].attn.num_heads)
    seam: TerrainSeam = net.terrain
    samples = 1 if seam.static_terrain or "elevation_m" in seam.sources else batch_size
    whole = len(blocks) * tokens**2 * 4 / MIB
    factors = sum(block.attn.bias.has_factors for _, block in blocks)
    masks = (len(blocks) - factors) / len(blocks)
    dense, mask = SCORES_KEPT * batch_size * heads * whole, samples * masks * whole
    yield (
        f"memory of the bias a device, over attention without: dense {dense:.1f} MiB, sdpa {mask:.1f} MiB a head of "
        "the bias, tiled a tile at a time"
    )


def _folders(trainer: Any) -> Iterator[tuple[str, Any]]:
    yield "results", trainer.default_root_dir
    for logger in trainer.loggers:
        yield f"log of {type(logger).__name__}", logger.log_dir if getattr(logger, "log_dir", None) else logger.save_dir
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "dirpath", None):
            yield "checkpoints", callback.dirpath
