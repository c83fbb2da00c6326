"""Choices: what is told beside rows that are sent once to each rank, which experts over there and with what weights.

A row arrives once and several experts there read it. So a second list travels, an entry for each choice, in the order of the rows:
:func:`by_rank` makes it where the tokens are, :func:`tabled` makes a table of slots of it where the experts are. A choice says
its expert and which of its row's choices it is; a new row begins where that is the first.

``torch`` is plain torch on any device; ``triton`` does each of the two in two passes, where plain torch takes some twenty operations
that a GPU has less to do for than its host to ask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamac.moe.routing import Routing
from adamac.moe.rows import Order, by_kernel, differentiated
from adamac.ops.launch import Impl


@dataclass(frozen=True)
class Choices:
    """Where choices and rows go. How many there are is not known yet: lists are as long as they can be, their ends mean nothing.

    Attributes:
        copies: Order of the rows, one for each rank that a token has any choice on.
        order: Order of the choices, each a row of its own: by rank, by token within, and as the routing has them within.
        codes: ``[n]`` int32, what is said of each choice in that order: ``place * local + expert``, with its place among the
            choices of its row and the number that its expert has over there.
        counts: ``[ranks, 2]`` int64, rows and choices for each rank.
    """

    copies: Order
    order: Order
    codes: Tensor
    counts: Tensor


def by_rank(routing: Routing, local: int, ranks: int, *, impl: Impl = "auto") -> Choices:
    """Put choices and rows in the order of the ranks that they go to; dropped choices are left out.

    Args:
        routing: Of this rank's tokens.
        local: Experts of each rank.
        ranks: How many there are.
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.
    """
    if by_kernel(impl, routing.experts) and routing.experts.numel():
        from adamac.moe.choices import triton as kernels

        return kernels.by_rank(routing, local, ranks)
    from adamac.moe.choices import reference

    return reference.by_rank(routing, local, ranks)


def tabled(
    codes: Tensor, weights: Tensor, rows: int, local: int, slots: int, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Make a table of choices that have arrived, a line for each row; differentiable in the weights.

    Args:
        codes: ``[n]`` int32, as in :class:`Choices`, of one rank after another.
        weights: ``[n]`` of any float dtype.
        rows: How many rows these are of.
        local: Experts here.
        slots: The most choices that a row may have here.
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``[rows, slots]`` int32 experts, -1 where a row has fewer; and their weights, 0 there.
    """
    if differentiated(weights):
        return _Tabled.apply(weights, codes, rows, local, slots, impl)
    return _tables(codes, weights, rows, local, slots, impl)[:2]


def _tables(
    codes: Tensor, weights: Tensor, rows: int, local: int, slots: int, impl: Impl
) -> tuple[Tensor, Tensor, Tensor]:
    """Both tables, and where in them each choice is, seen as one line."""
    if by_kernel(impl, codes) and rows:
        from adamac.moe.choices import triton as kernels

        return kernels.tables(codes, weights, rows, local, slots)
    from adamac.moe.choices import reference

    return reference.tables(codes, weights, rows, local, slots)


class _Tabled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, codes: Tensor, rows: int, local: int, slots: int, impl: Impl
    ) -> tuple[Tensor, Tensor]:
        experts, table, ctx.places = _tables(codes, weights, rows, local, slots, impl)
        ctx.mark_non_differentiable(experts)
        return experts, table

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return gradients[1].flatten()[ctx.places], None, None, None, None, None
