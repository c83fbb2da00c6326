"""Reductions over the members of each cluster: sum, mean, minimum, maximum.

``labels`` say to which segment a row belongs; a row labelled ``-1`` belongs to none and is left out. Segments may be
ragged and empty. Sums are deterministic: on the CPU rows are added in order, elsewhere rows are sorted by label first,
because a GPU's atomic additions come in no fixed order. Minima and maxima do not depend on the order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adamac.ops.precision import accurate


def segment_counts(labels: Tensor, num_segments: int) -> Tensor:
    """Count the rows of each segment.

    Args:
        labels: ``[batch, heads, tokens]``, integers from -1 to ``num_segments - 1``; -1 belongs to none.
        num_segments: How many segments there are, empty ones included.

    Returns:
        ``[batch, heads, num_segments]`` int64.
    """
    spare = num_segments  # rows of no segment are counted in one more segment, which is cut off
    slots = torch.where(labels < 0, spare, labels).long()
    counts = slots.new_zeros(*labels.shape[:-1], num_segments + 1)
    # Integer additions commute, so atomics are deterministic here.
    return counts.scatter_add_(-1, slots, torch.ones_like(slots))[..., :num_segments]


def segment_sum(values: Tensor, labels: Tensor, num_segments: int) -> Tensor:
    """Add up the rows of each segment in float32 (float64 stays float64).

    Args:
        values: ``[batch, heads, tokens, dim]``.
        labels: ``[batch, heads, tokens]``, -1 belongs to no segment.
        num_segments: How many segments there are.

    Returns:
        ``[batch, heads, num_segments, dim]``; zeros for an empty segment.
    """
    batch, heads, _, dim = values.shape
    rows = accurate(values).reshape(-1, dim)
    slots = _flat_slots(labels, num_segments)
    total = batch * heads * (num_segments + 1)
    if values.device.type == "cpu":
        sums = rows.new_zeros(total, dim).index_add_(0, slots, rows)
    else:
        order = torch.argsort(slots, stable=True)
        lengths = slots.new_zeros(total).scatter_add_(0, slots, torch.ones_like(slots))
        sums = torch.segment_reduce(rows[order], "sum", lengths=lengths, axis=0, unsafe=True)  # ty: ignore[missing-attribute]
    return sums.view(batch, heads, num_segments + 1, dim)[:, :, :num_segments]


def segment_mean(values: Tensor, labels: Tensor, num_segments: int) -> Tensor:
    """Average the rows of each segment; see :func:`segment_sum`. An empty segment gives zeros."""
    counts = segment_counts(labels, num_segments).clamp_min(1)
    return segment_sum(values, labels, num_segments) / counts.unsqueeze(-1)


def segment_min_max(values: Tensor, labels: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Take the elementwise minimum and maximum over the rows of each segment.

    Args:
        values: ``[batch, heads, tokens, dim]``.
        labels: ``[batch, heads, tokens]``, -1 belongs to no segment.
        num_segments: How many segments there are.

    Returns:
        Minimum and maximum, each ``[batch, heads, num_segments, dim]`` in float32 (float64 stays). An empty segment
        gives zeros in both, so that products with it stay finite; mask it by its count.
    """
    batch, heads, _, dim = values.shape
    rows = accurate(values).reshape(-1, dim)
    slots = _flat_slots(labels, num_segments).unsqueeze(-1).expand(-1, dim)
    total = batch * heads * (num_segments + 1)
    extremes = []
    for reduction in ("amin", "amax"):
        reduced = rows.new_zeros(total, dim)
        reduced = reduced.scatter_reduce_(0, slots, rows, reduction, include_self=False)
        extremes.append(reduced.view(batch, heads, num_segments + 1, dim)[:, :, :num_segments])
    return extremes[0], extremes[1]


def _flat_slots(labels: Tensor, num_segments: int) -> Tensor:
    """Number the segments of all heads in one row; segment ``num_segments`` of a head takes the rows of none."""
    batch, heads, _ = labels.shape
    slots = torch.where(labels < 0, num_segments, labels).long()
    offsets = torch.arange(batch * heads, device=labels.device) * (num_segments + 1)
    return (slots + offsets.view(batch, heads, 1)).reshape(-1)
