"""k-means of every head at once: nearest centroid, one Lloyd update, and the loop of both.

Two metrics. ``"euclidean"`` is what keys are clustered by, because the distance of a key from its centroid bounds the
error of its logit. ``"cosine"`` is what queries are clustered by in AdaCluster, because the order of a query's logits
does not depend on its length: points are put on the unit sphere, and so are the centroids after each update (spherical
k-means).

Either can be measured under a quadratic form ``F``, one a head: a difference ``x`` then has the squared length ``x F x``. The
form of the other side of attention, the second moments of the queries for keys, makes it the mean squared difference of
logits. Points are not transformed for it: ``argmin (p-c) F (p-c)`` is ``argmax p (F c) - c F c / 2``, so only centroids are.

A point labelled ``-1`` (padding) takes no part. A cluster that loses all its points keeps its old centroid.
Distances are held for a slice of the points at a time, never for all of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamac.ops.inputs import check_shape
from adamac.ops.launch import Impl, chosen
from adamac.ops.precision import accurate
from adamac.ops.segment import Segments, segment_sum

Metric = Literal["euclidean", "cosine"]

# Similarities held at once, in elements. On a CPU they should stay in a core's own cache (2^18 float32 values are 1 MiB),
# elsewhere slices should be few.
_SLICE_ELEMENTS = {"cpu": 1 << 18, "other": 1 << 26}


@dataclass(frozen=True)
class Lloyd:
    """What k-means ends with.

    Attributes:
        members: The points of each cluster, by the nearest centroid *before* the last update.
        centroids: ``[batch, heads, clusters, dim]``, the mean of each cluster's points (on the unit sphere for
            ``"cosine"``); an empty cluster keeps its former centroid.
        means: Like ``centroids``, mean member, if the last update gave it beside centroids on the unit sphere.
        variances: Like ``centroids``, the members' mean squared deviation from their mean by coordinate, if the last update
            gave it.
    """

    members: Segments
    centroids: Tensor
    means: Tensor | None = None
    variances: Tensor | None = None


def nearest(
    points: Tensor,
    centroids: Tensor,
    metric: Metric = "euclidean",
    *,
    form: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Find the nearest centroid of every point; ties go to the lower index (in the kernel, to the same one always).

    Args:
        points: ``[batch, heads, tokens, dim]``.
        centroids: ``[batch, heads, clusters, dim]``.
        metric: ``"euclidean"``, or ``"cosine"`` for the largest cosine.
        form: ``[batch, heads, dim, dim]``, symmetric and positive semidefinite; ``None`` is the identity.
        impl: ``"torch"``, ``"triton"`` (which rounds directions to the points' dtype, and similarities to 17 bits) or ``"auto"``.

    Returns:
        ``[batch, heads, tokens]`` int64, or int32 from the kernel.

    Raises:
        ValueError: If points and centroids do not fit each other, or Triton is asked for where it cannot run.
    """
    expected = (*points.shape[:2], centroids.shape[-2], points.shape[-1])
    check_shape("centroids", centroids, expected, like=points)
    if chosen(impl, points) == "triton":
        from adamac.ops.kmeans import triton as kernels

        return kernels.nearest(points, accurate(centroids), metric == "cosine", form)
    directions, offset = _directions(accurate(centroids), metric, form)
    points = accurate(points)
    batch, heads, tokens, _ = points.shape
    at_once = _SLICE_ELEMENTS["cpu" if points.device.type == "cpu" else "other"]
    step = max(1, at_once // (batch * heads * centroids.shape[2]))
    labels = torch.empty(batch, heads, tokens, dtype=torch.long, device=points.device)
    transposed = directions.to(points.dtype).transpose(-1, -2)
    for start in range(0, tokens, step):
        similarity = points[:, :, start : start + step] @ transposed
        if offset is not None:
            similarity += offset.unsqueeze(-2)
        labels[:, :, start : start + step] = similarity.argmax(-1)
    return labels


def _directions(centroids: Tensor, metric: Metric, form: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Turn "nearest" into "largest product with a direction, plus an offset"."""
    directions = centroids if form is None else centroids @ form.to(centroids.dtype)
    size = (directions * centroids).sum(-1)
    if metric == "euclidean":
        return directions, size.mul_(-0.5)
    # A centroid that the form hardly sees has a size of nothing but rounding.
    least = 1e-6 * directions.norm(dim=-1) * centroids.norm(dim=-1) + torch.finfo(size.dtype).tiny
    scale = torch.maximum(size, least).rsqrt()  # the point's own length changes no order
    return directions * scale.unsqueeze(-1), None


def kmeans(
    points: Tensor,
    initial: Tensor,
    *,
    iterations: int,
    metric: Metric = "euclidean",
    include: Tensor | None = None,
    form: Tensor | None = None,
    impl: Impl = "auto",
) -> Lloyd:
    """Run Lloyd iterations (assign, then update) from the given centroids.

    Args:
        points: ``[batch, heads, tokens, dim]``; computed in float32 unless float64.
        initial: ``[batch, heads, clusters, dim]`` centroids to start from.
        iterations: How many, at least 1.
        metric: ``"euclidean"`` or ``"cosine"`` (spherical k-means).
        include: ``[batch, heads or 1, tokens]`` bool, which points take part; ``None`` means all.
        form: ``[batch, heads, dim, dim]``, under which points are near each other or not; ``None`` is the identity.
            Centroids are means either way.
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        Members and centroids.

    Raises:
        ValueError: If ``iterations`` is below 1.
    """
    if iterations < 1:
        raise ValueError(f"kmeans needs at least one iteration, got {iterations}")
    found = _iterate(points, accurate(initial), metric, include, form, impl)
    for _ in range(iterations - 1):
        found = _iterate(points, found.centroids, metric, include, form, impl)
    return found


def distances(points: Tensor, labels: Tensor, centroids: Tensor, form: Tensor | None = None) -> Tensor:
    """Measure how far each point is from its own centroid, under a form if one is given (see :func:`kmeans`).

    Returns:
        ``[batch, heads, tokens]``, zero for points labelled -1.
    """
    batch, heads, tokens, dim = points.shape
    found = accurate(centroids).new_empty(batch, heads, tokens)
    step = max(1, _SLICE_ELEMENTS["cpu" if points.device.type == "cpu" else "other"] // (batch * heads * dim))
    for start in range(0, tokens, step):
        part = accurate(points[:, :, start : start + step])
        index = labels[:, :, start : start + step].long().clamp_min(0).unsqueeze(-1).expand_as(part)
        own = torch.gather(centroids.to(part.dtype), 2, index)
        apart = part - own
        weighed = apart if form is None else apart @ form.to(apart.dtype)
        found[:, :, start : start + step] = (weighed * apart).sum(-1).clamp_min_(0).sqrt_()
    return found.masked_fill_(labels < 0, 0.0)


def spread_tokens(points: Tensor, clusters: int, seed: int, include: Tensor | None = None) -> Tensor:
    """Choose starting centroids: one token at random from each of ``clusters`` equal stretches of the sequence.

    Neighbouring video tokens are alike, so stretches cover the scene better than free draws. All heads of a sample take
    the same positions. With ``include`` the stretches are equal in tokens that take part.

    Args:
        points: ``[batch, heads, tokens, dim]``.
        clusters: How many; more than there are tokens gives repeats (their clusters stay empty).
        seed: The same seed gives the same tokens, on any device.
        include: ``[batch, heads or 1, tokens]`` bool.

    Returns:
        ``[batch, heads, clusters, dim]``.
    """
    batch, heads, tokens, dim = points.shape
    share = (torch.arange(clusters, device=points.device) + _jitter(clusters, seed, points.device)) / clusters
    if include is None:
        index = (share * tokens).long().clamp_max(tokens - 1).expand(batch, heads, clusters)
    else:
        # The n-th token that takes part is where the running count first reaches n + 1.
        running = include.expand(batch, heads, tokens).long().cumsum(-1)
        # Rounding may carry the last share up to 1, hence the clamp.
        wanted = ((share * running[..., -1:]).long() + 1).clamp_max(running[..., -1:])
        index = torch.searchsorted(running, wanted).clamp_max(tokens - 1)
    return torch.gather(points, 2, index.unsqueeze(-1).expand(-1, -1, -1, dim))


@functools.lru_cache(maxsize=64)
def _jitter(clusters: int, seed: int, device: torch.device) -> Tensor:
    """Random numbers that are the same on any device. Kept, because bringing them to a GPU makes the host wait for it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(clusters, generator=generator, device="cpu").to(device)


def _iterate(
    points: Tensor, old: Tensor, metric: Metric, include: Tensor | None, form: Tensor | None, impl: Impl
) -> Lloyd:
    labels = nearest(points, old, metric, form=form, impl=impl)
    if include is not None:
        labels = labels.masked_fill(~include, -1)
    return _update(points, Segments(labels, old.shape[2]), old, metric, impl)


def _update(points: Tensor, members: Segments, old: Tensor, metric: Metric, impl: Impl) -> Lloyd:
    if chosen(impl, points) == "triton":
        from adamac.ops.segment import triton as kernels

        moved, beside = kernels.segment_moments(points, members, "centroid", metric == "cosine", old)
        if metric == "cosine":
            return Lloyd(members, moved, means=beside)
        return Lloyd(members, moved, variances=beside)
    counts = members.counts.unsqueeze(-1)
    sums = segment_sum(points, members, normalise=metric == "cosine", impl="torch")
    moved = torch.nn.functional.normalize(sums, dim=-1) if metric == "cosine" else sums / counts.clamp_min(1)
    return Lloyd(members, torch.where(counts > 0, moved, old))
