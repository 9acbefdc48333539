"""Under torch's transformations of functions: vmap, grad, compilation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def transforming() -> bool:
    """Whether a transformation of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


def tracing(tensor: Tensor) -> bool:
    """Whether a program is made of what is computed with it, in which there are no numbers yet."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def readable(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at: not while a graph is compiled, nor under vmap those of all members."""
    return not tracing(tensor) and not torch._C._functorch.is_batchedtensor(tensor)


def each_in_turn(
    function: type[torch.autograd.Function], info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The function of each of the batch's members, one after another; what `torch.autograd.Function.vmap` returns.

    Args:
        function: Whose arguments are tensors, or are the same for all members.
        info: Has `batch_size`.
        in_dims: Of each argument, which dimension counts the members; None: it is the same for all.
        inputs: The arguments.
    """
    found = []
    for member in range(info.batch_size):
        own = [
            given.select(dim, member) if dim is not None and isinstance(given, Tensor) else given
            for given, dim in zip(inputs, in_dims, strict=True)
        ]
        found.append(function.apply(*own))
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(some) for some in zip(*found, strict=True)), (0,) * len(found[0])
