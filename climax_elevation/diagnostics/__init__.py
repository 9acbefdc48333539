"""Is the bias alive? What it is and does over training, and what the forecast loses without it."""

from climax_elevation.diagnostics.interventions import INTERVENTIONS, Effects, effects, intervention
from climax_elevation.diagnostics.monitor import BiasMonitor, read_record
from climax_elevation.diagnostics.run import Run, examine, open_run
from climax_elevation.diagnostics.strength import INERT_BELOW, Report, Strength, assess

__all__ = [
    "INERT_BELOW",
    "INTERVENTIONS",
    "BiasMonitor",
    "Effects",
    "Report",
    "Run",
    "Strength",
    "assess",
    "effects",
    "examine",
    "intervention",
    "open_run",
    "read_record",
]
