"""Compares terrain biases with none, and with each other: several seeds, everything else equal."""

from climax_elevation.compare.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
