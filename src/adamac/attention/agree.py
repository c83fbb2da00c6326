"""Numbers of a whole layer, where its heads are spread over ranks.

Under context parallelism each rank holds the whole sequence for some of the heads. All but a few numbers belong to one head;
those that belong to the layer have to come out equal on every rank, or the ranks would do unequal work, and wait for each
other for ever where they communicate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def total(number: Tensor, ranks: ProcessGroup | None) -> Tensor:
    """Sum over the ranks; give float64, so that the sum hardly depends on how heads are spread."""
    return _over(number, ranks, dist.ReduceOp.SUM) if ranks is not None else number


def largest(number: Tensor, ranks: ProcessGroup | None) -> Tensor:
    """Maximum over the ranks."""
    return _over(number, ranks, dist.ReduceOp.MAX) if ranks is not None else number


def _over(number: Tensor, ranks: ProcessGroup, operation: dist.ReduceOp.RedOpType) -> Tensor:
    reduced = number.clone()
    dist.all_reduce(reduced, operation, group=ranks)
    return reduced
