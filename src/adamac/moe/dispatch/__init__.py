"""Dispatchers: they move rows to the experts that a routing names, and bring the answers back.

A dispatcher is no module, it has nothing to learn. It sends rows on their way, and what it returns knows the way back::

    (sent,) = dispatcher.send(rows, routing)   # starts; rows [tokens, width]
    arrived, counts = sent.arrive()            # waits; sorted by local expert
    sent.reply(experts(arrived, counts))       # starts
    answer = sent.collect()                    # waits; [tokens, width], weighted and summed

Between ``send`` and ``arrive``, and between ``reply`` and ``collect``, the rows travel and the device is free. Sent in
chunks, one travels while the experts work on another. Five kinds, equal in
what they compute and different in what they send:

- :class:`Local`: all experts are here; nothing is sent.
- :class:`AllToAll`: one copy of a row for each of its experts, weights applied on return. What most trainers do.
- :class:`PerRank`: one copy for each *rank* that holds any of its experts. The weights travel along and are applied over there,
  and one partial sum comes back. With many experts a token and few ranks this sends far less.
- :class:`AllGather`: every row to every rank, partial sums by reduce-scatter. Sends the most, but needs no permutation before and
  its volume does not depend on the routing; wins where a token's experts are on nearly all ranks anyway.
- :class:`StaticGather`: the same in shapes that are known beforehand, for ranks with equally many tokens. The host reads nothing,
  so that a pass can be captured in a CUDA graph; rows take more memory.

Every dispatcher is differentiable in rows and weights, and takes experts without rows and any skew; all but the last take ranks without
tokens.
"""

from __future__ import annotations

from adamac.moe.dispatch.all_gather import AllGather
from adamac.moe.dispatch.all_to_all import AllToAll
from adamac.moe.dispatch.choose import DISPATCHERS, SENDERS, TOKENS, Choice, cheapest, choose, resolve
from adamac.moe.dispatch.common import Dispatcher, Meter, NotFiniteError, Sent
from adamac.moe.dispatch.local import Local
from adamac.moe.dispatch.per_rank import PerRank
from adamac.moe.dispatch.static_gather import StaticGather

__all__ = [
    "DISPATCHERS",
    "SENDERS",
    "TOKENS",
    "AllGather",
    "AllToAll",
    "Choice",
    "Dispatcher",
    "Local",
    "Meter",
    "NotFiniteError",
    "PerRank",
    "Sent",
    "StaticGather",
    "cheapest",
    "choose",
    "resolve",
]
