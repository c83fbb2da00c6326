"""Moving rows: from the order of tokens to the order of experts, and back with a weighted sum.

A :class:`Order` says for each sorted row which token it came from, and for each token where its rows are. Knowing both ways, the
backward of each direction is a gather of the other: nothing is ever added up atomically, so gradients are deterministic.

``torch`` is plain torch on any device; ``triton`` gives a program to each token, which reads its rows where they lie, adds them up in
float32 and never writes the copies that ``torch`` picks first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamac.moe.routing import Routing
from adamac.ops.launch import Impl, chosen


@dataclass(frozen=True)
class Order:
    """Where rows come from and where they went.

    Attributes:
        flat: ``[n]`` int64, the place in ``where``, seen as one row, that each sorted row fills.
        where: ``[tokens, slots]`` int64, the sorted row of each of a token's slots, -1 where there is none.
        full: Whether no slot is empty.
    """

    flat: Tensor
    where: Tensor
    full: bool

    @classmethod
    def of(cls, flat: Tensor, tokens: int, slots: int, *, full: bool) -> Order:
        """Take the slots in the order of the sorted rows."""
        where = flat.new_empty(tokens * slots) if full else flat.new_full((tokens * slots,), -1)
        where[flat] = torch.arange(len(flat), device=flat.device)
        return cls(flat, where.view(tokens, slots), full)

    @property
    def source(self) -> Tensor:
        """``[n]`` int64, the token that each sorted row came from."""
        return self.flat // max(1, self.where.shape[1])


def by_expert(routing: Routing) -> tuple[Order, Tensor]:
    """Sort the choices of all tokens by expert, and by token within.

    Dropped choices are left out; how many there are has to be read, so that a routing with any waits for the device.

    Returns:
        The order, and the rows of each expert: ``[num_experts]`` int64.
    """
    experts = routing.experts.flatten()
    if routing.dropped is not None:
        experts = experts.masked_fill(routing.dropped.flatten(), routing.num_experts)
    experts, flat = narrow(experts, routing.num_experts).sort(stable=True)
    counts = segment_lengths(experts, routing.num_experts)
    full = routing.dropped is None
    if not full:
        flat = flat[: int(counts.sum())]
    return Order.of(flat, routing.tokens, routing.top_k, full=full), counts


def narrow(labels: Tensor, number: int) -> Tensor:
    """Labels of 16 bits where they fit: they take half the passes of a radix sort on a GPU."""
    return labels.to(torch.int16) if number < 2**15 else labels


def segment_lengths(labels: Tensor, number: int) -> Tensor:
    """Count the labels 0 to ``number - 1`` in a sorted list: ``[number]`` int64."""
    bounds = torch.arange(number + 1, device=labels.device, dtype=labels.dtype)
    return torch.searchsorted(labels, bounds).diff()


def spread(rows: Tensor, order: Order, *, impl: Impl = "auto") -> Tensor:
    """Copy each token's row to all its slots: ``[tokens, width]`` to ``[n, width]``."""
    return _Spread.apply(rows, order, impl)


def gathered(rows: Tensor, order: Order, weights: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """Add up the rows of each token.

    Args:
        rows: ``[n, width]``, sorted.
        order: How they were sorted.
        weights: ``[tokens, slots]`` multipliers, in any float dtype; ``None`` means 1.
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``[tokens, width]``.
    """
    return _Gathered.apply(rows, weights, order, impl)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Order, impl: Impl) -> Tensor:
        ctx.order, ctx.impl = order, impl
        return rows[order.source]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _sums(gradients[0], ctx.order, None, ctx.impl), None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor | None, order: Order, impl: Impl) -> Tensor:
        ctx.order, ctx.impl = order, impl
        # Without weights neither gradient reads a value.
        ctx.save_for_backward(*([] if weights is None else [rows, weights]))
        return _sums(rows, order, weights, impl)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        saved = ctx.saved_tensors  # once: a recomputed pass refuses to give them twice
        if not saved:
            return gradients[0][ctx.order.source], None, None, None
        rows, weights = saved
        if chosen(ctx.impl, rows) == "triton":
            from adamac.moe.rows import triton as kernels

            return *kernels.gradients(rows, ctx.order, weights, gradients[0]), None, None
        from adamac.moe.rows import reference

        return *reference.gradients(rows, ctx.order, weights, gradients[0]), None, None


def _sums(rows: Tensor, order: Order, weights: Tensor | None, impl: Impl) -> Tensor:
    if chosen(impl, rows) == "triton":
        from adamac.moe.rows import triton as kernels

        return kernels.sums(rows, order, weights)
    from adamac.moe.rows import reference

    return reference.sums(rows, order, weights)
