"""Cluster attention in two kernels: one lists what each query cluster reads, the other attends.

A program of the second has up to ``ROWS`` rows of one query cluster. It reads keys by token, a block at a time, from its
cluster's list; then, if skipped tokens are compensated, the means of all key clusters in their order, each with the log of
how many tokens of it are skipped as a bias (minus infinity if none is). Keys and values are never permuted or copied: a row
of keys is a few hundred bytes, which a gather reads as fast as a stream.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["head_from", "q_clusters", "k_clusters", "tokens", "capacity"])
def list_kernel(
    ends,  # [heads, q_clusters, k_clusters] running sums of reads
    reads,  # [heads, q_clusters, k_clusters]
    order,  # [heads, tokens] key tokens by cluster
    starts,  # [heads, k_clusters + 1]
    listed,  # [heads of this launch, q_clusters, capacity]
    head_from,
    q_clusters,
    k_clusters,
    tokens,
    capacity,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write the tokens that a query cluster reads, one after another. A cluster that reads all there is needs no list."""
    row = tl.program_id(1).to(tl.int64)  # query cluster of this launch
    head = head_from + row // q_clusters
    own = (head_from * q_clusters + row) * k_clusters
    length = tl.load(ends + own + k_clusters - 1)
    everything = tl.load(starts + head * (k_clusters + 1) + k_clusters)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if (tl.program_id(0) * BLOCK < length) & (length < everything):
        # The first cluster whose running sum is above the place, found by halving.
        low = tl.zeros([BLOCK], tl.int32)
        size = k_clusters
        for _ in range(STEPS):
            half = size // 2
            probe = low + half
            above = tl.load(ends + own + tl.minimum(probe, k_clusters - 1))
            low = tl.where((above <= place) & (half > 0), probe, low)
            size -= half
        first = tl.load(ends + own + low)
        cluster = tl.minimum(tl.where(first <= place, low + 1, low), k_clusters - 1)
        rank = place - (tl.load(ends + own + cluster) - tl.load(reads + own + cluster))
        inside = (place < length) & (place < capacity)
        at = tl.load(starts + head * (k_clusters + 1) + cluster, mask=inside, other=0) + rank
        token = tl.load(order + head * tokens + at, mask=inside, other=0)
        tl.store(listed + row * capacity + place, token, mask=inside)


