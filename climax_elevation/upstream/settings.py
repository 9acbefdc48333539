"""A run's settings, judged before anything is built: what constructors would take in silence, or fail at much later.

Both hosts are asked the same here; what else they ask is their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from climax_elevation.checks import MOST, count, learning_rate, not_below_zero, positive, share, text, true_or_false
from climax_elevation.errors import InputError

HIGHEST_SEED = 2**32 - 1
HOSTS = ("climax.", "climax_elevation.")  # whose networks have the arguments of ClimaX

Rule = Callable[[str, Any], object]


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise InputError for the first setting that cannot be meant.

    Args:
        config: With the parts trainer, model and data, as far as there are such, without interpolations.
    """
    seed = config.get("seed_everything")
    if seed is not None and not isinstance(seed, bool):
        _whole(0, HIGHEST_SEED)("seed_everything", seed)
    for part, rules in (("trainer", TRAINER), ("model", MODEL), ("data", DATA)):
        _check(part, config.get(part), rules)
    trainer = config.get("trainer") or {}
    if "max_epochs" not in trainer:  # the parser fills in the defaults of a part that is there
        raise InputError("trainer holds settings by name, and here it is empty: write some, or leave it out")
    least, most = trainer.get("min_epochs"), trainer.get("max_epochs")
    if least is not None and most is not None and -1 < most < least:
        raise InputError(f"trainer.min_epochs is at most trainer.max_epochs ({most}), not {least}")
    least, most = trainer.get("min_steps"), trainer.get("max_steps", -1)
    if least is not None and -1 < most < least:
        raise InputError(f"trainer.min_steps is at most trainer.max_steps ({most}), not {least}")
    way = trainer.get("gradient_clip_algorithm")
    if way is not None and trainer.get("gradient_clip_val") is None:
        raise InputError(
            f"trainer.gradient_clip_algorithm {way!r} has no effect without trainer.gradient_clip_val: set it"
        )
    model = config.get("model") or {}
    if "warmup_epochs" in model and not 0 <= model["warmup_epochs"] < model["max_epochs"]:
        raise InputError(
            f"model.warmup_epochs is from 0 to model.max_epochs ({model['max_epochs']}, both in steps), not "
            f"{model['warmup_epochs']}"
        )
    network = model.get("net")
    if isinstance(network, Mapping) and str(network.get("class_path")).startswith(HOSTS):
        given = network.get("init_args") or {}
        _check("model.net.init_args", given, NETWORK)
        if given.get("use_physics_mask"):
            _check("model.net.init_args", given, {"bias_type": text})


def _check(part: str, given: Any, rules: Mapping[str, Rule]) -> None:
    if isinstance(given, Mapping):
        for name, rule in rules.items():
            if name in given:
                rule(f"{part}.{name}", given[name])


def _whole(least: int, most: int | None = None) -> Rule:
    """A whole number within bounds."""

    def check(name: str, value: Any) -> None:
        within = isinstance(value, int) and not isinstance(value, bool) and least <= value <= (most or MOST)
        if not within:
            bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
            raise InputError(f"{name} is a whole number {bounds}, not {value!r}")

    return check


def _or_none(rule: Rule) -> Rule:
    return lambda name, value: None if value is None else rule(name, value)


def _names(name: str, value: Any) -> None:
    """A list of different names."""
    if isinstance(value, str) or not isinstance(value, list | tuple) or not value or len(set(value)) < len(value):
        raise InputError(f"{name} is a list of at least one name, none twice, not {value!r}")
    for each in value:
        text(f"each of {name}", each)


def _name_or_names(name: str, value: Any) -> None:
    (text if isinstance(value, str) else _names)(name, value)


def _by_name(name: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name} are values by name, not {value!r}")


def _sides(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError(f"{name} is a height and a width in pixels, not {value!r}")
    for side in value:
        count(name, side)


def _file_or_none(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} is the name of a file, or '' for none, not {value!r}")


TRAINER: dict[str, Rule] = {
    "accumulate_grad_batches": count,
    "check_val_every_n_epoch": _or_none(count),
    "log_every_n_steps": _or_none(_whole(0)),
    "num_sanity_val_steps": _or_none(_whole(-1)),
    "gradient_clip_val": _or_none(not_below_zero),
}
MODEL: dict[str, Rule] = {
    "lr": learning_rate,
    "weight_decay": not_below_zero,
    "warmup_start_lr": not_below_zero,
    "eta_min": not_below_zero,
    "beta_1": share,
    "beta_2": share,
    "pretrained_path": _file_or_none,
}
NETWORK: dict[str, Rule] = {
    "default_vars": _names,
    "img_size": _sides,
    "patch_size": count,
    "embed_dim": count,
    "depth": count,
    "decoder_depth": _whole(0),
    "num_heads": count,
    "mlp_ratio": lambda name, value: positive(name, value, "widths"),
    "drop_path": share,
    "drop_rate": share,
    "parallel_patch_embed": true_or_false,
    "use_physics_mask": true_or_false,
    "bias_args": _or_none(_by_name),
    "time_history": count,
    "freeze_encoder": true_or_false,
}
DATA: dict[str, Rule] = {
    "root_dir": text,
    "variables": _names,
    "out_variables": _or_none(_name_or_names),
    "list_train_simu": _names,
    "buffer_size": count,
    "predict_range": count,
    "hrs_each_step": count,
    "history": count,
    "batch_size": count,
    "num_workers": _whole(0),
    "pin_memory": true_or_false,
}
