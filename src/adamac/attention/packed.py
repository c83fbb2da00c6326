"""Centroids in half a byte a coordinate, for keeping between steps.

What a later step starts from need not be exact: one Lloyd iteration moves every centroid to the mean of its members anyway.
Sixteen levels over the range that each coordinate has in its head cost no output error (docs/log.md), and a large model keeps
this for every layer and guidance branch: 40 layers and two branches of 40 heads with 275 and 1,650 centroids of width 128 are
0.4 GB, and 3.2 GB in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Packed:
    """Centroids ``[batch, heads, clusters, head_dim]``, rounded.

    Attributes:
        levels: ``[batch, heads, clusters, head_dim / 2]`` uint8, the level of a coordinate of the first half and, times 16,
            of the second half.
        low: ``[batch, heads, 1, head_dim]`` float32, the value of level 0.
        step: ``[batch, heads, 1, head_dim]`` float32, from one level to the next.
    """

    levels: Tensor
    low: Tensor
    step: Tensor

    @classmethod
    def of(cls, centroids: Tensor) -> Packed:
        """Round; a coordinate is off by at most 1/30 of the range that it has among the head's centroids."""
        low, high = centroids.float().aminmax(dim=2, keepdim=True)
        step = (high - low) / 15
        levels = ((centroids - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.uint8)
        first, second = pad(levels, (0, levels.shape[-1] % 2)).chunk(2, dim=-1)
        return cls(first | (second << 4), low, step)

    def centroids(self) -> Tensor:
        """Return them in float32."""
        levels = torch.cat([self.levels & 15, self.levels >> 4], dim=-1)
        return levels[..., : self.low.shape[-1]] * self.step + self.low

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.levels.nbytes + self.low.nbytes + self.step.nbytes
