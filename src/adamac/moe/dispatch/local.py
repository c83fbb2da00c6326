"""All experts are on this rank: rows are only sorted."""

from __future__ import annotations

from torch import Tensor

from adamac.moe.dispatch.common import Meter, Sent, divided, refuse_not_finite
from adamac.moe.routing import Routing
from adamac.moe.rows import Order, by_expert, gathered, spread


class Local:
    """Sorts rows by expert and sends nothing.

    On a GPU nobody looks whether the logits were finite, as that would wait for the device: NaN then shows in the output.
    """

    ranks = 1
    rank = 0
    reads = False

    def send(
        self, rows: Tensor, routing: Routing, meter: Meter | None = None, *, chunks: int = 1
    ) -> list[Sent]:
        """See :meth:`adamac.moe.dispatch.Dispatcher.send`."""
        meter = meter or Meter()
        if routing.finite is not None and rows.device.type == "cpu":
            refuse_not_finite([bool(routing.finite)])
        sent: list[Sent] = []
        for part, routed in divided(rows, routing, chunks):
            with meter.clock.stage("permute"):
                order, counts = by_expert(routed)
                sent.append(_Sorted(spread(part, order), counts, order, routed.weights, meter))
        return sent


class _Sorted:
    def __init__(self, rows: Tensor, counts: Tensor, order: Order, weights: Tensor, meter: Meter) -> None:
        self._rows, self._counts, self._order, self._weights, self._meter = (
            rows,
            counts,
            order,
            weights,
            meter,
        )

    def arrive(self) -> tuple[Tensor, Tensor]:
        return self._rows, self._counts

    def reply(self, rows: Tensor) -> None:
        self._rows = rows

    def collect(self) -> Tensor:
        with self._meter.clock.stage("collect"):
            return gathered(self._rows, self._order, self._weights)
