"""Reductions over segments, a program for each: it walks through its rows where they lie, sixteen or more at a time.

Rows are added in the order of the segment's list, in lanes that are added up at the end, so a sum is the same bits every
time. Nothing is sorted, permuted or converted in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamac.ops.launch import interpreted, power_of_two
from adamac.ops.segment import Segments

_MODES = {"sum": 0, "mean": 1, "variance": 2, "extremes": 3, "centroid": 4}


def segment_moments(
    values: Tensor, segments: Segments, mode: str, normalise: bool, former: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reduce the rows of each segment.

    Args:
        values: ``[batch, heads, tokens, dim]``, the last dimension contiguous.
        segments: Of the tokens.
        mode: ``"sum"``, ``"mean"``, ``"variance"`` (about ``former``), ``"extremes"`` (minimum and maximum), or
            ``"centroid"``: the mean, scaled to length 1 if rows are, and ``former`` for an empty segment; and, in the same
            pass, the mean of the rows as they are if they are scaled, else the variance, taken about ``former``, which
            is near enough to the mean that little cancels.
        normalise: Scale each row to length 1 first.
        former: ``[batch, heads, number, dim]``, for ``"centroid"``, and the means for ``"variance"``.

    Returns:
        Two tensors ``[batch, heads, number, dim]`` float32; the second is empty where there is one result.
    """
    batch, heads, _, dim = values.shape
    values = values if values.stride(-1) == 1 else values.contiguous()
    starts, order = segments.starts, segments.order  # in this order, since the first may bring the second
    first = torch.empty(batch, heads, segments.number, dim, dtype=torch.float32, device=values.device)
    second = torch.empty_like(first) if mode in ("extremes", "centroid") else first[..., :0]
    with torch.cuda.device_of(values):  # Triton launches on the current device
        _moments[(segments.number, batch * heads)](
            values,
            order.contiguous(),
            starts.contiguous(),
            first if former is None else former.float().contiguous(),
            first,
            second,
            heads,
            order.shape[-1],
            segments.number,
            dim,
            *values.stride()[:3],
            MODE=_MODES[mode],
            NORMALISE=normalise,
            ROWS=16 if interpreted() else 32,
            WIDTH=power_of_two(dim),
            num_warps=4,
        )
    return first, second


@triton.jit(do_not_specialize=["tokens", "number"])
def _moments(
    values,
    order,
    starts,
    former,
    first,
    second,
    heads,
    tokens,
    number,
    dim,
    stride_b,
    stride_h,
    stride_n,
    MODE: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    segment = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    begin = tl.load(starts + head * (number + 1) + segment)
    end = tl.load(starts + head * (number + 1) + segment + 1)
    column = tl.arange(0, WIDTH)
    inside = column < dim
    base = values + (head // heads) * stride_b + (head % heads) * stride_h
    size = tl.maximum(end - begin, 1).to(tl.float32)
    one = tl.zeros([ROWS, WIDTH], tl.float32)
    two = tl.zeros([ROWS, WIDTH], tl.float32)
    if MODE == 3:
        one += float("inf")
        two -= float("inf")
    out = (head * number + segment) * dim + column
    if MODE == 2 or MODE == 4:
        known = tl.load(former + out, mask=inside, other=0.0)
    for start in range(begin, end, ROWS):
        place = start + tl.arange(0, ROWS)
        here = (place < end)[:, None] & inside[None, :]
        row = tl.load(order + head * tokens + place, mask=place < end, other=0).to(tl.int64)
        x = tl.load(base + row[:, None] * stride_n + column[None, :], mask=here, other=0.0).to(tl.float32)
        if NORMALISE and MODE != 4:
            x /= tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None]
        if MODE == 3:
            one = tl.minimum(one, tl.where(here, x, float("inf")))
            two = tl.maximum(two, tl.where(here, x, float("-inf")))
        elif MODE == 2:
            x = tl.where(here, x - known[None, :], 0.0)
            one += x * x
        elif MODE == 4:
            if NORMALISE:
                two += x
                one += x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None]
            else:
                one += x
                apart = tl.where(here, x - known[None, :], 0.0)
                two += apart * apart
        else:
            one += x
    if MODE == 3:
        some = begin < end
        tl.store(first + out, tl.where(some, tl.min(one, 0), 0.0), mask=inside)
        tl.store(second + out, tl.where(some, tl.max(two, 0), 0.0), mask=inside)
    else:
        result = tl.sum(one, 0)
        if MODE > 0:
            result /= size
        if MODE == 4:
            beside = tl.sum(two, 0) / size
            if NORMALISE:
                result /= tl.maximum(tl.sqrt(tl.sum(result * result, 0)), 1e-12)
            else:
                moved = result - known
                beside = tl.where(end - begin > 1, tl.maximum(beside - moved * moved, 0.0), 0.0)
            tl.store(second + out, beside, mask=inside)
            result = tl.where(begin < end, result, known)
        tl.store(first + out, result, mask=inside)
