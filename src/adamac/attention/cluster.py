"""Turn the video tokens of every head into clusters: by k-means, or by cutting the video into tiles."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from adamac.attention.layout import Layout
from adamac.attention.plan import Clusters, Plan
from adamac.ops.kmeans import Lloyd, Metric, kmeans, spread_tokens
from adamac.ops.launch import chosen
from adamac.ops.precision import accurate
from adamac.ops.segment import Segments, segment_mean


def cluster_tokens(
    points: Tensor,
    num_clusters: int,
    layout: Layout,
    *,
    iterations: int,
    metric: Metric,
    seed: int,
    form: Tensor | None = None,
) -> Clusters:
    """Cluster the video tokens from scratch, each head by itself.

    Args:
        points: ``[batch, heads, video_tokens, head_dim]``.
        num_clusters: How many; at most one a token.
        layout: Says which tokens are padding.
        iterations: Lloyd iterations.
        metric: ``"euclidean"`` or ``"cosine"``.
        seed: Chooses the tokens that k-means starts from.
        form: Under which tokens are near each other; see :mod:`adamac.attention.logit_metric`.
    """
    valid = layout.video_valid()
    initial = spread_tokens(points, min(num_clusters, points.shape[2]), seed, valid)
    found = kmeans(points, initial, iterations=iterations, metric=metric, include=valid, form=form)
    return as_clusters(points, found, metric)


def refine(
    points: Tensor,
    start: Tensor,
    layout: Layout,
    *,
    iterations: int,
    metric: Metric,
    form: Tensor | None = None,
) -> Clusters:
    """Cluster the tokens of the next step, starting from the former step's centroids; see :func:`cluster_tokens`."""
    valid = layout.video_valid()
    found = kmeans(points, start, iterations=iterations, metric=metric, include=valid, form=form)
    return as_clusters(points, found, metric)


def regroup(points: Tensor, former: Clusters) -> Clusters:
    """Keep the former step's partition, with the means of the new tokens."""
    return replace(former, means=segment_mean(points, former.members), variances=None)


def as_clusters(points: Tensor, found: Lloyd, metric: Metric) -> Clusters:
    """Attach mean members; on the unit sphere these are not the centroids."""
    means = found.centroids if metric == "euclidean" else found.means
    if means is None:
        means = segment_mean(points, found.members)
    return Clusters(found.members, means, found.centroids, found.variances)


def tiles(points: Tensor, layout: Layout, tile: int | tuple[int, int, int]) -> Clusters:
    """Cut the video into tiles: runs of ``tile`` tokens in raster order, or boxes of (frames, height, width).

    Args:
        points: ``[batch, heads, video_tokens, head_dim]``.
        layout: Says which tokens are padding, and the grid that boxes need.
        tile: Tokens in a run, or the sides of a box; tiles at the border are smaller.

    Raises:
        ValueError: If boxes are asked for and the layout has no grid.
    """
    device = points.device
    if isinstance(tile, int):
        number = torch.arange(points.shape[2], device=device) // tile
    else:
        if layout.grid is None:
            raise ValueError(
                f"3-D tiles {tile} need the grid of the video tokens; give Layout(grid=...) or a run length"
            )
        boxes = [math.ceil(side / step) for side, step in zip(layout.grid, tile, strict=True)]
        frame, row, column = (
            torch.arange(side, device=device) // step for side, step in zip(layout.grid, tile, strict=True)
        )
        number = (frame[:, None, None] * boxes[1] + row[:, None]) * boxes[2] + column
        number = number.flatten()
    labels = number.expand(points.shape[:3])
    valid = layout.video_valid()
    if valid is not None:
        labels = labels.masked_fill(~valid, -1)
    num_tiles = tile_count(points.shape[2], layout, tile)
    members = Segments(labels.contiguous(), num_tiles)
    return Clusters(members, segment_mean(points, members))


def tile_count(tokens: int, layout: Layout, tile: int | tuple[int, int, int]) -> int:
    """How many tiles the video has, without looking at the device."""
    if isinstance(tile, int):
        return math.ceil(tokens / tile)
    assert layout.grid is not None
    return math.prod(math.ceil(side / step) for side, step in zip(layout.grid, tile, strict=True))


def video_parts(query: Tensor, key: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Cut the video tokens out of query and key, as views where kernels read any dtype, else in the precision of plans."""
    parts = layout.video(query), layout.video(key)
    return parts if chosen("auto", query) == "triton" else (accurate(parts[0]), accurate(parts[1]))


def check_counts(method: object, *names: str) -> None:
    """Refuse a method of which one of the named settings is below 1; ``None`` leaves it to the method."""
    for name in names:
        number = getattr(method, name)
        if number is not None and number < 1:
            raise ValueError(f"{type(method).__name__}.{name} must be at least 1, got {number}")


def usable(previous: Plan | None, query: Tensor, layout: Layout) -> Plan | None:
    """Return the former plan if it has clusters of tensors of this shape, else nothing: the method then starts afresh.

    Raises:
        ValueError: If it is neither a plan nor ``None``.
    """
    if previous is not None and not isinstance(previous, Plan):
        raise ValueError(
            f"previous must be the Plan of this layer's last step, or None, got {type(previous).__name__}"
        )
    if previous is None or previous.is_dense or not previous.layout.same_shape(layout):
        return None
    held = previous.start[0].low if previous.start is not None else previous.parts()[0].means
    if held.shape[:2] != query.shape[:2] or held.shape[-1] != query.shape[-1] or held.device != query.device:
        return None
    return previous
