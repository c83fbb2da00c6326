"""Fill a budget from ranked items: in each row the best come first, until the row's limit is reached.

All budgets are this. With a cluster's tokens as weight a row reads so many tokens; with one as weight, so many clusters; with
softmax mass as weight, the clusters that hold a share of it. Of the item that crosses the limit only the rest of the limit is
taken, which a caller may round up to the whole item. Of equal items the first comes first.

``torch`` sorts. ``triton`` halves the range of scores until it knows the one at which the limit is crossed, without sorting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adamac.ops.inputs import check_shape
from adamac.ops.launch import Impl, chosen


def fill(score: Tensor, weight: Tensor, limit: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Take the best items of each row until the limit.

    Args:
        score: ``[batch, heads, rows, items]`` float32; the highest is the best.
        weight: ``[batch, heads, rows or 1, items]``, not negative, integers or float32.
        limit: ``[batch, heads, 1, 1]``, of the dtype of ``weight``.
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``[batch, heads, rows, items]`` in the dtype of ``weight`` (int32 from the kernel for integers): how much of each
        item's weight is taken, from none to all.
    """
    batch, heads, rows, items = score.shape
    check_shape("weight", weight, (batch, heads, rows if weight.shape[2] > 1 else 1, items), like=score)
    check_shape("limit", limit, (batch, heads, 1, 1), like=score)
    if score.dtype == torch.float32 and chosen(impl, score) == "triton":
        from adamac.ops.fill import triton as kernels

        return kernels.fill(score, weight, limit)
    order = score.argsort(dim=-1, descending=True, stable=True)
    weights = torch.gather(weight.expand_as(order), -1, order)
    before = weights.cumsum(-1) - weights
    taken = torch.minimum((limit - before).clamp_min(0), weights)
    return torch.zeros_like(taken).scatter_(-1, order, taken)
