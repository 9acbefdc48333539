"""`train --plan`: what a run would be, without starting it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pytorch_lightning import Trainer
from torch import nn

from climax_elevation.attention import ENGINES
from climax_elevation.block import TerrainBlock
from climax_elevation.data.shares import Share
from climax_elevation.seam import TerrainSeam
from climax_elevation.training import variables_of
from climax_elevation.upstream.memory import kept_by_bias, kept_by_network, of_weights
from climax_elevation.upstream.schedule import announced

MIB = 2**20

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
    yield f"parameters: {sum(parameter.numel() for parameter in module.parameters())}"
    yield from _memory(trainer, module, datamodule, blocks, processes)
    for name, folder in _folders(trainer):
        yield f"{name}: {folder}"


def _bias(net: Any, blocks: Sequence[tuple[int, TerrainBlock]], tokens: int) -> str:
    if not blocks:
        return "none"
    kinds = ", ".join(sorted({type(block.attn.bias).__name__ for _, block in blocks}))
    engines = ", ".join(sorted({block.engine_for(tokens) for _, block in blocks}))
    places = ", ".join(str(index) for index, _ in blocks)
    return f"{kinds} in blocks {places} of {len(net.blocks)}, engine {engines}"


def _memory(
    trainer: Any, module: Any, datamodule: Any, blocks: Sequence[tuple[int, TerrainBlock]], processes: int
) -> Iterator[str]:
    """What a step holds on each device."""
    net, device, autocast = module.net, trainer.strategy.root_device, trainer.precision_plugin.forward_context
    batch_size, weights = int(datamodule.hparams["batch_size"]), of_weights(module, processes)
    found = variables_of(datamodule)
    channels = max(map(len, found.values())) if isinstance(found, dict) else len(found or net.default_vars)
    plain = kept_by_network(net, channels, batch_size, device, autocast)
    copies = ", their copies in DDP" if processes > 1 else ""
    yield (
        f"memory of a step a device without a bias: about {_mib(weights + plain)}, {_mib(weights)} for weights, "
        f"gradients{copies} and AdamW's moments, {_mib(plain)} that forward keeps for backward"
    )
    if blocks:
        seam: TerrainSeam = net.terrain
        one_ground = seam.static_terrain or "elevation_m" in seam.sources
        tokens, samples = net.pos_embed.shape[1], batch_size * int(getattr(net, "time_history", 1))
        listed = []
        for engine in ENGINES:
            more = kept_by_bias(blocks[0][1], engine, tokens, samples, one_ground=one_ground, device=device)
            if more is not None:
                listed.append(f"{engine} {_mib(weights + plain + len(blocks) * more)}")
        yield f"memory of a step a device with the bias, by engine: about {', '.join(listed)}"
    yield "memory that is not counted: results on the way, which backward does not need, and the allocator's own"


def _mib(number: int) -> str:
    return f"{number / MIB:.1f} MiB"


def _folders(trainer: Any) -> Iterator[tuple[str, Any]]:
    yield "results", trainer.default_root_dir
    for logger in trainer.loggers:
        yield f"log of {type(logger).__name__}", logger.log_dir if getattr(logger, "log_dir", None) else logger.save_dir
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "dirpath", None):
            yield "checkpoints", callback.dirpath
