"""Choices in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from adamac.moe.choices import Choices
from adamac.moe.routing import Routing
from adamac.moe.rows import by_label


def by_rank(routing: Routing, local: int, ranks: int) -> Choices:
    """Compute :func:`adamac.moe.choices.by_rank`."""
    rank = routing.experts // local
    if routing.dropped is not None:
        rank = rank.masked_fill(routing.dropped, ranks)
    needed = rank.new_full((routing.tokens, ranks + 1), ranks).scatter_(1, rank, rank)[:, :ranks]
    full = routing.dropped is None
    copies, copied = by_label(needed, ranks, needed.numel(), impl="torch")
    order, counts = by_label(rank, ranks, rank.numel(), full=full, impl="torch")
    # Choices of a row lie together: one's place among them is its distance from the first.
    row = order.source * (ranks + 1) + rank.flatten()[order.flat]
    place = torch.arange(len(row), device=row.device)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    within = place - torch.where(first, place, 0).cummax(0).values
    codes = within * local + routing.experts.flatten()[order.flat] % local
    return Choices(copies, order, codes.int(), torch.stack([copied, counts], 1))


def tables(
    codes: Tensor, weights: Tensor, rows: int, local: int, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute both tables of :func:`adamac.moe.choices.tabled`, and the place of each choice in them."""
    row = (codes < local).cumsum(0) - 1
    places = row * slots + codes // local
    experts = codes.new_full((rows * slots,), -1).index_put((places,), codes % local)
    table = weights.new_zeros(rows * slots).index_put((places,), weights)
    return experts.view(rows, slots), table.view(rows, slots), places