@triton.jit
def _absorb(
    q,
    k,
    v,
    bias,
    output,
    total,
    top,
    scale,
    BIASED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take one block of keys into the running softmax (in powers of two)."""
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    logits = tl.dot(q, k.T, input_precision=PRECISION)
    if BIASED:
        logits = logits * scale + bias[None, :]
        new_top = tl.maximum(top, tl.max(logits, 1))
        # Until something is read the top is minus infinity, of which no difference may be taken.
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - reference[:, None])
        fade = tl.exp2(top - reference)
    else:
        new_top = tl.maximum(top, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - new_top[:, None])
        fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    output = tl.dot(weights.to(v.dtype), v, output * fade[:, None], input_precision=PRECISION)
    return output, total, new_top


@triton.jit(
    do_not_specialize=[
        "head_from",
        "q_tokens",
        "k_tokens",
        "q_clusters",
        "k_clusters",
        "tiles",
        "capacity",
    ]
)
def attend_kernel(
    query,
    key,
    value,
    mean_key,  # [heads, k_clusters, dim]
    mean_value,
    q_order,  # [heads, q_tokens]
    k_order,  # [heads, k_tokens]
    q_starts,  # [heads, q_clusters + 1]
    k_starts,  # [heads, k_clusters + 1]
    reads,  # [heads, q_clusters, k_clusters]
    ends,
    tile_cluster,  # [heads, tiles]
    tile_first,
    listed,  # [heads of this launch, q_clusters, capacity]
    output,
    lse,  # [heads, q_tokens]
    head_from,
    heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    tiles,
    capacity,
    dim,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    o_stride_b,
    o_stride_h,
    o_stride_n,
    scale,  # times log2(e)
    COMPENSATE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend from one tile of rows."""
    head = (head_from + tl.program_id(1)).to(tl.int64)
    # The last cluster of queries may be text, which reads most: it goes first, lest it be waited for.
    tile = tiles - 1 - tl.program_id(0)
    cluster = tl.load(tile_cluster + head * tiles + tile)
    if cluster <= q_clusters:  # beyond that a tile is spare
        sample, part = head // heads, head % heads
        column = tl.arange(0, WIDTH)
        inside = (column < dim)[None, :]
        first = tl.load(tile_first + head * tiles + tile)
        nothing = cluster == q_clusters  # padding
        stop = tl.load(
            q_starts + head * (q_clusters + 1) + cluster + 1, mask=cluster < q_clusters, other=q_tokens
        )
        place = first + tl.arange(0, ROWS)
        mine = place < stop
        row = tl.load(q_order + head * q_tokens + place, mask=mine, other=0).to(tl.int64)
        q_at = query + sample * q_stride_b + part * q_stride_h + row[:, None] * q_stride_n + column[None, :]
        q = tl.load(q_at, mask=mine[:, None] & inside, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        k_base = key + sample * k_stride_b + part * k_stride_h + column[None, :]
        v_base = value + sample * v_stride_b + part * v_stride_h + column[None, :]
        own = (head * q_clusters + tl.minimum(cluster, q_clusters - 1)) * k_clusters
        everything = tl.load(k_starts + head * (k_clusters + 1) + k_clusters)
        length = tl.load(ends + own + k_clusters - 1)
        length = tl.where(nothing, 0, length)
        # Who reads everything needs no list: the tokens of all clusters are one.
        list_at = listed + (tl.program_id(1).to(tl.int64) * q_clusters + cluster) * capacity
        list_at = tl.where(length == everything, k_order + head * k_tokens, list_at)

        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        lane = tl.arange(0, KEYS)
        bias = tl.zeros([KEYS], tl.float32)
        whole = length // KEYS * KEYS
        for start in range(0, whole, KEYS):
            token = tl.load(list_at + start + lane).to(tl.int64)
            if FULL:
                k = tl.load(k_base + token[:, None] * k_stride_n)
                v = tl.load(v_base + token[:, None] * v_stride_n)
            else:
                k = tl.load(k_base + token[:, None] * k_stride_n, mask=inside, other=0.0)
                v = tl.load(v_base + token[:, None] * v_stride_n, mask=inside, other=0.0)
            acc, total, top = _absorb(q, k, v, bias, acc, total, top, scale, False, UPCAST, PRECISION)
        if whole < length:
            there = whole + lane < length
            token = tl.load(list_at + whole + lane, mask=there, other=0).to(tl.int64)
            k = tl.load(k_base + token[:, None] * k_stride_n, mask=there[:, None] & inside, other=0.0)
            v = tl.load(v_base + token[:, None] * v_stride_n, mask=there[:, None] & inside, other=0.0)
            bias = tl.where(there, 0.0, float("-inf"))
            acc, total, top = _absorb(q, k, v, bias, acc, total, top, scale, True, UPCAST, PRECISION)
        if COMPENSATE and not nothing:
            for start in range(0, k_clusters, KEYS):
                each = start + lane
                there = each < k_clusters
                at = head * (k_clusters + 1) + each
                size = tl.load(k_starts + at + 1, mask=there, other=0) - tl.load(
                    k_starts + at, mask=there, other=0
                )
                left = size - tl.load(reads + own + each, mask=there, other=0)
                bias = tl.where(left > 0, tl.log2(tl.maximum(left, 1).to(tl.float32)), float("-inf"))
                mean = (head * k_clusters + each)[:, None] * dim + column[None, :]
                k = tl.load(mean_key + mean, mask=there[:, None] & inside, other=0.0)
                v = tl.load(mean_value + mean, mask=there[:, None] & inside, other=0.0)
                acc, total, top = _absorb(q, k, v, bias, acc, total, top, scale, True, UPCAST, PRECISION)

        some = total > 0
        acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
        log_sum = tl.where(
            some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf")
        )
        o_at = output + sample * o_stride_b + part * o_stride_h + row[:, None] * o_stride_n + column[None, :]
        tl.store(o_at, acc.to(output.dtype.element_ty), mask=mine[:, None] & inside)
        tl.store(lse + head * q_tokens + row, log_sum, mask=mine)
