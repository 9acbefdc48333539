"""Terrain-aware attention for the ClimaX weather transformer."""

from climax_elevation.attachment import attach
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
from climax_elevation.terrain.fields import Terrain, downsample_elevation
from climax_elevation.terrain.reader import TerrainReader

__all__ = [
    "Attention3D",
    "ElevationBias",
    "InputError",
    "PhysicsBias",
    "PhysicsGuidedBlockCorrected",
    "RelativePositionBias3D",
    "Terrain",
    "TerrainReader",
    "attach",
    "available_biases",
    "biased_attention",
    "build_bias",
    "compute_patch_coords_3d",
    "downsample_elevation",
    "keep_bias",
    "register_bias",
]
