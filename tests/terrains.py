"""Terrain for tests, and every bias with arguments that fit it."""

import torch

from climax_elevation import Terrain, build_bias

GRID = (4, 8)
EVERY_BIAS = {
    "adaptive": ("adaptive", {"scale_init": 2.0}),
    "advection": ("advection", {}),
    "multiplicative": ("multiplicative", {}),
    "physics": ("physics", {}),
    "physics without wind": ("physics", {"wind": False, "direction": "both"}),
    "relative_2d": ("relative_2d", {}),
    "relative_3d": ("relative_3d", {"hidden_dim": 16}),
    "relative_3d physical": ("relative_3d", {"coords": "physical", "log_spaced": True}),
    "ridge": ("ridge", {}),
    "ridge both ways": ("ridge", {"wind": False, "direction": "both"}),
    "ridge froude": ("ridge", {"form": "froude", "direction": "query_above"}),
    "structure": ("structure", {}),
    "structure without height": ("structure", {"vertical": False}),
    "topoflow": ("topoflow", {}),
    "sum": ("physics+relative_2d", {"physics": {"alpha_init": 2.0}}),
    "sum with factors": ("advection+structure", {}),
    "sum of three": ("advection+ridge+relative_3d", {"relative_3d": {"hidden_dim": 8}}),
}


def global_terrain(grid=GRID, batch=2, terrain_batch=1, seed=0, dtype=torch.float64, speed_m_s=8.0, hours=24.0):
    """A globe of hills in whole metres, so that half metres are exact, under winds of a few m/s."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = grid
    tokens = rows * columns
    lat = (torch.arange(rows, dtype=dtype) + 0.5) * 180 / rows - 90
    lon = torch.arange(columns, dtype=dtype) * 360 / columns
    elevation = torch.randint(0, 4000, (terrain_batch, tokens), generator=generator).to(dtype)
    u, v = (torch.rand(2, batch, tokens, generator=generator, dtype=dtype) - 0.5) * 2 * speed_m_s
    return Terrain(
        elevation_m=elevation,
        grid=grid,
        u=u,
        v=v,
        speed=torch.hypot(u, v),
        lat=lat.repeat_interleave(columns),
        lon=lon.repeat(rows),
        lead_hours=torch.full((batch,), hours, dtype=dtype),
    )


def make(case, terrain, num_heads=4, seed=0):
    """The bias of a case, prepared for a terrain, in float64."""
    torch.manual_seed(seed)
    name, arguments = EVERY_BIAS[case]
    bias = build_bias(name, num_heads=num_heads, grid=terrain.grid, **arguments).double()
    bias.prepare(terrain)
    return bias
