"""Terrain-aware attention for the ClimaX weather transformer."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from climax_elevation.attachment import attach, bias_off, detach
    from climax_elevation.attention import biased_attention
    from climax_elevation.bias import (
        ElevationBias,
        PhysicsBias,
        RelativePositionBias3D,
        build_bias,
        compute_patch_coords_3d,
    )
    from climax_elevation.bias.registry import available_biases, register_bias
    from climax_elevation.block import Attention3D, PhysicsGuidedBlockCorrected, keep_bias
    from climax_elevation.errors import InputError
    from climax_elevation.forecast.loaded import load_run
    from climax_elevation.options import AttachOptions
    from climax_elevation.other_hosts import attach_blocks, terrain_given
    from climax_elevation.terrain.fields import Terrain, downsample_elevation
    from climax_elevation.terrain.reader import TerrainReader

_PLACES = {
    "AttachOptions": "options",
    "Attention3D": "block",
    "ElevationBias": "bias",
    "InputError": "errors",
    "PhysicsBias": "bias",
    "PhysicsGuidedBlockCorrected": "block",
    "RelativePositionBias3D": "bias",
    "Terrain": "terrain.fields",
    "TerrainReader": "terrain.reader",
    "attach": "attachment",
    "attach_blocks": "other_hosts",
    "available_biases": "bias.registry",
    "bias_off": "attachment",
    "biased_attention": "attention",
    "build_bias": "bias",
    "compute_patch_coords_3d": "bias",
    "detach": "attachment",
    "downsample_elevation": "terrain.fields",
    "keep_bias": "block",
    "load_run": "forecast.loaded",
    "register_bias": "bias.registry",
    "terrain_given": "other_hosts",
}

__all__ = [
    "AttachOptions",
    "Attention3D",
    "ElevationBias",
    "InputError",
    "PhysicsBias",
    "PhysicsGuidedBlockCorrected",
    "RelativePositionBias3D",
    "Terrain",
    "TerrainReader",
    "attach",
    "attach_blocks",
    "available_biases",
    "bias_off",
    "biased_attention",
    "build_bias",
    "compute_patch_coords_3d",
    "detach",
    "downsample_elevation",
    "keep_bias",
    "load_run",
    "register_bias",
    "terrain_given",
]


def __getattr__(name: str) -> Any:
    """A public name, whose module is imported when it is first wanted: not every command wants torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    _register_operators()
    return found


def _register_operators() -> None:
    """Where torch is in use: a program that was exported looks for them when it is loaded."""
    if "torch" in sys.modules:
        importlib.import_module(f"{__name__}.attention")


_register_operators()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
