"""Moving rows: from the order of tokens to the order of experts, and back with a weighted sum.

A :class:`Order` says for each sorted row which token it came from, and for each token where its rows are. Knowing both ways, the
backward of each direction is a gather of the other: nothing is ever added up atomically, so gradients are deterministic.

``torch`` is plain torch on any device; ``triton`` gives a program to each token. Adding up, it reads the token's rows where they lie, adds in
float32 and never writes the copies that ``torch`` picks first; spreading, it reads the token once and writes it to all its places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adamac.moe.routing import Routing
from adamac.ops.launch import Impl, chosen

# Columns below which torch copies rows faster than a program for each does.
_NARROW = 64


@dataclass(frozen=True)
class Order:
    """Where rows come from and where they went.

    Attributes:
        flat: ``[n]`` int64, the place in ``where``, seen as one row, that each sorted row fills. Of an order with room to spare ``n`` is
            the room; what is beyond the rows that there are names any place.
        where: ``[tokens, slots]`` int64, the sorted row of each of a token's slots, -1 where there is none.
        full: Whether no slot is empty.
        sources: ``[n]`` int64, :attr:`source` where it is known already.
    """

    flat: Tensor
    where: Tensor
    full: bool
    sources: Tensor | None = None

    @property
    def source(self) -> Tensor:
        """``[n]`` int64, the token that each sorted row came from."""
        if self.sources is not None:
            return self.sources
        return self.flat // max(1, self.where.shape[1])

    def first(self, rows: int) -> Order:
        """The same order of so many rows: of one that was made longer before it was known how many there are."""
        return replace(
            self, flat=self.flat[:rows], sources=None if self.sources is None else self.sources[:rows]
        )


def by_label(
    labels: Tensor,
    number: int,
    rows: int | None = None,
    *,
    full: bool = False,
    room: int | None = None,
    impl: Impl = "auto",
) -> tuple[Order, Tensor]:
    """Sort slots by label, and by place within: slots with a label outside 0 to ``number - 1`` are empty.

    Args:
        labels: ``[tokens, slots]`` integers.
        number: How many labels there are.
        rows: How many slots are not empty; if not given and not ``full``, it is read, which waits for the device.
        full: Says that no slot is empty.
        room: In place of ``rows``, how many slots are not empty at most: the order has as many rows, the device alone knows how many
            of them there are, and nothing is read.
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        The order, and the rows of each label: ``[number]`` int64.
    """
    if by_kernel(impl, labels) and labels.numel():
        from adamac.moe.rows import triton as kernels

        flat, where, sources, counts = kernels.sorting(labels, number, spare=room is not None)
        order = Order(flat, where, full, sources)
    else:
        # Beyond all labels and below all of them is the same: outside.
        outside = labels if full else torch.where(labels < 0, number, labels).clamp_max(number)
        ordered, flat = narrow(outside.flatten(), number).sort(stable=True)
        counts = segment_lengths(ordered, number)
        places = torch.arange(len(flat), device=labels.device)
        where = torch.empty_like(flat)
        where[flat] = places if full else places.masked_fill(ordered >= number, -1)
        order = Order(flat, where.view(labels.shape), full)
    if full:
        return order, counts
    if room is not None:
        return order.first(room), counts
    rows = int(counts.sum()) if rows is None else rows
    return order.first(rows), counts


def by_run(lengths: Tensor, rows: int, *, impl: Impl = "auto") -> Order:
    """Sort rows that lie in runs, outer after outer and inner after inner within, by inner first.

    Args:
        lengths: ``[outer, inner]`` int64, of each run.
        rows: Their sum.
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.
    """
    if by_kernel(impl, lengths) and rows:
        from adamac.moe.rows import triton as kernels

        flat, where = kernels.by_run(lengths, rows)
        return Order(flat, where.unsqueeze(1), True, flat)
    outer, inner = lengths.shape
    labels = torch.arange(inner, device=lengths.device).repeat(outer)
    labels = labels.repeat_interleave(lengths.flatten(), output_size=rows)
    return by_label(labels.unsqueeze(1), inner, full=True, impl="torch")[0]


def by_expert(routing: Routing) -> tuple[Order, Tensor]:
    """Sort the choices of all tokens by expert, and by token within.

    Dropped choices are left out; how many there are has to be read, so that a routing with any waits for the device.

    Returns:
        The order, and the rows of each expert: ``[num_experts]`` int64.
    """
    experts, full = routing.experts, routing.dropped is None
    if routing.dropped is not None:
        experts = experts.masked_fill(routing.dropped, routing.num_experts)
    return by_label(experts, routing.num_experts, full=full)


def narrow(labels: Tensor, number: int) -> Tensor:
    """Labels of 16 bits where they fit: they take half the passes of a radix sort on a GPU."""
    return labels.to(torch.int16) if number < 2**15 else labels


def segment_lengths(labels: Tensor, number: int) -> Tensor:
    """Count the labels 0 to ``number - 1`` in a sorted list: ``[number]`` int64."""
    bounds = torch.arange(number + 1, device=labels.device, dtype=labels.dtype)
    return torch.searchsorted(labels, bounds).diff()


def spread(rows: Tensor, order: Order, *, impl: Impl = "auto") -> Tensor:
    """Copy each token's row to all its slots: ``[tokens, width]`` to ``[n, width]``."""
    if differentiated(rows):
        return _Spread.apply(rows, order, impl)
    return _copies(rows, order, impl)


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
    if differentiated(rows, weights):
        return _Gathered.apply(rows, weights, order, impl)
    return _sums(rows, order, weights, impl)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Order, impl: Impl) -> Tensor:
        ctx.order, ctx.impl = order, impl
        return _copies(rows, order, impl)

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
            return _copies(gradients[0], ctx.order, ctx.impl), None, None, None
        rows, weights = saved
        if chosen(ctx.impl, rows) == "triton":
            from adamac.moe.rows import triton as kernels

            return *kernels.gradients(rows, ctx.order, weights, gradients[0]), None, None
        from adamac.moe.rows import reference

        return *reference.gradients(rows, ctx.order, weights, gradients[0]), None, None


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know; telling it costs the host as much as an operation."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _copies(rows: Tensor, order: Order, impl: Impl) -> Tensor:
    # Of narrow rows a program would have next to nothing to do.
    if chosen(impl, rows) == "triton" and (rows.shape[1] >= _NARROW or impl == "triton"):
        from adamac.moe.rows import triton as kernels

        return kernels.copies(rows, order)
    return rows[order.source]


def _sums(rows: Tensor, order: Order, weights: Tensor | None, impl: Impl) -> Tensor:
    if chosen(impl, rows) == "triton":
        from adamac.moe.rows import triton as kernels

        return kernels.sums(rows, order, weights)
    from adamac.moe.rows import reference

    return reference.sums(rows, order, weights)


def by_kernel(impl: Impl, indices: Tensor) -> bool:
    """Whether a kernel puts these in order; the dtype that :func:`chosen` asks for is that of rows, and there are none here."""
    return chosen(impl, indices.new_empty(0, dtype=torch.float32)) == "triton"
