"""From a trained run and anybody's files to a forecast."""

from climax_elevation.forecast.command import Forecast, forecast
from climax_elevation.forecast.loaded import LoadedRun, load_run

__all__ = ["Forecast", "LoadedRun", "forecast", "load_run"]
