"""The bridge to ClimaX: finding it, patching it, and running it on today's versions."""

from climax_elevation.upstream.locate import find_climax
from climax_elevation.upstream.overlay import overlay

__all__ = ["find_climax", "overlay"]
