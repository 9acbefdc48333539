"""Numbers of a configuration that would spoil a run, refused before it begins, whichever host it is for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from climax_elevation.errors import InputError

NOT_BELOW_ZERO = ("weight_decay", "warmup_start_lr", "eta_min")
BELOW_ONE = ("drop_path", "drop_rate")


def check_settings(model: Mapping[str, Any]) -> None:
    """Refuse an optimiser's, a schedule's or a network's number that no run can be healthy with.

    Args:
        model: The part `model` of a configuration, with `net` in it; what it does not name is not judged.

    Raises:
        InputError: If the learning rate is not above 0, or another number is below 0, or one is NaN or infinite; or if
            a share of what is dropped is not below 1.
    """
    if _is_number(model.get("lr")) and not 0 < model["lr"] < math.inf:
        raise InputError(f"model.lr is a finite number above 0, not {model['lr']}")
    for name in NOT_BELOW_ZERO:
        if _is_number(model.get(name)) and not 0 <= model[name] < math.inf:
            raise InputError(f"model.{name} is a finite number of 0 or more, not {model[name]}")
    net = model.get("net")
    arguments = (None if net is None or isinstance(net, str) else net.get("init_args")) or {}
    for name in BELOW_ONE:
        if _is_number(arguments.get(name)) and not 0 <= arguments[name] < 1:
            raise InputError(f"model.net.init_args.{name} is from 0 to below 1, not {arguments[name]}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
