"""Fused kernels for GPUs: attention and bias in one pass, forward and backward, nothing of `[L, L]` in memory.

The biases worth it are `PhysicsBias`, whose b costs a few operations a pair and is computed inside the attention
kernel, and `RelativePositionBias3D` in normalised coordinates. There the hidden units of a pair are shared by all
heads, and by the batch where terrain is: they are computed once, in a kernel of their own, for a block of rows and
columns; attention goes over that block, and so on to the next. Gradients (equations in `tiled`) come from the saved
logsumexp; a program writes its sums to a place of its own and torch adds them: no atomics, so a run repeats exactly.

Both directions are custom operators, which torch.compile passes over without a break. Triton is imported by the
first call.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from climax_elevation.attention.engine import Engine
from climax_elevation.bias.base import ElevationBias, Tensors
from climax_elevation.bias.physics import PhysicsBias
from climax_elevation.bias.relative_3d import RelativePositionBias3D
from climax_elevation.errors import InputError

INSTALLED = importlib.util.find_spec("triton") is not None
HALF = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 128
MOST_UNITS = 128  # of the hidden layer
BLOCK_HELD = 1 << 24  # numbers of db in memory, all samples and heads: 32 MB in half precision, and b beside it
BLOCK_COLUMNS = 2048


class Launch(NamedTuple):
    """Queries and keys that a program looks at together, and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int


class Launches(NamedTuple):
    """Of the three attention kernels."""

    forward: Launch
    queries: Launch
    keys: Launch


# By bytes of a number and width of a head, up to. NOT measured: they are the ones with which ptxas, for compute
# capabilities 8.0 and 9.0, spills next to no register and shared memory suffices.
LAUNCHES = {
    (2, 64): Launches(Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(32, 64, 4, 2)),
    (2, 96): Launches(Launch(128, 64, 8, 3), Launch(64, 32, 4, 2), Launch(32, 64, 4, 2)),
    (2, 128): Launches(Launch(64, 64, 4, 3), Launch(64, 32, 4, 2), Launch(32, 64, 8, 2)),
    (4, 96): Launches(Launch(32, 32, 8, 1), Launch(32, 32, 8, 1), Launch(16, 32, 8, 1)),
    (4, 128): Launches(Launch(16, 16, 8, 1), Launch(32, 32, 8, 1), Launch(16, 32, 8, 1)),
    (8, 128): Launches(Launch(16, 16, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1)),
}
PAIRS = {64: Launch(32, 128, 8, 1), 128: Launch(32, 64, 8, 1)}  # of the relative bias, by hidden units up to


def _has_kernels(bias: ElevationBias) -> bool:
    """Whether b is one of those that the kernels compute; not of a subclass, which may compute another."""
    if type(bias) is RelativePositionBias3D:
        return bias.coords == "normalized" and cast(nn.Linear, bias.mlp[0]).out_features <= MOST_UNITS
    return type(bias) is PhysicsBias


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: ElevationBias,
    inputs: Tensors,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """softmax(scale * q k^T + b) v, in fused kernels."""
    _check(q, v, bias, dropout_p)
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        features = [feature.to(wide) for feature in bias.features(*inputs)]
        if isinstance(bias, PhysicsBias):
            height, excess, beta = features[0].expand(len(q), -1), None, None
            if bias.wind:
                excess, beta = features[1].expand(len(q), -1), bias.wind_beta.to(wide)
            out, _ = _physics(q, k, v, height, excess, bias.elevation_alpha.to(wide), beta, bias.direction, scale)
        else:
            last = cast(nn.Linear, cast(RelativePositionBias3D, bias).mlp[-1])
            out, _ = _relative(q, k, v, features[0], features[1], last.weight.to(wide), last.bias.to(wide), scale)
        return out


