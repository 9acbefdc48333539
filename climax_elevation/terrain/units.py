"""Units, as files spell them, and what they are in ClimaX's own."""

from __future__ import annotations

import re
from collections.abc import Mapping

from climax_elevation.errors import InputError

STANDARD_GRAVITY_M_S2 = 9.80665
"""Turns geopotential (m2 s-2) into height (m)."""

Linear = tuple[float, float]
"""value in ClimaX's unit = factor * value + offset."""

Units = Mapping[str, Linear]
"""Spellings, without blanks, carets, stars and dots, in lower case; those of ClimaX's own unit come first."""


def _same(*spellings: str, factor: float = 1.0, offset: float = 0.0) -> dict[str, Linear]:
    return dict.fromkeys(spellings, (factor, offset))


TEMPERATURE = {
    **_same("k", "kelvin", "degk"),
    **_same("degc", "c", "°c", "celsius", "degreescelsius", "degreecelsius", offset=273.15),
    **_same("degf", "f", "°f", "fahrenheit", factor=5 / 9, offset=273.15 - 32 * 5 / 9),
}
SPEED = {
    **_same("ms-1", "m/s", "mps", "meterspersecond", "metrespersecond"),
    **_same("kmh-1", "km/h", factor=1 / 3.6),
    **_same("kt", "kts", "kn", "knot", "knots", factor=1852 / 3600),
}
PRESSURE = {
    **_same("pa", "pascal", "pascals"),
    **_same("hpa", "mb", "mbar", "millibar", "millibars", factor=100.0),
    **_same("kpa", factor=1000.0),
}
_HEIGHT_SPELLINGS = ("m", "metre", "metres", "meter", "meters", "masl", "gpm", "geopotentialmeter")
_GEOPOTENTIAL_SPELLINGS = ("m2s-2", "m2/s2", "jkg-1", "j/kg")
GEOPOTENTIAL = {
    **_same(*_GEOPOTENTIAL_SPELLINGS),
    **_same(*_HEIGHT_SPELLINGS, factor=STANDARD_GRAVITY_M_S2),
}
HEIGHT = {
    **_same(*_HEIGHT_SPELLINGS),
    **_same(*_GEOPOTENTIAL_SPELLINGS, factor=1 / STANDARD_GRAVITY_M_S2),
    **_same("km", factor=1000.0),
    **_same("ft", "foot", "feet", factor=0.3048),
}
WATER_DEPTH = {**_same("m", "metre", "metres"), **_same("mm", "kgm-2", "kg/m2", factor=0.001)}
ENERGY = {**_same("jm-2", "j/m2"), **_same("kjm-2", "kj/m2", factor=1000.0)}
PERCENT = {**_same("%", "percent"), **_same("1", "dimensionless", factor=100.0)}
MIXING = {**_same("kgkg-1", "kg/kg", "1", "dimensionless"), **_same("gkg-1", "g/kg", factor=0.001)}
FRACTION = {
    **_same("", "1", "(0-1)", "0-1", "dimensionless", "none", "proportion", "fraction"),
    **_same("%", "percent", factor=0.01),
}


def conversion(units: Units, unit: str | None, what: str, remedy: str) -> Linear:
    """Factor and offset from a unit to ClimaX's.

    Args:
        units: Those that the quantity may come in.
        unit: As the file or the user spells it; None where neither does.
        what: The quantity, for the message.
        remedy: What to do where it is another.

    Raises:
        InputError: If the unit is missing or not one of them.
    """
    plain = "" if unit is None else re.sub(r"[\s*^_.]", "", unit).lower()
    if plain in units:
        return units[plain]
    known = ", ".join(repr(spelling) for spelling in units if spelling)
    came = f"its unit {unit!r} is not one of them" if plain else "it names no unit"
    raise InputError(f"{what} must come in one of {known}, but {came}: {remedy}")
