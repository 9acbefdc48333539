"""Pretrained weights into a model with a list of variables, and a grid, of its own: by name, and never in silence.

ClimaX numbers its variables by their place in `default_vars`. Three kinds of weights have a place for each: the patch
embeddings, `var_embed`, and the rows of the head's last layer. Taken by number, as shapes allow, the embedding of
one quantity becomes that of another.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import interpolate

from climax_elevation.bias.base import like_parameters
from climax_elevation.checkpoints import check_weights, read_checkpoint
from climax_elevation.data.names import CLIMAX_LEVELS_HPA
from climax_elevation.errors import InputError

logger = logging.getLogger(__name__)

DESCRIPTION = "climax_elevation_net"
"""Key of a checkpoint under which its network says what it is."""
CONFIG = "config.yaml"
CONFIG_AT_MOST_UP = 3  # folders above the checkpoint: checkpoints/, version_0/, lightning_logs/
CLIMAX_VARIABLES = (
    *("land_sea_mask", "orography", "lattitude"),
    *("2m_temperature", "10m_u_component_of_wind", "10m_v_component_of_wind"),
    *(
        f"{name}_{level}"
        for name in (
            *("geopotential", "u_component_of_wind", "v_component_of_wind"),
            *("temperature", "relative_humidity", "specific_humidity"),
        )
        for level in CLIMAX_LEVELS_HPA
    ),
)
"""`default_vars` of ClimaX's own configurations, 48 of them: of the pretrained checkpoints."""

_stated: ContextVar[tuple[str, ...] | None] = ContextVar("pretrained variables", default=None)


@contextmanager
def stating(variables: Sequence[str] | None) -> Iterator[None]:
    """Within it, pretrained checkpoints have these variables; None: they have to say so themselves."""
    token = _stated.set(None if variables is None else tuple(variables))
    try:
        yield
    finally:
        _stated.reset(token)


@dataclass(frozen=True)
class Net:
    """What a network's weights are of.

    Attributes:
        variables: `default_vars`.
        grid: Rows and columns of patches; None: unknown.
    """

    variables: tuple[str, ...]
    grid: tuple[int, int] | None


def describe(checkpoint: dict[str, Any], net: Any) -> None:
    """Write into a checkpoint what its network is, so that its weights can be mapped by name one day."""
    if all(hasattr(net, name) for name in ("default_vars", "img_size", "patch_size")):
        checkpoint[DESCRIPTION] = {
            "default_vars": [str(name) for name in net.default_vars],
            "img_size": [int(size) for size in net.img_size],
            "patch_size": int(net.patch_size),
        }


