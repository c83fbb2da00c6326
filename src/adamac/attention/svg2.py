"""Sparse VideoGen2's semantic-aware permutation (arXiv 2505.18875), as a plan.

Queries and keys are clustered apart by Euclidean k-means, with fixed counts; a key cluster's softmax mass is estimated from
its centroid and its size; each query cluster reads the heaviest clusters until they hold ``top_p`` of the estimated mass,
the crossing cluster included, and at least a tenth of them. Later steps start from the former centroids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from adamac.attention.cluster import check_counts, cluster_tokens, refine, usable, video_parts
from adamac.attention.layout import Layout, check_attention_inputs
from adamac.attention.plan import Clusters, Plan
from adamac.attention.select import Budget, TopP, check_budget, score_clusters


@dataclass(frozen=True)
class SVG2:
    """Semantic clusters with a top-p budget; defaults are the paper's 100 and 500 clusters.

    Attributes:
        query_clusters: Clusters of the queries of each head (the authors' scripts use up to 400).
        key_clusters: Clusters of the keys of each head (up to 1000).
        budget: Top-p with a floor.
        compensate: Not part of SVG2; any plan can be compensated.
        first_iterations: Lloyd iterations at the first sparse step.
        iterations: Lloyd iterations of a later step.
        seed: Chooses the tokens that k-means starts from.
    """

    query_clusters: int = 100
    key_clusters: int = 500
    budget: Budget = field(default_factory=TopP)
    compensate: bool = False
    first_iterations: int = 50
    iterations: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self)
        check_counts(self, "query_clusters", "key_clusters", "first_iterations", "iterations")

    def __call__(
        self, query: Tensor, key: Tensor, *, layout: Layout | None = None, previous: Plan | None = None
    ) -> Plan:
        """Plan one attention call; see :meth:`adamac.attention.AdaCluster.__call__`."""
        layout = layout or Layout.video_only(query.shape[-2])
        check_attention_inputs(query, key, layout)
        previous = usable(previous, query, layout)
        video_query, video_key = video_parts(query, key, layout)
        if previous is None:
            queries = self._fresh(video_query, self.query_clusters, layout)
            keys = self._fresh(video_key, self.key_clusters, layout)
        else:
            start_queries, start_keys = previous.centroids()
            queries = refine(
                video_query, start_queries, layout, iterations=self.iterations, metric="euclidean"
            )
            keys = refine(video_key, start_keys, layout, iterations=self.iterations, metric="euclidean")
        score = score_clusters("centroid", queries.means, video_key, keys)
        reads = self.budget.reads(score, keys.counts)
        max_reads = self.budget.max_reads(layout.video_tokens)
        return Plan(
            layout, queries, keys, reads, compensate=self.compensate, max_reads=max_reads, carry="centroids"
        )

    def _fresh(self, tokens: Tensor, number: int, layout: Layout) -> Clusters:
        return cluster_tokens(
            tokens, number, layout, iterations=self.first_iterations, metric="euclidean", seed=self.seed
        )
