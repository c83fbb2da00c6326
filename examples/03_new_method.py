"""A new selection rule in an afternoon: each frame reads itself and its two neighbours."""

import torch
from torch import Tensor

from adamac.attention import Layout, Plan, attend
from adamac.attention.cluster import tiles


def neighbours(query: Tensor, key: Tensor, *, layout: Layout, previous: Plan | None = None) -> Plan:
    """Plan a sliding window over frames."""
    assert layout.grid is not None
    frames, height, width = layout.grid
    queries, keys = (tiles(layout.video(x), layout, height * width) for x in (query, key))
    index = torch.arange(frames)
    near = (index[:, None] - index).abs() <= 1
    reads = torch.where(near, keys.counts.unsqueeze(-2), 0)
    return Plan(layout, queries, keys, reads, compensate=True)


query, key, value = torch.randn(3, 1, 2, 12 * 8 * 16, 64).unbind()
plan = neighbours(query, key, layout=Layout.video_only(12 * 8 * 16, grid=(12, 8, 16)))
output = attend(query, key, value, plan)
print(f"{tuple(output.shape)} at {plan.density().mean():.1%}")
