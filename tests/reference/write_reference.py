"""Writes reference.npz, weights.npz and manifest.json: what unmodified ClimaX computes on the versions of its time.

    CLIMAX_SRC=PATH_OF_A_CHECKOUT python tests/reference/write_reference.py

with a Python of upstream's docker/environment.yml (3.8, torch 1.12.1, timm 0.6.12, numpy 1.23.5), which needs
nothing of this package. Weights and inputs of reference.npz are filled by a formula; weights.npz has what a seed
draws, and what two steps of training make of the formula's weights. Only this script writes the three files.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

COMMIT = "6d5d354ffb4b91bb684f430b98e8f6f8af7c7f7c"
HERE = Path(__file__).parent
NAMES = ["land_sea_mask", "orography", "lattitude", "2m_temperature", "10m_u_component_of_wind"]

CASES: dict[str, dict[str, Any]] = {
    "serial": {
        "model": {"img_size": [8, 16], "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 4},
        "batch": 2,
        "variables": NAMES,
        "out_variables": ["2m_temperature", "10m_u_component_of_wind"],
    },
    "serial_subset": {
        "model": {"img_size": [12, 8], "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3},
        "batch": 3,
        "variables": ["10m_u_component_of_wind", "orography", "2m_temperature"],
        "out_variables": ["2m_temperature"],
    },
    "parallel": {
        "model": {"img_size": [8, 16], "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 4},
        "batch": 2,
        "variables": NAMES,
        "out_variables": ["2m_temperature", "10m_u_component_of_wind"],
    },
    "parallel_subset": {
        "model": {
            "img_size": [12, 20],
            "patch_size": 4,
            "embed_dim": 16,
            "depth": 1,
            "decoder_depth": 1,
            "num_heads": 2,
            "mlp_ratio": 2.0,
        },
        "batch": 1,
        "variables": ["2m_temperature", "lattitude"],
        "out_variables": ["10m_u_component_of_wind", "2m_temperature"],
    },
}

WEIGHTS_OF = ("serial", "parallel_subset")  # the smallest of either kind


def formula(name: str, shape: tuple[int, ...], scale: float, offset: float = 0.0) -> Tensor:
    """Values from offset - scale to offset + scale that name and index decide, float32.

    value = offset + scale * (2 * frac(1000 * sin(name's phase + index)) - 1)
    """
    phase = zlib.crc32(name.encode()) % 1000
    sines = np.sin(phase + np.arange(math.prod(shape), dtype=np.float64))
    values = offset + scale * (2 * np.mod(1000 * sines, 1) - 1)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every parameter its value by formula: norms near 1, all else large enough to matter."""
    for name, parameter in model.named_parameters():
        is_scale = ".norm" in f".{name}" and name.endswith("weight")
        parameter.copy_(formula(name, tuple(parameter.shape), 0.5, 1.0 if is_scale else 0.0))


def build(model_class: Callable[..., nn.Module], case: str) -> nn.Module:
    """The model of a case, filled, in evaluation mode."""
    model = model_class(NAMES, **CASES[case]["model"], parallel_patch_embed=case.startswith("parallel"))
    fill(model)
    return model.eval()


def run(model: nn.Module, metrics: Any, case: str) -> dict[str, np.ndarray]:
    """Everything that a model and a module of metrics compute for a case, by name."""
    settings = CASES[case]
    height, width = settings["model"]["img_size"]
    batch, variables, targets = settings["batch"], settings["variables"], settings["out_variables"]
    x = formula("x", (batch, len(variables), height, width), 1.0)
    y = formula("y", (batch, len(targets), height, width), 1.0)
    lead_times = torch.linspace(0.06, 7.3, batch)
    lat = np.linspace(-70.0, 50.0, height)
    climatology = formula("climatology", (len(targets), height, width), 2.0, 5.0)
    scores = [metrics.lat_weighted_mse_val, metrics.lat_weighted_rmse, metrics.lat_weighted_acc]
    with torch.no_grad():
        losses, predictions = model(x, y, lead_times, variables, targets, [metrics.lat_weighted_mse], lat)
        evaluated = model.evaluate(
            x, y, lead_times, variables, targets, _to_physical, scores, lat, climatology, "72_hours"
        )
        encoded = model.forward_encoder(x, lead_times, variables)
    numbers = {f"loss/{name}": value for name, value in losses[0].items()}
    numbers.update({f"score/{name}": value for score in evaluated for name, value in score.items()})
    numbers.update({"predictions": predictions, "encoded": encoded})
    return {name: np.asarray(value, dtype=np.float32) for name, value in numbers.items()}


def drawn(model_class: Callable[..., nn.Module], case: str) -> dict[str, np.ndarray]:
    """The weights of a case's model as seed 0 draws them."""
    torch.manual_seed(0)
    model = model_class(NAMES, **CASES[case]["model"], parallel_patch_embed=case.startswith("parallel"))
    return {name: value.numpy() for name, value in model.state_dict().items()}


def trained(model_class: Callable[..., nn.Module], metrics: Any, case: str) -> dict[str, np.ndarray]:
    """The weights of a case's model after two steps of gradient descent from the formula's, without dropout."""
    model, settings = build(model_class, case), CASES[case]
    height, width = settings["model"]["img_size"]
    batch, variables, targets = settings["batch"], settings["variables"], settings["out_variables"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in ("first", "second"):
        x = formula(f"x {step}", (batch, len(variables), height, width), 1.0)
        y = formula(f"y {step}", (batch, len(targets), height, width), 1.0)
        lead_times, lat = torch.linspace(0.06, 7.3, batch), np.linspace(-70.0, 50.0, height)
        losses, _ = model(x, y, lead_times, variables, targets, [metrics.lat_weighted_mse], lat)
        optimizer.zero_grad()
        losses[0]["loss"].backward()
        optimizer.step()
    return {name: value.numpy() for name, value in model.state_dict().items()}


def shapes(model: nn.Module) -> dict[str, str]:
    """Shape of each entry of the state dict, in its order."""
    return {name: str(list(value.shape)) for name, value in model.state_dict().items()}


def _to_physical(x: Tensor) -> Tensor:
    return 2.5 * x + 4.0


def _write(checkout: Path) -> None:
    _check_unmodified(checkout)
    sys.path.insert(0, str(checkout / "src"))
    climax = importlib.import_module("climax.arch").ClimaX
    metrics = importlib.import_module("climax.utils.metrics")
    arrays: dict[str, np.ndarray] = {}
    weights: dict[str, np.ndarray] = {}
    cases: dict[str, Any] = {}
    for case, settings in CASES.items():
        fresh = climax(NAMES, **settings["model"])
        arrays.update({f"{case}/{name}": getattr(fresh, name).detach().numpy() for name in ("pos_embed", "var_embed")})
        model = build(climax, case)
        arrays.update({f"{case}/{name}": values for name, values in run(model, metrics, case).items()})
        if case in WEIGHTS_OF:
            weights.update({f"{case}/drawn/{name}": v for name, v in drawn(climax, case).items()})
            weights.update({f"{case}/trained/{name}": v for name, v in trained(climax, metrics, case).items()})
        cases[case] = {**settings, "state_dict": shapes(model)}
    np.savez_compressed(HERE / "reference.npz", **arrays)  # type: ignore[arg-type]
    np.savez_compressed(HERE / "weights.npz", **weights)  # type: ignore[arg-type]
    package = checkout / "src" / "climax"
    files = [package / "arch.py", package / "utils" / "metrics.py", HERE / "reference.npz", HERE / "weights.npz"]
    manifest = {
        "source": "microsoft/ClimaX",
        "commit": COMMIT,
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "numpy")},
        },
        "default_vars": NAMES,
        "cases": cases,
    }
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _check_unmodified(checkout: Path) -> None:
    for question, answer in ((("rev-parse", "HEAD"), COMMIT), (("status", "--porcelain", "src"), "")):
        told = subprocess.run(["git", *question], cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
        if told.stdout.strip() != answer:
            sys.exit(f"the reference is unmodified ClimaX at {COMMIT[:7]}: git {' '.join(question)} says {told.stdout}")


if __name__ == "__main__":
    if "CLIMAX_SRC" not in os.environ:
        sys.exit("CLIMAX_SRC is the path of a checkout of microsoft/ClimaX: set it")
    _write(Path(os.environ["CLIMAX_SRC"]))
