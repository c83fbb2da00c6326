"""Nearest centroid in one kernel: a tile of points meets the centroids block by block, and only labels are written.

Similarities are computed by the matrix units from the points' own dtype and held, like norms, in float32. Centroids are
rounded to that dtype first; the offset is that of the rounded centroid, so the label is that of the nearest rounded one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamac.ops.launch import interpreted, power_of_two


def nearest(points: Tensor, centroids: Tensor, euclidean: bool) -> Tensor:
    """Find the nearest centroid of every point; ties go to the lower index.

    Args:
        points: ``[batch, heads, tokens, dim]``, the last dimension contiguous.
        centroids: ``[batch, heads, clusters, dim]``, on the unit sphere if not ``euclidean``.
        euclidean: Smallest distance, or else largest product.

    Returns:
        ``[batch, heads, tokens]`` int32.
    """
    batch, heads, tokens, dim = points.shape
    points = points if points.stride(-1) == 1 else points.contiguous()
    clusters = centroids.shape[2]
    rounded = centroids.to(points.dtype).contiguous()
    # argmin |p - c|^2 = argmax p.c - |c|^2 / 2
    offset = -0.5 * rounded.float().square().sum(-1)
    if not euclidean:
        offset = torch.zeros_like(offset)
    labels = torch.empty(batch, heads, tokens, dtype=torch.int32, device=points.device)
    width = max(16, power_of_two(dim))
    rows, block, stages = _launch(width * points.element_size())
    with torch.cuda.device_of(points):  # Triton launches on the current device
        _nearest[(triton.cdiv(tokens, rows), batch * heads)](
            points,
            rounded,
            offset,
            labels,
            heads,
            tokens,
            clusters,
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
    centroids,
    offset,
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
    best = tl.full([ROWS], float("-inf"), tl.float32)
    label = tl.zeros([ROWS], tl.int32)
    for start in range(0, clusters, BLOCK):
        cluster = start + tl.arange(0, BLOCK)
        real = cluster < clusters
        here = real[:, None] if FULL else real[:, None] & (column < dim)[None, :]
        at = centroids + (head * clusters + cluster)[:, None] * dim + column[None, :]
        c = tl.load(at, mask=here, other=0.0)
        if UPCAST:
            c = c.to(tl.float32)
        shift = tl.load(offset + head * clusters + cluster, mask=real, other=float("-inf"))
        similarity = tl.dot(p, c.T, input_precision=PRECISION) + shift[None, :]
        most, index = tl.max(similarity, 1, return_indices=True)
        better = most > best
        label = tl.where(better, start + index, label)
        best = tl.where(better, most, best)
    tl.store(labels + head * tokens + row, label, mask=row < tokens)
