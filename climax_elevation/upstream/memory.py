"""What a training step holds on a device, estimated before there is one: from shapes, without computing it.

    weights, gradients, AdamW's moments + what forward keeps for backward

The second is counted as torch itself counts it: each part of the network runs on tensors without memory, and what
autograd saves is added up. What a bias adds is counted in small, on two grids with real numbers, by each engine, and
is a polynomial of second degree in the number of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

from climax_elevation.attachment import bias_off
from climax_elevation.attention import biased_attention
from climax_elevation.block import BiasedAttention, TerrainBlock
from climax_elevation.errors import InputError
from climax_elevation.terrain.fields import Terrain

BYTES_A_WEIGHT = 16  # itself, its gradient and AdamW's two moments, in float32
BYTES_OF_BUCKETS = 4  # of DDP, which sends gradients in copies
SMALL = ((4, 8), (8, 8))  # grids on which a bias is tried
OF_GPUS = ("triton",)

Autocast = Callable[[], AbstractContextManager[Any]]


def of_weights(module: nn.Module, processes: int) -> int:
    """Bytes of weights, gradients and moments, and of the copies in which DDP sends gradients."""
    trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    rest = sum(weight.numel() for weight in module.parameters()) - trained
    return trained * (BYTES_A_WEIGHT + BYTES_OF_BUCKETS * (processes > 1)) + 4 * rest


def kept_by_network(net: Any, variables: int, batch_size: int, device: torch.device, autocast: Autocast) -> int:
    """Bytes that the forward of a ClimaX keeps for backward, without a bias, all patches counted.

    Args:
        net: A ClimaX or what stands in for it, in training.
        variables: Channels of its input.
        batch_size: Samples of a process.
        device: That it is going to train on.
        autocast: What Lightning runs forward in.
    """
    height, width = (int(side) for side in net.img_size)
    tokens, dim = net.pos_embed.shape[1:]
    samples = batch_size * int(getattr(net, "time_history", 1))
    biased = any(isinstance(block, TerrainBlock) for block in net.blocks)
    with bias_off(net) if biased else nullcontext():
        kept = _Kept(device, autocast)
        if isinstance(net.token_embeds, nn.ModuleList):
            one = kept.by(net.token_embeds[0], (samples, 1, height, width))
            embedded = one * variables
        else:
            embedded = kept.by(net.token_embeds, (samples, variables, height, width), torch.arange(variables))
        columns = (samples * tokens, variables, dim)
        parts = [kept.by(net.var_agg, (samples * tokens, 1, dim), columns, columns), embedded]
        of_tokens = (samples, tokens, dim)
        parts += [kept.by(part, of_tokens) for part in (net.pos_drop, *net.blocks, net.norm)]
        if samples == batch_size:
            parts.append(kept.by(net.head, of_tokens))
    return sum(parts)


class _Kept:
    """Counts what parts of a network keep for backward, on tensors without memory."""

    def __init__(self, device: torch.device, autocast: Autocast) -> None:
        self.device, self.autocast = device, autocast

    def by(self, part: nn.Module, *shapes: Any) -> int:
        """Bytes, where the part is called with tensors of these shapes; the same shape again is the same tensor."""
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            own = {name: _there(fake, tensor, self.device) for name, tensor in _named_tensors(part)}
            made: dict[Any, Tensor] = {}
            inputs = [
                shape
                if isinstance(shape, Tensor)
                else made.setdefault(shape, torch.empty(shape, device=self.device, requires_grad=True))
                for shape in shapes
            ]
            with counted(list(own.values())) as total, self.autocast():
                functional_call(part, own, tuple(inputs))
            return total()


def _there(fake: FakeTensorMode, tensor: Tensor, device: torch.device) -> Tensor:
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return made.requires_grad_(tensor.requires_grad)


def _named_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from part.named_parameters()
    yield from part.named_buffers()


@contextmanager
def counted(apart: Sequence[Tensor]) -> Iterator[Callable[[], int]]:
    """Within it, autograd's saved tensors are counted, each storage once and those of `apart` not at all.

    Yields:
        What tells the bytes so far.
    """
    known = {tensor.untyped_storage()._cdata: tensor for tensor in apart}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in known:
            found.setdefault(storage, tensor)  # held, lest another gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def kept_by_bias(
    block: TerrainBlock, engine: str, tokens: int, batch_size: int, *, one_ground: bool, device: torch.device
) -> int | None:
    """Bytes that attention with the bias of a block keeps for backward, over attention without one.

    Args:
        block: Of which there is one bias.
        engine: By which.
        tokens: Of a sample.
        batch_size: Samples of a process.
        one_ground: Whether the terrain is the same for all samples.
        device: That it is going to train on.

    Returns:
        None, where the engine or the bias does not run on this device.
    """
    if engine in OF_GPUS and device.type == "cpu":
        return None
    attention = block.attn

    def over(samples: int) -> float:
        few, many = (rows * columns for rows, columns in SMALL)
        of_few, of_many = (_tried(attention, engine, grid, samples, one_ground, device) for grid in SMALL)
        squared = (of_many / many - of_few / few) / (many - few)
        return squared * tokens**2 + (of_few / few - squared * few) * tokens

    try:
        one, two = over(1), over(2)
    except (InputError, RuntimeError, NotImplementedError):
        return None
    return max(0, round(one + (batch_size - 1) * (two - one)))


def _tried(
    attention: BiasedAttention, engine: str, grid: tuple[int, int], samples: int, one_ground: bool, device: torch.device
) -> int:
    """Bytes, over attention without a bias, of a grid that is small."""
    bias = copy.deepcopy(attention.bias).to(device)
    terrain = _terrain(grid, samples, 1 if one_ground else samples, device)
    bias.prepare(terrain)
    inputs = bias.inputs(terrain)
    width = cast(Tensor, attention.qkv.weight).shape[1] // attention.num_heads
    of_block = torch.zeros(
        (samples, grid[0] * grid[1], 3, attention.num_heads, width), device=device, requires_grad=True
    )
    q, k, v = of_block.permute(2, 0, 3, 1, 4).unbind(0)
    totals = []
    for attend in (
        lambda: biased_attention(q, k, v, bias, inputs, engine=engine),
        lambda: scaled_dot_product_attention(q, k, v),
    ):
        with counted(list(bias.parameters())) as total:
            attend().transpose(1, 2).flatten(2).square()  # as the projection that follows, it keeps what it is given
        totals.append(total())
    return totals[0] - totals[1]


def _terrain(grid: tuple[int, int], samples: int, grounds: int, device: torch.device) -> Terrain:
    """Some hills and winds on a globe."""
    rows, columns = grid
    lat = torch.linspace(-60, 60, rows, device=device).repeat_interleave(columns)
    lon = torch.linspace(0, 300, columns, device=device).repeat(rows)
    hills = (1500 + 1500 * (lon / 20).sin() * (lat / 30).cos()).expand(grounds, -1).contiguous()
    wind = torch.full((samples, rows * columns), 5.0, device=device)
    share = torch.ones_like(hills)
    hours = torch.full((samples,), 6.0, device=device)
    return Terrain(hills, grid, wind, wind, wind, lat=lat, lon=lon, lead_hours=hours, land=share)
