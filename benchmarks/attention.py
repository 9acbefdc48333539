"""Biased attention beside unbiased attention: time, forward and backward, and memory, in one run.

    python benchmarks/attention.py              every bias at 512 tokens; physics and relative_3d at 2048 and 8192 too
    python benchmarks/attention.py --short      64, 128 and 256 tokens: from where on "tiled" is faster
    python benchmarks/attention.py --engines dense sdpa tiled       each of them

Every variant is timed in turn, round after round, so that a machine's moods meet all alike; what is
printed is the median of the rounds' ratios to torch's unbiased fused attention of the same round. Memory
is the peak of a process of its own over what it held before, less the same of unbiased attention. A bias of
zeros goes through the loops of "tiled" as well: what a bias costs is the difference to that, and what the loops
gain is the difference of that to 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from climax_elevation import ElevationBias, Terrain, available_biases, biased_attention, build_bias
from climax_elevation.attention import ENGINES, choose_engine
from climax_elevation.attention.columns import NoBias
from climax_elevation.bias.base import Tensors, map_tensors


@dataclass(frozen=True)
class Shape:
    """Of queries, keys and values; the grid is twice as wide as high."""

    tokens: int
    batch: int
    heads: int
    width: int

    @property
    def grid(self) -> tuple[int, int]:
        rows = 1 << ((self.tokens.bit_length() - 1) // 2)
        return rows, self.tokens // rows

    def __str__(self) -> str:
        return f"{self.tokens} tokens, B{self.batch} H{self.heads} d{self.width}"


SHAPES = [Shape(512, 4, 16, 64), Shape(2048, 1, 8, 96), Shape(8192, 1, 8, 96)]
SHORT = [Shape(tokens, 4, 16, 64) for tokens in (64, 128, 256)]
GROWTH = [Shape(1 << power, 1, 8, 96) for power in range(9, 16)]
MAIN = {
    "physics": ("physics", {"wind": False}),
    "physics with wind": ("physics", {}),
    "relative_3d": ("relative_3d", {}),
}
LONG_FROM = 1024  # tokens, from where on only these are measured unless others are named
UNBIASED = "unbiased"
ZERO = "no bias, the same loops"


@dataclass
class Row:
    """One variant at one shape; times and ratios of forward and backward together."""

    bias: str
    engine: str
    shape: str
    tokens: int
    seconds: float
    ratio: float
    lowest: float
    highest: float
    extra_mb: float | None = None


def terrain(shape: Shape, device: str) -> Terrain:
    """Hills and winds over a globe; one ground for the batch, as `static_terrain` gives it."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape.grid
    lat = ((torch.arange(rows) + 0.5) * 180 / rows - 90).repeat_interleave(columns)
    lon = (torch.arange(columns) * 360 / columns).repeat(rows)
    u, v = torch.randn(2, shape.batch, shape.tokens, generator=generator) * 6
    made = {
        "elevation_m": (torch.randn(1, shape.tokens, generator=generator) * 1500).clamp(0, 6000).round(),
        "u": u,
        "v": v,
        "speed": torch.hypot(u, v),
        "lat": lat,
        "lon": lon,
        "lead_hours": torch.full((shape.batch,), 24.0),
    }
    return Terrain(grid=shape.grid, **{name: value.to(device) for name, value in made.items()})


class Variant:
    """Attention of one kind, ready to run forward and backward."""

    def __init__(self, label: str, engine: str, shape: Shape, device: str, dtype: torch.dtype, biases: dict) -> None:
        torch.manual_seed(0)
        self.label, self.engine = label, engine
        size = (shape.batch, shape.heads, shape.tokens, shape.width)
        self.q, self.k, self.v = (torch.randn(size, device=device, dtype=dtype).requires_grad_() for _ in range(3))
        self.upstream = torch.randn(size, device=device, dtype=dtype)
        self.device = device
        self.bias: ElevationBias | None = None
        self.inputs: Tensors = ()
        if label != UNBIASED:
            ground = terrain(shape, device)
            if label == ZERO:
                self.bias, self.inputs = NoBias(), (ground.elevation_m,)
                return
            name, arguments = biases[label]
            self.bias = build_bias(name, num_heads=shape.heads, grid=shape.grid, **arguments).to(device)
            self.bias.prepare(ground)
            self.inputs = map_tensors(lambda values: values.contiguous(), self.bias.inputs(ground))

    def run(self) -> float:
        """Seconds of forward and backward."""
        self.synchronize()
        started = time.perf_counter()
        if self.bias is None:
            out = scaled_dot_product_attention(self.q, self.k, self.v)
        else:
            out = biased_attention(self.q, self.k, self.v, self.bias, self.inputs, engine=self.engine)
        out.backward(self.upstream)
        self.synchronize()
        seconds = time.perf_counter() - started
        for leaf in (self.q, self.k, self.v, *(self.bias.parameters() if self.bias else ())):
            leaf.grad = None
        return seconds

    def chosen(self) -> str:
        """The engine that ran."""
        if self.bias is None:
            return "sdpa"
        tokens, dtype = self.q.shape[2], self.q.dtype
        return choose_engine(self.engine, self.bias, tokens=tokens, device=self.device, dtype=dtype)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(shape: Shape, labels: list[tuple[str, str]], options: argparse.Namespace, biases: dict) -> list[Row]:
    """One row a (bias, engine), unbiased first."""
    dtype = getattr(torch, options.dtype)
    variants = [Variant(UNBIASED, "", shape, options.device, dtype, biases)]
    variants += [Variant(label, engine, shape, options.device, dtype, biases) for label, engine in labels]
    for variant in variants:
        variant.run()
    rounds = options.rounds or max(5, min(41, int(60 / sum(variant.run() for variant in variants))))
    times = [
        [variant.run() for variant in variants] for _ in tqdm(range(rounds), desc=str(shape), unit="round", leave=False)
    ]
    rows = []
    for index, variant in enumerate(variants):
        ratios = sorted(round_[index] / round_[0] for round_ in times)
        engine = variant.chosen()
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        seconds = median(round_[index] for round_ in times)
        rows.append(Row(variant.label, engine, str(shape), shape.tokens, seconds, median(ratios), low, high))
    return rows


