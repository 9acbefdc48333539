"""How time and memory of attention with a bias grow with the number of tokens, engine by engine.

    python benchmarks/growth.py --json benchmarks/results/growth_cpu.json --plot docs/growth

Where the JSON is already there, it is printed and drawn again; delete it to measure anew.

Each point is a process of its own that may take `--limit-gb` of address space; where that is not enough, the
point is left out. A short run first loads what libraries load. Then comes one forward and backward, or, below
16384 tokens, the median of three. Memory is the peak of the first over what was held before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from attention import GROWTH, UNBIASED, Shape, Variant, cases, machine, peak_of
from tqdm import tqdm

REPEATED_BELOW = 16384  # tokens
STYLES = {
    "unbiased": ("0.3", ":", "o"),
    "dense": ("#d55e00", "-.", "^"),
    "sdpa": ("#e69f00", "--", "s"),
    "tiled": ("#0072b2", "-", "D"),
}


def measure(label: str, engine: str, shape: Shape) -> dict:
    """Seconds, and MB over what was held before, of one forward and backward here."""
    Variant(label, engine, Shape(256, 1, shape.heads, shape.width), "cpu", torch.float32, cases()).run()
    variant = Variant(label, engine, shape, "cpu", torch.float32, cases())
    seconds, megabytes = peak_of(variant)
    if shape.tokens < REPEATED_BELOW:
        seconds = median([variant.run() for _ in range(3)])
    return {"tokens": shape.tokens, "seconds": seconds, "mb": megabytes}


def point(label: str, engine: str, shape: Shape, limit_gb: float) -> dict | None:
    """`measure` in a process of its own; None where memory does not suffice."""
    command = [sys.executable, __file__, "--point", json.dumps([label, engine, shape.tokens])]
    limit = int(limit_gb * 1e9)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    if done.returncode:
        if "allocate memory" in done.stderr or "MemoryError" in done.stderr:
            return None
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def plot(found: dict, path: Path) -> None:
    """Two panels, time and memory, with logarithmic axes; PNG and PDF."""
    from climax_elevation.draw.plots import new_figure, readable_fonts, save

    with readable_fonts():
        figure = new_figure(11, 5)
        for axes, of, label in zip(
            figure.subplots(1, 2), ("seconds", "mb"), ("forward and backward (s)", "peak memory (MB)"), strict=True
        ):
            for engine, points in found["points"].items():
                colour, line, marker = STYLES[engine]
                name = engine if engine == UNBIASED else f"{engine}, {found['bias']}"
                axes.loglog(
                    [p["tokens"] for p in points],
                    [p[of] for p in points],
                    line,
                    marker=marker,
                    color=colour,
                    lw=2,
                    label=name,
                )
            ticks = [shape.tokens for shape in GROWTH]
            axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axes.tick_params(axis="x", labelrotation=45)
            axes.set_xlabel("tokens")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
        figure.axes[0].legend()
        figure.suptitle("Attention of 8 heads of 96, batch 1, float32, " + found["machine"]["summary"])
        save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bias", default="physics", choices=list(cases()))
    parser.add_argument("--engines", nargs="+", default=["dense", "sdpa", "tiled"], choices=list(STYLES)[1:])
    parser.add_argument("--most-tokens", type=int, default=GROWTH[-1].tokens)
    parser.add_argument("--limit-gb", type=float, default=20.0)
    parser.add_argument("--json", type=Path, required=True, help="results; where it exists, it is drawn again")
    parser.add_argument("--plot", type=Path, help="picture, without suffix")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.json.exists():
        options.json.write_text(json.dumps(everything(options), indent=1))
    found = json.loads(options.json.read_text())
    print(table(found))
    if options.plot:
        plot(found, options.plot)


def table(found: dict) -> str:
    """A line a point, with its time over that of unbiased attention."""
    plain = {p["tokens"]: p["seconds"] for p in found["points"][UNBIASED]}
    lines = ["| engine | tokens | seconds | over unbiased | memory |", "|---" * 5 + "|"]
    for engine, points in found["points"].items():
        for p in points:
            ratio = p["seconds"] / plain[p["tokens"]]
            lines.append(f"| {engine} | {p['tokens']} | {p['seconds']:.4f} | {ratio:.2f} | {p['mb']:.0f} MB |")
    return "\n".join(lines)


def everything(options: argparse.Namespace) -> dict:
    """Points of each engine, from few tokens to many, up to where one fails."""
    points: dict[str, list[dict]] = {}
    shapes = [shape for shape in GROWTH if shape.tokens <= options.most_tokens]
    for engine in tqdm([UNBIASED, *options.engines], unit="engine"):
        points[engine] = []
        label = UNBIASED if engine == UNBIASED else options.bias
        for shape in shapes:
            found = point(label, engine, shape, options.limit_gb)
            if found is None:
                break
            points[engine].append(found)
    about = machine(argparse.Namespace(device="cpu", dtype="float32"))
    about["summary"] = f"{about['threads']} CPU cores"
    return {"bias": options.bias, "machine": about, "points": points}


if __name__ == "__main__":
    if "--point" in sys.argv:
        label, engine, tokens = json.loads(sys.argv[sys.argv.index("--point") + 1])
        print(json.dumps(measure(label, engine, next(shape for shape in GROWTH if shape.tokens == tokens))))
    else:
        main()
