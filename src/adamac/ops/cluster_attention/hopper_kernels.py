"""Cluster attention for Hopper, in Gluon: who fetches and who computes are different warps.

A program has 128 rows of one query cluster. Four warps fetch: they gather packed keys and values into shared memory, some
blocks ahead. Two groups of four warps compute, 64 rows each, and overlap their own work as FlashAttention-3 does: a step
begins to multiply the queries with a block of keys, and the weights of the block before with its values, and takes the
softmax of the former while the matrix units are busy with the latter.

What a step needs arrives together and is freed together, so shared memory is a ring of *pairs*: the keys of a block and the
values of the block before. In a tile of at most 64 rows the two groups share out the blocks instead of the rows, every other
one each; there the block before a group's own is two back, and a pair has one reader.

The softmax has to stand between the wait for the logits and the wait for the values in the machine's code too. Nothing
obliges the assembler to leave it there: the softmax does not depend on the second wait, and ptxas put both waits first, so
that nothing overlapped at all. What it does not move across is a branch. The wait for the next pair is one (it asks in a
loop), is needed at about that place anyway, and so stands there. A test reads the machine's code for it.

The order of blocks is that of the other kernel: the tokens that are read, then the means of all clusters with the log of
how many of their tokens are skipped as bias.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from adamac.ops.cluster_attention.hopper_compute import GROUP, compute
from adamac.ops.cluster_attention.hopper_fetch import fetch_pairs


def configuration(head_dim: int) -> dict[str, int]:
    """What the kernel is launched with; shared memory holds the queries and ``STAGES`` pairs of keys and values."""
    return {"KEYS": 128, "DIM": head_dim, "STAGES": 3 if head_dim > 64 else 5, "num_warps": 4}


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
    if cluster > q_clusters:  # a spare tile has no rows
        return
    first = gl.load(tile_first + head * tiles + tile)
    own = gl.minimum(cluster, q_clusters - 1)
    stop = gl.load(q_starts + head * (q_clusters + 1) + own + 1)
    stop = gl.where(cluster < q_clusters, stop, q_tokens)
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
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_memory = gl.allocate_shared_memory(dtype, [2, GROUP, DIM], shared)
    memory = (
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], shared),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], shared),
        gl.allocate_shared_memory(gl.float32, [STAGES, KEYS], line),
    )
    tops_and_totals = (
        gl.allocate_shared_memory(gl.float32, [GROUP], line),
        gl.allocate_shared_memory(gl.float32, [GROUP], line),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    alone = stop - first <= GROUP
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=128)  # each fetching thread says when its copies are there
        if alone:  # the groups that read a pair say when they are done
            mbarrier.init(empty.index(stage), count=1)
        else:
            mbarrier.init(empty.index(stage), count=2)
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(done, count=1)
    fence_async_shared()

    barriers = (full, empty, done)
    sides = (query, output, lse, rows, first, stop, q_stride_n, o_stride_n)
    bounds = (length, exact, blocks, alone)
    gl.warp_specialize(
        [
            (
                compute,
                (0, memory, barriers, q_memory, tops_and_totals, sides, bounds, scale, KEYS, DIM, STAGES),
            ),
            (
                compute,
                (1, memory, barriers, q_memory, tops_and_totals, sides, bounds, scale, KEYS, DIM, STAGES),
            ),
            (
                fetch_pairs,
                (memory, barriers, key, value, tokens, skipped, bounds, k_tokens, KEYS, DIM, STAGES),
            ),
        ],
        [4, 4],
        [216, 72],
    )