def _check(q: Tensor, v: Tensor, bias: ElevationBias, dropout_p: float) -> None:
    """Raise InputError where there is no kernel for it."""
    if dropout_p > 0:
        raise InputError("the engine 'triton' has no attention dropout: choose 'sdpa', or set it to 0")
    if not _has_kernels(bias):
        raise InputError(
            "the engine 'triton' has kernels for the biases 'physics' and 'relative_3d' (normalized, up to "
            f"{MOST_UNITS} hidden units), not for this {type(bias).__name__}: choose 'tiled' or 'auto'"
        )
    if v.shape[-1] != q.shape[-1] or q.shape[-1] > WIDEST_HEAD:
        raise InputError(
            f"the engine 'triton' takes heads of one width up to {WIDEST_HEAD} for queries, keys and values, not of "
            f"{q.shape[-1]} and {v.shape[-1]}: choose 'tiled'"
        )


class _Region(NamedTuple):
    """Queries and keys that one launch is about."""

    first_row: int
    end_row: int
    first_column: int
    end_column: int

    @property
    def rows(self) -> int:
        return self.end_row - self.first_row

    @property
    def columns(self) -> int:
        return self.end_column - self.first_column

    def fits(self, launch: Launch) -> bool:
        """Whether its tiles fill the region without masks."""
        return self.rows % launch.rows == 0 and self.columns % launch.columns == 0


class _Physics(NamedTuple):
    """What the attention kernels take to compute the physics bias; nothing where b lies in a block."""

    height: Tensor | None = None
    excess: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None


