"""One training step of the whole model, with a bias in block 0 and without, side by side.

    python benchmarks/step.py            32 x 64, patch 2, 1024 wide, 8 blocks of 16 heads: 512 tokens
    python benchmarks/step.py --large    128 x 256, patch 2, 768 wide, 6 blocks of 8 heads: 8192 tokens

The model is the stand-in host, which computes ClimaX's function. A step is forward, loss, backward and
AdamW. The models are stepped in turn, round after round; what is printed is the median of the rounds'
ratios to the unbiased model's step of the same round.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from climax_elevation.host import StandInClimaX

WINDS = ("10m_u_component_of_wind", "10m_v_component_of_wind")
VARIABLES = ["orography", "lattitude", "2m_temperature", *WINDS]
SMALL = {"img_size": [32, 64], "embed_dim": 1024, "depth": 8, "num_heads": 16}
LARGE = {"img_size": [128, 256], "embed_dim": 768, "depth": 6, "num_heads": 8}
MODELS = {
    "unbiased": None,
    "physics": ("physics", {"wind": False}),
    "physics with wind": ("physics", {}),
    "relative_3d": ("relative_3d", {}),
}


class Step:
    """A model, its optimiser and a batch."""

    def __init__(self, name: str, sizes: dict, batch: int, device: str) -> None:
        torch.manual_seed(0)
        flags = {}
        if MODELS[name] is not None:
            bias, arguments = MODELS[name]
            bias_args = {"blocks": [0], "static_terrain": True, **arguments}
            flags = {"use_physics_mask": True, "bias_type": bias, "bias_args": bias_args}
        self.model = StandInClimaX(VARIABLES, patch_size=2, drop_path=0.0, drop_rate=0.0, **sizes, **flags).to(device)
        if flags:
            mean = {"orography": 400.0, WINDS[0]: 0.0, WINDS[1]: 0.0}
            std = {"orography": 800.0, WINDS[0]: 5.0, WINDS[1]: 5.0}
            self.model.terrain.set_statistics(mean, std, "the benchmark")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.x = torch.randn(batch, len(VARIABLES), *sizes["img_size"], device=device)
        self.x[:, 0] = torch.rand(sizes["img_size"], device=device) * 4 - 0.5
        self.lead_times = torch.full((batch,), 0.24, device=device)
        self.device = device

    def run(self) -> float:
        """Seconds of a step."""
        self.synchronize()
        started = time.perf_counter()
        self.optimizer.zero_grad()
        _, predicted = self.model(self.x, None, self.lead_times, VARIABLES, VARIABLES, None, None)
        (predicted - self.x).square().mean().backward()
        self.optimizer.step()
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=list(MODELS)[1:], choices=list(MODELS)[1:])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    names = ["unbiased", *options.models]
    steps = [Step(name, LARGE if options.large else SMALL, options.batch, options.device) for name in names]
    for step in steps:
        step.run()
    times = [[step.run() for step in steps] for _ in tqdm(range(options.rounds), unit="round", leave=False)]
    rows = []
    print("| model | seconds a step | over unbiased | least and most |\n|---|---|---|---|")
    for index, name in enumerate(names):
        ratios = sorted(round_[index] / round_[0] for round_ in times)
        seconds = median(round_[index] for round_ in times)
        rows.append({"model": name, "seconds": seconds, "ratio": median(ratios), "ratios": ratios})
        print(f"| {name} | {seconds:.3f} | {median(ratios):.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f} |")
    if options.json:
        sizes = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"options": sizes, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
