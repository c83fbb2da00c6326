"""Cluster attention for Hopper, in Gluon: who fetches and who computes are different warps.

A program has 128 rows of one query cluster. Four warps fetch: they gather blocks of packed keys and values into shared
memory, some blocks ahead. Two groups of four warps compute, 64 rows each, and overlap their own work as FlashAttention-3
does: while the matrix units multiply a block's logits and the former block's weights with its values, nothing waits but
the softmax in between; and while one group takes its softmax, the other has the matrix units.

The order of blocks is that of the other kernel: the tokens that are read, then the means of all clusters with the log of
how many of their tokens are skipped as bias.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Both have been renamed since Triton 3.6.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
fetch = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
GROUP = gl.constexpr(64)  # rows of a computing group, which is what its instruction has


def configuration(head_dim: int) -> dict[str, int]:
    """What the kernel is launched with; shared memory holds the queries and ``STAGES`` blocks of keys and of values."""
    return {"KEYS": 128, "DIM": head_dim, "STAGES": 2 if head_dim > 64 else 4, "num_warps": 4}


@gluon.jit
def _fetch_block(base, row, column, memory, full, empty, block, DIM: gl.constexpr, STAGES: gl.constexpr):
    """Bring one block to its place once the place is free; the barrier is told when it has arrived."""
    stage = block % STAGES
    mbarrier.wait(empty.index(stage), ((block // STAGES) & 1) ^ 1)
    fetch(memory.index(stage), base + (row[:, None] * DIM + column[None, :]))
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _block_rows(tokens, block, lane, exact, k_tokens, KEYS: gl.constexpr):
    """Packed rows of one block: listed ones, and after the last block of these the means. Lists are whole blocks long."""
    listed = gl.load(tokens + gl.where(block < exact, block * KEYS, 0) + lane)
    return gl.where(block < exact, listed, k_tokens + (block - exact) * KEYS + lane)


@gluon.jit
def _fetch(
    memory,  # (keys, values)
    barriers,  # (k_full, v_full, k_empty, v_empty)
    key,
    value,
    tokens,
    exact,
    blocks,
    k_tokens,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What the fetching warps do: rows are looked up a block ahead, and keys go a block ahead of values."""
    k_memory, v_memory = memory
    k_full, v_full, k_empty, v_empty, _done = barriers
    across: gl.constexpr = DIM // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    lane = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
    if blocks > 0:
        row = _block_rows(tokens, 0, lane, exact, k_tokens, KEYS)
        _fetch_block(key, row, column, k_memory, k_full, k_empty, 0, DIM, STAGES)
        for block in range(1, blocks):
            next_row = _block_rows(tokens, block, lane, exact, k_tokens, KEYS)
            _fetch_block(value, row, column, v_memory, v_full, v_empty, block - 1, DIM, STAGES)
            _fetch_block(key, next_row, column, k_memory, k_full, k_empty, block, DIM, STAGES)
            row = next_row
        _fetch_block(value, row, column, v_memory, v_full, v_empty, blocks - 1, DIM, STAGES)


@gluon.jit
def _bias(block, exact, length, skipped, KEYS: gl.constexpr, layout: gl.constexpr):
    """What is added to the logits of one block: nothing, or minus infinity past its end, or how much a mean stands for."""
    lane = gl.arange(0, KEYS, layout=layout)
    of_token = gl.where(block * KEYS + lane < length, 0.0, float("-inf"))
    is_mean = (block >= exact) & (lane >= 0)
    return gl.load(skipped + (block - exact) * KEYS + lane, mask=is_mean, other=of_token)


@gluon.jit
def _softmax(logits, top, total, scale, bias, BIASED: gl.constexpr):
    """Take logits into the running softmax, in powers of two; returns weights and the factor for what came before."""
    if BIASED:
        logits = logits * scale + bias[None, :]
        new_top = gl.maximum(top, gl.max(logits, 1))
        # Until something is read the top is minus infinity, of which no difference may be taken.
        reference = gl.where(new_top == float("-inf"), 0.0, new_top)
        weights = gl.exp2(logits - reference[:, None])
        fade = gl.exp2(top - reference)
    else:
        new_top = gl.maximum(top, gl.max(logits, 1) * scale)
        weights = gl.exp2(logits * scale - new_top[:, None])
        fade = gl.exp2(top - new_top)
    return weights, fade, new_top, total * fade + gl.sum(weights, 1)


