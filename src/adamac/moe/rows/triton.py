"""Moving rows with a program for each token, which walks through its slots and reads the rows where they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamac.moe.rows import Order
from adamac.ops.launch import power_of_two

# Columns that a program holds at once.
_COLUMNS = 1024


def sums(rows: Tensor, order: Order, weights: Tensor | None) -> Tensor:
    """Compute :func:`adamac.moe.rows.gathered`."""
    tokens, slots = order.where.shape
    width, block = rows.shape[1], _block(rows)
    out = rows.new_empty(tokens, width)
    if out.numel():
        with torch.cuda.device_of(rows):  # Triton launches on the current device
            _sums[(tokens, triton.cdiv(width, block))](
                rows.contiguous(),
                order.where,
                order.where if weights is None else weights.contiguous(),
                out,
                slots,
                width,
                WEIGHTED=weights is not None,
                BLOCK=block,
                num_warps=_warps(block),
            )
    return out


def gradients(rows: Tensor, order: Order, weights: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`sums` with weights, in rows and in weights, in one pass over the rows."""
    tokens, slots = order.where.shape
    block = _block(rows)
    by_rows, by_weights = torch.empty_like(rows), torch.empty_like(weights)
    if by_weights.numel():
        with torch.cuda.device_of(rows):
            _gradients[(tokens,)](
                rows.contiguous(),
                order.where,
                weights.contiguous(),
                gradient.contiguous(),
                by_rows,
                by_weights,
                slots,
                rows.shape[1],
                BLOCK=block,
                num_warps=_warps(block),
            )
    return by_rows, by_weights


def _block(rows: Tensor) -> int:
    return min(_COLUMNS, power_of_two(rows.shape[1]))


def _warps(block: int) -> int:
    return max(1, min(4, block // 256))


@triton.jit(do_not_specialize=["slots"])
def _sums(
    rows,
    where,
    weights,
    out,
    slots,
    width,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(slots):
        row = tl.load(where + token * slots + slot)
        end = tl.where(row >= 0, width, 0)  # an empty slot has no columns
        x = tl.load(rows + row * width + column, mask=column < end, other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= tl.load(weights + token * slots + slot).to(tl.float32)
        total += x
    tl.store(out + token * width + column, total, mask=column < width)


@triton.jit(do_not_specialize=["slots"])
def _gradients(
    rows,
    where,
    weights,
    gradient,
    by_rows,
    by_weights,
    slots,
    width,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for slot in range(slots):
        row = tl.load(where + token * slots + slot)
        weight = tl.load(weights + token * slots + slot).to(tl.float32)
        end = tl.where(row >= 0, width, 0)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < end
            x = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
            wanted = tl.load(gradient + token * width + column, mask=inside, other=0.0).to(tl.float32)
            total += x * wanted
            tl.store(by_rows + row * width + column, wanted * weight, mask=inside)
        tl.store(by_weights + token * slots + slot, tl.sum(total, 0))
