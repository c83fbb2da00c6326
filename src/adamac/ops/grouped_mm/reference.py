"""A grouped matrix product as a loop over the groups."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_mm(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Compute :func:`adamac.ops.grouped_mm.grouped_mm`."""
    groups = rows.split(counts.tolist())
    # Empty groups take part, so that their weights get a gradient (zeros) like the others.
    return torch.cat([group @ weight for group, weight in zip(groups, weights.unbind(), strict=True)])
