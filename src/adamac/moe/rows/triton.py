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
# Pairs of a slot and a label that it may have.
_PAIRS = 8192
# Rows of a run that a program writes at once, and programs that share a run.
_RUN, _SHARING = 256, 16


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


def copies(rows: Tensor, order: Order) -> Tensor:
    """Compute :func:`adamac.moe.rows.spread`; room that no row fills is not written."""
    tokens, slots = order.where.shape
    width, block = rows.shape[1], _block(rows)
    out = rows.new_empty(len(order.flat), width)
    if out.numel():
        with torch.cuda.device_of(rows):
            _copies[(tokens, triton.cdiv(width, block))](
                rows.contiguous(), order.where, out, slots, width, BLOCK=block, num_warps=_warps(block)
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


def sorting(labels: Tensor, number: int, *, spare: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count and place, in two passes over the labels; stable.

    Args:
        labels: ``[tokens, slots]`` integers.
        number: How many labels there are.
        spare: Whether slots and tokens of rows that there are not will be looked at: they are 0 then.

    Returns:
        For all slots, of which the sorted rows are the first: the slot of each row and its token; ``[tokens, slots]`` the row of
        each slot, -1 if it has none; and ``[number]`` how many rows each label has. All int64.
    """
    slots, total = labels.shape[1], labels.numel()
    block = max(16, min(1024, _PAIRS // power_of_two(number)))
    programs = triton.cdiv(total, block)
    labels = labels.contiguous()
    counts = torch.empty(number, programs, dtype=torch.int32, device=labels.device)
    make = torch.zeros if spare else torch.empty
    flat, sources, where = make(3, total, dtype=torch.int64, device=labels.device).unbind()
    lengths = torch.empty(number, dtype=torch.int64, device=labels.device)
    sizes = {"BLOCK": block, "NUMBER": power_of_two(number)}
    with torch.cuda.device_of(labels):
        _count[(programs,)](labels, counts, total, number, programs, **sizes)
        ends = counts.flatten().cumsum(0)
        _place[(programs,)](
            labels, counts, ends, flat, sources, where, lengths, total, slots, number, programs, **sizes
        )
    return flat, where.view(labels.shape), sources, lengths


def by_run(lengths: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Compute :func:`adamac.moe.rows.by_run`: where each sorted row was, and where each row goes."""
    outer, inner = lengths.shape
    flat, where = torch.empty(2, rows, dtype=torch.int64, device=lengths.device).unbind()
    with torch.cuda.device_of(lengths):
        _runs[(outer * inner, _SHARING)](
            lengths,
            flat,
            where,
            inner,
            *lengths.stride(),
            RUNS=outer * inner,
            ALL=power_of_two(outer * inner),
            BLOCK=_RUN,
        )
    return flat, where


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
def _copies(rows, where, out, slots, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(rows + token * width + column, mask=column < width)
    for slot in range(slots):
        row = tl.load(where + token * slots + slot)
        end = tl.where(row >= 0, width, 0)
        tl.store(out + row * width + column, x, mask=column < end)


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


@triton.jit
def _labels(labels, total, number, BLOCK: tl.constexpr, NUMBER: tl.constexpr):
    """Slots of this program, and for each whether it has each of the labels."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + slot, mask=slot < total, other=-1).to(tl.int32)
    known = tl.arange(0, NUMBER)
    return slot, ((label[:, None] == known[None, :]) & (known < number)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["total", "programs"])
def _count(labels, counts, total, number, programs, BLOCK: tl.constexpr, NUMBER: tl.constexpr):
    _, has = _labels(labels, total, number, BLOCK, NUMBER)
    known = tl.arange(0, NUMBER)
    place = counts + known.to(tl.int64) * programs + tl.program_id(0)
    tl.store(place, tl.sum(has, 0), mask=known < number)


@triton.jit(do_not_specialize=["total", "programs"])
def _place(
    labels,
    counts,
    ends,
    flat,
    sources,
    where,
    lengths,
    total,
    slots,
    number,
    programs,
    BLOCK: tl.constexpr,
    NUMBER: tl.constexpr,
):
    slot, has = _labels(labels, total, number, BLOCK, NUMBER)
    known = tl.arange(0, NUMBER)
    place = known.to(tl.int64) * programs + tl.program_id(0)
    end = tl.load(ends + place, mask=known < number, other=0)
    start = (end - tl.load(counts + place, mask=known < number, other=0)).to(tl.int32)
    if tl.program_id(0) == 0:  # where a label's rows end, less where the label's before it do
        first = known.to(tl.int64) * programs
        before = tl.load(ends + first - 1, mask=(known > 0) & (known < number), other=0)
        last = tl.load(ends + first + programs - 1, mask=known < number, other=0)
        tl.store(lengths + known, last - before, mask=known < number)
    # A slot's row: where its label starts, and how many slots of this program before it have the same.
    row = tl.sum(has * (start[None, :] + tl.cumsum(has, 0) - 1), 1)
    some = tl.sum(has, 1) > 0
    tl.store(where + slot, tl.where(some, row, -1), mask=slot < total)
    tl.store(flat + row, slot, mask=some)
    tl.store(sources + row, slot // slots, mask=some)


@triton.jit(do_not_specialize=["inner", "stride", "step"])
def _runs(
    lengths, flat, where, inner, stride, step, RUNS: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr
):
    run = tl.program_id(0)
    other = tl.arange(0, ALL)
    place = other // inner * stride + other % inner * step
    length = tl.load(lengths + place, mask=other < RUNS, other=0)
    column, own = other % inner, run % inner
    earlier = (column < own) | ((column == own) & (other < run))
    start = tl.sum(tl.where(other < run, length, 0), 0)
    target = tl.sum(tl.where(earlier, length, 0), 0)
    number = tl.sum(tl.where(other == run, length, 0), 0)
    for first in range(tl.program_id(1) * BLOCK, number, tl.num_programs(1) * BLOCK):
        row = first + tl.arange(0, BLOCK)
        tl.store(flat + target + row, start + row, mask=row < number)
        tl.store(where + start + row, target + row, mask=row < number)
