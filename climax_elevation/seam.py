"""Where ClimaX hands its input over, and each of its blocks is given what its bias wants.

What a new version of ClimaX changes about blocks and their calls is answered here and in `block`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from climax_elevation.block import TerrainBlock
from climax_elevation.terrain.fields import Terrain
from climax_elevation.terrain.order import published_order, wind_order
from climax_elevation.terrain.reader import TerrainReader


class TerrainSeam(TerrainReader):
    """The module `terrain` of a ClimaX model: reads, prepares biases, orders tokens, and serves the blocks.

    Args:
        img_size, patch_size: As `TerrainReader`.
        patch_order: One of `climax_elevation.terrain.order.PATCH_ORDERS`.
        host: The model, whose position embedding "wind_as_published" leaves behind; None: another order.
        options: The other arguments of `TerrainReader`.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: int,
        *,
        patch_order: str = "raster",
        host: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__(img_size, patch_size, **options)
        self.patch_order = patch_order
        self.cache_dir: Path | None = None  # beside the data, where what is long to compute is kept
        self.host: tuple[nn.Module, ...] = () if host is None else (host,)  # a tuple, lest it be registered as a part
        self._prepared = False

    def _changed(self) -> None:
        super()._changed()
        self._prepared = False

    def for_blocks(
        self,
        blocks: Iterable[nn.Module],
        x: Tensor,
        lead_times: Tensor | None,
        variables: Sequence[str],
        patch_ids: Sequence[int] | None = None,
    ) -> dict[int, dict[str, Any]]:
        """Keyword arguments for each block that takes terrain, by its index.

        Args:
            blocks: Of the model.
            x, lead_times, variables: As `forward`.
            patch_ids: The patches that are kept, where not all are.
        """
        chosen = {index: block for index, block in enumerate(blocks) if isinstance(block, TerrainBlock)}
        if not self._announced:
            tokens = self.grid[0] * self.grid[1] if patch_ids is None else len(patch_ids)
            engines = {block.engine_for(tokens) for block in chosen.values()}
            self._engines = f", engine {', '.join(sorted(engines))}"
        whole = self(x, lead_times, variables)
        if not self._prepared:
            self._prepare(chosen.values(), whole)
        terrain = whole if patch_ids is None else whole.select(patch_ids)
        if self.patch_order == "raster":
            return {index: block.terrain_inputs(terrain) for index, block in chosen.items()}
        order = wind_order(terrain) if self.patch_order == "wind" else published_order(terrain)
        arguments = {index: block.terrain_inputs(terrain, order) for index, block in chosen.items()}
        if self.patch_order == "wind_as_published":
            arguments[0]["positions"] = self.host[0].pos_embed[:, terrain.ids]  # type: ignore[index]
        return arguments

    @contextmanager
    def replaced(self, change: Callable[[Terrain], Terrain]) -> Iterator[None]:
        """Hand on `change(terrain)` in the place of each terrain read.

        Biases are prepared for the changed ground at the next forward, without keeping that on disk; what
        was prepared before has to be put back with the biases themselves.
        """
        prepared, cache_dir = self._prepared, self.cache_dir
        hook = self.register_forward_hook(lambda _, __, terrain: change(terrain))
        try:
            self._prepared, self.cache_dir = False, None
            yield
        finally:
            hook.remove()
            self._prepared, self.cache_dir = prepared, cache_dir

    @torch.compiler.disable
    def _prepare(self, blocks: Iterable[TerrainBlock], whole: Terrain) -> None:
        """What depends on the grid and its ground alone."""
        for block in blocks:
            block.attn.bias.prepare(whole, self.cache_dir)
        self._prepared = True
