"""Choices by counting: a pass that counts what each program has, and one that knows from the counts where its own belong."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamac.moe.choices import Choices
from adamac.moe.routing import Routing
from adamac.moe.rows import Order
from adamac.ops.launch import power_of_two

# Pairs of a token and a rank that a program may have.
_PAIRS = 4096
# Choices that have arrived, of a program.
_BLOCK = 1024


def by_rank(routing: Routing, local: int, ranks: int) -> Choices:
    """Compute :func:`adamac.moe.choices.by_rank`."""
    experts, dropped = routing.experts.contiguous(), routing.dropped
    tokens, top_k = experts.shape
    block = max(16, min(256, _PAIRS // power_of_two(ranks)))
    programs = triton.cdiv(tokens, block)
    rows = tokens * ranks
    made = torch.empty(3 * rows + 2 * experts.numel(), dtype=torch.int64, device=experts.device)
    flat, sources, where, chosen, places = made.split([rows] * 3 + [experts.numel()] * 2)
    codes = torch.empty(experts.numel(), dtype=torch.int32, device=experts.device)
    counts = torch.empty(ranks, 2, dtype=torch.int64, device=experts.device)
    # Of each program and rank its rows; after all of these its choices.
    numbers = torch.empty(2, ranks, programs, dtype=torch.int32, device=experts.device)
    given = experts, experts if dropped is None else dropped.contiguous()
    sizes = {
        "TOP_K": top_k,
        "DROPPED": dropped is not None,
        "BLOCK": block,
        "RANKS": power_of_two(ranks),
    }
    with torch.cuda.device_of(experts):  # Triton launches on the current device
        _count[(programs,)](*given, numbers, tokens, local, ranks, programs, **sizes)
        ends = numbers.view(2, -1).cumsum(1)
        _place[(programs,)](
            *given,
            numbers,
            ends,
            *(flat, sources, where, chosen, places, codes, counts),
            *(tokens, local, ranks, programs),
            **sizes,
        )
    copies = Order(flat, where.view(tokens, ranks), False, sources)
    return Choices(copies, Order(chosen, places.view(tokens, top_k), dropped is None), codes, counts)


def tables(
    codes: Tensor, weights: Tensor, rows: int, local: int, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute both tables of :func:`adamac.moe.choices.tabled`, and the place of each choice in them."""
    total = len(codes)
    programs = triton.cdiv(total, _BLOCK)
    begun = torch.empty(programs, dtype=torch.int32, device=codes.device)
    experts, table = codes.new_empty(rows, slots), weights.new_empty(rows, slots)
    places = torch.empty(total, dtype=torch.int64, device=codes.device)
    with torch.cuda.device_of(codes):
        _begun[(programs,)](codes, begun, total, local, BLOCK=_BLOCK)
        _tables[(programs,)](
            *(codes, weights, begun, experts, table, places), *(total, local, slots), BLOCK=_BLOCK
        )
    return experts, table, places


