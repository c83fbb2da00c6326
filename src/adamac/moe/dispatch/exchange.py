"""Collectives that a gradient passes backwards through, started in one place and waited for in another.

:func:`start` begins an exchange and returns at once; :func:`finish` waits for it. What is computed between the two overlaps with it,
and in the backward pass likewise: the gradient sets out where the forward pass finished and is waited for where it
started, and autograd runs what was computed between in between. Every exchange tells the traffic counter what it sent to other
ranks, in both directions.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from adamac.moe.traffic import Direction, Kind, Traffic

# Their names up to PyTorch 2.12, and since.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collective(Protocol):
    """An exchange of rows among the ranks of a group, and the one that takes a gradient back."""

    def begin(self, rows: Tensor, direction: Direction) -> tuple[Tensor, Any]:
        """Start; return where the result will be, and what to wait for."""
        ...


class Splits:
    """All-to-all: each rank gets its own part of the rows, of any length."""

    def __init__(
        self, group: dist.ProcessGroup, out: list[int], back: list[int], kind: Kind, traffic: Traffic
    ) -> None:
        """Take the number of rows that go to each rank, and that come from each."""
        self.group, self.out, self.back, self.kind, self.traffic = group, out, back, kind, traffic

    def begin(self, rows: Tensor, direction: Direction) -> tuple[Tensor, Any]:
        """See :class:`Collective`."""
        out, back = (self.out, self.back) if direction == "forward" else (self.back, self.out)
        result = rows.new_empty(sum(back), *rows.shape[1:])
        elsewhere = sum(out) - out[dist.get_rank(self.group)]
        self.traffic.add("all_to_all", self.kind, direction, elsewhere * rows[:1].nbytes if len(rows) else 0)
        work = dist.all_to_all_single(result, rows, back, out, group=self.group, async_op=True)
        return result, work

    def reversed(self) -> Splits:
        """What takes answers back the way that rows came."""
        return Splits(self.group, self.back, self.out, self.kind, self.traffic)


class Gather:
    """All-gather: every rank gets the rows of all, of the same number each. A gradient is summed and scattered back."""

    def __init__(self, group: dist.ProcessGroup, kind: Kind, traffic: Traffic) -> None:
        self.group, self.kind, self.traffic = group, kind, traffic

    def begin(self, rows: Tensor, direction: Direction) -> tuple[Tensor, Any]:
        """See :class:`Collective`."""
        both = (_gather, _scatter)
        return both[direction == "backward"](self.group, rows, self.kind, direction, self.traffic)


class Scatter(Gather):
    """Reduce-scatter: each rank gets the sum, over all ranks, of its part of the rows. A gradient is gathered."""

    def begin(self, rows: Tensor, direction: Direction) -> tuple[Tensor, Any]:
        """See :class:`Collective`."""
        both = (_scatter, _gather)
        return both[direction == "backward"](self.group, rows, self.kind, direction, self.traffic)


def _gather(
    group: dist.ProcessGroup, rows: Tensor, kind: Kind, direction: Direction, traffic: Traffic
) -> tuple[Tensor, Any]:
    ranks = dist.get_world_size(group)
    result = rows.new_empty(ranks * len(rows), *rows.shape[1:])
    traffic.add("all_gather", kind, direction, (ranks - 1) * rows.nbytes)
    return result, _all_gather(result, rows, group=group, async_op=True)


def _scatter(
    group: dist.ProcessGroup, rows: Tensor, kind: Kind, direction: Direction, traffic: Traffic
) -> tuple[Tensor, Any]:
    ranks = dist.get_world_size(group)
    result = rows.new_empty(len(rows) // ranks, *rows.shape[1:])
    traffic.add("reduce_scatter", kind, direction, (ranks - 1) * result.nbytes)
    return result, _reduce_scatter(result, rows, group=group, async_op=True)


class Travelling:
    """Rows under way, or later their gradient on its way back."""

    def __init__(self, collective: Collective) -> None:
        self.collective = collective
        self._under_way: tuple[Tensor, Tensor, Any] | None = None

    def set_out(self, rows: Tensor, direction: Direction) -> Tensor:
        """Start; return where the result will be."""
        rows = rows.contiguous()
        result, work = self.collective.begin(rows, direction)
        self._under_way = rows, result, work  # what is sent must not be freed before it is
        return result

    def arrive(self) -> Tensor:
        """Wait for the result."""
        assert self._under_way is not None, "what travels arrives once"
        _, result, work = self._under_way
        work.wait()
        self._under_way = None
        return result


class Started:
    """An exchange that was started, and what autograd knows of it."""

    def __init__(self, travelling: Travelling, rows: Tensor) -> None:
        self.travelling, self.rows = travelling, rows


def start(rows: Tensor, collective: Collective) -> Started:
    """Start an exchange of rows, differentiable in them."""
    travelling = Travelling(collective)
    if torch.is_grad_enabled() and rows.requires_grad:
        return Started(travelling, _Start.apply(rows, travelling))
    return Started(travelling, travelling.set_out(rows, "forward"))


def finish(started: Started) -> Tensor:
    """Wait for an exchange: the rows that arrived."""
    if torch.is_grad_enabled() and started.rows.requires_grad:
        return _Finish.apply(started.rows, started.travelling)
    return started.travelling.arrive()


def exchanged(rows: Tensor, collective: Collective) -> Tensor:
    """Exchange rows and wait for them."""
    return finish(start(rows, collective))


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, travelling: Travelling) -> Tensor:
        ctx.travelling = travelling
        return travelling.set_out(rows, "forward")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.travelling.arrive(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, travelling: Travelling) -> Tensor:
        ctx.travelling = travelling
        travelling.arrive()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.travelling.set_out(gradients[0], "backward")
        return gradients[0], None  # of the right shape, and read by nobody: _Start takes what arrived
