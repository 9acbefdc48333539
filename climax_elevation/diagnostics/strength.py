"""How strong a bias is beside the logits that it is added to, and whether it is alive at all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from climax_elevation.bias.base import ElevationBias, Tensors, map_tensors
from climax_elevation.block import BiasedAttention, TerrainBlock
from climax_elevation.errors import InputError

ROWS = 64  # queries that are looked at, evenly spaced; up to three times as many where spacing has to be uneven
SAMPLES = 4  # of a batch, at most
HELD = 2**24  # numbers of a tile held at once, 64 MiB

INERT_BELOW = 0.01
"""Share of attention that an inert bias moves at most, in any row.

An output of attention, a mean of values, moves by no more than this share of the distance between the two
values farthest apart: one part in a hundred, about what bfloat16 loses anyway (2^-8 of each weight and value).
"""


@dataclass(frozen=True)
class Seen:
    """What the attention of a block works on in one forward pass.

    Attributes:
        attention: The block's.
        x: Tokens, normalised, `[B, L, D]`.
        bias_inputs: The arguments of `attention.bias`.
        order: The token at each place of both, `[B, L]`; None: raster order.
    """

    attention: BiasedAttention
    x: Tensor
    bias_inputs: Tensors
    order: Tensor | None


def terrain_blocks(model: nn.Module) -> dict[int, TerrainBlock]:
    """The blocks of `model` that have a terrain bias, by their index.

    Raises:
        InputError: If there is none, or two have the same index.
    """
    blocks: dict[int, TerrainBlock] = {}
    for name, part in model.named_modules():
        if isinstance(part, TerrainBlock):
            index = int((re.findall(r"\d+", name) or ["0"])[-1])
            if index in blocks:
                raise InputError(f"two stacks of blocks have a terrain bias in block {index}: look at one at a time")
            blocks[index] = part
    if not blocks:
        raise InputError(
            f"this {type(getattr(model, 'net', model)).__name__} has no terrain bias: train it with "
            "use_physics_mask: true"
        )
    return blocks


@contextmanager
def watch(model: nn.Module, see: Callable[[int, Seen], None]) -> Iterator[None]:
    """Call `see(index, seen)`, without gradient, whenever a block with a terrain bias attends."""
    with ExitStack() as stack:
        for index, block in terrain_blocks(model).items():
            orders: list[Tensor | None] = [None]

            def remember_order(_: Any, __: Any, named: dict[str, Any], orders: list[Tensor | None] = orders) -> None:
                orders[0] = named.get("order")

            def attend(
                attention: Any, given: tuple[Any, ...], index: int = index, orders: list[Tensor | None] = orders
            ) -> None:
                with torch.no_grad():
                    detached = map_tensors(lambda tensor: tensor.detach(), given[1])
                    see(index, Seen(attention, given[0].detach(), detached, orders[0]))

            stack.callback(block.register_forward_pre_hook(remember_order, with_kwargs=True).remove)
            stack.callback(block.attn.register_forward_pre_hook(attend).remove)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradient and dropout; every module is in its own mode again afterwards."""
    modes = {part: part.training for part in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def encode(model: nn.Module, batch: Sequence[Any]) -> None:
    """Run the blocks of `model`, a ClimaX or a Lightning module around one, on a batch of its data module."""
    net: Any = getattr(model, "net", model)
    device = next(net.parameters()).device
    x, _, lead_times, variables, _, *region = batch
    net.forward_encoder(x.to(device), lead_times.to(device), variables, *region)


@dataclass(frozen=True)
class Strength:
    """A bias b beside the logits a = scale q . k, over sampled queries and all keys; a value a head each.

    What is the same for all keys is no bias to softmax: it is taken out of `share` and `moved`.

    Attributes:
        largest: Largest |b|.
        mean: Mean |b|.
        share: var(b) / (var(a) + var(b)), variances over the keys of a row, then averaged over rows.
        moved: Mean over rows of the share of attention that b moves from some keys to others, which is half
            the sum over keys of |softmax(a + b) - softmax(a)|.
        most_moved: The largest over rows of the same.
    """

    largest: list[float]
    mean: list[float]
    share: list[float]
    moved: list[float]
    most_moved: list[float]

    @property
    def inert(self) -> bool:
        """Whether b moves less than `INERT_BELOW` of the attention in every row of every head."""
        return max(self.most_moved) < INERT_BELOW


def measure(seen: Seen) -> Strength:
    """`Strength` of a block's bias, from some rows of its attention and never all of them at once."""
    attention, heads = seen.attention, seen.attention.num_heads
    tokens = seen.x.shape[1]
    step = row_step(tokens)
    at_once = max(1, HELD // (tokens * max(heads, attention.bias.numbers_a_pair)))
    found: list[tuple[Tensor, ...]] = []
    with torch.autocast(seen.x.device.type, enabled=False):
        for sample in range(min(SAMPLES, len(seen.x))):
            of_sample = one_sample(seen, sample)
            for first in range(step // 2, tokens, step * at_once):
                rows = slice(first, min(first + step * at_once, tokens), step)
                found.append(_of_rows(*logits_and_bias(of_sample, rows, slice(0, tokens))))
    largest, mean, of_bias, of_logits, moved = (torch.cat(rows, dim=1) for rows in zip(*found, strict=True))
    variance = of_bias.mean(dim=1)
    total = variance + of_logits.mean(dim=1)
    share = torch.where(total > 0, variance / total, torch.zeros_like(total))
    values = (largest.amax(dim=1), mean.mean(dim=1), share, moved.mean(dim=1), moved.amax(dim=1))
    return Strength(*(value.tolist() for value in values))


def row_step(tokens: int) -> int:
    """Distance between sampled rows: about tokens / `ROWS`, and never in step with the columns of the grid."""
    step = max(1, tokens // ROWS)
    while math.gcd(step, tokens) > 1:
        step -= 1
    return step


def one_sample(seen: Seen, sample: int) -> Seen:
    """The same of one sample of the batch alone."""
    inputs = map_tensors(lambda t: t[min(sample, len(t) - 1)][None], seen.bias_inputs)
    return Seen(seen.attention, seen.x[sample][None], inputs, None if seen.order is None else seen.order[sample][None])


def logits_and_bias(seen: Seen, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """scale q . k and b of some queries with some keys of one sample, `[heads, Lq, Lk]` both."""
    attention = seen.attention
    bias: ElevationBias = attention.bias
    weight = next(attention.qkv.parameters())
    q, k, _ = attention.project(seen.x.to(weight.dtype))
    b = bias.pairwise(*bias.tile(bias.features(*seen.bias_inputs), rows, columns))[0]
    logits = attention.scale * (q[0, :, rows].to(b.dtype) @ k[0, :, columns].to(b.dtype).transpose(1, 2))
    return logits, b.expand_as(logits)


def _of_rows(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """For each head and row: largest |b|, mean |b|, variances of b and of the logits, and what b moves."""
    size = bias.abs()
    moved = ((logits + bias).softmax(dim=-1) - logits.softmax(dim=-1)).abs().sum(dim=-1) / 2
    variances = (values.var(dim=-1, correction=0) for values in (bias, logits))
    return (size.amax(dim=-1), size.mean(dim=-1), *variances, moved)


@dataclass(frozen=True)
class Report:
    """What `assess` found; `str()` of it is a table to print.

    Attributes:
        blocks: By the block's index.
        parameters: Scalars of the biases, by block and name.
    """

    blocks: dict[int, Strength]
    parameters: dict[tuple[int, str], float]

    @property
    def inert(self) -> bool:
        """Whether the bias of every block is inert."""
        return all(strength.inert for strength in self.blocks.values())

    def __str__(self) -> str:
        lines = [
            f"{'block':>5} {'largest |b|':>12} {'mean |b|':>9} {'moves':>6} {'at most':>8}  share of the logits' "
            "variance by head"
        ]
        for index, strength in self.blocks.items():
            moved = sum(strength.moved) / len(strength.moved)
            mean = sum(strength.mean) / len(strength.mean)
            shares = " ".join(f"{share:.1%}" for share in strength.share)
            lines.append(
                f"{index:5} {max(strength.largest):12.4g} {mean:9.3g} {moved:6.1%} {max(strength.most_moved):8.1%}  "
                f"{shares}{'  inert' if strength.inert else ''}"
            )
        lines += [f"block {index}: {name} = {value:.6g}" for (index, name), value in self.parameters.items()]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.inert:
            return f"The bias is inert: in no row, head or block does it move {INERT_BELOW:.0%} of the attention."
        alive = [index for index, strength in self.blocks.items() if not strength.inert]
        most = max(max(self.blocks[index].most_moved) for index in alive)
        where = "" if len(alive) == len(self.blocks) else f" in block {', '.join(map(str, alive))}"
        return f"The bias is alive{where}: it moves up to {most:.1%} of a row's attention."


def assess(model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any] = encode) -> Report:
    """Measure the biases of a model on a batch; nothing of the model is changed.

    Args:
        model: A ClimaX with terrain, or a Lightning module that holds one as `net`; or any model, with `run`.
        batch: As ClimaX's data modules give them: x, y, lead_times, variables, out_variables; or what `run` takes.
        run: Calls `run(model, batch)`, so that every block runs.

    Raises:
        InputError: If the model has no terrain bias.
    """
    found: dict[int, Strength] = {}

    def see(index: int, seen: Seen) -> None:
        found[index] = measure(seen)

    with evaluating(model), watch(model, see):
        run(model, batch)
    parameters = {
        (index, name): parameter.item()
        for index, block in terrain_blocks(model).items()
        for name, parameter in block.attn.bias.named_parameters()
        if parameter.numel() == 1
    }
    return Report(found, parameters)
