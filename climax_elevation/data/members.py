"""Dimensions of which ClimaX takes one value: members of an ensemble, versions of an experiment."""

from __future__ import annotations

import logging

import numpy as np
import xarray as xr

from climax_elevation.data.select import enumerated, listed
from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

_MEMBERS = ("number", "realization", "member", "member_id", "ensemble", "ens", "expver")
_FINAL, _PRELIMINARY = "1", "5"
_BLOCK_STEPS = 64


def one_member(part: xr.Dataset) -> xr.Dataset:
    """`part` without dimensions of members and versions.

    ERA5 and its preliminary version ERA5T, which the Climate Data Store files as experiments 1 and 5, are joined: at
    each place and time ERA5's value where there is one.

    Raises:
        InputError: If there are several members, or other versions.
    """
    for dimension in list(part.sizes):
        if str(dimension).lower() not in _MEMBERS or part.sizes[dimension] == 1:
            continue
        coordinate = part[dimension] if dimension in part.coords else xr.DataArray(np.arange(part.sizes[dimension]))
        values = listed(coordinate.to_numpy())
        versions = [value.lstrip("0") for value in values]
        if dimension == "expver" and sorted(versions) == [_FINAL, _PRELIMINARY]:
            part = _joined(part, versions.index(_FINAL), versions.index(_PRELIMINARY))
            continue
        raise InputError(
            f"the source has {len(values)} values of {str(dimension)!r}, ClimaX takes one: choose with the option "
            f"select {dimension}={values[0]} (there are {enumerated(values)})"
        )
    if "expver" in part.coords and part["expver"].ndim == 1 and len(np.unique(part["expver"])) > 1:
        logger.info(
            "ERA5 and ERA5T (expver %s) follow one another in time", ", ".join(listed(np.unique(part["expver"])))
        )
    return part


def _joined(part: xr.Dataset, final: int, preliminary: int) -> xr.Dataset:
    logger.info("expver 1 (ERA5) and 5 (ERA5T) joined: ERA5's value where there is one")
    joined = {}
    for name, array in part.data_vars.items():
        if "expver" not in array.dims:
            continue
        times = [str(dimension) for dimension in array.dims if str(dimension) in ("time", "valid_time", "step")]
        lazy = array.chunk({dimension: _BLOCK_STEPS for dimension in times})  # computed step by step, never at once
        first, second = (lazy.isel(expver=index, drop=True) for index in (final, preliminary))
        joined[name] = first.fillna(second).assign_attrs(array.attrs)
    return part.drop_dims("expver").assign(joined)
