"""What the fetching warps of the Hopper kernel do; :mod:`adamac.ops.cluster_attention.hopper_kernels` says how it fits together."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

# Renamed since Triton 3.6.
fetch = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def fetch_pairs(
    memory,  # (keys, values, biases)
    barriers,  # (full, empty, done)
    key,
    value,
    tokens,
    skipped,
    bounds,
    k_tokens,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What the fetching warps do, pair by pair; rows are looked up a pair ahead."""
    k_memory, v_memory, biases = memory
    full, empty, _done = barriers
    _length, exact, blocks, alone = bounds
    across: gl.constexpr = DIM // 8
    down: gl.constexpr = 32 // across
    # A thread has neighbouring rows: the lists are read in long words.
    layout: gl.constexpr = gl.BlockedLayout([KEYS // down // 4, 8], [down, across], [4, 1], [1, 0])
    lane = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
    thread = gl.arange(0, KEYS, layout=gl.BlockedLayout([1], [32], [4], [0]))
    behind = gl.where(alone, 2, 1)  # blocks by which the values of a pair are behind its keys
    row = _rows(tokens, 0, lane, exact, k_tokens, KEYS)
    for pair in range(0, gl.where(blocks > 0, blocks + behind, 0)):
        stage = pair % STAGES
        v_row = _rows(tokens, gl.maximum(pair - behind, 0), lane, exact, k_tokens, KEYS)
        mbarrier.wait(empty.index(stage), ((pair // STAGES) & 1) ^ 1)
        if pair < blocks:
            fetch(k_memory.index(stage), key + (row[:, None] * DIM + column[None, :]))
        if pair >= behind:
            fetch(v_memory.index(stage), value + (v_row[:, None] * DIM + column[None, :]))
        if (pair >= exact) & (pair < blocks):
            fetch(biases.index(stage), skipped + (pair - exact) * KEYS + thread)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        row = _rows(tokens, pair + 1, lane, exact, k_tokens, KEYS)


@gluon.jit
def _rows(tokens, block, lane, exact, k_tokens, KEYS: gl.constexpr):
    """Packed rows of one block: listed ones, and after the last block of these the means. Lists are whole blocks long."""
    if block < exact:
        rows = gl.load(tokens + block * KEYS + lane)
    else:
        rows = k_tokens + (block - exact) * KEYS + lane
    return rows
