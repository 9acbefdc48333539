"""ClimaX's shard format: what is written where, and nothing ever half written.

OUT/train|val|test/*.npz                     one array [N, 1, H, W] float32 a variable
OUT/val|test/climatology.npz                 one array [1, H, W] a variable
OUT/normalize_mean.npz, normalize_std.npz    one array (1,) a variable
OUT/lat.npy, lon.npy                         [H] and [W], degrees
"""

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from climax_elevation.errors import InputError
from climax_elevation.files import Arrays

PARTITIONS = ("train", "val", "test")


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a partition's folder, in order."""
    return sorted(path for path in folder.glob("*.npz") if is_shard(path))


def is_shard(path: Path) -> bool:
    """Whether a file of a partition's folder is one of its shards."""
    return path.suffix == ".npz" and "climatology" not in path.name


def check_space(out: Path, needed: int) -> None:
    """Raise InputError unless shards of so many bytes fit on the disk of a folder, which need not be there yet."""
    free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.exists())).free
    if needed > free:
        raise InputError(
            f"the shards need {needed / 2**30:.1f} GiB, the disk of {out} has {free / 2**30:.1f} GiB free: "
            "free some, or choose another folder"
        )


class RunningStatistics:
    """Mean, standard deviation and climatology of shards seen one at a time, in float64.

    Mean and standard deviation are over time and space, as ClimaX's `normalize_*.npz` have them;
    the climatology is the time mean of each pixel. Latitude does not weigh, as in ClimaX.
    Squares are summed about each shard's own mean, so that nothing cancels.
    """

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}
        self._sum: dict[str, NDArray[np.float64]] = {}
        self._squares: dict[str, float] = {}

    def update(self, arrays: Arrays) -> None:
        """Add a shard: arrays `[N, 1, H, W]`."""
        for name, values in arrays.items():
            exact = np.asarray(values, dtype=np.float64)
            squares = float(np.square(exact - exact.mean()).sum())
            if name in self._sum:
                seen = self._steps[name] * self._sum[name].size
                apart = float(exact.mean() - self.mean()[name][0])
                squares += self._squares[name] + apart**2 * seen * exact.size / (seen + exact.size)
            self._steps[name] = self._steps.get(name, 0) + exact.shape[0]
            self._sum[name] = self._sum.get(name, np.zeros(exact.shape[1:])) + exact.sum(axis=0)
            self._squares[name] = squares

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """Mean of each variable, shape (1,)."""
        return {name: climate.mean().reshape(1) for name, climate in self.climatology().items()}

    def std(self) -> dict[str, NDArray[np.float64]]:
        """Standard deviation of each variable, shape (1,)."""
        sizes = {name: self._steps[name] * total.size for name, total in self._sum.items()}
        return {name: np.sqrt([squares / sizes[name]]) for name, squares in self._squares.items()}

    def climatology(self) -> dict[str, NDArray[np.float64]]:
        """Time mean of each variable, shape [1, H, W]."""
        return {name: total / self._steps[name] for name, total in self._sum.items()}
