"""A terrain bias of one's own: ground above the snow line attends to its like."""

import torch
from torch import nn

from climax_elevation import ElevationBias


class SnowLineBias(ElevationBias):
    """b[i, j] = gamma s_i s_j, with s = tanh((z - snow_line_m) / 500 m)."""

    def __init__(self, *, snow_line_m: float = 2500.0, gamma_init: float = 0.5) -> None:
        super().__init__()
        self.snow_line_m = snow_line_m
        self.gamma = nn.Parameter(torch.tensor([gamma_init]))

    def inputs(self, terrain):
        return (terrain.elevation_m,)

    def features(self, elevation):  # once a token, [B or 1, L]
        return (torch.tanh((elevation.to(self.value_dtype()) - self.snow_line_m) / 500),)

    def pairwise(self, query, key):  # every query with every key, [B or 1, 1, Lq, Lk]
        return (self.gamma * query[0][:, :, None] * key[0][:, None])[:, None]
