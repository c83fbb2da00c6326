"""Every row goes to every rank; each rank answers what its experts say, and a reduce-scatter adds the answers up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from adamac.moe.dispatch.all_to_all import finite_column
from adamac.moe.dispatch.common import Meter, OverRanks, Sent, divided, refuse_not_finite
from adamac.moe.dispatch.exchange import Gather, Scatter, Started, exchanged, finish, start
from adamac.moe.presets import local_experts
from adamac.moe.routing import Routing
from adamac.moe.rows import Order, by_label, gathered, spread

# What stands for no expert; below all of them, also after this rank's first is taken off.
_NOWHERE = -1


class AllGather(OverRanks):
    """Gathers all rows, experts and weights on all ranks, and reduce-scatters weighted partial sums.

    Ranks with fewer tokens than others send padding, as the collectives want equal parts. A first small message says
    how many tokens there are, and how many rows each rank's experts will get; reading it waits for the device, once a layer.
    """

    def send(
        self, rows: Tensor, routing: Routing, meter: Meter | None = None, *, chunks: int = 1
    ) -> list[Sent]:
        """See :meth:`adamac.moe.dispatch.Dispatcher.send`."""
        meter = meter or Meter()
        local = local_experts(routing.num_experts, self.ranks)
        parts = divided(rows, routing, chunks)
        with meter.clock.stage("send"):
            announced = self._announce([routed for _, routed in parts], meter)
            return [
                self._send_chunk(*part, *lengths, local, meter)
                for part, lengths in zip(parts, announced, strict=True)
            ]

    def _announce(self, parts: list[Routing], meter: Meter) -> list[tuple[int, int]]:
        """Tell all ranks how many tokens each chunk has here, and how many choices of each rank's experts.

        Returns:
            By chunk, the most tokens that any rank has, and the rows that this rank's experts get.
        """
        numbers = [
            number
            for routed in parts
            for number in (
                routed.experts.new_full((1,), routed.tokens),
                routed.load().view(self.ranks, -1).sum(1),
            )
        ]
        own = torch.cat([*numbers, *finite_column(parts[0], numbers[0].unsqueeze(0))])
        told = exchanged(own.unsqueeze(0), Gather(self.group, "metadata", meter.traffic)).tolist()
        refuse_not_finite([of_rank[-1] for of_rank in told])
        places = range(0, len(parts) * (1 + self.ranks), 1 + self.ranks)
        return [
            (
                max(of_rank[place] for of_rank in told),
                sum(of_rank[place + 1 + self.rank] for of_rank in told),
            )
            for place in places
        ]

    def _send_chunk(
        self,
        rows: Tensor,
        routing: Routing,
        longest: int,
        arriving: int | None,
        local: int,
        meter: Meter,
        *,
        room: int | None = None,
    ) -> Sent:
        experts, weights = routing.experts.int(), routing.weights
        if routing.dropped is not None:
            experts = experts.masked_fill(routing.dropped, _NOWHERE)
        if longest > routing.tokens:
            short = (0, 0, 0, longest - routing.tokens)
            experts, weights, rows = (
                pad(experts, short, value=_NOWHERE),
                pad(weights, short),
                pad(rows, short),
            )
        aside = Gather(self.group, "metadata", meter.traffic)
        travelling = (
            start(experts, aside),
            start(weights, aside),
            start(rows, Gather(self.group, "payload", meter.traffic)),
        )
        return _Gathered(
            self.group, travelling, self.rank * local, local, routing.tokens, arriving, room, meter
        )


@dataclass
class _Gathered:
    group: dist.ProcessGroup
    travelling: tuple[Started, ...]
    first: int
    local: int
    tokens: int
    arriving: int | None  # rows that come, where that was announced
    room: int | None  # else, the most that may
    meter: Meter
    order: Order | None = None
    weights: Tensor | None = None

    def arrive(self) -> tuple[Tensor, Tensor]:
        # What is small is read and sorted while the rows still travel.
        *aside, payload = self.travelling
        with self.meter.clock.stage("send"):
            experts, self.weights = (finish(travelling) for travelling in aside)
        with self.meter.clock.stage("permute"):
            # Other ranks' experts, dropped choices and padding have no row here.
            labels = experts - self.first
            self.order, counts = by_label(labels, self.local, self.arriving, room=self.room)
        with self.meter.clock.stage("send"):
            rows = finish(payload)
        with self.meter.clock.stage("permute"):
            return spread(rows, self.order), counts

    def reply(self, rows: Tensor) -> None:
        assert self.order is not None, "rows are answered after they have arrived"
        with self.meter.clock.stage("collect"):
            sums = gathered(rows, self.order, self.weights)
            self.travelling = (start(sums, Scatter(self.group, "payload", self.meter.traffic)),)

    def collect(self) -> Tensor:
        with self.meter.clock.stage("collect"):
            sums = finish(self.travelling[0])
            return sums if len(sums) == self.tokens else sums[: self.tokens]
