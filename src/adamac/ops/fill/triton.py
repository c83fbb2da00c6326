"""Filling a budget without a sort: a program finds, for one row, the score at which the limit is crossed.

Floats are read as integers of the same order, and the threshold is found by 32 halvings, each one sum over the row in
registers. What lies above the threshold is taken whole; items that equal it are taken in their order until the limit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamac.ops.launch import power_of_two


def fill(score: Tensor, weight: Tensor, limit: Tensor) -> Tensor:
    """Compute :func:`adamac.ops.fill.fill`; integers come back as int32."""
    batch, heads, rows, items = score.shape
    whole = not weight.dtype.is_floating_point
    weight = weight.to(torch.int32 if whole else torch.float32).contiguous()
    limit = limit.to(weight.dtype).expand(batch, heads, 1, 1).contiguous()
    taken = torch.empty(batch, heads, rows, items, dtype=weight.dtype, device=score.device)
    block = power_of_two(items)
    with torch.cuda.device_of(score):  # Triton launches on the current device
        _fill[(rows, batch * heads)](
            score.contiguous(),
            weight,
            limit,
            taken,
            rows,
            items,
            weight.shape[2],
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
    return taken


@triton.jit(do_not_specialize=["rows", "items", "weight_rows"])
def _fill(score, weight, limit, taken, rows, items, weight_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    item = tl.arange(0, BLOCK)
    there = item < items
    at = (head * rows + row) * items + item
    # Adding zero makes -0 a +0: they are equal, their bits are not.
    bits = (tl.load(score + at, mask=there, other=float("-inf")) + 0.0).to(tl.int32, bitcast=True)
    place = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    w = tl.load(weight + (head * weight_rows + row % weight_rows) * items + item, mask=there, other=0)
    most = tl.load(limit + head)
    low = tl.full([], -2147483648, tl.int64)
    high = tl.full([], 2147483647, tl.int64)
    for _ in range(32):  # the highest place at or above which the weights reach the limit
        middle = (low + high + 1) >> 1
        enough = tl.sum(tl.where(place >= middle, w, 0), 0) >= most
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = tl.where(place > low, w, 0)
    level = tl.where(place == low, w, 0)
    rest = most - tl.sum(above, 0) - (tl.cumsum(level, 0) - level)
    tl.store(taken + at, above + tl.minimum(tl.maximum(rest, 0), level), mask=there)