class _Attention:
    """The attention kernels, with the arguments that all launches share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, direction: str = "") -> None:
        if q.device.type != "cuda" and not kernels().INTERPRETED.value:
            raise InputError(
                f"the engine 'triton' runs on a CUDA or ROCm GPU, not on {q.device.type}: choose 'tiled' or 'auto'"
            )
        if not (q.stride() == k.stride() == v.stride() and q.stride(-1) == 1):
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        self.q, self.k, self.v = q, k, v
        self.batch, self.heads, self.tokens, self.width = q.shape
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.sizes = {"HEADS": self.heads, "WIDTH": self.width, **_parts(self.width)}
        self.options = {**self.sizes, "SCALE": scale, "DIRECTION": direction}
        self.launches = _launches_of(q.dtype, self.width)
        self.everything = _Region(0, self.tokens, 0, self.tokens)

    def empty(self, dtype: torch.dtype) -> Tensor:
        """Not yet filled, as q."""
        return _empty(self.q, dtype)

    def per_row(self, *leading: int) -> Tensor:
        """Not yet filled, `[..., B, H, L]`."""
        return self.q.new_empty(*leading, *self.q.shape[:3], dtype=self.wide)

    def programs(self, length: int, each: int) -> tuple[int, int]:
        """The grid of launches that give a program `each` tokens of one head."""
        return _count(length, each), self.batch * self.heads

    def forward(
        self, out: Tensor, logsumexp: Tensor, region: _Region, physics: _Physics, block: Tensor | None, resume: bool
    ) -> None:
        """Fill the region's rows of `out` and `logsumexp`; with `resume`, they hold those of earlier columns."""
        launch = self.launches.forward
        kernels().attention_forward[self.programs(region.rows, launch.rows)](
            *(self.q, self.k, self.v, out, logsumexp, *physics, block, _sample_stride(block)),
            *(*self.q.stride()[:3], self.tokens, *region),
            **self.options,
            RESUME=resume,
            **_compiled(launch, region),
        )

    def deltas(self, grad: Tensor, out: Tensor) -> Tensor:
        """rowsum(do * out), `[B, H, L]`."""
        launch = Launch(64, 64, 4, 1)
        delta = self.per_row()
        kernels().row_products[self.programs(self.tokens, launch.rows)](
            *(grad, out, delta, self.tokens), **self.sizes, EVEN=self.tokens % launch.rows == 0, ROWS=launch.rows
        )
        return delta

    def backward_keys(
        self,
        known: tuple[Tensor, Tensor, Tensor],
        found: tuple[Tensor, Tensor],
        region: _Region,
        physics: _Physics,
        of_features: tuple[Tensor | None, Tensor | None],
        block: Tensor | None,
        dblock: Tensor | None,
        resume: bool,
    ) -> None:
        """Fill the region's columns of `found`, dk and dv, or with `resume` add to them, and `dblock`.

        Args:
            known: do, logsumexp and delta.
            found: dk and dv.
            region: Rows to go over, and columns to do it for.
            physics: The bias, unless `block` holds it.
            of_features: What the keys add to the gradients of height and excess, `[B, H, L]`, where wanted.
            block: b of the region.
            dblock: Its gradient.
            resume: Whether `found` holds the sums over earlier rows.
        """
        launch = self.launches.keys
        kernels().attention_backward_keys[self.programs(region.columns, launch.columns)](
            *(self.q, self.k, self.v, *known, *found, *physics, *of_features, block, dblock, _sample_stride(block)),
            *(*self.q.stride()[:3], self.tokens, *region),
            **self.options,
            RESUME=resume,
            **_compiled(launch, region),
        )

    def backward_queries(
        self,
        known: tuple[Tensor, Tensor, Tensor],
        dq: Tensor,
        physics: _Physics,
        of_features: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """Fill `dq`, and return the gradients of alpha and beta; arguments as of `backward_keys`."""
        launch = self.launches.queries
        grid = self.programs(self.tokens, launch.rows)
        dalpha = self.q.new_empty(grid, dtype=self.wide)
        dbeta = None if physics.beta is None else torch.empty_like(dalpha)
        kernels().attention_backward_queries[grid](
            *(self.q, self.k, self.v, *known, dq, *physics, dalpha, dbeta, *of_features),
            *(*self.q.stride()[:3], self.tokens),
            **self.options,
            **_compiled(launch, self.everything),
        )
        return dalpha.sum(), None if dbeta is None else dbeta.sum()


def kernels() -> ModuleType:
    """The device code, imported when it is first needed."""
    if not INSTALLED:
        raise InputError("the engine 'triton' needs the package triton, which is missing: choose 'tiled' or 'auto'")
    return importlib.import_module("climax_elevation.attention.triton_kernels")


def _parts(width: int) -> dict[str, int]:
    """Two powers of two that hold `width` columns, the second 0 where one does; of 16 at least, for tensor cores."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = _power_of_two(width - first) if width > first else 0
    return {"FIRST": 2 * first, "REST": 0} if rest == first else {"FIRST": first, "REST": rest}


def _power_of_two(number: int) -> int:
    """The next power of two, 16 at least."""
    return max(16, 1 << (number - 1).bit_length())


def _count(length: int, each: int) -> int:
    return -(-length // each)


def _launches_of(dtype: torch.dtype, width: int) -> Launches:
    return next(launches for (size, most), launches in LAUNCHES.items() if size == dtype.itemsize and width <= most)


def _compiled(launch: Launch, region: _Region) -> dict[str, Any]:
    return {
        "EVEN": region.fits(launch),
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


def _sample_stride(block: Tensor | None) -> int:
    """From a sample's block to the next one's; 0 where all share one."""
    return 0 if block is None or len(block) == 1 else block.stride(0)


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, H, L, d]`, not yet filled, in memory `[B, L, H, d]`, so that putting heads side by side is no copy."""
    batch, heads, tokens, width = like.shape
    return like.new_empty(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)


@torch.library.custom_op(
    "climax_elevation::triton_physics",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor height, Tensor? excess, Tensor alpha, Tensor? beta, "
    "str direction, float scale) -> (Tensor, Tensor)",
)
def _physics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height: Tensor,
    excess: Tensor | None,
    alpha: Tensor,
    beta: Tensor | None,
    direction: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    attention = _Attention(q, k, v, scale, direction)
    out, logsumexp = attention.empty(q.dtype), attention.per_row()
    physics = _Physics(height.contiguous(), None if excess is None else excess.contiguous(), alpha, beta)
    with torch.cuda.device_of(q):
        attention.forward(out, logsumexp, attention.everything, physics, block=None, resume=False)
    return out, logsumexp


@torch.library.custom_op(
    "climax_elevation::triton_physics_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor height, Tensor? excess, "
    "Tensor alpha, Tensor? beta, str direction, float scale, bool of_features) -> Tensor[]",
)
def _physics_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    height: Tensor,
    excess: Tensor | None,
    alpha: Tensor,
    beta: Tensor | None,
    direction: str,
    scale: float,
    of_features: bool,
) -> list[Tensor]:
    attention = _Attention(q, k, v, scale, direction)
    dq, dk, dv = (attention.empty(q.dtype) for _ in range(3))
    physics = _Physics(height.contiguous(), None if excess is None else excess.contiguous(), alpha, beta)
    of_height = attention.per_row(2) if of_features else None  # from queries, and from keys
    of_excess = attention.per_row(2) if of_features and excess is not None else None

    def of_side(side: int) -> tuple[Tensor | None, Tensor | None]:
        return None if of_height is None else of_height[side], None if of_excess is None else of_excess[side]

    with torch.cuda.device_of(q):
        grad = _laid_out(grad)
        known = (grad, logsumexp, attention.deltas(grad, out))
        dalpha, dbeta = attention.backward_queries(known, dq, physics, of_side(0))
        attention.backward_keys(known, (dk, dv), attention.everything, physics, of_side(1), None, None, resume=False)
    features = [both.sum(dim=(0, 2)) for both in (of_height, of_excess) if both is not None]
    of_beta = [] if dbeta is None or beta is None else [dbeta.view_as(beta)]
    return [dq, dk, dv, dalpha.view_as(alpha), *of_beta, *features]


