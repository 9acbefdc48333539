"""A forecast and what the bias changed in it, drawn."""

from __future__ import annotations

from matplotlib.figure import Figure

from climax_elevation.diagnostics.view import Field
from climax_elevation.draw import plots
from climax_elevation.errors import InputError
from climax_elevation.forecast.command import Forecast


def picture(done: Forecast) -> Figure:
    """The pair of maps.

    Args:
        done: Of a forecast that was asked to show a variable.

    Raises:
        InputError: If it was not.
    """
    shown = done.shown
    if shown is None:
        raise InputError("a picture is of one variable: forecast with show")
    field = Field(shown.lat, shown.lon, shown.values)
    change = None if shown.without is None else shown.values - shown.without
    ground = None if shown.ground is None else Field(shown.lat, shown.lon, shown.ground)
    return plots.forecast_figure(field, change, ground, shown.variable, shown.when, plots.variable_unit(shown.variable))
