"""One copy of a row for each of its experts, sent by an all-to-all with uneven splits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from adamac.moe.dispatch.common import Meter, OverRanks, Sent, divided, refuse_not_finite
from adamac.moe.dispatch.exchange import Splits, Started, exchanged, finish, start
from adamac.moe.presets import local_experts
from adamac.moe.routing import Routing
from adamac.moe.rows import Order, by_expert, by_run, gathered, spread


class AllToAll(OverRanks):
    """Sends a copy of each row to each of its experts; answers are weighted and summed where the row came from.

    A first small message says how many rows each expert gets. Reading it waits for the device, once a layer.
    """

    def send(
        self, rows: Tensor, routing: Routing, meter: Meter | None = None, *, chunks: int = 1
    ) -> list[Sent]:
        """See :meth:`adamac.moe.dispatch.Dispatcher.send`."""
        meter = meter or Meter()
        local = local_experts(routing.num_experts, self.ranks)
        parts = divided(rows, routing, chunks)
        with meter.clock.stage("permute"):
            sorts = [by_expert(routed) for _, routed in parts]
            counts = torch.stack([counts.view(self.ranks, local) for _, counts in sorts], 1)
        with meter.clock.stage("send"):
            there, out, back = self._announce(counts, routing, meter)
        sent: list[Sent] = []
        for number, ((part, routed), (order, _)) in enumerate(zip(parts, sorts, strict=True)):
            with meter.clock.stage("permute"):
                copies = spread(part, order)
            with meter.clock.stage("send"):
                splits = Splits(self.group, out[number], back[number], "payload", meter.traffic)
                travelling = start(copies, splits)
            sent.append(_Copies(splits, travelling, there[:, number], order, routed.weights, meter))
        return sent

    def _announce(
        self, counts: Tensor, routing: Routing, meter: Meter
    ) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        """Tell each rank how many rows its experts get.

        Args:
            counts: ``[ranks, chunks, local_experts]``, rows by where to.
            routing: Says whether all is well here.
            meter: What counts.

        Returns:
            The rows that come here, ``[ranks, chunks, local_experts]`` by where from; and by chunk and rank, those that go
            out and those that come here.
        """
        sent, arrived = announced(counts.flatten(1), routing, self.group, meter)
        numbers = torch.stack([sent, arrived]).tolist()
        refuse_not_finite([of_rank[-1] for of_rank in numbers[1]])
        local, ends = counts.shape[2], range(counts.shape[2], sent.shape[1], counts.shape[2])
        # Added up here: the device would need a launch for each sum.
        out, back = (
            [[sum(of_rank[end - local : end]) for of_rank in side] for end in ends] for side in numbers
        )
        return arrived[:, :-1].view_as(counts), out, back


def announced(
    numbers: Tensor, routing: Routing, group: dist.ProcessGroup, meter: Meter
) -> tuple[Tensor, Tensor]:
    """Tell each rank some numbers, and whether the router's logits were finite here.

    Args:
        numbers: ``[ranks, n]`` int64, those for each rank.
        routing: That of this rank.
        group: The ranks.
        meter: What counts.

    Returns:
        What went to each rank and what came from each, ``[ranks, n + 1]``: the numbers, and whether the sender's logits were
        finite, 0 or 1.
    """
    one_each = [1] * len(numbers)
    splits = Splits(group, one_each, one_each, "metadata", meter.traffic)
    sent = torch.cat([numbers, finite_column(routing, numbers)], 1)
    return sent, exchanged(sent, splits)


def finite_column(routing: Routing, like: Tensor) -> Tensor:
    """Whether this rank's logits were finite, as a column that goes along to each rank."""
    if routing.finite is None:
        return like.new_ones(len(like), 1)
    return routing.finite.to(like.dtype).expand(len(like), 1)


@dataclass
class _Copies:
    splits: Splits
    travelling: Started
    there: Tensor  # [ranks, local_experts], rows that come here by where from and where to
    order: Order
    weights: Tensor
    meter: Meter
    regrouped: Order | None = None

    def arrive(self) -> tuple[Tensor, Tensor]:
        with self.meter.clock.stage("permute"):  # the order is found while the rows still travel
            counts = self.there.sum(0)
            if min(self.there.shape) > 1:  # else rank after rank is expert after expert already
                self.regrouped = by_run(self.there, sum(self.splits.back))
        with self.meter.clock.stage("send"):
            rows = finish(self.travelling)
        if self.regrouped is not None:
            with self.meter.clock.stage("permute"):
                rows = spread(rows, self.regrouped)
        return rows, counts

    def reply(self, rows: Tensor) -> None:
        if self.regrouped is not None:
            with self.meter.clock.stage("permute"):
                rows = gathered(rows, self.regrouped)
        with self.meter.clock.stage("collect"):
            self.travelling = start(rows, self.splits.reversed())

    def collect(self) -> Tensor:
        with self.meter.clock.stage("collect"):
            return gathered(finish(self.travelling), self.order, self.weights)
