"""What weather services infer a value from others with: inverse distance, and optimal interpolation.

Anomalies x of places, of which some are visible (v); d is the chord between two places, dz their difference in height:

    inverse distance         x_i = sum_v d_iv^-p x_v / sum_v d_iv^-p
    optimal interpolation    x_i = C_iv (C_vv + e I)^-1 x_v
                             C_ij = exp(-d^2 / 2 L^2) or exp(-d / L), times exp(-dz^2 / 2 V^2) with heights

p, or L, e and V, and which of the two forms, are those of the least squared error at hidden places of the training.

Source: Gandin, Objective analysis of meteorological fields (1963); structure functions as in gridpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

EARTH_RADIUS_KM = 6371.0
POWERS = (0.1, 8.0)
NEAREST_KM = 1e-3  # places are apart, if only in height
NOISE, HEIGHT_SCALE_M = 0.3, 500.0  # where the search begins
TIMES_AT_A_TIME = 256
FORMS: dict[str, Callable[[Array], Array]] = {
    "Gaussian": lambda scaled: np.exp(-(scaled**2) / 2),
    "exponential": lambda scaled: np.exp(-scaled),
}


@dataclass(frozen=True)
class Places:
    """Where stations are, or the centres of patches, two by two.

    Attributes:
        distance_km: Chord, `[S, S]`.
        rise_m: Difference in height, `[S, S]`.
    """

    distance_km: Array
    rise_m: Array

    @staticmethod
    def of(lat: Array, lon: Array, elevation_m: Array) -> Places:
        """From degrees and metres, `[S]` each."""
        phi, lam = np.deg2rad(lat), np.deg2rad(lon)
        x = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=1)
        chord = np.sqrt(np.square(x[:, None] - x).sum(axis=2))
        return Places(EARTH_RADIUS_KM * chord, elevation_m[:, None] - elevation_m)

    def only(self, chosen: NDArray[np.integer]) -> Places:
        """Of some of the stations."""
        return Places(self.distance_km[np.ix_(chosen, chosen)], self.rise_m[np.ix_(chosen, chosen)])


@dataclass(frozen=True)
class Interpolation:
    """A fitted method.

    Attributes:
        name: For tables.
        parameters: What was fitted, by name with its unit.
        infer: Of anomalies `[T, S]`, which of them are visible `[T, S]`, and the places: a value everywhere, `[T, S]`.
    """

    name: str
    parameters: dict[str, float | str]
    infer: Callable[[Array, Mask, Places], Array]


def fit_all(x: Array, visible: Mask, scored: Mask, places: Places) -> list[Interpolation]:
    """Inverse distance, and optimal interpolation without heights and with them; arguments as `fit_optimal`'s."""
    given = (x, visible, scored, places)
    return [fit_inverse_distance(*given), fit_optimal(*given, heights=False), fit_optimal(*given, heights=True)]


def fit_inverse_distance(x: Array, visible: Mask, scored: Mask, places: Places) -> Interpolation:
    """The power p of the least squared error where `scored`; arguments as `Interpolation.infer`'s."""

    def error(p: float) -> float:
        return _error(inverse_distance(x, visible, places, p), x, scored)

    power = float(minimize_scalar(error, bounds=POWERS, method="bounded").x)
    return Interpolation("inverse distance", {"p": power}, lambda x, v, at: inverse_distance(x, v, at, power))


def fit_optimal(x: Array, visible: Mask, scored: Mask, places: Places, *, heights: bool) -> Interpolation:
    """Form, L, e and, with `heights`, V of the least squared error where `scored`."""
    apart = places.distance_km[~np.eye(len(places.distance_km), dtype=bool)]
    first = [np.log(np.median(apart)), np.log(NOISE), *([np.log(HEIGHT_SCALE_M)] if heights else [])]
    best: tuple[float, str, Array] | None = None
    for form in FORMS:

        def error(logs: Array, form: str = form) -> float:
            return _error(_optimal(x, visible, places, form, logs), x, scored)

        found = minimize(error, first, method="Nelder-Mead", options={"xatol": 0.02, "fatol": 1e-5, "maxfev": 200})
        if best is None or found.fun < best[0]:
            best = float(found.fun), form, found.x
    assert best is not None  # there is a form
    _, form, logs = best
    values = np.exp(logs)
    parameters: dict[str, float | str] = {"form": form, "L, km": float(values[0]), "e": float(values[1])}
    if heights:
        parameters["V, m"] = float(values[2])
    name = f"optimal interpolation, distance{' and height' if heights else ''}"
    return Interpolation(name, parameters, lambda x, v, at: _optimal(x, v, at, form, logs))


def inverse_distance(x: Array, visible: Mask, places: Places, power: float) -> Array:
    """The means of what is visible, weighted as at the top; a visible place does not count for itself."""
    weight = np.maximum(places.distance_km, NEAREST_KM) ** -power
    np.fill_diagonal(weight, 0.0)
    known = np.where(visible, x, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num((known @ weight) / (visible @ weight))


def _optimal(x: Array, visible: Mask, places: Places, form: str, logs: Array) -> Array:
    length, noise, *height = np.exp(np.clip(logs, -12, 12))
    covariance = FORMS[form](places.distance_km / length)
    if height:
        covariance = covariance * np.exp(-((places.rise_m / height[0]) ** 2) / 2)
    result = np.empty(x.shape)
    most = int(visible.sum(axis=1).max(initial=0))
    diagonal = np.arange(most)
    for rows in np.array_split(np.arange(len(x)), max(1, len(x) // TIMES_AT_A_TIME)):
        # the visible ones first; a row that has fewer is filled up with others, whose weight is 0
        chosen = np.argsort(~visible[rows], axis=1, kind="stable")[:, :most]
        seen = np.take_along_axis(visible[rows], chosen, axis=1)
        known = np.where(seen, np.take_along_axis(x[rows], chosen, axis=1), 0.0)
        system = covariance[chosen[:, :, None], chosen[:, None, :]] * (seen[:, :, None] & seen[:, None, :])
        system[:, diagonal, diagonal] = np.where(seen, 1 + noise, 1.0)
        weights = np.zeros(visible[rows].shape)
        np.put_along_axis(weights, chosen, np.linalg.solve(system, known[..., None])[..., 0] * seen, axis=1)
        result[rows] = weights @ covariance
    return result


def _error(inferred: Array, x: Array, scored: Mask) -> float:
    return float(np.square(inferred - x)[scored].mean())
