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
from adamac.moe.rows import Order, gathered, narrow, segment_lengths, spread


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
        numbers = torch.stack(
            [count for chosen in choices for count in (chosen.needed.sum(0), chosen.counts)], 1
        )
        arrived, fine = announced(numbers, routing, self.group, meter)
        *lengths, fine = torch.cat([numbers.T, arrived.T, fine]).tolist()
        refuse_not_finite(fine)
        out, back = lengths[: 2 * len(choices)], lengths[2 * len(choices) :]
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
            copies = _copies(choices, splits.out, routing.tokens, self.ranks)
            kept = sum(aside.out)
            rows, weights = spread(rows, copies), _reordered(routing.weights, choices.order)[:kept]
            experts = _marked(choices, local)[:kept]
        with meter.clock.stage("send"):
            travelling = (
                start(experts, aside),
                start(weights.unsqueeze(1), aside),
                start(rows, splits),
            )
        return _Copies(splits, travelling, copies, local, min(local, routing.top_k), meter)


@dataclass
class _Choices:
    """The choices of all tokens, sorted by rank and by token within.

    Attributes:
        order: ``[tokens * top_k]`` int64, the places of the choices, dropped ones last.
        experts: ``[tokens * top_k]``, the experts in that order.
        owner: ``[tokens * top_k]``, token x ranks + rank, in that order.
        counts: ``[ranks]`` int64, choices of each rank.
        needed: ``[tokens, ranks]`` bool, whether a token has any choice on a rank.
    """

    order: Tensor
    experts: Tensor
    owner: Tensor
    counts: Tensor
    needed: Tensor


def _by_rank(routing: Routing, local: int, ranks: int) -> _Choices:
    rank = routing.experts // local
    if routing.dropped is not None:
        rank = rank.masked_fill(routing.dropped, ranks)
    needed = torch.zeros(routing.tokens, ranks + 1, dtype=torch.bool, device=rank.device)
    needed = needed.scatter_(1, rank, True)[:, :ranks]
    labels, order = narrow(rank.flatten(), ranks).sort(stable=True)
    counts = segment_lengths(labels, ranks)
    owner = order // routing.top_k * ranks + labels
    return _Choices(order, routing.experts.flatten()[order], owner, counts, needed)


def _copies(choices: _Choices, rows: list[int], tokens: int, ranks: int) -> Order:
    """The order of the rows that are sent: by rank, and by token within."""
    # How many there are is known on the host by now, so that finding them need not wait.
    places = torch.nonzero_static(choices.needed.T.flatten(), size=sum(rows)).squeeze(1)
    rank, token = places // max(1, tokens), places % max(1, tokens)
    return Order.of(token * ranks + rank, tokens, ranks, full=False)


def _reordered(weights: Tensor, order: Tensor) -> Tensor:
    """Weights in the order of the choices; all of them, so that a gradient is a permutation."""
    return spread(weights.reshape(-1, 1), Order.of(order, len(order), 1, full=True)).squeeze(1)


def _marked(choices: _Choices, local: int) -> Tensor:
    """What is said of a choice: twice its expert's number over there, plus one if it is the first of its row."""
    first = torch.ones_like(choices.owner, dtype=torch.bool)
    first[1:] = choices.owner[1:] != choices.owner[:-1]
    return (choices.experts % local * 2 + first).int().unsqueeze(1)


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
            experts, by_expert = narrow(marked >> 1, self.local).sort(stable=True)
            self.order = Order.of(slot[by_expert], copies, self.slots, full=False)
            empty = weights.new_zeros(copies * self.slots)
            self.weights = empty.index_put((slot,), weights.squeeze(1)).view(copies, self.slots)
            counts = segment_lengths(experts, self.local)
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