@triton.jit
def _rank(experts, dropped, token, k, tokens, local, ranks, TOP_K: tl.constexpr, DROPPED: tl.constexpr):
    """The k-th expert of each token, and its rank; the number of ranks where there is none."""
    there = token < tokens
    expert = tl.load(experts + token * TOP_K + k, mask=there, other=0).to(tl.int32)
    if DROPPED:
        there = there & (tl.load(dropped + token * TOP_K + k, mask=there, other=1) == 0)
    return expert, tl.where(there, expert // local, ranks)


@triton.jit
def _chosen(
    experts,
    dropped,
    tokens,
    local,
    ranks,
    TOP_K: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Tokens of this program, and how many of the choices of each are on each rank."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = tl.arange(0, RANKS)
    number = tl.zeros([BLOCK, RANKS], tl.int32)
    for k in tl.static_range(TOP_K):
        _, rank = _rank(experts, dropped, token, k, tokens, local, ranks, TOP_K, DROPPED)
        number += ((rank[:, None] == known[None, :]) & (known < ranks)[None, :]).to(tl.int32)
    return token, number


@triton.jit(do_not_specialize=["tokens", "programs"])
def _count(
    experts,
    dropped,
    numbers,
    tokens,
    local,
    ranks,
    programs,
    TOP_K: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
):
    _, number = _chosen(experts, dropped, tokens, local, ranks, TOP_K, DROPPED, BLOCK, RANKS)
    known = tl.arange(0, RANKS)
    place = numbers + known.to(tl.int64) * programs + tl.program_id(0)
    tl.store(place, tl.sum((number > 0).to(tl.int32), 0), mask=known < ranks)
    tl.store(place + ranks * programs, tl.sum(number, 0), mask=known < ranks)


@triton.jit
def _bounds(numbers, ends, programs, ranks, RANKS: tl.constexpr):
    """Where this program's part of each rank begins, and how many each rank has of all programs."""
    known = tl.arange(0, RANKS)
    there = known < ranks
    first = known.to(tl.int64) * programs
    own = first + tl.program_id(0)
    start = tl.load(ends + own, mask=there, other=0) - tl.load(numbers + own, mask=there, other=0)
    before = tl.load(ends + first - 1, mask=there & (known > 0), other=0)
    return start.to(tl.int32), tl.load(ends + first + programs - 1, mask=there, other=0) - before


@triton.jit(do_not_specialize=["tokens", "programs"])
def _place(
    experts,
    dropped,
    numbers,
    ends,
    flat,
    sources,
    where,
    chosen,
    places,
    codes,
    counts,
    tokens,
    local,
    ranks,
    programs,
    TOP_K: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
):
    token, number = _chosen(experts, dropped, tokens, local, ranks, TOP_K, DROPPED, BLOCK, RANKS)
    known = tl.arange(0, RANKS)
    copied, all_copied = _bounds(numbers, ends, programs, ranks, RANKS)
    taken, all_taken = _bounds(numbers + ranks * programs, ends + ranks * programs, programs, ranks, RANKS)
    if tl.program_id(0) == 0:
        tl.store(counts + 2 * known, all_copied, mask=known < ranks)
        tl.store(counts + 2 * known + 1, all_taken, mask=known < ranks)

    some = (number > 0).to(tl.int32)
    row = copied[None, :] + tl.cumsum(some, 0) - 1
    slot = token[:, None] * ranks + known[None, :]
    inside = (token < tokens)[:, None] & (known < ranks)[None, :]
    tl.store(where + slot, tl.where(some > 0, row, -1).to(tl.int64), mask=inside)
    tl.store(flat + row, slot, mask=some > 0)
    tl.store(sources + row, token[:, None] + tl.zeros_like(slot), mask=some > 0)

    start = taken[None, :] + tl.cumsum(number, 0) - number
    seen = tl.zeros([BLOCK, RANKS], tl.int32)
    for k in tl.static_range(TOP_K):
        expert, rank = _rank(experts, dropped, token, k, tokens, local, ranks, TOP_K, DROPPED)
        own = (rank[:, None] == known[None, :]) & (known < ranks)[None, :]
        within = tl.sum(tl.where(own, seen, 0), 1)
        place = tl.sum(tl.where(own, start, 0), 1) + within
        goes = rank < ranks
        tl.store(places + token * TOP_K + k, tl.where(goes, place, -1).to(tl.int64), mask=token < tokens)
        tl.store(chosen + place, token * TOP_K + k, mask=goes)
        tl.store(codes + place, within * local + expert % local, mask=goes)
        seen += own.to(tl.int32)


@triton.jit(do_not_specialize=["total"])
def _begun(codes, begun, total, local, BLOCK: tl.constexpr):
    """How many rows begin in each program's part."""
    choice = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + choice, mask=choice < total, other=local)
    tl.store(begun + tl.program_id(0), tl.sum((code < local).to(tl.int32), 0))


@triton.jit(do_not_specialize=["total"])
def _tables(codes, weights, begun, experts, table, places, total, local, slots, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    before = 0
    for first in range(0, program, BLOCK):
        other = first + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(begun + other, mask=other < program, other=0), 0)
    choice = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = choice < total
    code = tl.load(codes + choice, mask=there, other=local)
    following = tl.load(codes + choice + 1, mask=choice + 1 < total, other=0)  # as if another row followed
    line = (before + tl.cumsum((code < local).to(tl.int32), 0) - 1).to(tl.int64) * slots
    slot = code // local
    tl.store(places + choice, line + slot, mask=there)
    tl.store(experts + line + slot, code % local, mask=there)
    weight = tl.load(weights + choice, mask=there, other=0.0)
    tl.store(table + line + slot, weight, mask=there)
    # The last choice of a row empties the slots behind it.
    last = there & (following < local)
    for empty in range(1, slots):
        behind = last & (slot < empty)
        tl.store(experts + line + empty, -1, mask=behind)
        tl.store(table + line + empty, tl.zeros_like(weight), mask=behind)
