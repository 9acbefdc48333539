"""The engines that this machine's CPU can run: "triton" through its interpreter, see conftest."""

import os

from climax_elevation.attention import ENGINES
from climax_elevation.attention.engines.triton import INSTALLED

INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
CPU_ENGINES = [name for name in ENGINES if name != "triton" or INTERPRETED]
TRITON_CASES = ("physics", "physics without wind", "relative_3d")  # of terrains.EVERY_BIAS
