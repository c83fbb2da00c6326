"""The oracle: AdaCluster's clusters, ranked by the softmax mass that they really have.

It costs more than dense attention. What it shows is how much a better score could still gain.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from adamac.attention.adacluster import AdaCluster
from adamac.attention.cluster import video_parts
from adamac.attention.layout import Layout
from adamac.attention.mass import mass_score
from adamac.attention.plan import Plan
from adamac.attention.select import Budget, Tokens


@dataclass(frozen=True)
class Oracle:
    """Clusters ranked by their true mass.

    Attributes:
        clustering: Whose clusters are used; its score and budget play no part.
        budget: How much each query cluster reads.
        compensate: Let skipped clusters enter the softmax through their means.
    """

    clustering: AdaCluster = field(default_factory=AdaCluster)
    budget: Budget = field(default_factory=Tokens)
    compensate: bool = False

    def __call__(
        self, query: Tensor, key: Tensor, *, layout: Layout | None = None, previous: Plan | None = None
    ) -> Plan:
        """Plan one attention call; see :meth:`adamac.attention.AdaCluster.__call__`."""
        plan = self.clustering(query, key, layout=layout, previous=previous)
        if plan.is_dense:
            return plan
        queries, keys, _ = plan.parts()
        score = mass_score(*video_parts(query, key, plan.layout), queries, keys)
        reads = self.budget.reads(score, keys.counts)
        max_reads = self.budget.max_reads(plan.layout.video_tokens)
        return replace(plan, reads=reads, compensate=self.compensate, max_reads=max_reads)
