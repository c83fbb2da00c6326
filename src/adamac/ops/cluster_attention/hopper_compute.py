"""What the computing warps of the Hopper kernel do; :mod:`adamac.ops.cluster_attention.hopper_kernels` says how it fits together."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# These have been renamed since Triton 3.6.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
GROUP = gl.constexpr(64)  # rows of a computing group, which is what its instruction has


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
def _bias(biases, block, bounds, KEYS: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):
    """What is added to the logits of one block: nothing, or minus infinity past its end, or how much a mean stands for."""
    length, exact, _blocks, _alone = bounds
    lane = gl.arange(0, KEYS, layout=layout)
    of_token = gl.where(block * KEYS + lane < length, 0.0, float("-inf"))
    return gl.where(block >= exact, biases.index(block % STAGES).load(layout), of_token)


@gluon.jit
def _arrived(full, pair, STAGES: gl.constexpr):
    """Wait until a pair is there, for the matrix units as well."""
    mbarrier.wait(full.index(pair % STAGES), (pair // STAGES) & 1)
    fence_async_shared()


@gluon.jit
def _free(empty, pair, STAGES: gl.constexpr):
    """Say that this group is done with a pair."""
    barrier()  # of its four warps
    mbarrier.arrive(empty.index(pair % STAGES), count=1)


@gluon.jit
def _times_keys(own, k_memory, pair, KEYS: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):
    """Begin to multiply the queries with the keys of a pair."""
    zeros = gl.zeros([GROUP, KEYS], gl.float32, layout)
    keys = k_memory.index(pair % STAGES).permute((1, 0))
    return warpgroup_mma(own, keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def _times_values(weights, acc, v_memory, pair, STAGES: gl.constexpr):
    """Begin to add the weights' products with the values of a pair."""
    return warpgroup_mma(weights, v_memory.index(pair % STAGES), acc, is_async=True)


@gluon.jit
def _step(
    block,
    stride,
    tools,  # (queries, memory, barriers, bounds, scale)
    state,  # (weights, output, top, total)
    BIASED: gl.constexpr,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Begin to multiply a block's keys and the block before's values, and take the softmax when the keys are done."""
    own, memory, barriers, bounds, scale = tools
    k_memory, v_memory, biases = memory
    full, empty, _done = barriers
    weights, acc, top, total = state
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    bias_layout: gl.constexpr = gl.SliceLayout(0, logits_layout)
    token = _times_keys(own, k_memory, block, KEYS, STAGES, logits_layout)
    added = _times_values(weights, acc, v_memory, block, STAGES)
    if BIASED:
        bias = _bias(biases, block, bounds, KEYS, STAGES, bias_layout)
    else:
        bias = gl.zeros([KEYS], gl.float32, bias_layout)
    logits = warpgroup_mma_wait(1, deps=[token])
    new_weights, fade, top, total = _softmax(logits, top, total, scale, bias, BIASED)
    # The next pair is waited for here, lest the assembler wait for the values before it takes the softmax.
    _arrived(full, block + stride, STAGES)
    acc = warpgroup_mma_wait(0, deps=[added])
    _free(empty, block, STAGES)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, acc_layout))[:, None]
    weights = gl.convert_layout(new_weights.to(own.dtype), gl.DotOperandLayout(0, acc_layout, 2))
    return weights, acc, top, total


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
    weights, acc, top, total = state
    for index in range(start, stop):
        state = (weights, acc, top, total)
        block = first_block + index * stride
        weights, acc, top, total = _step(block, stride, tools, state, BIASED, KEYS, DIM, STAGES)
    return weights, acc, top, total


@gluon.jit
def _room_for_output(keys, DIM: gl.constexpr):
    """The memory of a block of keys as a group's output in float32, which is as large."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    if REINTERPRETS:
        room = keys.reinterpret(gl.float32, [GROUP, DIM], plain)
    else:
        room = keys._reinterpret(gl.float32, [GROUP, DIM], plain)
    return room


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
def _store(acc, top, total, sides, begin, stop, row_layout: gl.constexpr, acc_layout: gl.constexpr):
    """Write a group's output, over the total of its weights, and its log-sum-exp to where its rows belong."""
    _query, output, lse, rows, _first, _stop, _q_stride, o_stride = sides
    out_row: gl.constexpr = gl.SliceLayout(1, acc_layout)
    some = total > 0
    log_sum = gl.where(some, (top + gl.log2(gl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
    share = gl.convert_layout(gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0), out_row)
    acc = gl.where((share > 0)[:, None], acc * share[:, None], 0.0)
    place = begin + gl.arange(0, GROUP, layout=out_row)
    column = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc_layout))
    row = gl.load(rows + place, mask=place < stop, other=0).to(gl.int64)
    here = (place < stop)[:, None] & (column >= 0)[None, :]
    gl.store(output + row[:, None] * o_stride + column[None, :], acc.to(output.dtype.element_ty), mask=here)
    place = begin + gl.arange(0, GROUP, layout=row_layout)
    row = gl.load(rows + place, mask=place < stop, other=0)
    gl.store(lse + row, log_sum, mask=place < stop)


@gluon.jit
def compute(
    HALF: gl.constexpr,
    memory,  # (keys, values, biases)
    barriers,  # (full, empty, done)
    q_memory,
    tops_and_totals,  # of the second group
    sides,
    bounds,
    scale,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What a computing group does: 64 rows and all blocks, or, in a tile of at most 64 rows, these and every other block."""
    k_memory, v_memory, biases = memory
    full, empty, done = barriers
    query, _output, _lse, rows, first, stop, q_stride, _o_stride = sides
    length, _exact, blocks, alone = bounds
    across: gl.constexpr = DIM // 8
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, logits_layout)
    bias_layout: gl.constexpr = gl.SliceLayout(0, logits_layout)

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
    last = first_block + number * stride  # the last pair has values only
    if number > 0:
        _arrived(full, first_block, STAGES)
        token = _times_keys(own, k_memory, first_block, KEYS, STAGES, logits_layout)
        logits = warpgroup_mma_wait(0, deps=[token])
        bias = _bias(biases, first_block, bounds, KEYS, STAGES, bias_layout)
        weights, _fade, top, total = _softmax(logits, top, total, scale, bias, True)
        weights = gl.convert_layout(weights.to(own.dtype), weights_layout)
        _arrived(full, first_block + stride, STAGES)
        _free(empty, first_block, STAGES)
        whole = gl.maximum(gl.cdiv(length // KEYS - first_block, stride), 1)
        way = (first_block, stride)
        tools = (own, memory, barriers, bounds, scale)
        state = (weights, acc, top, total)
        state = _walk(1, whole, way, tools, state, False, KEYS, DIM, STAGES)
        state = _walk(whole, number, way, tools, state, True, KEYS, DIM, STAGES)
        weights, acc, top, total = state
        added = _times_values(weights, acc, v_memory, last, STAGES)
        acc = warpgroup_mma_wait(0, deps=[added])
    if alone:
        last_of_second = 1 + gl.cdiv(blocks - 1, 2) * 2  # has no keys, so there is room for its output
        others = _room_for_output(k_memory.index(last_of_second % STAGES), DIM)
        partial = (others, tops_and_totals[0], tops_and_totals[1])
        acc, top, total = _join(HALF, acc, top, total, partial, done, row_layout, acc_layout)
        stop = gl.where(HALF == 1, begin, stop)

    _store(acc, top, total, sides, begin, stop, row_layout, acc_layout)
