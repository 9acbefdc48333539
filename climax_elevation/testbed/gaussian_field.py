"""A simulated field over real terrain whose covariance is known, and with it the least error that is possible."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from climax_elevation.terrain.sphere import EARTH_RADIUS_M, unit_vectors
from climax_elevation.testbed.altitude import ElevationMap

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

NUGGET = 1e-6  # of the variance; keeps the matrix of places that are nearly alike invertible


class GaussianField:
    """A Gaussian process of mean 0 and variance 1 over the cells of a map.

        C_ij = exp(-d(i, j)^2 / (2 L^2) - (z_i - z_j)^2 / (2 V^2))

    d is the chord between two cells and z their elevation. Valleys near each other are alike, as under one pool of cold
    air, and the heights between them are not.

    Args:
        ground: The cells.
        length_m: L, metres.
        height_m: V, metres.
    """

    def __init__(self, ground: ElevationMap, length_m: float, height_m: float) -> None:
        self.ground, self.length_m, self.height_m = ground, length_m, height_m

    @cached_property
    def covariance(self) -> Array:
        """C and the nugget, `[cells, cells]`, rows of the map after each other."""
        lat, lon = np.meshgrid(self.ground.lat, self.ground.lon, indexing="ij")
        places = unit_vectors(torch.from_numpy(lat.ravel()), torch.from_numpy(lon.ravel())).numpy() * EARTH_RADIUS_M
        height = self.ground.elevation_m.ravel()
        chord = np.linalg.norm(places[:, None] - places, axis=2)
        exponent = (chord / self.length_m) ** 2 + ((height[:, None] - height) / self.height_m) ** 2
        return np.exp(-exponent / 2) + NUGGET * np.eye(height.size)

    def simulate(self, count: int, rng: np.random.Generator) -> Array:
        """Independent fields, `[count, cells]`."""
        root = np.linalg.cholesky(self.covariance)
        return rng.standard_normal((count, len(root))) @ root.T

    def infer(self, values: Array, visible: Mask) -> Array:
        """Kriging with the true covariance: the mean of all fields that agree with what is visible.

            x = C_.v C_vv^-1 x_v

        No function of the visible values has a smaller mean squared error.

        Args:
            values: `[fields, cells]`; only those that are visible are read.
            visible: `[fields, cells]`.

        Returns:
            `[fields, cells]`.
        """
        c = self.covariance
        return np.stack(
            [c[:, v] @ np.linalg.solve(c[np.ix_(v, v)], x[v]) for x, v in zip(values, visible, strict=True)]
        )


def visible_cells(fields: int, cells: int, share: float, rng: np.random.Generator) -> Mask:
    """A random choice for each field, all of the same size, `[fields, cells]`."""
    return rng.random((fields, cells)).argsort(axis=1) < round(share * cells)
