"""Parameters that a step does not use, which today's DDP does not look for by itself."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import nn

from climax_elevation.training import variables_of

LOOK = "find_unused_parameters"


def look_for_unused(strategy: Strategy, module: Any, datamodule: Any) -> list[str]:
    """Make DDP look for unused parameters where there are going to be some, as Lightning 1.8's did everywhere.

    A ClimaX that embeds each variable by itself has embeddings without a use where its data lack some of
    `default_vars`, as upstream's own pretraining has.

    Args:
        strategy: Changed in its place, if it is DDP and nothing was said about this.
        module: Has the network, `net`.
        datamodule: Knows the variables of the data.

    Returns:
        The variables without a use somewhere, if that is why it is changed.
    """
    if type(strategy) is not DDPStrategy or LOOK in strategy._ddp_kwargs:
        return []
    net = module.net
    if not isinstance(getattr(net, "token_embeds", None), nn.ModuleList):
        return []
    found = variables_of(datamodule)
    sources = [set(names) for names in (found.values() if isinstance(found, dict) else [found or net.default_vars])]
    unread = [name for name in net.default_vars if not all(name in source for source in sources)]
    if unread:
        strategy._ddp_kwargs[LOOK] = True
    return unread
