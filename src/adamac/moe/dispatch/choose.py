"""Which dispatcher a layer uses, and why: by name, by what a machine's constants predict, or by the bytes that each would send.

Bytes are what can be known without the machine. They are the right rule where they are dear; where they are cheap, how often rows
are moved and what the host is asked decide, and only constants that were measured on the machine say so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch.distributed as dist

from adamac.moe.cost.machine import COLLECTIVES, Machine
from adamac.moe.cost.pick import by_dispatcher
from adamac.moe.dispatch.all_gather import AllGather
from adamac.moe.dispatch.all_to_all import AllToAll
from adamac.moe.dispatch.common import Dispatcher
from adamac.moe.dispatch.local import Local
from adamac.moe.dispatch.per_rank import PerRank
from adamac.moe.dispatch.static_gather import StaticGather
from adamac.moe.presets import MoEConfig
from adamac.moe.traffic import SENDING, bytes_sent, metadata_bytes

DispatcherName = Literal["auto", "local", "all_to_all", "per_rank", "all_gather", "static_gather"]
# What "auto" chooses among.
DISPATCHERS = {"all_gather": AllGather, "all_to_all": AllToAll, "per_rank": PerRank}
# And all that send: the last has conditions, so that somebody has to ask for it.
SENDERS = DISPATCHERS | {"static_gather": StaticGather}

# Tokens on each rank that are reckoned with where nobody says how many there will be.
TOKENS = 4096
# Bytes of a value, likewise: those of a model in half precision.
_ITEMSIZE = 2
# A simpler dispatcher may send this much more before its simplicity stops to pay.
_SLACK = 1.1


@dataclass(frozen=True)
class Choice:
    """A dispatcher, and why it is this one.

    Attributes:
        dispatcher: Made for the group.
        reason: In words, the same on all ranks.
    """

    dispatcher: Dispatcher
    reason: str


def choose(
    name: str,
    config: MoEConfig,
    group: dist.ProcessGroup | None = None,
    *,
    machine: Machine | None = None,
    tokens: int = TOKENS,
) -> Choice:
    """Make the dispatcher of a layer.

    Args:
        name: ``"auto"`` is ``"local"`` on one rank; on several the one that is predicted to be fastest in training on the
            machine or, if none is given, what :func:`cheapest` names.
        config: The layer.
        group: Ranks that hold its experts; ``None`` means that all are here.
        machine: What ``"auto"`` goes by. Given on all ranks or on none; the first rank's decides and the others are told, so
            that on several ranks this is a collective.
        tokens: On each rank, that ``"auto"`` reckons with.

    Raises:
        ValueError: If the name is unknown or does not fit the group, the machine is no :class:`Machine` or lacks a constant, or there are no
            tokens.
    """
    if name not in get_args(DispatcherName):
        raise ValueError(f"dispatcher must be one of {', '.join(get_args(DispatcherName))}; got {name!r}")
    ranks = 1 if group is None else dist.get_world_size(group)
    if name == "local" and ranks > 1:
        raise ValueError(f'dispatcher "local" sends nothing, but the group has {ranks} ranks; use "auto"')
    if group is None and name in SENDERS:
        raise ValueError(f'dispatcher "{name}" needs a group of ranks; pass group, or use "auto"')
    _check(machine, tokens)
    if name != "auto" and machine is not None:
        raise ValueError(f'a machine is what "auto" goes by; leave it out, or dispatcher "{name}"')
    if name in SENDERS and group is not None:
        return Choice(SENDERS[name](group), "asked for by name")
    if group is None or ranks == 1:
        return Choice(Local(), "all experts are on this rank")
    if machine is None:  # then all compute the same from the same numbers
        found, reason = resolve(config, ranks, tokens=tokens)
    else:
        found, reason = _agreed(lambda: resolve(config, ranks, machine=machine, tokens=tokens), group)
    return Choice(DISPATCHERS[found](group), reason)


def resolve(
    config: MoEConfig, ranks: int, *, machine: Machine | None = None, tokens: int = TOKENS
) -> tuple[str, str]:
    """Name what ``"auto"`` is on several ranks, and say why; makes nothing and asks no other rank.

    Args:
        config: The layer.
        ranks: Over which its experts are spread; at least 2.
        machine: What it goes by; ``None``: bytes.
        tokens: On each rank.

    Raises:
        ValueError: If the experts cannot be spread, the machine is no :class:`Machine` or lacks a constant, or there are no tokens.
    """
    _check(machine, tokens)
    return _by_bytes(config, ranks, tokens) if machine is None else _by_time(config, ranks, tokens, machine)


def cheapest(config: MoEConfig, ranks: int, tokens: int = TOKENS, itemsize: int = _ITEMSIZE) -> str:
    """Name the dispatcher that sends the fewest bytes at an even load, a simpler one if it sends hardly more.

    Args:
        config: The layer.
        ranks: Over which its experts are spread.
        tokens: On each rank.
        itemsize: Bytes of a value.
    """
    sent = _bytes(config, ranks, tokens, itemsize)
    return next(name for name, number in sent.items() if number <= _SLACK * min(sent.values()))


def _check(machine: Machine | None, tokens: int) -> None:
    if machine is not None and not isinstance(machine, Machine):
        raise ValueError(f"machine must be a Machine, as Machine.load reads it from a file; got {machine!r}")
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a whole number, at least 1; got {tokens!r}")


def _bytes(config: MoEConfig, ranks: int, tokens: int, itemsize: int) -> dict[str, float]:
    return {
        name: bytes_sent(config, tokens, ranks, name, itemsize) + metadata_bytes(config, tokens, ranks, name)
        for name in SENDING
    }


def _by_bytes(config: MoEConfig, ranks: int, tokens: int) -> tuple[str, str]:
    sent = _bytes(config, ranks, tokens, _ITEMSIZE)
    listed = ", ".join(f"{name} {number / 2**20:.3g}" for name, number in sent.items())
    reason = (
        f"the simplest of those that send least, as no machine was given to predict times with: MiB forward of {tokens} tokens "
        f"a rank in {8 * _ITEMSIZE} bits: {listed}"
    )
    return cheapest(config, ranks, tokens), reason


def _by_time(config: MoEConfig, ranks: int, tokens: int, machine: Machine) -> tuple[str, str]:
    said = by_dispatcher(config, tokens, ranks, machine, itemsize=machine.itemsize)
    listed = ", ".join(f"{name} {each.time_ms:.3g}" for name, each in said.items())
    reason = f"predicted to be fastest on {machine.name}: ms forward and backward, {tokens} tokens a rank: {listed}"
    if assumed := machine.assumed():
        reason += f"; assumed, not measured: {', '.join(assumed)}"
    if machine.ranks not in (None, ranks) and any(
        machine.costs[kind].source == "measured" for kind in COLLECTIVES
    ):
        reason += (
            f"; collectives were measured on {machine.ranks} ranks and are taken to be the same on {ranks}"
        )
    return min(said, key=lambda name: said[name].time_ms), reason


def _agreed(decide: Callable[[], tuple[str, str]], group: dist.ProcessGroup) -> tuple[str, str]:
    """What the first rank decides; what it refuses, all refuse, so that none is left waiting."""
    said: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            said = [decide()]
        except ValueError as error:
            said = [error]
    dist.broadcast_object_list(said, group=group, group_src=0)
    if isinstance(said[0], ValueError):
        raise said[0]
    return said[0]
