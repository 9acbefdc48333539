"""Terrain-aware attention for the ClimaX weather transformer."""

from climax_elevation.attach import attach
from climax_elevation.attention import biased_attention
from climax_elevation.bias import ElevationBias, PhysicsBias
from climax_elevation.block import PhysicsGuidedBlockCorrected
from climax_elevation.errors import InputError
from climax_elevation.registry import available_biases, build_bias, register_bias
from climax_elevation.terrain import Terrain, TerrainReader, downsample_elevation

__all__ = [
    "ElevationBias",
    "InputError",
    "PhysicsBias",
    "PhysicsGuidedBlockCorrected",
    "Terrain",
    "TerrainReader",
    "attach",
    "available_biases",
    "biased_attention",
    "build_bias",
    "downsample_elevation",
    "register_bias",
]
