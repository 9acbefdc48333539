"""The terrain biases, one file each; importing this package registers them."""

from climax_elevation.bias.base import ElevationBias
from climax_elevation.bias.physics import PhysicsBias

__all__ = ["ElevationBias", "PhysicsBias"]
