"""The collectives themselves, without a layer: what a cost model of a fabric can be fitted from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .cases import CollectivesCase
from .crew import Crew
from .turns import figures, turns

_SMALLEST = 2**16

# Their names up to PyTorch 2.12, and since.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def run(case: CollectivesCase, crew: Crew) -> None:
    """Time all collectives at all sizes, and hand out a row for each."""
    sizes = [_SMALLEST]
    while sizes[-1] * 4 <= case.largest_mib * 2**20:
        sizes.append(sizes[-1] * 4)
    for size in sizes:
        steps = _steps(size, crew)
        for step in steps.values():
            step()
        for name, times in turns(steps, crew, case.budget_s / len(sizes)).items():
            found = figures(times)
            # What leaves a rank: of an all-to-all all but its own part, of the others its part for each other rank.
            sent = size * (crew.ranks - 1) // crew.ranks
            entries = {"collective": name, "bytes_held": size, "bytes_sent": sent, **found}
            rate = {"gb_per_s": sent / found["p50_ms"] / 1e6}
            crew.row({"benchmark": "moe_collectives", "status": "ok", **entries, **rate})


def _steps(size: int, crew: Crew) -> dict[str, Callable[[], Any]]:
    """Each of them exchanges ``size`` bytes in all: the larger of what a rank gives and gets."""
    whole = torch.randn(size // 2 // crew.ranks * crew.ranks, device=crew.device).to(torch.bfloat16)
    part: Tensor = whole.chunk(crew.ranks)[0].clone()
    other = torch.empty_like(whole)
    return {
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "all_gather": lambda: _all_gather(other, part),
        "reduce_scatter": lambda: _reduce_scatter(part, whole),
    }
