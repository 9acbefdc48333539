"""Training: the one place that chooses between ClimaX and the host that stands in for it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from climax_elevation.errors import InputError

if TYPE_CHECKING:
    from climax_elevation.upstream.config import Modernized

MODULES = ("global_forecast", "regional_forecast", "climate_projection", "pretrain")
READERS = ("climax", "plugin")


def train(
    module: str,
    climax: Path | None,
    arguments: list[str],
    *,
    pretrained_variables: Sequence[str] | None = None,
    plan: bool = False,
    reader: str = "climax",
) -> None:
    """Train, and then test where upstream's script does, with terrain-aware ClimaX.

    Args:
        module: One of `MODULES`: which of upstream's training scripts.
        climax: A copy of ClimaX, as `find_climax` takes it; None: the one of the environment, or the
            stand-in host where there is none.
        arguments: What the training script is called with: `--config FILE`, `--trainer.max_epochs=5`.
        pretrained_variables: Of the checkpoint that model.pretrained_path names, in its order; None: it, or the
            configuration beside it, says so, or it has ClimaX's 48.
        plan: Print what the run would be, and do not start it.
        reader: One of `READERS`: "climax" reads with the script's own data module, "plugin" with the plugin's, which
            gives every process each its part of all samples, and goes on in the middle of an epoch; the stand-in host
            has no other.

    Raises:
        InputError: If ClimaX is another version, a configuration is wrong, only the stand-in host
            is there and `module` is not "global_forecast", or `reader` does not read what `module` trains on.
    """
    if module not in MODULES:
        raise InputError(f"unknown module {module!r}; available: {', '.join(MODULES)}")
    if reader not in READERS:
        raise InputError(f"unknown reader {reader!r}; available: {', '.join(READERS)}")
    from climax_elevation.host.shards import GlobalForecastDataModule
    from climax_elevation.pretrained import stating
    from climax_elevation.upstream.config import modernize
    from climax_elevation.upstream.launch import train_upstream
    from climax_elevation.upstream.lightning import say, training_errors
    from climax_elevation.upstream.locate import ClimaXNotFound, find_climax
    from climax_elevation.upstream.plan import planning

    try:
        source = find_climax(climax)
    except ClimaXNotFound as error:
        if module != "global_forecast":
            raise InputError(f"{module} needs ClimaX, the stand-in host has global_forecast alone: {error}") from None
        source, why = None, str(error)
    scratch = tempfile.TemporaryDirectory(prefix="climax-elevation-")
    with scratch as folder, training_errors(), stating(pretrained_variables), planning(plan):
        if source is None:
            say("host: stand-in, which is not ClimaX (%s)", why)
            _train_stand_in(modernize(arguments, Path(folder), stand_in=True))
        else:
            say("host: ClimaX, %s (%s)", source.examination.sentence, source.origin)
            own = GlobalForecastDataModule if reader == "plugin" else None
            train_upstream(module, source, modernize(arguments, Path(folder)), own)


def _train_stand_in(given: Modernized) -> None:
    from climax_elevation.host.module import GlobalForecastModule
    from climax_elevation.host.shards import GlobalForecastDataModule
    from climax_elevation.upstream.lightning import TrainingCLI

    cli = TrainingCLI(
        arguments=given.arguments,
        resume=given.resume,
        bias_args=given.bias_args,
        model_class=GlobalForecastModule,
        datamodule_class=GlobalForecastDataModule,
        seed_everything_default=42,
        save_config_kwargs={"overwrite": True},
        run=False,
        parser_kwargs={"parser_mode": "omegaconf"},
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path="best")
