"""A grouped matrix product as a loop over the groups."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_mm(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Compute :func:`adamac.ops.grouped_mm.grouped_mm`."""
    lengths = counts.tolist()
    *groups, beyond = rows.split([*lengths, len(rows) - sum(lengths)])
    # Empty groups take part, so that their weights get a gradient (zeros) like the others.
    products = [group @ weight for group, weight in zip(groups, weights.unbind(), strict=True)]
    return torch.cat([*products, beyond.new_zeros(len(beyond), weights.shape[2])])