def load_pretrained(module: nn.Module, source: str, *, trusted: bool = False) -> None:
    """Copy into `module` the weights of a Lightning checkpoint that fit it, and log what became of each.

    What belongs to a variable goes to that variable; what the checkpoint lacks keeps its fresh weights. A
    position embedding of another grid is interpolated, bicubically, as ClimaX does it. Patch embeddings of
    both kinds, serial and parallel, fit each other.

    Args:
        module: Has the network as `net`; its keys begin with "net.".
        source: File or URL of the checkpoint. Older ones of ClimaX say "channel" for "var" in keys.
        trusted: Whether a checkpoint with more than tensors is unpickled, which may run whatever it holds.

    Raises:
        InputError: If it is absent, cut short or no checkpoint, has no weight that fits, one that is not finite, or
            weights of variables that it does not name.
    """
    checkpoint = _read(source, trusted)
    saved = {key.replace("channel", "var"): value for key, value in checkpoint["state_dict"].items()}
    own = module.state_dict()
    saved = like_parameters(saved, own)
    net: Any = module.net
    weights = _of_variables(saved, _described(checkpoint, source), source)
    grid = (net.img_size[0] // net.patch_size, net.img_size[1] // net.patch_size)
    fitting = {key: value for key, value in weights.rest.items() if key in own and value.shape == own[key].shape}
    fitting.pop(POSITIONS, None)  # grids of one number of patches may be two
    fitting |= _position(weights.rest, own, weights.grid, grid)
    mapped, placed = _placed(weights, own, list(net.default_vars))
    fitting |= placed
    if not fitting:
        raise InputError(f"no weight in {source} fits the model: its keys begin with {', '.join(list(saved)[:3])}")
    check_weights(fitting, source)
    try:
        module.load_state_dict(fitting, strict=False)
    except RuntimeError as error:  # shapes fit: what is left is terrain that disagrees
        raise InputError(f"{source}: {' '.join(str(error).split())}") from error
    if weights.variables:
        fresh = [name for name in net.default_vars if name not in mapped]
        unused = [name for name in weights.variables if name not in mapped]
        logger.info("%s: weights by name: %s", source, ", ".join(mapped) or "of no variable")
        logger.info("variables that it lacks, which start afresh: %s", ", ".join(fresh) or "none")
        logger.info("variables that the model lacks, left out: %s", ", ".join(unused) or "none")
    logger.info(
        "%s: loaded %d of %d weights; missing: %s; unexpected or of another shape: %s",
        source,
        len(fitting),
        len(own),
        ", ".join(key for key in own if key not in fitting) or "none",
        ", ".join(key for key in (*weights.rest, *weights.head) if key not in fitting) or "none",
    )


# ---- what a checkpoint is of -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """A checkpoint's weights, those of variables by their names.

    Attributes:
        variables: In the checkpoint's order; empty: none of its weights is of a variable.
        grid: Of patches; None: unknown.
        kernels, offsets: Of the patch embeddings, by variable.
        embeddings: `var_embed`, by variable.
        head: Rows of the head's last layer, by its key and variable: `[p, p, ...]`.
        rest: All other weights, by key; and what could not be taken apart.
    """

    variables: tuple[str, ...]
    grid: tuple[int, int] | None
    kernels: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]
    embeddings: Mapping[str, Tensor]
    head: Mapping[str, Mapping[str, Tensor]]
    rest: Mapping[str, Tensor]


SERIAL = re.compile(r"net\.token_embeds\.(\d+)\.proj\.(weight|bias)")
PARALLEL = {"weight": "net.token_embeds.proj_weights", "bias": "net.token_embeds.proj_biases"}
VARIABLES, POSITIONS = "net.var_embed", "net.pos_embed"
HEAD = re.compile(r"net\.head\.(\d+)\.(weight|bias)")


def _described(checkpoint: Mapping[str, Any], source: str) -> Net | None:
    """What the checkpoint, or else the configuration beside it, says of its network; None: nothing."""
    found = checkpoint.get(DESCRIPTION) or _configured(source) or {}
    grid: tuple[int, int] | None = None
    try:
        height, width = (int(size) // int(found["patch_size"]) for size in found["img_size"])
        grid = (height, width)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        pass
    known = _stated.get() or tuple(map(str, found.get("default_vars") or ()))
    return Net(known, grid) if known else None


def _configured(source: str) -> Mapping[str, Any] | None:
    """The network's arguments in the run's config.yaml, where the checkpoint still lies in the run's folder."""
    if "://" in source:
        return None
    for folder in list(Path(source).absolute().parents)[:CONFIG_AT_MOST_UP]:
        if (folder / CONFIG).is_file():
            try:
                config = yaml.safe_load((folder / CONFIG).read_text())
                return config["model"]["net"]["init_args"]
            except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
                return None
    return None


def _of_variables(saved: Mapping[str, Tensor], described: Net | None, source: str) -> _Weights:
    kernels = _embeddings(saved, "weight")
    count = len(kernels) or (saved[VARIABLES].shape[1] if VARIABLES in saved else 0)
    grid = None if described is None else described.grid
    if not count:
        return _Weights((), grid, {}, {}, {}, {}, dict(saved))
    if described is not None:
        names: tuple[str, ...] = described.variables
    elif count == len(CLIMAX_VARIABLES):
        names = CLIMAX_VARIABLES
        logger.info("%s: taken to have ClimaX's %d variables", source, count)
    else:
        raise InputError(
            f"{source} has weights of {count} variables and does not say which, so they cannot go to the model's: name "
            "them in its order with climax-elevation train MODULE --pretrained-variables NAME ... -- ARGUMENTS"
        )
    if len(names) != count or len(set(names)) != count:
        raise InputError(
            f"{source} has weights of {count} variables, and {len(names)} are named ({', '.join(names)}): name each "
            "once, in the checkpoint's order"
        )
    taken = {key for key in saved if SERIAL.fullmatch(key) or key in PARALLEL.values() or key == VARIABLES}
    last = _last(saved)
    head = {}
    for kind in ("weight", "bias"):
        key = f"net.head.{last}.{kind}"
        side = round((len(saved[key]) / count) ** 0.5) if key in saved else 0
        if side and side * side * count == len(saved[key]):
            columns = saved[key].unflatten(0, (side, side, count))
            head[key] = {name: columns[:, :, index] for index, name in enumerate(names)}
            taken.add(key)
    return _Weights(
        names,
        grid,
        {names[index]: value for index, value in kernels.items()},
        {names[index]: value for index, value in _embeddings(saved, "bias").items()},
        {name: saved[VARIABLES][0, index] for index, name in enumerate(names)} if VARIABLES in saved else {},
        head,
        {key: value for key, value in saved.items() if key not in taken},
    )


def _last(state: Mapping[str, Tensor]) -> int:
    """Number of the head's last layer."""
    return max((int(match[1]) for match in map(HEAD.fullmatch, state) if match), default=-1)


def _embeddings(saved: Mapping[str, Tensor], kind: str) -> dict[int, Tensor]:
    """Patch embeddings by number, of both kinds."""
    if PARALLEL[kind] in saved:
        return dict(enumerate(saved[PARALLEL[kind]]))
    matches = ((SERIAL.fullmatch(key), value) for key, value in saved.items())
    return {int(match[1]): value for match, value in matches if match and match[2] == kind}


# ---- where they go ---------------------------------------------------------------------------------


def _placed(
    weights: _Weights, own: Mapping[str, Tensor], variables: Sequence[str]
) -> tuple[list[str], dict[str, Tensor]]:
    """Names that both sides have, and the model's weights with the checkpoint's in their places."""
    mapped: dict[str, None] = {}
    placed: dict[str, Tensor] = {}

    def put(key: str, name: str, value: Tensor | None, at: Any) -> None:
        target = own.get(key)
        if value is None or target is None or target[at].shape != value.shape:
            return
        placed.setdefault(key, target.clone())[at] = value
        mapped[name] = None

    # under another depth of the head its last layer reads something else
    heads = {key: values for key, values in weights.head.items() if key.startswith(f"net.head.{_last(own)}.")}
    for index, name in enumerate(variables):
        for kind, values in (("weight", weights.kernels), ("bias", weights.offsets)):
            put(f"net.token_embeds.{index}.proj.{kind}", name, values.get(name), ...)
            put(PARALLEL[kind], name, values.get(name), index)
        put(VARIABLES, name, weights.embeddings.get(name), (0, index))
        for key, rows in heads.items():
            value = rows.get(name)
            if value is not None and key in own and len(own[key]) == len(variables) * value.shape[0] * value.shape[1]:
                places = torch.arange(len(own[key])).unflatten(0, (*value.shape[:2], len(variables)))[:, :, index]
                put(key, name, value, places)
    return [name for name in variables if name in mapped], placed


def _position(
    saved: Mapping[str, Tensor], own: Mapping[str, Tensor], known: tuple[int, int] | None, grid: tuple[int, int]
) -> dict[str, Tensor]:
    """The position embedding on the model's grid of patches, or nothing where that cannot be."""
    value = saved.get(POSITIONS)
    if value is None or POSITIONS not in own or value.shape[-1] != own[POSITIONS].shape[-1]:
        return {}
    patches = value.shape[1]
    there = known if known is not None and known[0] * known[1] == patches else None
    if there is None and 2 * int((patches // 2) ** 0.5) ** 2 == patches:
        rows = int((patches // 2) ** 0.5)
        there = (rows, 2 * rows)  # as all of ClimaX's grids are
    if there is None and patches == grid[0] * grid[1]:
        there = grid
    if there is None:
        logger.info("position embedding of %d patches, of no known grid: left out", patches)
        return {}
    if there == grid:
        return {POSITIONS: value}
    logger.info("position embedding interpolated from %d x %d to %d x %d patches", *there, *grid)
    field = value.unflatten(1, there).permute(0, 3, 1, 2)
    laid = interpolate(field, size=grid, mode="bicubic", align_corners=False)
    return {POSITIONS: laid.permute(0, 2, 3, 1).flatten(1, 2)}


# ---- the file --------------------------------------------------------------------------------------


def _read(source: str, trusted: bool) -> Mapping[str, Any]:
    if "://" not in source:
        return read_checkpoint(source, weights_only=not trusted, what="model.pretrained_path")
    try:
        checkpoint = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=not trusted)
    except URLError as error:
        raise InputError(f"model.pretrained_path {source} cannot be fetched ({error.reason})") from error
    except Exception as error:  # of other files torch reads what it can, and then raises anything
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{source} is no checkpoint that can be read: {said}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InputError(f"{source} is not a Lightning checkpoint: it has no state_dict")
    return checkpoint