@torch.library.custom_op(
    "climax_elevation::triton_relative",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor of_query, Tensor of_key, Tensor weight, Tensor constant, "
    "float scale) -> (Tensor, Tensor)",
)
def _relative(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    weight: Tensor,
    constant: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    attention = _Attention(q, k, v, scale)
    out, logsumexp = attention.empty(attention.wide), attention.per_row()
    network = _Network(of_query, of_key, weight, constant, q.dtype)
    with torch.cuda.device_of(q):
        for region in _regions(q):
            block = network.block(region)
            attention.forward(out, logsumexp, region, _Physics(), block, resume=region.first_column > 0)
    return out.to(q.dtype), logsumexp


@torch.library.custom_op(
    "climax_elevation::triton_relative_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor of_query, "
    "Tensor of_key, Tensor weight, Tensor constant, float scale) -> Tensor[]",
)
def _relative_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    weight: Tensor,
    constant: Tensor,
    scale: float,
) -> list[Tensor]:
    attention = _Attention(q, k, v, scale)
    dk, dv = attention.empty(attention.wide), attention.empty(attention.wide)
    dq = attention.empty(attention.wide).zero_()
    network = _Network(of_query, of_key, weight, constant, q.dtype)
    gradients = [torch.zeros_like(tensor) for tensor in network.tensors]
    with torch.cuda.device_of(q):
        grad = _laid_out(grad)
        known = (grad, logsumexp, attention.deltas(grad, out))
        for region in _regions(q):
            block = network.block(region)
            ds = q.new_empty(*q.shape[:2], region.rows, region.columns)
            resume = region.first_row > 0
            attention.backward_keys(known, (dk, dv), region, _Physics(), (None, None), block, ds, resume)
            rows, columns = slice(*region[:2]), slice(*region[2:])
            dq[:, :, rows].add_(ds @ k[:, :, columns], alpha=scale)
            network.backward(region, ds, gradients)
    return [*(total.to(q.dtype) for total in (dq, dk, dv)), *gradients]


