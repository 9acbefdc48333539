"""Libraries that only some sources need."""

from importlib import import_module
from types import ModuleType

from climax_elevation.errors import InputError


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Import `package`, or say what to install.

    Args:
        package: As pip knows it.
        extra: This package's extra that brings it.
        purpose: What needs it, the start of the sentence.

    Raises:
        InputError: If it is not installed or does not work.
    """
    try:
        return import_module(package.replace("-", "_"))
    except (ImportError, RuntimeError) as error:  # RuntimeError: cfgrib without its C library
        raise InputError(
            f"{purpose} needs the package {package}: pip install 'climax-elevation[{extra}]' ({error})"
        ) from error
