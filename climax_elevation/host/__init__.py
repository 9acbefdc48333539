"""What stands in where ClimaX is not installed: its model, data, training and scores."""

from climax_elevation.host.model import StandInClimaX

__all__ = ["StandInClimaX"]
