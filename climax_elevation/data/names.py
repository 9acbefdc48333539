"""ClimaX's variable names, the other names files give them, and their units."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from climax_elevation.elevation_file import STANDARD_GRAVITY_M_S2
from climax_elevation.errors import InputError

"""Standard gravity, which turns ECMWF's geopotential (m2 s-2) into height (m)."""

CLIMAX_LEVELS_HPA = (50, 250, 500, 600, 700, 850, 925)
"""The pressure levels that ClimaX was pretrained on."""

HIGHEST_GROUND_M = 9000.0
"""No ground is higher, so a larger value is not in metres (Everest: 8849 m)."""

Linear = tuple[float, float]
"""value in ClimaX's unit = factor * value + offset."""


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
    units: Mapping[str, Linear]
    valid: tuple[float, float]
    on_levels: bool = False


def _same(*spellings: str, factor: float = 1.0, offset: float = 0.0) -> dict[str, Linear]:
    return dict.fromkeys(spellings, (factor, offset))


_TEMPERATURE = {
    **_same("k", "kelvin", "degk"),
    **_same("degc", "c", "°c", "celsius", "degreescelsius", "degreecelsius", offset=273.15),
    **_same("degf", "f", "°f", "fahrenheit", factor=5 / 9, offset=273.15 - 32 * 5 / 9),
}
_SPEED = {
    **_same("ms-1", "m/s", "mps", "meterspersecond", "metrespersecond"),
    **_same("kmh-1", "km/h", factor=1 / 3.6),
    **_same("kt", "kts", "kn", "knot", "knots", factor=1852 / 3600),
}
_PRESSURE = {
    **_same("pa", "pascal", "pascals"),
    **_same("hpa", "mb", "mbar", "millibar", "millibars", factor=100.0),
    **_same("kpa", factor=1000.0),
}
_HEIGHT_SPELLINGS = ("m", "metre", "metres", "meter", "meters", "gpm", "geopotentialmeter")
_GEOPOTENTIAL_SPELLINGS = ("m2s-2", "m2/s2", "jkg-1", "j/kg")
_GEOPOTENTIAL = {
    **_same(*_GEOPOTENTIAL_SPELLINGS),
    **_same(*_HEIGHT_SPELLINGS, factor=STANDARD_GRAVITY_M_S2),
}
_HEIGHT = {
    **_same(*_HEIGHT_SPELLINGS),
    **_same(*_GEOPOTENTIAL_SPELLINGS, factor=1 / STANDARD_GRAVITY_M_S2),
    **_same("km", factor=1000.0),
    **_same("ft", "feet", factor=0.3048),
}
_WATER_DEPTH = {**_same("m", "metre", "metres"), **_same("mm", "kgm-2", "kg/m2", factor=0.001)}
_ENERGY = {**_same("jm-2", "j/m2"), **_same("kjm-2", "kj/m2", factor=1000.0)}
_PERCENT = {**_same("%", "percent"), **_same("1", "dimensionless", factor=100.0)}
_MIXING = {**_same("kgkg-1", "kg/kg", "1", "dimensionless"), **_same("gkg-1", "g/kg", factor=0.001)}
_FRACTION = {
    **_same("", "1", "(0-1)", "0-1", "dimensionless", "none", "proportion", "fraction"),
    **_same("%", "percent", factor=0.01),
}

OROGRAPHY = Variable(
    "orography",
    (
        *("orog", "topography", "elevation", "surface_altitude", "hgt", "hgt_surface", "hgtsfc", "hgt_sfc"),
        *("geopotential_at_surface", "surface_geopotential", "phis", "z", "geopotential"),
    ),
    _HEIGHT,
    # As low as the terrain contract of the model goes; the shore of the Dead Sea is at -430 m.
    (-500.0, HIGHEST_GROUND_M),
)
LAND_SEA_MASK = Variable("land_sea_mask", ("lsm",), _FRACTION, (-0.01, 1.01))
LATITUDE_NAMES = ("lattitude", "lat2d")
"""Written from the coordinates, never read. ClimaX's key is really spelled so."""

VARIABLES = (
    OROGRAPHY,
    LAND_SEA_MASK,
    Variable("2m_temperature", ("t2m", "2t", "t2"), _TEMPERATURE, (100.0, 400.0)),
    Variable("10m_u_component_of_wind", ("u10", "10u", "u10m"), _SPEED, (-250.0, 250.0)),
    Variable("10m_v_component_of_wind", ("v10", "10v", "v10m"), _SPEED, (-250.0, 250.0)),
    Variable("mean_sea_level_pressure", ("msl", "mslp", "prmsl"), _PRESSURE, (80e3, 120e3)),
    Variable("surface_pressure", ("sp",), _PRESSURE, (20e3, 120e3)),
    Variable("toa_incident_solar_radiation", ("tisr",), _ENERGY, (-1e5, 1e9)),
    Variable("total_precipitation", ("tp",), _WATER_DEPTH, (-0.01, 100.0)),
    Variable("geopotential", ("z",), _GEOPOTENTIAL, (-2e4, 1e6), on_levels=True),
    Variable("u_component_of_wind", ("u",), _SPEED, (-250.0, 250.0), on_levels=True),
    Variable("v_component_of_wind", ("v",), _SPEED, (-250.0, 250.0), on_levels=True),
    Variable("temperature", ("t",), _TEMPERATURE, (100.0, 400.0), on_levels=True),
    Variable("relative_humidity", ("r", "rh"), _PERCENT, (-100.0, 500.0), on_levels=True),
    Variable("specific_humidity", ("q",), _MIXING, (-0.1, 0.5), on_levels=True),
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
    plain = "" if unit is None else re.sub(r"[\s*^_.]", "", unit).lower()
    if plain in variable.units:
        return variable.units[plain]
    known = ", ".join(repr(spelling) for spelling in variable.units if spelling)
    came = f"its unit {unit!r} is not one of them" if plain else "it names no unit"
    raise InputError(
        f"{variable.name} ({called!r} in the source) must come in one of {known}, but {came}: "
        f"state the unit with the option units, e.g. {called}={next(iter(variable.units)) or '1'}"
    )
