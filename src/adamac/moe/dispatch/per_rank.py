"""One copy of a row for each rank that holds any of its experts; the answers of a rank come back as one sum.

With 8 of 64 experts on 4 ranks a token has on average 2.7 other ranks but 6 copies on them. The price is a second small
message for each choice: which expert, and with what weight, since the weights are applied over there. Weights are
differentiable: their gradients travel back like those of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adamac.moe.dispatch.all_to_all import announced
from adamac.moe.dispatch.common import Meter, OverRanks, Sent, divided, local_experts, refuse_not_finite
from adamac.moe.dispatch.exchange import Splits, Started, finish, start
from adamac.moe.routing import Routing
from adamac.moe.rows import Order, by_label, gathered, spread


class PerRank(OverRanks):
    """Sends each row once to each rank that needs it, with its experts and weights there.

    A first small message says how many rows and choices each rank gets; reading it waits for the device, once a layer.
    """

    def send(
        self, rows: Tensor, routing: Routing, meter: Meter | None = None, *, chunks: int = 1
    ) -> list[Sent]:
        """See :meth:`adamac.moe.dispatch.Dispatcher.send`."""
        meter = meter or Meter()
        local = local_experts(routing.num_experts, self.ranks)
        parts = divided(rows, routing, chunks)
        with meter.clock.stage("permute"):
            choices = [_by_rank(routed, local, self.ranks) for _, routed in parts]
        with meter.clock.stage("send"):
            splits = self._announce(choices, routing, meter)
        return [
            self._send_chunk(*part, chosen, *lengths, local, meter)
            for part, chosen, lengths in zip(parts, choices, splits, strict=True)
        ]

    def _announce(
        self, choices: list[_Choices], routing: Routing, meter: Meter
    ) -> list[tuple[Splits, Splits]]:
        """Tell each rank how many rows and choices it gets; return, by chunk, how rows are split and how choices are."""
        numbers = torch.stack([count for chosen in choices for count in (chosen.copied, chosen.counts)], 1)
        # A list for each number, of ranks.
        told = torch.stack(announced(numbers, routing, self.group, meter)).mT.tolist()
        (*out, _), (*back, fine) = told
        refuse_not_finite(fine)
        return [
            (
                Splits(self.group, out[place], back[place], "payload", meter.traffic),
                Splits(self.group, out[place + 1], back[place + 1], "metadata", meter.traffic),
            )
            for place in range(0, len(out), 2)
        ]

    def _send_chunk(
        self,
        rows: Tensor,
        routing: Routing,
        choices: _Choices,
        splits: Splits,
        aside: Splits,
        local: int,
        meter: Meter,
    ) -> Sent:
        with meter.clock.stage("permute"):
            copies = choices.copies.first(sum(splits.out))
            kept = choices.order.first(sum(aside.out))
            rows, weights = spread(rows, copies), _reordered(routing.weights, kept)
            experts = _marked(routing, kept, local, self.ranks)
        with meter.clock.stage("send"):
            travelling = (
                start(experts, aside),
                start(weights.unsqueeze(1), aside),
                start(rows, splits),
            )
        return _Copies(splits, travelling, copies, local, min(local, routing.top_k), meter)


@dataclass
class _Choices:
    """Where choices and rows go. How many there are is not known here yet: both orders are as long as they can be.

    Attributes:
        order: Of the choices, by rank and by token within.
        counts: ``[ranks]`` int64, choices of each rank.
        copies: Of the rows, one for each rank that a token has any choice on.
        copied: ``[ranks]`` int64, rows for each rank.
    """

    order: Order
    counts: Tensor
    copies: Order
    copied: Tensor


def _by_rank(routing: Routing, local: int, ranks: int) -> _Choices:
    rank = routing.experts // local
    if routing.dropped is not None:
        rank = rank.masked_fill(routing.dropped, ranks)
    needed = rank.new_full((routing.tokens, ranks + 1), ranks).scatter_(1, rank, rank)[:, :ranks]
    order, counts = by_label(rank, ranks, rank.numel(), full=routing.dropped is None)
    copies, copied = by_label(needed, ranks, needed.numel())
    return _Choices(order, counts, copies, copied)


def _reordered(weights: Tensor, order: Order) -> Tensor:
    """Weights in the order of the choices."""
    return spread(
        weights.reshape(-1, 1), Order(order.flat, order.where.view(-1, 1), order.full, order.flat)
    ).squeeze(1)


def _marked(routing: Routing, order: Order, local: int, ranks: int) -> Tensor:
    """What is said of a choice: twice its expert's number over there, plus one if it is the first of its row."""
    experts = routing.experts.flatten()[order.flat]
    owner = order.source * ranks + experts // local
    first = torch.ones_like(owner, dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]
    return (experts % local * 2 + first).int().unsqueeze(1)


@dataclass
class _Copies:
    splits: Splits
    travelling: tuple[Started, ...]
    copies: Order
    local: int
    slots: int
    meter: Meter
    order: Order | None = None
    weights: Tensor | None = None

    def arrive(self) -> tuple[Tensor, Tensor]:
        # What is small is read and sorted while the rows still travel.
        *aside, payload = self.travelling
        copies = sum(self.splits.back)
        with self.meter.clock.stage("send"):
            marked, weights = (finish(travelling) for travelling in aside)
        with self.meter.clock.stage("permute"):
            marked = marked.squeeze(1)
            row = (marked & 1).cumsum(0) - 1
            # A row's choices lie together: a choice's place among them is its distance from the first.
            begins = torch.searchsorted(row, torch.arange(copies, device=row.device))
            slot = row * self.slots + torch.arange(len(row), device=row.device) - begins[row]
            labels = marked.new_full((copies * self.slots,), -1).index_put((slot,), marked >> 1)
            self.order, counts = by_label(labels.view(copies, self.slots), self.local, len(row))
            empty = weights.new_zeros(copies * self.slots)
            self.weights = empty.index_put((slot,), weights.squeeze(1)).view(copies, self.slots)
        with self.meter.clock.stage("send"):
            rows = finish(payload)
        with self.meter.clock.stage("permute"):
            return spread(rows, self.order), counts

    def reply(self, rows: Tensor) -> None:
        assert self.order is not None, "rows are answered after they have arrived"
        with self.meter.clock.stage("collect"):
            sums = gathered(rows, self.order, self.weights)
            self.travelling = (start(sums, self.splits.reversed()),)

    def collect(self) -> Tensor:
        with self.meter.clock.stage("collect"):
            return gathered(finish(self.travelling[0]), self.copies)
