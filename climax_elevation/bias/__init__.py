"""The terrain biases, one file each; importing this package registers them."""

from climax_elevation.bias.adaptive import AdaptiveBias
from climax_elevation.bias.advection import AdvectionBias
from climax_elevation.bias.base import ElevationBias
from climax_elevation.bias.build import SumBias, build_bias
from climax_elevation.bias.multiplicative import MultiplicativeBias
from climax_elevation.bias.physics import PhysicsBias
from climax_elevation.bias.relative_2d import RelativePositionBias2D
from climax_elevation.bias.relative_3d import RelativePositionBias3D, compute_patch_coords_3d
from climax_elevation.bias.ridge import RidgeBias
from climax_elevation.bias.structure import StructureBias
from climax_elevation.bias.topoflow import TopoFlowBias

__all__ = [
    "AdaptiveBias",
    "AdvectionBias",
    "ElevationBias",
    "MultiplicativeBias",
    "PhysicsBias",
    "RelativePositionBias2D",
    "RelativePositionBias3D",
    "RidgeBias",
    "StructureBias",
    "SumBias",
    "TopoFlowBias",
    "build_bias",
    "compute_patch_coords_3d",
]
