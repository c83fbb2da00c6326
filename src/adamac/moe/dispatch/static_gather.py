"""The all-gather in shapes that do not depend on the routing: nothing is announced, nothing is read, a CUDA graph can hold it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from adamac.moe.dispatch.all_gather import AllGather
from adamac.moe.dispatch.common import Meter, Sent, divided
from adamac.moe.dispatch.exchange import Gather, exchanged
from adamac.moe.presets import local_experts
from adamac.moe.routing import Routing
from adamac.moe.traffic import Traffic


class StaticGather(AllGather):
    """:class:`AllGather` without its first message: the host never waits for the device, and a pass can be captured.

    Two things must be known without asking. Every rank gives as many tokens as the others, in every pass; that is looked at in the
    first pass that is not being captured, and believed from then on. Where a rank gives another number later, messages do not fit:
    the backend may end the ranks, let them wait for ever or mix up rows.
    And rows that come are taken up in a buffer for as many as may come: all choices of all ranks that can fall on this one,
    ``ranks * tokens * min(top_k, local experts)``, or what the experts' capacity lets through if that is less. Rows that do not come
    are neither moved nor multiplied; what they cost is memory, without a capacity up to as many times what rows take as there are ranks.

    Nobody looks whether logits were finite: NaN shows in the output, as on one rank.
    """

    reads = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._agreed = False

    def send(
        self, rows: Tensor, routing: Routing, meter: Meter | None = None, *, chunks: int = 1
    ) -> list[Sent]:
        """See :meth:`adamac.moe.dispatch.Dispatcher.send`.

        Raises:
            ValueError: In the first pass, on all ranks, if they have different numbers of tokens.
        """
        meter = meter or Meter()
        local = local_experts(routing.num_experts, self.ranks)
        self._agree(routing)
        with meter.clock.stage("send"):
            return [
                self._send_chunk(
                    part, routed, routed.tokens, None, local, meter, room=self._room(routed, local)
                )
                for part, routed in divided(rows, routing, chunks)
            ]

    def _room(self, routing: Routing, local: int) -> int:
        """The most rows that may come."""
        choices = routing.tokens * min(routing.top_k, local)
        return self.ranks * (choices if routing.room is None else min(choices, local * routing.room))

    def _agree(self, routing: Routing) -> None:
        experts = routing.experts
        if self._agreed or (experts.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        own = experts.new_full((1,), routing.tokens)
        tokens = exchanged(own, Gather(self.group, "metadata", Traffic())).tolist()  # once: not counted
        if len(set(tokens)) > 1:
            raise ValueError(
                f'dispatcher "static_gather" needs equally many tokens on every rank; got {", ".join(map(str, tokens))}: '
                'give each rank as many, or use "all_gather"'
            )
        self._agreed = True
