"""Which dispatcher a layer uses, by name or by the bytes that each would send.

Bytes are what can be known without the machine. Who has measured theirs asks :func:`adamac.advise.fastest_dispatcher`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.distributed as dist

from adamac.moe.dispatch.all_gather import AllGather
from adamac.moe.dispatch.all_to_all import AllToAll
from adamac.moe.dispatch.common import Dispatcher
from adamac.moe.dispatch.local import Local
from adamac.moe.dispatch.per_rank import PerRank
from adamac.moe.presets import MoEConfig
from adamac.moe.traffic import bytes_sent, metadata_bytes

DispatcherName = Literal["auto", "local", "all_to_all", "per_rank", "all_gather"]
# The simplest first.
DISPATCHERS = {"all_gather": AllGather, "all_to_all": AllToAll, "per_rank": PerRank}

# A simpler dispatcher may send this much more before its simplicity stops to pay.
_SLACK = 1.1


def choose(name: str, config: MoEConfig, group: dist.ProcessGroup | None = None) -> Dispatcher:
    """Make the dispatcher of a layer.

    Args:
        name: ``"auto"`` picks by bytes, see :func:`cheapest`.
        config: The layer.
        group: Ranks that hold its experts; ``None`` means that all are here.

    Raises:
        ValueError: If the name is unknown, or does not fit the group.
    """
    if name not in get_args(DispatcherName):
        raise ValueError(f"dispatcher must be one of {', '.join(get_args(DispatcherName))}; got {name!r}")
    ranks = 1 if group is None else dist.get_world_size(group)
    if name == "local" and ranks > 1:
        raise ValueError(f'dispatcher "local" sends nothing, but the group has {ranks} ranks; use "auto"')
    if group is None and name in DISPATCHERS:
        raise ValueError(f'dispatcher "{name}" needs a group of ranks; pass group, or use "auto"')
    if name in DISPATCHERS and group is not None:
        return DISPATCHERS[name](group)
    if group is None or ranks == 1:
        return Local()
    return DISPATCHERS[cheapest(config, ranks)](group)


def cheapest(config: MoEConfig, ranks: int, tokens: int = 4096, itemsize: int = 2) -> str:
    """Name the dispatcher that sends the fewest bytes at an even load, a simpler one if it sends hardly more.

    Args:
        config: The layer.
        ranks: Over which its experts are spread.
        tokens: On each rank.
        itemsize: Bytes of a value.
    """
    sent = {
        name: bytes_sent(config, tokens, ranks, name, itemsize) + metadata_bytes(config, tokens, ranks, name)
        for name in DISPATCHERS
    }
    return next(name for name, number in sent.items() if number <= _SLACK * min(sent.values()))
