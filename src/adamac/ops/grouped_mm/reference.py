"""A grouped matrix product as a loop over the groups."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_mm(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Compute :func:`adamac.ops.grouped_mm.grouped_mm`; rows that are no group's come out as zeros."""
    lengths = counts.tolist()
    beyond = len(rows) - sum(lengths)
    if beyond < 0:
        raise ValueError(f"counts add up to {sum(lengths)}, but there are {len(rows)} rows; give as many")
    groups = rows.split([*lengths, beyond])[:-1]
    # Empty groups take part, so that their weights get a gradient (zeros) like the others.
    products = [group @ weight for group, weight in zip(groups, weights.unbind(), strict=True)]
    return torch.cat([*products, products[0].new_zeros(beyond, weights.shape[2])])
