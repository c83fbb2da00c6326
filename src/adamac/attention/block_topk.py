"""Block top-k by mean pooling: the class of SpargeAttn (arXiv 2502.18137) and XAttention (arXiv 2503.16428).

The video is cut into tiles, runs of tokens in raster order or 3-D boxes; a tile of keys is scored for a tile of queries by
the product of their means; each tile of queries reads its best tiles of keys. Their own kernels (quantisation, antidiagonal
sums, tiles judged by self-similarity) are left out: this is what tiles can do against clusters on the same executor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from adamac.attention.cluster import tiles, video_parts
from adamac.attention.layout import Layout, check_attention_inputs
from adamac.attention.plan import Plan
from adamac.attention.select import Budget, Score, Tokens, check_budget, check_score, score_clusters


@dataclass(frozen=True)
class BlockTopK:
    """Tiles chosen by their mean.

    Attributes:
        tile: Tokens in a run of raster order, or (frames, height, width) of a box.
        score: How tiles of keys are ranked.
        budget: How much each tile of queries reads.
        compensate: Let skipped tiles enter the softmax through their means.
    """

    tile: int | tuple[int, int, int] = 128
    score: Score = "centroid"
    budget: Budget = field(default_factory=Tokens)
    compensate: bool = False

    def __post_init__(self) -> None:
        check_budget(self)
        sides = (self.tile,) if isinstance(self.tile, int) else self.tile
        if min(sides) < 1:
            raise ValueError(f"BlockTopK.tile must be positive, got {self.tile}")
        check_score(self.score)

    def __call__(
        self, query: Tensor, key: Tensor, *, layout: Layout | None = None, previous: Plan | None = None
    ) -> Plan:
        """Plan one attention call; see :meth:`adamac.attention.AdaCluster.__call__`. Nothing is kept between steps."""
        layout = layout or Layout.video_only(query.shape[-2])
        check_attention_inputs(query, key, layout)
        video_query, video_key = video_parts(query, key, layout)
        queries, keys = tiles(video_query, layout, self.tile), tiles(video_key, layout, self.tile)
        score = score_clusters(self.score, queries.means, video_key, keys)
        reads = self.budget.reads(score, keys.counts)
        max_reads = self.budget.max_reads(layout.video_tokens)
        return Plan(
            layout, queries, keys, reads, compensate=self.compensate, max_reads=max_reads, carry="nothing"
        )