class _Network:
    """The relative bias, b[h, i, j] = W2[h] . relu(a_i + c_j) + b2[h], a block at a time, and its gradients."""

    def __init__(self, of_query: Tensor, of_key: Tensor, weight: Tensor, constant: Tensor, dtype: torch.dtype) -> None:
        self.tensors = [tensor.contiguous() for tensor in (of_query, of_key, weight, constant)]
        self.samples, self.tokens, units = of_query.shape
        self.heads = len(weight)
        self.launch = next(launch for most, launch in PAIRS.items() if units <= most)
        # as precise as half precision needs, where tensor cores have it
        fast = dtype in HALF and torch.version.hip is None
        self.options = {
            "HEADS": self.heads,
            "HEADS_HELD": _power_of_two(self.heads),
            "UNITS": units,
            "UNITS_HELD": _power_of_two(units),
            "PRECISION": "tf32" if fast else "ieee",
        }

    def grid(self, region: _Region) -> tuple[int, int, int]:
        return _count(region.columns, self.launch.columns), _count(region.rows, self.launch.rows), self.samples

    def block(self, region: _Region) -> Tensor:
        """b of a region, `[B or 1, H, rows, columns]`."""
        block = self.tensors[0].new_empty(self.samples, self.heads, region.rows, region.columns)
        kernels().relative_bias[self.grid(region)](
            *(*self.tensors, block, self.tokens, *region), **self.options, **_compiled(self.launch, region)
        )
        return block

    def backward(self, region: _Region, ds: Tensor, gradients: list[Tensor]) -> None:
        """Add what ds of a region, `[B, H, rows, columns]`, gives to the gradients of `tensors`."""
        of_query, of_key, weight, constant = self.tensors
        if len(ds) > self.samples:
            ds = ds.sum(dim=0, keepdim=True, dtype=of_query.dtype)
        across, down, samples = grid = self.grid(region)
        units = of_query.shape[2]
        dquery = of_query.new_empty(samples, across, region.rows, units)
        dkey = of_key.new_empty(samples, down, region.columns, units)
        dweight = weight.new_empty(samples * down * across, *weight.shape)
        dconstant = constant.new_empty(samples * down * across, *constant.shape)
        kernels().relative_bias_backward[grid](
            *(of_query, of_key, weight, ds, dquery, dkey, dweight, dconstant, self.tokens, *region),
            **self.options,
            **_compiled(self.launch, region),
        )
        gradients[0][:, slice(*region[:2])] += dquery.sum(dim=1)
        gradients[1][:, slice(*region[2:])] += dkey.sum(dim=1)
        gradients[2] += dweight.sum(dim=0)
        gradients[3] += dconstant.sum(dim=0)


def _regions(q: Tensor) -> Iterator[_Region]:
    """Blocks of rows and columns that cover all pairs, of which `BLOCK_HELD` numbers are held at once."""
    batch, heads, tokens, _ = q.shape
    columns = min(tokens, BLOCK_COLUMNS)
    rows = 1 << max(4, (BLOCK_HELD // (batch * heads * columns)).bit_length() - 1)
    for row, column in itertools.product(range(0, tokens, rows), range(0, tokens, columns)):
        yield _Region(row, min(row + rows, tokens), column, min(column + columns, tokens))


def _laid_out(grad: Tensor) -> Tensor:
    """A gradient of `out`, in memory as `_empty` is."""
    return grad.transpose(1, 2).contiguous().transpose(1, 2)


@_physics.register_fake
@_relative.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return _empty(q, q.dtype), q.new_empty(q.shape[:3], dtype=wide)


@_physics_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    height: Tensor,
    excess: Tensor | None,
    alpha: Tensor,
    beta: Tensor | None,
    direction: str,
    scale: float,
    of_features: bool,
) -> list[Tensor]:
    features = [f for f in (height, excess) if of_features and f is not None]
    parameters = [parameter for parameter in (alpha, beta) if parameter is not None]
    return [*(_empty(q, q.dtype) for _ in range(3)), *map(torch.empty_like, parameters), *map(_dense, features)]


@_relative_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, *rest: Any) -> list[Tensor]:
    return [*(_empty(q, q.dtype) for _ in range(3)), *map(_dense, rest[:4])]


def _dense(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *others = inputs
    tensors = [other for other in others if other is None or isinstance(other, Tensor)]
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.rest = others[len(tensors) :]


def _differentiate_physics(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # looked at once, as checkpointing allows
    of_features = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    found = iter(_physics_backward(grad, *saved, *ctx.rest, of_features))
    dq, dk, dv, dalpha = (next(found) for _ in range(4))
    dbeta = None if saved[-1] is None else next(found)
    return dq, dk, dv, next(found, None), next(found, None), dalpha, dbeta, None, None


def _differentiate_relative(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_relative_backward(grad, *ctx.saved_tensors, *ctx.rest), None


_physics.register_autograd(_differentiate_physics, setup_context=_save)
_relative.register_autograd(_differentiate_relative, setup_context=_save)


ENGINE = Engine(triton_attention)
