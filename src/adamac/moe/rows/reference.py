"""Moving rows in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from adamac.moe.rows import Order


def sums(rows: Tensor, order: Order, weights: Tensor | None) -> Tensor:
    """Compute :func:`adamac.moe.rows.gathered`."""
    tokens, slots = order.where.shape
    if order.full:
        picked = rows[order.where.flatten()].view(tokens, slots, rows.shape[1])
        if weights is None:
            return picked[:, 0] if slots == 1 else picked.sum(1)
        return torch.bmm(weights.to(rows.dtype).unsqueeze(1), picked).squeeze(1)
    # Slots one after another: all at once would take the memory of the empty ones too.
    padded, where = _with_zero_row(rows, order)
    total = rows.new_zeros(tokens, rows.shape[1], dtype=_wide(rows.dtype))
    for slot in range(slots):
        picked = padded[where[:, slot]]
        total += picked if weights is None else picked * weights[:, slot, None].to(total.dtype)
    return total.to(rows.dtype)


def gradients(rows: Tensor, order: Order, weights: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`sums` with weights, in rows and in weights."""
    multipliers = weights.flatten()[order.flat].to(gradient.dtype).unsqueeze(1)
    by_rows = gradient[order.source] * multipliers
    return by_rows, _products(rows, order, gradient).to(weights.dtype)


def _products(rows: Tensor, order: Order, others: Tensor) -> Tensor:
    """Inner product of each slot's row with its token's in ``others``: ``[tokens, slots]``, 0 for an empty slot."""
    tokens, slots = order.where.shape
    if order.full:
        picked = rows[order.where.flatten()].view(tokens, slots, rows.shape[1])
        return torch.bmm(picked, others.unsqueeze(2)).squeeze(2)
    padded, where = _with_zero_row(rows, order)
    columns = [(padded[where[:, slot]] * others).sum(-1, dtype=_wide(rows.dtype)) for slot in range(slots)]
    return torch.stack(columns, 1)


def _with_zero_row(rows: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return padded, torch.where(order.where < 0, len(rows), order.where)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
