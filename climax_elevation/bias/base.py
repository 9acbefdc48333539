"""What every terrain bias is: a function of token pairs, added to attention logits before softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from climax_elevation.terrain import Terrain

Features = tuple[Tensor, ...]


class ElevationBias(nn.Module):
    """An additive, real-valued attention bias b[i, j]; query i reads key j.

        attention = softmax(q k^T / sqrt(d) + b) v

    A subclass says what it takes from a `Terrain` (`needs`, `inputs`), what can be done once a token
    (`features`) and how two tokens compare (`pairwise`). Every attention engine works from these.
    The values are float32, or the module's own type where that is wider.
    """

    needs: frozenset[str] = frozenset()
    """Optional fields of `Terrain` without which `inputs` cannot be made, such as `"speed"`."""

    def inputs(self, terrain: Terrain) -> tuple[Tensor, ...]:
        """The arguments of `forward`, taken from `terrain`."""
        raise NotImplementedError(f"{type(self).__name__} does not define inputs(terrain)")

    def features(self, *inputs: Tensor) -> Features:
        """Whatever can be done once a token: tensors `[B or 1, L, ...]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define features(*inputs)")

    def pairwise(self, query: Features, key: Features) -> Tensor:
        """Bias of every query with every key, `[B or 1, heads or 1, Lq, Lk]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define pairwise(query, key)")

    def factors(self, *inputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Exact low rank where there is one: `(f, g)`, each `[B or 1, heads or 1, L, r]`.

        b[i, j] = f[i] . g[j] + (anything that depends on i alone, which softmax ignores)
        """
        return None

    def forward(self, *inputs: Tensor) -> Tensor:
        """The dense bias `[B or 1, heads or 1, L, L]`: the definition every engine is tested against."""
        with torch.autocast(inputs[0].device.type, enabled=False):
            features = self.features(*inputs)
            return self.pairwise(features, features)

    def value_dtype(self) -> torch.dtype:
        """float32, or the parameters' own type where that is wider."""
        dtype = torch.float32
        for parameter in self.parameters():
            dtype = torch.promote_types(dtype, parameter.dtype)
        return dtype
