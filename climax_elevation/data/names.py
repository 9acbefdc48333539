"""ClimaX's variable names, the other names files give them, and their units."""

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
        aliases: Other names, lower case: ERA5's short name, GRIB's, WeatherBench's.
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
        *("orog", "topography", "elevation", "surface_altitude", "hgt", "hgt_surface", "hgtsfc", "hgt_sfc"),
        *("geopotential_at_surface", "surface_geopotential", "phis", "z", "geopotential"),
    ),
    units.HEIGHT,
    # As low as the terrain contract of the model goes; the shore of the Dead Sea is at -430 m.
    (-500.0, HIGHEST_GROUND_M),
)
LAND_SEA_MASK = Variable("land_sea_mask", ("lsm",), units.FRACTION, (-0.01, 1.01))
LATITUDE_NAMES = ("lattitude", "lat2d")
"""Written from the coordinates, never read. ClimaX's key is really spelled so."""

VARIABLES = (
    OROGRAPHY,
    LAND_SEA_MASK,
    Variable("2m_temperature", ("t2m", "2t", "t2"), units.TEMPERATURE, (100.0, 400.0)),
    Variable("10m_u_component_of_wind", ("u10", "10u", "u10m"), units.SPEED, (-250.0, 250.0)),
    Variable("10m_v_component_of_wind", ("v10", "10v", "v10m"), units.SPEED, (-250.0, 250.0)),
    Variable("mean_sea_level_pressure", ("msl", "mslp", "prmsl"), units.PRESSURE, (80e3, 120e3)),
    Variable("surface_pressure", ("sp",), units.PRESSURE, (20e3, 120e3)),
    Variable("toa_incident_solar_radiation", ("tisr",), units.ENERGY, (-1e5, 1e9)),
    Variable("total_precipitation", ("tp",), units.WATER_DEPTH, (-0.01, 100.0)),
    Variable("geopotential", ("z",), units.GEOPOTENTIAL, (-2e4, 1e6), on_levels=True),
    Variable("u_component_of_wind", ("u",), units.SPEED, (-250.0, 250.0), on_levels=True),
    Variable("v_component_of_wind", ("v",), units.SPEED, (-250.0, 250.0), on_levels=True),
    Variable("temperature", ("t",), units.TEMPERATURE, (100.0, 400.0), on_levels=True),
    Variable("relative_humidity", ("r", "rh"), units.PERCENT, (-100.0, 500.0), on_levels=True),
    Variable("specific_humidity", ("q",), units.MIXING, (-0.1, 0.5), on_levels=True),
)


def find_variable(name: str, *, has_levels: bool) -> Variable | None:
    """The variable that a file calls `name`, or None; `z` is orography unless it has levels."""
    lower = name.lower()
    for variable in VARIABLES:
        if variable.on_levels == has_levels and lower in (variable.name, *variable.aliases):
            return variable
    return None


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