def peak_mb(label: str, engine: str, shape: Shape, options: argparse.Namespace) -> float:
    """Peak memory of one forward and backward, MB, in a process of its own."""
    request = json.dumps({"label": label, "engine": engine, "shape": asdict(shape)})
    command = [sys.executable, __file__, "--peak-of", request, "--dtype", options.dtype, "--device", options.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_here(options: argparse.Namespace) -> float:
    request = json.loads(options.peak_of)
    shape = Shape(**request["shape"])
    dtype = getattr(torch, options.dtype)
    variants = [
        Variant(request["label"], request["engine"], each, options.device, dtype, cases())
        for each in (Shape(256, 1, shape.heads, shape.width), shape)
    ]
    variants[0].run()  # what is loaded at the first call is not attention's
    return peak_of(variants[1])[1]


def peak_of(variant: Variant) -> tuple[float, float]:
    """Seconds of a run, and its peak memory over what was held before, MB."""
    if variant.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return variant.run(), torch.cuda.max_memory_allocated() / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident_mb("VmRSS")
    seconds = variant.run()
    return seconds, resident_mb("VmHWM") - before


def resident_mb(field: str) -> float:
    """This process's memory now, or at its peak; Linux tells in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def cases() -> dict[str, tuple[str, dict]]:
    """Every bias, by what rows call it."""
    others: dict[str, tuple[str, dict]] = {name: (name, {}) for name in available_biases() if name not in MAIN}
    return MAIN | others


def table(rows: list[Row]) -> str:
    lines = ["| bias | engine | shape | seconds | over unbiased | middle half | extra memory |", "|---" * 7 + "|"]
    for row in rows:
        memory = "" if row.extra_mb is None else f"{row.extra_mb:.0f} MB"
        lines.append(
            f"| {row.bias} | {row.engine} | {row.shape} | {row.seconds:.4f} | {row.ratio:.2f} | "
            f"{row.lowest:.2f} to {row.highest:.2f} | {memory} |"
        )
    return "\n".join(lines)


def machine(options: argparse.Namespace) -> dict[str, str | int]:
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": options.dtype}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="64 to 256 tokens: from where on 'tiled' is faster")
    parser.add_argument("--engines", nargs="+", default=["auto"], choices=["auto", *ENGINES])
    parser.add_argument("--tokens", nargs="+", type=int, help="only the shapes of these lengths")
    parser.add_argument("--bias", nargs="+", choices=[ZERO, *cases()], help="only these, at every length")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, help="default: as many as a minute holds, 5 to 41")
    parser.add_argument("--no-memory", action="store_true", help="skip the processes that measure memory")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(peak_here(options))
        return
    rows = []
    for shape in SHORT if options.short else SHAPES:
        if options.tokens and shape.tokens not in options.tokens:
            continue
        biases = options.bias or [ZERO, *(cases() if shape.tokens < LONG_FROM else MAIN)]
        labels = [(bias, engine) for bias in biases for engine in options.engines]
        found = measure(shape, labels, options, cases())
        if not options.no_memory:
            plain = peak_mb(UNBIASED, "", shape, options)
            for row, (label, engine) in zip(found[1:], labels, strict=True):
                row.extra_mb = peak_mb(label, engine, shape, options) - plain
        rows += found
        print(table(found), flush=True)
    if options.json:
        found_all = {"machine": machine(options), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found_all, indent=1))


if __name__ == "__main__":
    main()
