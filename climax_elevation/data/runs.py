"""Forecast runs: from the time at which one was made and a lead time, to the time that it is for."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import xarray as xr

from climax_elevation.data.names import find_variable
from climax_elevation.data.select import enumerated, listed
from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

_MADE = ("time", "forecast_reference_time", "reftime", "init_time", "initial_time")
_LEADS = ("step", "forecast_period", "lead_time", "leadtime", "prediction_timedelta")
_FOR = "valid_time"
_ACCUMULATED = ("total_precipitation", "toa_incident_solar_radiation")


_SECONDS = {"s": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hr": 3600, "hour": 3600, "d": 86400, "day": 86400}


def with_durations(part: xr.Dataset) -> xr.Dataset:
    """`part` with its lead times as durations, where they are numbers with a unit of time."""
    for name in _LEADS:
        if name in part.coords and np.issubdtype(part[name].dtype, np.number):
            unit = str(part[name].attrs.get("units", "")).lower()
            seconds = _SECONDS.get(unit, _SECONDS.get(unit.removesuffix("s")))
            if seconds is not None:
                exact = np.round(part[name].to_numpy().astype(np.float64) * seconds * 1e9).astype("timedelta64[ns]")
                part = part.assign_coords({name: (part[name].dims, exact)})
    return part


def valid_times(part: xr.Dataset) -> xr.Dataset:
    """`part` along the time that its fields are for.

    One run is a time axis of lead times; one lead time of several runs is a time axis too.

    Raises:
        InputError: If there are several runs of several lead times: names what to choose.
    """
    lead = _first(part, _LEADS)
    made = _first(part, _MADE)
    if lead is None or (made is None and _FOR not in part.coords):
        return _filed_under_valid_time(part, made)
    runs = 1 if made is None else part.sizes.get(made, 1)
    leads = part.sizes.get(lead, 1)
    if runs > 1 and leads > 1:
        times, steps = listed(part[made].to_numpy()), listed(part[lead].to_numpy())
        raise InputError(
            f"{_names(part.data_vars)}: {runs} forecast runs ({times[0]} to {times[-1]}) of {leads} lead times "
            f"({enumerated(steps)} h): choose one lead time of all runs with the option select {lead}={steps[0]}, or "
            f"one run with select {made}={times[0]}, or leave them out with the option variables"
        )
    if leads == 1 and lead in part.dims:
        part = part.isel({lead: 0})
    elif leads > 1 and made in part.dims:
        part = part.isel({made: 0})
    along = lead if lead in part.dims else made if made in part.dims else None
    if along is None:
        return part
    part = _along(part, along, made, lead)
    if along == lead:
        _tell_accumulated(part)
    return part


def _along(part: xr.Dataset, along: str, made: str | None, lead: str) -> xr.Dataset:
    """Time of each field as the dimension `time`, in the place of `along`."""
    if _FOR in part.coords and part[_FOR].size == part.sizes[along]:
        times = part[_FOR].to_numpy().reshape(-1)
    elif np.issubdtype(part[lead].dtype, np.timedelta64):
        times = np.asarray(part[made] + part[lead]).reshape(-1)
    else:
        raise InputError(
            f"lead times {lead!r} are {part[lead].dtype} and have no unit of time, and there is no {_FOR!r}: add it"
        )
    part = part.drop_vars([name for name in (made, lead, _FOR) if name in part.coords])
    return (part if along == "time" else part.rename({along: "time"})).assign_coords(time=("time", times))


def _filed_under_valid_time(part: xr.Dataset, made: str | None) -> xr.Dataset:
    if made is not None and made != _FOR and _FOR in part.coords and part[_FOR].dims == (made,):
        return _along(part, made, made, made)
    return part


def _first(part: xr.Dataset, names: Iterable[str]) -> str | None:
    here = [name for name in names if name in part.coords]
    return next((name for name in here if part[name].ndim), here[0] if here else None)


def _tell_accumulated(part: xr.Dataset) -> None:
    found = [
        name for name, array in part.data_vars.items() if "time" in array.dims and is_accumulated(str(name), array)
    ]
    if found:
        logger.warning(
            "%s: accumulated from the start of the forecast, so that values rise with lead time: take differences "
            "first, or leave them out with the option variables",
            _names(found),
        )


def is_accumulated(called: str, array: xr.DataArray) -> bool:
    """Whether a field is a sum over the time since a forecast began, by its attributes or its name."""
    said = f"{array.attrs.get('GRIB_stepType', '')} {array.attrs.get('cell_methods', '')}"
    variable = find_variable(called, has_levels=False)
    return "accum" in said or "time: sum" in said or (variable is not None and variable.name in _ACCUMULATED)


def _names(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))
