"""Numbers of a configuration that would spoil a run, refused before it begins, whichever host it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from climax_elevation.checks import learning_rate, not_below_zero, share

OF_MODULE = {"lr": learning_rate} | dict.fromkeys(("weight_decay", "warmup_start_lr", "eta_min"), not_below_zero)
OF_NET = dict.fromkeys(("drop_path", "drop_rate"), share)


def check_settings(model: Mapping[str, Any]) -> None:
    """Refuse an optimiser's, a schedule's or a network's number that no run can be healthy with.

    Args:
        model: The part `model` of a configuration, with `net` in it; what it does not name is not judged.

    Raises:
        InputError: If the learning rate is not above 0, or another rate is below 0, or a share of what is dropped is
            not below 1, or one of them is NaN or infinite.
    """
    net = model.get("net")
    arguments = (None if net is None or isinstance(net, str) else net.get("init_args")) or {}
    for where, values, checks in (("model", model, OF_MODULE), ("model.net.init_args", arguments, OF_NET)):
        for name, check in checks.items():
            if isinstance(values.get(name), int | float):
                check(f"{where}.{name}", values[name])
