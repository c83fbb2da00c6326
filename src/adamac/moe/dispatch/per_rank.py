"""One copy of a row for each rank that holds any of its experts; the answers of a rank come back as one sum.

With 8 of 64 experts on 4 ranks a token has on average 2.7 other ranks but 6 copies on them. The price is a second small
message for each choice: which expert, and with what weight, since the weights are applied over there. Weights are
differentiable: their gradients travel back like those of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adamac.moe.choices import Choices, by_rank, tabled
from adamac.moe.dispatch.all_to_all import announced
from adamac.moe.dispatch.common import Meter, OverRanks, Sent, divided, refuse_not_finite
from adamac.moe.dispatch.exchange import Splits, Started, finish, start
from adamac.moe.presets import local_experts
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
            choices = [by_rank(routed, local, self.ranks) for _, routed in parts]
        with meter.clock.stage("send"):
            splits = self._announce(choices, routing, meter)
        return [
            self._send_chunk(*part, chosen, *lengths, local, meter)
            for part, chosen, lengths in zip(parts, choices, splits, strict=True)
        ]

    def _announce(
        self, choices: list[Choices], routing: Routing, meter: Meter
    ) -> list[tuple[Splits, Splits]]:
        """Tell each rank how many rows and choices it gets; return, by chunk, how rows are split and how choices are."""
        numbers = [chosen.counts for chosen in choices]
        both = announced(
            numbers[0] if len(numbers) == 1 else torch.cat(numbers, 1), routing, self.group, meter
        )
        # A list for each number, of ranks.
        out, back = (list(zip(*of_ranks, strict=True)) for of_ranks in torch.stack(both).tolist())
        refuse_not_finite([*back[-1]])
        return [
            (
                Splits(self.group, [*out[place]], [*back[place]], "payload", meter.traffic),
                Splits(self.group, [*out[place + 1]], [*back[place + 1]], "metadata", meter.traffic),
            )
            for place in range(0, 2 * len(choices), 2)
        ]

    def _send_chunk(
        self,
        rows: Tensor,
        routing: Routing,
        choices: Choices,
        splits: Splits,
        aside: Splits,
        local: int,
        meter: Meter,
    ) -> Sent:
        with meter.clock.stage("permute"):
            copies = choices.copies.first(sum(splits.out))
            kept = choices.order.first(sum(aside.out))
            rows, weights = spread(rows, copies), _reordered(routing.weights, kept)
        with meter.clock.stage("send"):
            travelling = (
                start(choices.codes[: len(kept.flat)].unsqueeze(1), aside),
                start(weights, aside),
                start(rows, splits),
            )
        return _Copies(splits, travelling, copies, local, min(local, routing.top_k), meter)


def _reordered(weights: Tensor, order: Order) -> Tensor:
    """Weights in the order of the choices: ``[n, 1]``."""
    alone = Order(order.flat, order.where.view(-1, 1), order.full, order.flat)
    return spread(weights.reshape(-1, 1), alone)


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
        with self.meter.clock.stage("send"):
            codes, weights = (finish(travelling).squeeze(1) for travelling in aside)
        with self.meter.clock.stage("permute"):
            copies = sum(self.splits.back)
            labels, self.weights = tabled(codes, weights, copies, self.local, self.slots)
            self.order, counts = by_label(labels, self.local, len(codes))
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
