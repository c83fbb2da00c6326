"""Every row goes to every rank; each rank answers what its experts say, and a reduce-scatter adds the answers up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from adamac.moe.dispatch.all_to_all import finite_column
from adamac.moe.dispatch.common import Meter, OverRanks, Sent, divided, local_experts, refuse_not_finite
from adamac.moe.dispatch.exchange import Gather, Scatter, Started, exchanged, finish, start
from adamac.moe.routing import Routing
from adamac.moe.rows import Order, gathered, narrow, segment_lengths, spread


class AllGather(OverRanks):
    """Gathers all rows, experts and weights on all ranks, and reduce-scatters weighted partial sums.

    Ranks with fewer tokens than others send padding, as the collectives want equal parts. A first small message says
    how many tokens there are; reading it waits for the device, and counting the rows for this rank's experts does again.
    """

    def send(
        self, rows: Tensor, routing: Routing, meter: Meter | None = None, *, chunks: int = 1
    ) -> list[Sent]:
        """See :meth:`adamac.moe.dispatch.Dispatcher.send`."""
        meter = meter or Meter()
        local = local_experts(routing.num_experts, self.ranks)
        parts = divided(rows, routing, chunks)
        with meter.clock.stage("send"):
            longest = self._announce([routed.tokens for _, routed in parts], routing, meter)
            return [
                self._send_chunk(*part, length, local, meter)
                for part, length in zip(parts, longest, strict=True)
            ]

    def _announce(self, tokens: list[int], routing: Routing, meter: Meter) -> list[int]:
        """Tell all ranks how many tokens each chunk has here: the most that any rank has, by chunk."""
        own = routing.experts.new_tensor([tokens])
        own = torch.cat([own, finite_column(routing, own)], 1)
        *lengths, fine = exchanged(own, Gather(self.group, "metadata", meter.traffic)).T.tolist()
        refuse_not_finite(fine)
        return [max(of_ranks) for of_ranks in lengths]

    def _send_chunk(self, rows: Tensor, routing: Routing, longest: int, local: int, meter: Meter) -> Sent:
        short = (0, 0, 0, longest - routing.tokens)
        experts = routing.experts.int()
        if routing.dropped is not None:
            experts = experts.masked_fill(routing.dropped, -1)
        aside = Gather(self.group, "metadata", meter.traffic)
        travelling = (
            start(pad(experts, short, value=-1), aside),
            start(pad(routing.weights, short), aside),
            start(pad(rows, short), Gather(self.group, "payload", meter.traffic)),
        )
        return _Gathered(self.group, travelling, self.rank * local, local, routing.tokens, meter)


@dataclass
class _Gathered:
    group: dist.ProcessGroup
    travelling: tuple[Started, ...]
    first: int
    local: int
    tokens: int
    meter: Meter
    order: Order | None = None
    weights: Tensor | None = None

    def arrive(self) -> tuple[Tensor, Tensor]:
        # What is small is read and sorted while the rows still travel.
        *aside, payload = self.travelling
        with self.meter.clock.stage("send"):
            experts, self.weights = (finish(travelling) for travelling in aside)
        with self.meter.clock.stage("permute"):
            here = experts.long() - self.first
            here = here.masked_fill((here < 0) | (here >= self.local), self.local).flatten()
            labels, flat = narrow(here, self.local).sort(stable=True)
            counts = segment_lengths(labels, self.local)
            self.order = Order.of(flat[: int(counts.sum())], *experts.shape, full=False)
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
            return finish(self.travelling[0])[: self.tokens]
