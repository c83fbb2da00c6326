"""SparseD (arXiv 2509.24014), which was made for diffusion language models, as a plan for video.

Attention patterns differ between heads and hardly change over the denoising steps. So: the first steps are dense (give the
schedule ``first=0.2``), then each head's pattern is computed once from its true softmax weights, pooled over blocks, and
every later step reuses it. SparseD selects among the prompt's blocks and the generated blocks apart, so that neither
starves the other; here video is selected among video, and text is kept whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from adamac.attention.cluster import tiles, usable, video_parts
from adamac.attention.layout import Layout, check_attention_inputs
from adamac.attention.mass import mass_score
from adamac.attention.plan import Plan
from adamac.attention.select import Budget, Tokens, check_budget


@dataclass(frozen=True)
class SparseD:
    """Patterns found once and reused; SparseD itself reads 30 % at block 128 for long contexts.

    Attributes:
        block: Tokens of a block, in raster order.
        budget: How much each block of queries reads.
        compensate: Let skipped blocks enter the softmax through their means.
    """

    block: int = 128
    budget: Budget = field(default_factory=lambda: Tokens(0.3))
    compensate: bool = False

    def __post_init__(self) -> None:
        check_budget(self)
        if self.block < 1:
            raise ValueError(f"SparseD.block must be positive, got {self.block}")

    def __call__(
        self, query: Tensor, key: Tensor, *, layout: Layout | None = None, previous: Plan | None = None
    ) -> Plan:
        """Plan one attention call; see :meth:`adamac.attention.AdaCluster.__call__`.

        The first call costs as much as dense attention, a later one nothing.
        """
        layout = layout or Layout.video_only(query.shape[-2])
        check_attention_inputs(query, key, layout)
        previous = usable(previous, query, layout)
        if previous is not None:
            return replace(previous, layout=layout, age=previous.age + 1)
        video_query, video_key = video_parts(query, key, layout)
        queries, keys = tiles(video_query, layout, self.block), tiles(video_key, layout, self.block)
        score = mass_score(video_query, video_key, queries, keys)
        reads = self.budget.reads(score, keys.counts)
        max_reads = self.budget.max_reads(layout.video_tokens)
        return Plan(layout, queries, keys, reads, compensate=self.compensate, max_reads=max_reads)
