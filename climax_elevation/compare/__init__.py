"""Compares terrain biases with none, and with each other: several seeds, everything else equal."""

from climax_elevation.compare.comparison import compare
from climax_elevation.compare.stored import Comparison

__all__ = ["Comparison", "compare"]
