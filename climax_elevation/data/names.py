"""ClimaX's variable names, the other names files give them, and their units."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from climax_elevation.terrain import units
from climax_elevation.terrain.units import Linear, Units

CLIMAX_LEVELS_HPA = (50, 250, 500, 600, 700, 850, 925)
"""The pressure levels that ClimaX was pretrained on."""

HIGHEST_GROUND_M = 9000.0
"""No ground is higher, so a larger value is not in metres (Everest: 8849 m)."""


@dataclass(frozen=True)
class Variable:
    """What ClimaX calls one physical quantity.

    Attributes:
        name: ClimaX's name, without the level.
        aliases: Other names, lower case: those of ERA5, GRIB, WeatherBench, CMIP, COSMO, WRF, MERRA-2, NCEP.
        units: Spelling without blanks and carets -> conversion to ClimaX's unit, which comes first.
        valid: Smallest and largest value in ClimaX's unit that can be true anywhere on Earth.
        on_levels: Whether it lives on pressure levels.
    """

    name: str
    aliases: tuple[str, ...]
    units: Units
    valid: tuple[float, float]
    on_levels: bool = False


OROGRAPHY = Variable(
    "orography",
    (
        *("orog", "topography", "elevation", "surface_altitude", "hgt", "hgt_surface", "hgtsfc", "hgt_sfc", "hgt_m"),
        *("hsurf", "h_surf", "topo", "topog", "oro", "elev", "dem", "zs", "ht", "terrain_height", "surface_height"),
        *("geopotential_at_surface", "surface_geopotential", "phis", "fis", "z", "geopotential"),
    ),
    units.HEIGHT,
    # As low as the terrain contract of the model goes; the shore of the Dead Sea is at -430 m.
    (-500.0, HIGHEST_GROUND_M),
)
LAND_SEA_MASK = Variable(
    "land_sea_mask", ("lsm", "sftlf", "fr_land", "landmask", "landfrac"), units.FRACTION, (-0.01, 1.01)
)
GROUND = (OROGRAPHY.name, LAND_SEA_MASK.name)
"""What a source tells of the ground, the same at all times."""
CALLED = "climax_elevation_called"
"""Attribute with the source's own name of what was renamed before files were merged."""
LATITUDE_NAMES = ("lattitude", "lat2d")
"""Written from the coordinates, never read. ClimaX's key is really spelled so."""

VARIABLES = (
    OROGRAPHY,
    LAND_SEA_MASK,
    Variable(
        "2m_temperature", ("t2m", "2t", "t2", "tas", "t_2m", "tmp2m", "trefht"), units.TEMPERATURE, (100.0, 400.0)
    ),
    Variable("10m_u_component_of_wind", ("u10", "10u", "u10m", "uas", "u_10m"), units.SPEED, (-250.0, 250.0)),
    Variable("10m_v_component_of_wind", ("v10", "10v", "v10m", "vas", "v_10m"), units.SPEED, (-250.0, 250.0)),
    Variable("mean_sea_level_pressure", ("msl", "mslp", "prmsl", "psl", "pmsl", "slp"), units.PRESSURE, (80e3, 120e3)),
    Variable("surface_pressure", ("sp", "ps", "psfc"), units.PRESSURE, (20e3, 120e3)),
    Variable("toa_incident_solar_radiation", ("tisr",), units.ENERGY, (-1e5, 1e9)),
    Variable("total_precipitation", ("tp", "tot_prec"), units.WATER_DEPTH, (-0.01, 100.0)),
    Variable("geopotential", ("z", "zg", "gh", "hgt", "fi", "h"), units.GEOPOTENTIAL, (-2e4, 1e6), on_levels=True),
    Variable("u_component_of_wind", ("u", "ua", "uwnd"), units.SPEED, (-250.0, 250.0), on_levels=True),
    Variable("v_component_of_wind", ("v", "va", "vwnd"), units.SPEED, (-250.0, 250.0), on_levels=True),
    Variable("temperature", ("t", "ta", "air", "tmp"), units.TEMPERATURE, (100.0, 400.0), on_levels=True),
    Variable("relative_humidity", ("r", "rh", "hur", "rhum", "relhum"), units.PERCENT, (-100.0, 500.0), on_levels=True),
    Variable("specific_humidity", ("q", "hus", "shum", "qv"), units.MIXING, (-0.1, 0.5), on_levels=True),
)


def find_variable(name: str, *, has_levels: bool) -> Variable | None:
    """The variable that a file calls `name`, or None; `z` is orography unless it has levels."""
    lower = name.lower()
    for variable in VARIABLES:
        if variable.on_levels == has_levels and lower in (variable.name, *variable.aliases):
            return variable
    return None


def is_wanted(called: str, names: Sequence[str] | None) -> bool:
    """Whether a source's variable may be one of `names`, with or without a level; None: one that ClimaX knows."""
    base = re.sub(r"_\d+$", "", called)
    known = [find_variable(name, has_levels=levels) for name in (called, base) for levels in (True, False)]
    if names is None:
        return any(known)
    ours = {called, *(variable.name for variable in known if variable is not None)}
    return any(name in ours or re.sub(r"_\d+$", "", name) in ours for name in names)


def conversion(variable: Variable, unit: str | None, called: str) -> Linear:
    """Factor and offset from `unit` to ClimaX's unit of `variable`.

    Args:
        variable: What is converted.
        unit: As the file or the user spells it; None where neither does.
        called: The file's own name for it, for the message.

    Returns:
        Factor and offset: ClimaX's value = factor * value + offset.

    Raises:
        InputError: If the unit is missing or not one of the variable's.
    """
    remedy = f"state the unit with the option units, e.g. {called}={next(iter(variable.units)) or '1'}"
    return units.conversion(variable.units, unit, f"{variable.name} ({called!r} in the source)", remedy)
