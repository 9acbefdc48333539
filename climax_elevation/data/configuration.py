"""A configuration that trains on the shards as they are: a small model, on either host, with the bias off or on."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from climax_elevation.files import write_text

logger = logging.getLogger(__name__)

FILE = "config.yaml"
WINDS = ("10m_u_component_of_wind", "10m_v_component_of_wind")
COMPUTED = ("toa_incident_solar_radiation",)
"""What changes in time and is known beforehand."""
FLAT_M = 10.0  # ground that nowhere leaves +-10 m may look standardised
MOST_PATCHES = 8192  # of ClimaX's own largest grid
BATCH = 4
BUFFER_BYTES = 2**28
TRAINING_STEPS, MOST_EPOCHS = 400, 10

TEMPLATE = """\
# Trains a small model on the data in this folder, to begin with: not a good one. Written by climax-elevation prepare.
#
#   {off}
#   {on}
#
# The first without the terrain bias, the second with it; with ClimaX where it is found (CLIMAX_SRC, or --climax PATH
# before the '--'), else on the stand-in host.

seed_everything: 42

trainer:
  default_root_dir: {plain}

  precision: 32
  accelerator: auto
  devices: 1
  max_epochs: {epochs}
  log_every_n_steps: 10

  logger:
    class_path: pytorch_lightning.loggers.CSVLogger
    init_args:
      save_dir: ${{trainer.default_root_dir}}

  callbacks:
    # takes the units of orography and wind from the data module; does nothing where the flag is off
    - class_path: climax_elevation.training.TerrainCallback

    # the best by validation is what is tested at the end
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args:
        monitor: "val/w_rmse"
        mode: "min"
        save_top_k: 1
        save_last: true
        filename: "epoch_{{epoch:03d}}"
        auto_insert_metric_name: false # the metric's name has a slash

model:
  lr: 0.001
  weight_decay: 0.00001
  warmup_epochs: {warmup} # in optimiser steps, whatever the name says
  max_epochs: {steps} # in optimiser steps too: {epochs} epochs of {steps_an_epoch}
  warmup_start_lr: 0.000001
  eta_min: 0.000001

  net:
    class_path: climax.arch.ClimaX
    init_args:
      default_vars: {variables}
      img_size: {img_size}
      patch_size: {patch_size} # {patches} patches
      embed_dim: 64
      depth: 4
      decoder_depth: 2
      num_heads: 4
      mlp_ratio: 4
      drop_path: 0.0
      drop_rate: 0.0

      use_physics_mask: false # true: with the bias
      bias_type: physics
      bias_args: {bias_args}

data:
  root_dir: {root_dir}
  variables: {variables}
  out_variables: {out_variables}
  predict_range: {predict_range} # steps
  hrs_each_step: {hours} # lead time: {lead} h
  buffer_size: {buffer_size}
  batch_size: {batch_size}
  num_workers: 0
  pin_memory: false
"""


@dataclass(frozen=True)
class Shards:
    """What a configuration has to know of prepared data.

    Attributes:
        out: The folder.
        changing, constant: Variables that change in time, and that do not.
        shape: Height and width.
        patch_size: Divides both.
        predict_range: Steps from input to target.
        hours_per_step: Of one.
        pairs: Of input and target, in training.
        step_bytes: Size of one step.
        ground_m: Lowest and highest elevation, metres.
    """

    out: Path
    changing: Sequence[str]
    constant: Sequence[str]
    shape: tuple[int, int]
    patch_size: int
    predict_range: int
    hours_per_step: float
    pairs: int
    step_bytes: int
    ground_m: tuple[float, float]


def write_configuration(shards: Shards) -> None:
    """Write `config.yaml` beside the shards, whole or not at all."""
    write_text(shards.out / FILE, configuration(shards))


def commands(out: Path) -> tuple[str, str]:
    """The two lines that train on prepared data: without the bias, and with it.

    Args:
        out: The folder of the shards.
    """
    config = shlex.quote(os.path.relpath(out / FILE) if out.is_relative_to(Path.cwd()) else str(out / FILE))
    begin = f"climax-elevation train global_forecast -- --config {config}"
    with_bias = shlex.quote(f"--trainer.default_root_dir={_runs(out)}/physics")
    return begin, f"{begin} --model.net.init_args.use_physics_mask=true {with_bias}"


def _runs(out: Path) -> str:
    return f"runs/{out.name}"


def moved(text: str, source: Path, out: Path, predict_range: int | None) -> str:
    """A configuration of prepared data, for the same data in another folder.

    Args:
        text: Its YAML, perhaps edited.
        source, out: Where the data were, and are.
        predict_range: Steps from input to target; None: as it is.
    """
    for old, new in zip((*commands(source), _runs(source)), (*commands(out), _runs(out)), strict=True):
        text = text.replace(old, new)
    text = re.sub(r"^(\s+root_dir: ).*$", lambda found: found[1] + _text(str(out)), text, flags=re.MULTILINE)
    if predict_range is not None:
        text = re.sub(r"^(\s+predict_range: )\d+", rf"\g<1>{predict_range}", text, flags=re.MULTILINE)
        text = re.sub(
            r"^(\s+hrs_each_step: (\d+) # lead time: )\d+ h",
            lambda found: f"{found[1]}{predict_range * int(found[2])} h",
            text,
            flags=re.MULTILINE,
        )
    return text


def configuration(shards: Shards) -> str:
    """The YAML text: see `TEMPLATE`."""
    patches = shards.shape[0] * shards.shape[1] // shards.patch_size**2
    if patches > MOST_PATCHES:
        logger.info(
            "%d patches of %d x %d pixels are more than ClimaX has ever had: prepare with a larger --patch-size, or "
            "regrid",
            patches,
            shards.patch_size,
            shards.patch_size,
        )
    names = [*shards.constant, *shards.changing]
    batch = min(BATCH, shards.pairs)
    steps_an_epoch = ceil(shards.pairs / batch)
    epochs = min(MOST_EPOCHS, ceil(TRAINING_STEPS / steps_an_epoch))
    steps = max(epochs * steps_an_epoch, 3)
    hours = max(1, round(shards.hours_per_step))
    off, on = commands(shards.out)
    bias_args: dict[str, Any] = {"blocks": [0], "wind": set(WINDS) <= set(names), "static_terrain": True}
    if shards.ground_m[0] > -FLAT_M and shards.ground_m[1] < FLAT_M:
        bias_args["terrain_is_flat"] = True
    return TEMPLATE.format(
        off=off,
        on=on,
        plain=_text(f"{_runs(shards.out)}/plain"),
        epochs=epochs,
        warmup=max(2, steps // 10),
        steps=steps,
        steps_an_epoch=steps_an_epoch,
        variables=_text(names),
        img_size=_text(list(shards.shape)),
        patch_size=shards.patch_size,
        patches=patches,
        bias_args=_text(bias_args),
        root_dir=_text(str(shards.out)),
        out_variables=_text([name for name in shards.changing if name not in COMPUTED] or list(shards.changing)),
        predict_range=shards.predict_range,
        hours=hours,
        lead=shards.predict_range * hours,
        buffer_size=max(1, min(shards.pairs, BUFFER_BYTES // (2 * shards.step_bytes))),
        batch_size=batch,
    )


def _text(value: Any) -> str:
    """JSON, which is YAML."""
    return json.dumps(value, ensure_ascii=False)
