"""What a row of ClimaX checkouts can do: which modules import, how upstream's tests end, how far its numbers are off.

    python tests/each_stage.py [--without-plugin] CHECKOUT ...

prints one line of JSON for each. The libraries, which take most of the time, are imported once: every checkout is
looked at in a process forked after that.
"""

import importlib
import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from reference.write_reference import CASES, HERE, WEIGHTS_OF, build, drawn, run, trained

LIBRARIES = (
    "pytorch_lightning.cli",
    "scipy.stats",
    "timm.models.vision_transformer",
    "torchvision.transforms",
    "xarray",
)


def modules(checkout):
    """Names of the package's modules that do not import."""
    package = checkout / "src" / "climax"
    files = [file for file in sorted(package.rglob("*.py")) if file.name != "__init__.py"]
    missing = []
    for file in files:
        name = ".".join(("climax", *file.relative_to(package).with_suffix("").parts))
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return missing


def distance(model_class, metrics):
    """Largest difference from the reference, over the largest value of the same array."""
    worst = 0.0
    with np.load(HERE / "reference.npz") as outputs, np.load(HERE / "weights.npz") as weights:
        for case in CASES:
            pairs = [
                (values, outputs[f"{case}/{name}"])
                for name, values in run(build(model_class, case), metrics, case).items()
            ]
            if case in WEIGHTS_OF:
                made = {"drawn": drawn(model_class, case), "trained": trained(model_class, metrics, case)}
                keys = {f"{case}/{kind}/{name}" for kind, state in made.items() for name in state}
                assert keys == {key for key in weights if key.startswith(f"{case}/")}
                pairs += [
                    (value, weights[f"{case}/{kind}/{n}"]) for kind, state in made.items() for n, value in state.items()
                ]
            for value, recorded in pairs:
                worst = max(worst, float(np.abs(value - recorded).max() / max(np.abs(recorded).max(), 1)))
    return worst


def look(checkout):
    """All of it, for one checkout."""
    sys.path.insert(0, str(checkout / "src"))
    missing = modules(checkout)
    try:
        arch, metrics = (importlib.import_module(f"climax.{name}") for name in ("arch", "utils.metrics"))
        off = distance(arch.ClimaX, metrics)
    except (ImportError, TypeError, AttributeError) as error:
        off = str(error)
    with redirect_stdout(io.StringIO()) as told:
        status = pytest.main(
            ["-q", "-rA", "-p", "no:cacheprovider", "--rootdir", str(checkout), str(checkout / "tests")]
        )
    ends = [line for line in told.getvalue().splitlines() if line.startswith(("PASSED", "FAILED", "SKIPPED", "ERROR"))]
    return {"missing": missing, "off": off, "status": int(status), "ends": ends}


if __name__ == "__main__":
    hidden = "--without-plugin" in sys.argv
    for library in LIBRARIES:
        importlib.import_module(library)
    if hidden:
        sys.modules["climax_elevation"] = None  # so that importing it fails
    else:
        importlib.import_module("climax_elevation").attach  # noqa: B018, loaded when it is asked for
    for argument in sys.argv[1:]:
        if argument.startswith("-"):
            continue
        child = os.fork()
        if not child:
            print(json.dumps(look(Path(argument))), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{argument} could not be looked at")
