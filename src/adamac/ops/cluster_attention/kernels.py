"""Cluster attention in kernels: pack keys and values by cluster, list what each query cluster reads and skips, attend.

Packed, the members of a cluster lie side by side, one head after another, and behind the tokens of a head stand the means of
its clusters. What a query cluster reads is a list of rows of that: gathered from where a transformer leaves keys, token by
token with all heads side by side, the same rows would be megabytes apart, and the memory system could not keep up (a third of
the speed on an H100). A program of the last kernel has up to ``ROWS`` rows of one query cluster. It reads listed rows, a
block at a time; then, if skipped tokens are compensated, the means, each with the log of how many tokens are skipped as a
bias (minus infinity if none is). The biases are worked out beforehand: looked up in place, through three tables each, they
made a block of means cost four times a block of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["head_from", "tokens", "clusters", "rows"])
def pack_kernel(
    source,  # [batch, heads, tokens, dim], any strides but the last
    packed,  # [heads of this launch, rows, dim]
    order,  # [heads, tokens]
    starts,  # [heads, clusters + 1]
    head_from,
    heads,
    tokens,
    clusters,
    rows,
    dim,
    stride_b,
    stride_h,
    stride_n,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copy the members of one cluster to where it begins, and their mean behind all tokens; zeros if there is no such."""
    cluster = tl.program_id(0)
    head = (head_from + tl.program_id(1)).to(tl.int64)
    real = cluster < clusters
    begin = tl.load(starts + head * (clusters + 1) + cluster, mask=real, other=0)
    end = tl.load(starts + head * (clusters + 1) + cluster + 1, mask=real, other=0)
    column = tl.arange(0, WIDTH)
    inside = (column < dim)[None, :]
    source += (head // heads) * stride_b + (head % heads) * stride_h
    packed += tl.program_id(1).to(tl.int64) * rows * dim
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(begin, end, ROWS):
        place = start + tl.arange(0, ROWS)
        here = (place < end)[:, None] & inside
        token = tl.load(order + head * tokens + place, mask=place < end, other=0).to(tl.int64)
        x = tl.load(source + token[:, None] * stride_n + column[None, :], mask=here, other=0.0)
        tl.store(packed + place[:, None] * dim + column[None, :], x, mask=here)
        total += x.to(tl.float32)
    if cluster == clusters - 1:
        # Behind the last cluster stands padding, which is read under a bias of minus infinity.
        for start in range(end, tokens, ROWS):
            place = start + tl.arange(0, ROWS)
            gap = (place < tokens)[:, None] & inside
            tl.store(
                packed + place[:, None] * dim + column[None, :],
                tl.zeros_like(total).to(packed.dtype.element_ty),
                mask=gap,
            )
    mean = tl.sum(total, 0) / tl.maximum(end - begin, 1)
    tl.store(packed + (tokens + cluster) * dim + column, mean.to(packed.dtype.element_ty), mask=column < dim)


@triton.jit(do_not_specialize=["head_from", "q_clusters", "k_clusters", "capacity"])
def list_kernel(
    ends,  # [heads, q_clusters, k_clusters] running sums of reads
    reads,  # [heads, q_clusters, k_clusters]
    starts,  # [heads, k_clusters + 1]
    listed,  # [heads of this launch, q_clusters, capacity]
    head_from,
    q_clusters,
    k_clusters,
    capacity,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Write the packed rows that a query cluster reads, one after another, and zeros to the end of the last ``PIECE``.

    Who reads all there is needs no list.
    """
    row = tl.program_id(0).to(tl.int64)  # query cluster of this launch
    head = head_from + row // q_clusters
    own = (head_from * q_clusters + row) * k_clusters
    length = tl.load(ends + own + k_clusters - 1)
    everything = tl.load(starts + head * (k_clusters + 1) + k_clusters)
    filled = tl.minimum((length + PIECE - 1) // PIECE * PIECE, capacity)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if (tl.program_id(1) * BLOCK < filled) & (length < everything):
        # The first cluster whose running sum is above the place, found by halving.
        low = tl.zeros([BLOCK], tl.int32)
        size = k_clusters
        while size > 1:
            half = size // 2
            below = tl.load(ends + own + tl.minimum(low + half, k_clusters - 1)) <= place
            low = tl.where(below, low + half, low)
            size -= half
        low = tl.where(tl.load(ends + own + low) <= place, low + 1, low)
        cluster = tl.minimum(low, k_clusters - 1)
        rank = place - (tl.load(ends + own + cluster) - tl.load(reads + own + cluster))
        begin = tl.load(starts + head * (k_clusters + 1) + cluster)
        tl.store(
            listed + row * capacity + place, tl.where(place < length, begin + rank, 0), mask=place < filled
        )


@triton.jit(do_not_specialize=["tokens", "clusters", "tiles"])
def tile_kernel(
    starts,  # [heads, clusters + 1]
    tile_cluster,  # [heads, tiles]
    tile_first,
    tokens,
    clusters,
    tiles,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # more than clusters
    PIECE: tl.constexpr,
):
    """Cut the query clusters of one head into tiles, one after another; then padding, as one more; the rest is spare."""
    head = tl.program_id(0).to(tl.int64)
    cluster = tl.arange(0, BLOCK)
    begin = tl.load(starts + head * (clusters + 1) + cluster, mask=cluster <= clusters, other=0)
    end = tl.load(starts + head * (clusters + 1) + cluster + 1, mask=cluster < clusters, other=0)
    end = tl.where(cluster == clusters, tokens, end)
    needed = tl.where(cluster <= clusters, (end - begin + ROWS - 1) // ROWS, 0)
    place = tl.cumsum(needed, 0) - needed
    tile_cluster += head * tiles
    tile_first += head * tiles
    for number in range(0, tl.max(needed, 0)):
        tl.store(tile_cluster + place + number, cluster, mask=number < needed)
        tl.store(tile_first + place + number, begin + number * ROWS, mask=number < needed)
    for spare in range(tl.sum(needed, 0), tiles, PIECE):
        tile = spare + tl.arange(0, PIECE)
        tl.store(tile_cluster + tile, clusters + 1, mask=tile < tiles)
        tl.store(tile_first + tile, tokens, mask=tile < tiles)


@triton.jit(do_not_specialize=["head_from", "q_clusters", "k_clusters", "means"])
def skip_kernel(
    reads,  # [heads, q_clusters, k_clusters]
    starts,  # [heads, k_clusters + 1]
    skipped,  # [heads of this launch, q_clusters, means], float32
    head_from,
    q_clusters,
    k_clusters,
    means,  # k_clusters, filled up to whole blocks
    BLOCK: tl.constexpr,
):
    """Write the logs (to base 2) of how many tokens of each key cluster a query cluster skips, minus infinity for none."""
    row = tl.program_id(0).to(tl.int64)  # query cluster of this launch
    head = head_from + row // q_clusters
    for start in range(0, means, BLOCK):
        cluster = start + tl.arange(0, BLOCK)
        there = cluster < k_clusters
        at = starts + head * (k_clusters + 1) + cluster
        size = tl.load(at + 1, mask=there, other=0) - tl.load(at, mask=there, other=0)
        left = size - tl.load(
            reads + (head_from * q_clusters + row) * k_clusters + cluster, mask=there, other=0
        )
        log = tl.where(left > 0, tl.log2(tl.maximum(left, 1).to(tl.float32)), float("-inf"))
        tl.store(skipped + row * means + cluster, log, mask=cluster < means)


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
        "means",
        "tiles",
        "capacity",
        "rows",
    ]
)
def attend_kernel(
    query,  # [batch, heads, q_tokens, dim], any strides but the last, and so is the output
    key,  # [heads of this launch, rows, dim]
    value,
    q_order,  # [heads, q_tokens]
    q_starts,  # [heads, q_clusters + 1]
    k_starts,  # [heads, k_clusters + 1]
    ends,  # [heads, q_clusters, k_clusters]
    tile_cluster,  # [heads, tiles]
    tile_first,
    listed,  # [heads of this launch, q_clusters, capacity]
    counted,  # [k_tokens or more] 0, 1, 2, ...
    skipped,  # [heads of this launch, q_clusters, means]
    output,
    lse,  # [heads, q_tokens]
    head_from,
    heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    means,  # whole blocks of them, or 0 if nothing is compensated
    tiles,
    capacity,
    rows,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    o_stride_b,
    o_stride_h,
    o_stride_n,
    scale,  # times log2(e)
    dim,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend from one tile of rows."""
    here = tl.program_id(1).to(tl.int64)
    head = head_from + here
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
        base = here * rows * dim
        k_base = key + base + column[None, :]
        v_base = value + base + column[None, :]
        known = tl.minimum(cluster, q_clusters - 1)
        own = (head * q_clusters + known) * k_clusters
        length = tl.load(ends + own + k_clusters - 1)
        length = tl.where(nothing, 0, length)
        # Who reads everything needs no list: it reads all rows in their order.
        everything = tl.load(k_starts + head * (k_clusters + 1) + k_clusters)
        list_at = tl.where(length == everything, counted, listed + (here * q_clusters + known) * capacity)

        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        lane = tl.arange(0, KEYS)
        bias = tl.zeros([KEYS], tl.float32)
        whole = length // KEYS * KEYS
        for start in range(0, whole, KEYS):
            at = tl.load(list_at + start + lane)[:, None] * dim
            if FULL:
                k = tl.load(k_base + at)
                v = tl.load(v_base + at)
            else:
                k = tl.load(k_base + at, mask=inside, other=0.0)
                v = tl.load(v_base + at, mask=inside, other=0.0)
            acc, total, top = _absorb(q, k, v, bias, acc, total, top, scale, False, UPCAST, PRECISION)
        if whole < length:
            there = whole + lane < length
            at = tl.load(list_at + whole + lane, mask=there, other=0)[:, None] * dim
            k = tl.load(k_base + at, mask=there[:, None] & inside, other=0.0)
            v = tl.load(v_base + at, mask=there[:, None] & inside, other=0.0)
            bias = tl.where(there, 0.0, float("-inf"))
            acc, total, top = _absorb(q, k, v, bias, acc, total, top, scale, True, UPCAST, PRECISION)
        skipped += (here * q_clusters + known) * means
        for start in range(0, tl.where(nothing, 0, means), KEYS):
            bias = tl.load(skipped + start + lane)
            at = (k_tokens + start + lane)[:, None] * dim
            if FULL:
                k = tl.load(k_base + at)
                v = tl.load(v_base + at)
            else:
                k = tl.load(k_base + at, mask=inside, other=0.0)
                v = tl.load(v_base + at, mask=inside, other=0.0)
            acc, total, top = _absorb(q, k, v, bias, acc, total, top, scale, True, UPCAST, PRECISION)

        some = total > 0
        acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
        log_sum = tl.where(
            some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf")
        )
        o_at = output + sample * o_stride_b + part * o_stride_h + row[:, None] * o_stride_n + column[None, :]
        tl.store(o_at, acc.to(output.dtype.element_ty), mask=mine[:, None] & inside)
        tl.store(lse + head * q_tokens + row, log_sum, mask=mine)
