"""Runs ClimaX's own training scripts, patched, with the bridge's command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partialmethod
from typing import Any

from torch import Tensor, nn

from climax_elevation.bias.base import like_parameters
from climax_elevation.errors import InputError
from climax_elevation.pretrained import load_pretrained
from climax_elevation.upstream.config import Modernized
from climax_elevation.upstream.lightning import PretrainingCLI, TrainingCLI
from climax_elevation.upstream.locate import Source
from climax_elevation.upstream.overlay import importable, overlay
from climax_elevation.upstream.regions import with_regions

FORECASTING = ("GlobalForecastModule", "RegionalForecastModule")
READ_ALIKE = ("global_forecast", "regional_forecast")
READ_OTHERWISE = {
    "climate_projection": "yearly files of simulations, which Lightning shares out by itself",
    "pretrain": "one source a node, with a lead time drawn for each sample",
}


def train_upstream(module: str, source: Source, given: Modernized, reader: type[Any] | None = None) -> None:
    """Train and, where upstream's script does, test.

    Args:
        module: Which of upstream's training scripts.
        source: Where ClimaX is.
        given: What the script is called with.
        reader: A data module for global forecasting, in the place of the script's own; None: that one.

    Raises:
        InputError: If the script cannot be imported, or is another, or takes other data than `reader` has.
    """
    if reader is not None and module not in READ_ALIKE:
        raise InputError(f"{module} reads other data than the plugin's reader, {READ_OTHERWISE[module]}: leave it out")
    with overlay(source, patched=True) as folder, importable(folder):
        try:
            script = importlib.import_module(f"climax.{module}.train")
        except ImportError as error:
            raise InputError(f"climax.{module}.train of {source.package} cannot be imported: {error}") from error
        # the second where local changes leave no place for the patch that brings the first
        called = [name for name in ("ClimaXCLI", "LightningCLI") if hasattr(script, name)]
        if not called or not hasattr(script, "main"):
            raise InputError(f"climax.{module}.train of {source.package} has no main() that calls LightningCLI")
        _read_older_scalars(sys.modules.get(f"climax.{module}.module"))
        for name in FORECASTING:
            if hasattr(script, name):
                # upstream's own takes weights of variables by number, and drops positions of other shapes of grids
                getattr(script, name).load_pretrained_weights = partialmethod(load_pretrained, trusted=True)
        cli: type[TrainingCLI] = PretrainingCLI if module == "pretrain" else TrainingCLI
        own: dict[str, Any] = {"arguments": given.arguments, "resume": given.resume, "bias_args": given.bias_args}
        if reader is not None:
            is_regional = module == "regional_forecast"
            own["datamodule_class"] = (
                with_regions(reader, importlib.import_module("climax.utils.data_utils")) if is_regional else reader
            )
        setattr(script, called[0], lambda **options: cli(**options | own))
        script.main()


def _read_older_scalars(script: Any) -> None:
    """Climate projection's own loader calls one function before it drops weights of another shape than the model's."""
    if not hasattr(script, "interpolate_pos_embed"):  # pretraining starts from none
        return
    own: Callable[..., None] = script.interpolate_pos_embed

    def interpolate_pos_embed(net: nn.Module, saved: dict[str, Tensor], **options: Any) -> None:
        saved.update(like_parameters(saved, {f"net.{name}": value for name, value in net.named_parameters()}))
        own(net, saved, **options)

    script.interpolate_pos_embed = interpolate_pos_embed
