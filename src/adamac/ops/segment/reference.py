"""Reductions over segments in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from adamac.ops.precision import accurate
from adamac.ops.segment import Segments


def segment_sum(values: Tensor, segments: Segments, normalise: bool) -> Tensor:
    """Compute :func:`adamac.ops.segment.segment_sum`."""
    batch, heads, _, dim = values.shape
    rows = accurate(values).reshape(-1, dim)
    if normalise:
        rows = torch.nn.functional.normalize(rows, dim=-1)
    slots = _flat_slots(segments)
    total = batch * heads * (segments.number + 1)
    if values.device.type == "cpu":
        sums = rows.new_zeros(total, dim).index_add_(0, slots, rows)
    else:  # a GPU's atomic additions come in no fixed order, so rows are sorted first
        order = torch.argsort(slots, stable=True)
        lengths = slots.new_zeros(total).scatter_add_(0, slots, torch.ones_like(slots))
        sums = torch.segment_reduce(rows[order], "sum", lengths=lengths, axis=0, unsafe=True)  # ty: ignore[missing-attribute]
    return sums.view(batch, heads, segments.number + 1, dim)[:, :, : segments.number]


def segment_mean(values: Tensor, segments: Segments) -> Tensor:
    """Compute :func:`adamac.ops.segment.segment_mean`."""
    return segment_sum(values, segments, False) / segments.counts.clamp_min(1).unsqueeze(-1)


def segment_variance(values: Tensor, segments: Segments, means: Tensor) -> Tensor:
    """Compute :func:`adamac.ops.segment.segment_variance`."""
    own = segments.labels.long().clamp_min(0).unsqueeze(-1).expand(-1, -1, -1, values.shape[-1])
    deviation = accurate(values) - torch.gather(means, 2, own)
    return segment_mean(deviation.square(), segments)


def segment_min_max(values: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Compute :func:`adamac.ops.segment.segment_min_max`."""
    batch, heads, _, dim = values.shape
    rows = accurate(values).reshape(-1, dim)
    slots = _flat_slots(segments).unsqueeze(-1).expand(-1, dim)
    total = batch * heads * (segments.number + 1)
    extremes = []
    for reduction in ("amin", "amax"):
        reduced = rows.new_zeros(total, dim)
        reduced = reduced.scatter_reduce_(0, slots, rows, reduction, include_self=False)
        extremes.append(reduced.view(batch, heads, segments.number + 1, dim)[:, :, : segments.number])
    return extremes[0], extremes[1]


def _flat_slots(segments: Segments) -> Tensor:
    """Number the segments of all heads in one row; one more segment of each head takes the rows of none."""
    batch, heads, _ = segments.labels.shape
    slots = torch.where(segments.labels < 0, segments.number, segments.labels).long()
    offsets = torch.arange(batch * heads, device=slots.device) * (segments.number + 1)
    return (slots + offsets.view(batch, heads, 1)).reshape(-1)
