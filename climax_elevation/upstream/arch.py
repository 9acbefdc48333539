"""ClimaX's architecture, patched and bridged, as a class for this process."""

from __future__ import annotations

import importlib

from torch import nn

from climax_elevation.errors import InputError
from climax_elevation.upstream.locate import Source
from climax_elevation.upstream.overlay import importable, overlay


def climax_class(source: Source) -> type[nn.Module]:
    """`climax.arch.ClimaX` of a patched temporary copy; the package is forgotten again, the class stays.

    Raises:
        InputError: If the patches do not fit, or the copy cannot be imported.
    """
    with overlay(source, patched=True) as folder, importable(folder):
        try:
            return importlib.import_module("climax.arch").ClimaX
        except ImportError as error:
            raise InputError(f"climax.arch of {source.package} cannot be imported: {error}") from error