@gluon.jit
def _next_logits(
    q_memory, k_memory, k_full, block, KEYS: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr
):
    """Begin to multiply the queries with a block of keys."""
    stage = block % STAGES
    mbarrier.wait(k_full.index(stage), (block // STAGES) & 1)
    fence_async_shared()
    zeros = gl.zeros([GROUP, KEYS], gl.float32, layout)
    return warpgroup_mma(q_memory, k_memory.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _add_values(weights, acc, v_memory, v_full, block, STAGES: gl.constexpr):
    """Begin to multiply the weights with a block of values."""
    stage = block % STAGES
    mbarrier.wait(v_full.index(stage), (block // STAGES) & 1)
    fence_async_shared()
    return warpgroup_mma(weights, v_memory.index(stage), acc, is_async=True)


@gluon.jit
def _free(empty, block, alone, STAGES: gl.constexpr):
    barrier()  # all four warps are done with the block
    mbarrier.arrive(empty.index(block % STAGES), count=1)
    if alone:  # nobody else will read it
        mbarrier.arrive(empty.index(block % STAGES), count=1)


@gluon.jit
def _step(
    block,
    before,
    own,
    memory,
    barriers,
    bounds,
    skipped,
    weights,
    acc,
    top,
    total,
    scale,
    BIASED: gl.constexpr,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Multiply a block of keys, and the weights of the block before with its values; take the softmax in between."""
    k_memory, v_memory = memory
    k_full, v_full, k_empty, v_empty, _done = barriers
    length, exact, _, alone = bounds
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    bias_layout: gl.constexpr = gl.SliceLayout(0, logits_layout)
    if BIASED:  # asked for first, so that it is there when the logits are
        bias = _bias(block, exact, length, skipped, KEYS, bias_layout)
    else:
        bias = gl.zeros([KEYS], gl.float32, bias_layout)
    token = _next_logits(own, k_memory, k_full, block, KEYS, STAGES, logits_layout)
    added = _add_values(weights, acc, v_memory, v_full, before, STAGES)
    logits = warpgroup_mma_wait(1, deps=[token])
    _free(k_empty, block, alone, STAGES)
    new_weights, fade, top, total = _softmax(logits, top, total, scale, bias, BIASED)
    acc = warpgroup_mma_wait(0, deps=[added])
    _free(v_empty, before, alone, STAGES)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, acc_layout))[:, None]
    operand = gl.convert_layout(new_weights.to(own.dtype), gl.DotOperandLayout(0, acc_layout, 2))
    return operand, acc, top, total


@gluon.jit
def _walk(
    start,
    stop,
    way,  # (first block, stride)
    tools,
    state,  # (weights, output, top, total)
    BIASED: gl.constexpr,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Take a group's blocks from one to another into its state; those with a bias have a loop of their own."""
    first_block, stride = way
    own, memory, barriers, bounds, skipped, scale = tools
    weights, acc, top, total = state
    for index in range(start, stop):
        block = first_block + index * stride
        weights, acc, top, total = _step(
            block,
            block - stride,
            own,
            memory,
            barriers,
            bounds,
            skipped,
            weights,
            acc,
            top,
            total,
            scale,
            BIASED,
            KEYS,
            DIM,
            STAGES,
        )
    return weights, acc, top, total


@gluon.jit
def _join(
    HALF: gl.constexpr, acc, top, total, partial, done, row_layout: gl.constexpr, acc_layout: gl.constexpr
):
    """The second group hands over what it has for the same rows; the first takes it into its own."""
    others, other_tops, other_totals = partial
    if HALF == 1:
        others.store(acc)
        other_tops.store(top)
        other_totals.store(total)
        barrier()
        mbarrier.arrive(done, count=1)
    else:
        mbarrier.wait(done, 0)
        other_top = other_tops.load(row_layout)
        new_top = gl.maximum(top, other_top)
        reference = gl.where(new_top == float("-inf"), 0.0, new_top)
        fade, other_fade = gl.exp2(top - reference), gl.exp2(other_top - reference)
        total = total * fade + other_totals.load(row_layout) * other_fade
        out_row: gl.constexpr = gl.SliceLayout(1, acc_layout)
        acc = acc * gl.convert_layout(fade, out_row)[:, None]
        acc += others.load(acc_layout) * gl.convert_layout(other_fade, out_row)[:, None]
        top = new_top
    return acc, top, total


@gluon.jit
def _compute(
    HALF: gl.constexpr,
    memory,  # (keys, values)
    barriers,  # (k_full, v_full, k_empty, v_empty, done)
    q_memory,
    partial,  # (output, top, total) of the second group
    sides,
    bounds,
    skipped,
    scale,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What a computing group does: 64 rows and all blocks, or, in a tile of at most 64 rows, these and every other block."""
    k_memory, v_memory = memory
    k_full, v_full, k_empty, _v_empty, done = barriers
    query, output, lse, rows, first, stop, q_stride, o_stride = sides
    length, exact, blocks, alone = bounds
    across: gl.constexpr = DIM // 8
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, logits_layout)
    bias_layout: gl.constexpr = gl.SliceLayout(0, logits_layout)
    out_row: gl.constexpr = gl.SliceLayout(1, acc_layout)

    begin = first + gl.where(alone, 0, HALF * GROUP)
    first_block = gl.where(alone, HALF, 0)
    stride = gl.where(alone, 2, 1)
    place = begin + gl.arange(0, GROUP, layout=gl.SliceLayout(1, load_layout))
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, load_layout))
    row = gl.load(rows + place, mask=place < stop, other=0).to(gl.int64)
    here = (place < stop)[:, None] & (column >= 0)[None, :]
    own = q_memory.index(HALF)
    own.store(gl.load(query + row[:, None] * q_stride + column[None, :], mask=here, other=0.0))
    fence_async_shared()
    barrier()

    top = gl.full([GROUP], float("-inf"), gl.float32, row_layout)
    total = gl.full([GROUP], 0.0, gl.float32, row_layout)
    acc = gl.zeros([GROUP, DIM], gl.float32, acc_layout)
    number = gl.cdiv(blocks - first_block, stride)
    if number > 0:
        token = _next_logits(own, k_memory, k_full, first_block, KEYS, STAGES, logits_layout)
        logits = warpgroup_mma_wait(0, deps=[token])
        _free(k_empty, first_block, alone, STAGES)
        bias = _bias(first_block, exact, length, skipped, KEYS, bias_layout)
        weights, _fade, top, total = _softmax(logits, top, total, scale, bias, True)
        operand = gl.convert_layout(weights.to(query.dtype.element_ty), weights_layout)
        whole = gl.maximum(gl.cdiv(length // KEYS - first_block, stride), 1)
        way = (first_block, stride)
        tools = (own, memory, barriers, bounds, skipped, scale)
        state = (operand, acc, top, total)
        state = _walk(1, whole, way, tools, state, False, KEYS, DIM, STAGES)
        state = _walk(whole, number, way, tools, state, True, KEYS, DIM, STAGES)
        operand, acc, top, total = state
        added = _add_values(operand, acc, v_memory, v_full, first_block + (number - 1) * stride, STAGES)
        acc = warpgroup_mma_wait(0, deps=[added])
    if alone:
        acc, top, total = _join(HALF, acc, top, total, partial, done, row_layout, acc_layout)
        stop = gl.where(HALF == 1, begin, stop)

    some = total > 0
    log_sum = gl.where(some, (top + gl.log2(gl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
    share = gl.convert_layout(gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0), out_row)
    acc = gl.where((share > 0)[:, None], acc * share[:, None], 0.0)
    place = begin + gl.arange(0, GROUP, layout=out_row)
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, acc_layout))
    row = gl.load(rows + place, mask=place < stop, other=0).to(gl.int64)
    here = (place < stop)[:, None] & (column >= 0)[None, :]
    gl.store(output + row[:, None] * o_stride + column[None, :], acc.to(output.dtype.element_ty), mask=here)
    place = begin + gl.arange(0, GROUP, layout=row_layout)
    row = gl.load(rows + place, mask=place < stop, other=0)
    gl.store(lse + row, log_sum, mask=place < stop)


@gluon.jit(
    do_not_specialize=[
        "head_from",
        "q_tokens",
        "k_tokens",
        "q_clusters",
        "k_clusters",
        "means",
        "tiles",
        "capacity",
        "packed_rows",
    ]
)
def attend_kernel(
    query,
    key,
    value,
    q_order,
    q_starts,
    k_starts,
    ends,
    tile_cluster,
    tile_first,
    listed,
    counted,
    skipped,
    output,
    lse,
    head_from,
    heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    means,
    tiles,
    capacity,
    packed_rows,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    o_stride_b,
    o_stride_h,
    o_stride_n,
    scale,  # times log2(e)
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attend from one tile of 128 rows; the arguments are those of the Triton kernel."""
    here = gl.program_id(1).to(gl.int64)
    head = head_from + here
    # The last cluster of queries may be text, which reads most: it goes first, lest it be waited for.
    tile = tiles - 1 - gl.program_id(0)
    cluster = gl.load(tile_cluster + head * tiles + tile)
    first = gl.load(tile_first + head * tiles + tile)
    own = gl.minimum(cluster, q_clusters - 1)
    stop = gl.load(q_starts + head * (q_clusters + 1) + own + 1)
    stop = gl.where(cluster < q_clusters, stop, q_tokens)
    stop = gl.where(cluster <= q_clusters, stop, 0)  # a spare tile has no rows
    k_starts += head * (k_clusters + 1)
    length = gl.load(ends + (head * q_clusters + own) * k_clusters + k_clusters - 1)
    length = gl.where(cluster < q_clusters, length, 0)
    # Who reads everything needs no list: it reads all rows in their order.
    tokens = gl.where(
        length == gl.load(k_starts + k_clusters), counted, listed + (here * q_clusters + own) * capacity
    )
    skipped += (here * q_clusters + own) * means
    means = gl.where(cluster < q_clusters, means, 0)
    exact = gl.cdiv(length, KEYS)
    blocks = exact + means // KEYS

    sample, part = head // heads, head % heads
    query += sample * q_stride_b + part * q_stride_h
    output += sample * o_stride_b + part * o_stride_h
    key += here * packed_rows * DIM
    value += here * packed_rows * DIM
    rows = q_order + head * q_tokens
    lse += head * q_tokens

    dtype: gl.constexpr = query.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_memory = gl.allocate_shared_memory(dtype, [2, GROUP, DIM], shared)
    k_memory = gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], shared)
    v_memory = gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], shared)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=128)  # each fetching thread says when its copies are there
        mbarrier.init(v_full.index(stage), count=128)
        mbarrier.init(k_empty.index(stage), count=2)  # each computing group says when it is done
        mbarrier.init(v_empty.index(stage), count=2)
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(done, count=1)
    fence_async_shared()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    partial = (
        gl.allocate_shared_memory(gl.float32, [GROUP, DIM], plain),
        gl.allocate_shared_memory(gl.float32, [GROUP], line),
        gl.allocate_shared_memory(gl.float32, [GROUP], line),
    )

    memory = (k_memory, v_memory)
    barriers = (k_full, v_full, k_empty, v_empty, done)
    sides = (query, output, lse, rows, first, stop, q_stride_n, o_stride_n)
    bounds = (length, exact, blocks, stop - first <= GROUP)
    gl.warp_specialize(
        [
            (
                _compute,
                (0, memory, barriers, q_memory, partial, sides, bounds, skipped, scale, KEYS, DIM, STAGES),
            ),
            (
                _compute,
                (1, memory, barriers, q_memory, partial, sides, bounds, skipped, scale, KEYS, DIM, STAGES),
            ),
            (_fetch, (memory, barriers, key, value, tokens, exact, blocks, k_tokens, KEYS, DIM, STAGES)),
        ],
        [4, 4],
        [216, 72],
    )
