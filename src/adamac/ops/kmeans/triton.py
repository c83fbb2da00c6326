"""Nearest centroid in one kernel: a tile of points meets the centroids block by block, and only labels are written.

Similarities are computed by the matrix units from the points' own dtype and held, like offsets, in float32. Directions are
rounded to that dtype first; their offsets make up for it where it matters, at the centroid.

The last six bits of a similarity make room for the place of its centroid in the block, so that one maximum finds both: with
places beside them a block takes half as many instructions again, more than the matrix units need for its products. What is
compared is thus 17 bits of the similarity, where a product of bfloat16 values begins with 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamac.ops.launch import interpreted, power_of_two

# Offset of what fills up the last block.
FARTHEST = tl.constexpr(-3e38)


def nearest(points: Tensor, centroids: Tensor, cosine: bool, form: Tensor | None) -> Tensor:
    """Find the nearest centroid of every point, to 17 bits of its similarity.

    Of equally near ones it is always the same: of the first block that has one, the first if the similarity is positive,
    that is, if they are nearer to the point than the origin is or their cosine is positive; else the last.

    Args:
        points: ``[batch, heads, tokens, dim]``.
        centroids: ``[batch, heads, clusters, dim]`` float32.
        cosine: By the largest cosine, or else by the smallest distance.
        form: ``[batch, heads, dim, dim]`` float32 that both are measured by, or ``None``.

    Returns:
        ``[batch, heads, tokens]`` int32.
    """
    batch, heads, tokens, dim = points.shape
    points = points if points.stride(-1) == 1 else points.contiguous()
    width = max(16, power_of_two(dim))
    rows, block, stages = _launch(width * points.element_size())
    rounded, offsets = directions(centroids, points.dtype, cosine, form, block)
    whole = rounded.shape[2]
    labels = torch.empty(batch, heads, tokens, dtype=torch.int32, device=points.device)
    with torch.cuda.device_of(points):  # Triton launches on the current device
        _nearest[(triton.cdiv(tokens, rows), batch * heads)](
            points,
            rounded,
            offsets,
            labels,
            heads,
            tokens,
            whole,
            dim,
            *points.stride()[:3],
            ROWS=rows,
            BLOCK=block,
            WIDTH=width,
            FULL=width == dim,
            UPCAST=interpreted(),
            PRECISION="tf32x3" if points.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=stages,
        )
    return labels


def directions(
    centroids: Tensor, dtype: torch.dtype, cosine: bool, form: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """Turn "nearest" into "largest product with a direction, plus an offset".

    Args:
        centroids: Of :func:`nearest`.
        dtype: Of the points; directions are rounded to it. Their offsets make up for that at the centroid itself.
        cosine: Of :func:`nearest`.
        form: Of :func:`nearest`.
        block: Directions come in whole blocks of so many, filled up by some that are farther than any, so that the kernel
            of the nearest masks nothing.

    Returns:
        Directions ``[batch, heads, blocks * block, dim]`` and offsets ``[batch, heads, blocks * block]`` float32.
    """
    batch, heads, clusters, dim = centroids.shape
    whole = triton.cdiv(clusters, block) * block
    rounded = torch.empty(batch, heads, whole, dim, dtype=dtype, device=centroids.device)
    offsets = torch.empty(batch, heads, whole, device=centroids.device)
    centroids = centroids.contiguous()
    with torch.cuda.device_of(centroids):
        _directions[(whole // 16, batch * heads)](
            centroids,
            centroids if form is None else form.float().contiguous(),
            rounded,
            offsets,
            clusters,
            whole,
            dim,
            ROWS=16,
            CHUNK=32,
            WIDTH=max(16, power_of_two(dim)),
            FORM=form is not None,
            COSINE=cosine,
            num_warps=4,
        )
    return rounded, offsets


def _launch(row_bytes: int) -> tuple[int, int, int]:
    """Points of a program, centroids at once, blocks of centroids in flight: what fits into shared memory."""
    if interpreted():
        return 16, 16, 1
    if row_bytes <= 256:
        return 128, 64, 3
    return (64, 32, 2) if row_bytes <= 512 else (32, 16, 1)


@triton.jit(do_not_specialize=["tokens", "clusters"])
def _nearest(
    points,
    centroids,  # [heads, clusters, dim], whole blocks of clusters
    offset,  # [heads, clusters]
    labels,
    heads,
    tokens,
    clusters,
    dim,
    stride_b,
    stride_h,
    stride_n,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    base = points + (head // heads) * stride_b + (head % heads) * stride_h
    there = (row < tokens)[:, None] & (column < dim)[None, :]
    p = tl.load(base + row.to(tl.int64)[:, None] * stride_n + column[None, :], mask=there, other=0.0)
    if UPCAST:
        p = p.to(tl.float32)
    best = tl.full(
        [ROWS], -1e38, tl.float32
    )  # what fills up the last block is below it, whatever a point holds
    label = tl.zeros([ROWS], tl.int32)
    lane = tl.arange(0, BLOCK)
    at = centroids + (head * clusters + lane)[:, None] * dim + column[None, :]
    shift_at = offset + head * clusters + lane
    mark = BLOCK - 1 - lane  # of equal positive numbers the first has the largest
    for start in range(0, clusters, BLOCK):
        c = tl.load(at) if FULL else tl.load(at, mask=(column < dim)[None, :], other=0.0)
        if UPCAST:
            c = c.to(tl.float32)
        similarity = tl.dot(p, c.T, input_precision=PRECISION) + tl.load(shift_at)[None, :]
        marked = (similarity.to(tl.int32, bitcast=True) & -BLOCK) | mark[None, :]
        most = tl.max(marked.to(tl.float32, bitcast=True), 1).to(tl.int32, bitcast=True)
        level = (most & -BLOCK).to(tl.float32, bitcast=True)
        better = level > best
        best = tl.where(better, level, best)
        label = tl.where(better, start + BLOCK - 1 - (most & (BLOCK - 1)), label)
        at += BLOCK * dim
        shift_at += BLOCK
    tl.store(labels + head * tokens + row, label, mask=row < tokens)


@triton.jit(do_not_specialize=["clusters", "whole"])
def _directions(
    centroids,  # [heads, clusters, dim]
    form,  # [heads, dim, dim], or anything
    rounded,  # [heads, whole, dim]
    offsets,  # [heads, whole]
    clusters,
    whole,
    dim,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    FORM: tl.constexpr,
    COSINE: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    real, inside = row < clusters, column < dim
    line = centroids + (head * clusters + row)[:, None] * dim
    c = tl.load(line + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    direction = c
    if FORM:
        direction = tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(0, WIDTH, CHUNK):
            inner = start + tl.arange(0, CHUNK)
            part = tl.load(line + inner[None, :], mask=real[:, None] & (inner < dim)[None, :], other=0.0)
            at = form + (head * dim + inner)[:, None] * dim + column[None, :]
            weighed = tl.load(at, mask=(inner < dim)[:, None] & inside[None, :], other=0.0)
            direction += tl.dot(part, weighed, input_precision="ieee")
    offset = tl.zeros([ROWS], tl.float32)
    if COSINE:  # the point's own length changes no order
        # A centroid that the form hardly sees has a size of nothing but rounding.
        least = 1e-6 * tl.sqrt(tl.sum(direction * direction, 1)) * tl.sqrt(tl.sum(c * c, 1)) + 1e-37
        direction *= 1 / tl.sqrt(tl.maximum(tl.sum(direction * c, 1), least))[:, None]
    kept = direction.to(rounded.dtype.element_ty)
    if not COSINE:  # argmin (p-c) F (p-c) = argmax p (F c) - c F c / 2
        offset += tl.sum(c * (0.5 * direction - kept.to(tl.float32)), 1)
    at = head * whole + row
    tl.store(rounded + at[:, None] * dim + column[None, :], kept, mask=inside[None, :])
    tl.store(offsets + at, tl.where(real, offset, FARTHEST))
