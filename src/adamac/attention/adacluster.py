"""AdaCluster (arXiv 2604.18348): cluster queries by angle, keys by distance, and read the key clusters that matter.

The idea of the paper. The order of a query's logits does not depend on the query's length, so queries are clustered on the
unit sphere: few clusters, fixed in number. The distance of a key from its centroid bounds the error of its logits, so keys
are clustered by Euclidean distance, and how many clusters that takes differs from layer to layer and hardly from prompt to
prompt: in the first sparse step keys that lie far from their centroid (1.5 times the mean distance) get further clusters,
stage by stage, until none is left. A layer that would need too many is left dense. Later steps start from the last step's
centroids and refine them once. Each query cluster then reads its best-scoring key clusters, with each row's own query.

Beyond the paper. Distances are measured by logits: how differently the queries of the head see two keys, and its keys two
queries. All key clusters are made at once: stages are there for who asks for them. What a row skips is *compensated*: a
skipped cluster enters the softmax through its mean key and mean value. The budget can be given in tokens, so that all rows
cost the same. Scores other than the paper's are at hand. The paper's own settings are :meth:`AdaCluster.paper`.

The paper leaves open: how many clusters k-means starts from, how many each further stage adds, its K, and what becomes of
text. Here: ``key_clusters``; two for each that the outliers would have by their share of the tokens, at least 16; ``budget``;
text is read by all and reads all. This file was written from the paper's description alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from adamac.attention.agree import largest, total
from adamac.attention.cluster import (
    as_clusters,
    check_counts,
    cluster_tokens,
    refine,
    regroup,
    usable,
    video_parts,
)
from adamac.attention.layout import Layout, check_attention_inputs
from adamac.attention.logit_metric import form_of_keys, form_of_queries
from adamac.attention.plan import Clusters, Plan
from adamac.attention.select import Budget, Score, Tokens, TopK, check_budget, check_score, score_clusters
from adamac.ops.kmeans import Metric, distances, kmeans, spread_tokens

# The least number of clusters that a further stage adds, lest the last few outliers take many stages.
_MIN_STAGE = 16


@dataclass(frozen=True)
class AdaCluster:
    """Sparse attention by clusters of queries and keys.

    Without arguments: our settings, which compensate what is skipped and read 10 % of the keys. :meth:`paper` gives the paper's.

    Attributes:
        query_clusters: Clusters of the queries of each head; ``None`` means the square root of the number of video tokens (66
            at 4,368 tokens, 275 at 75,600).
        key_clusters: Clusters of the keys of each head; ``None`` means 4 times that root (264 and 1,100). Every row reads every
            centroid, so twice the tokens should not get twice as many. With a finite ``outlier_factor``, the number that the
            first stage has.
        max_key_clusters: The most that further stages may bring ``key_clusters`` to; ``None`` means 1.5 times as many.
        outlier_factor: Keys farther from their centroid than this many times the layer's mean distance get further clusters,
            stage by stage, in the first sparse step (the paper: 1.5). Infinity means no stages: every layer gets
            ``key_clusters``, which gives a smaller error than as many that came in stages.
        angular: Cluster queries by angle (spherical k-means), as the paper does, or by distance.
        metric: What angles and distances are measured by. ``"tokens"``: the tokens themselves, as in the paper. ``"logits"``:
            how differently the other side of the head's attention sees two tokens (:mod:`adamac.attention.logit_metric`).
        score: How key clusters are ranked; see :mod:`adamac.attention.select`. ``None`` means ``"residual"`` with
            ``compensate`` and ``"moment"`` without: a cluster of a single far token has no residual, and would be skipped
            although nothing stands for it.
        budget: How much each query cluster reads: :class:`Tokens`, :class:`TopK` or :class:`TopP`.
        compensate: Let skipped clusters enter the softmax through their mean key and mean value.
        hard_layers: What happens to a layer that would need more than ``max_key_clusters``: ``"dense"`` leaves it dense for the
            whole video, as the paper does; ``"sparse"`` goes on with ``max_key_clusters``, which compensation can afford.
        first_iterations: Lloyd iterations in the first sparse step, in each stage.
        iterations: Lloyd iterations in a later step.
        recluster_every: Make new clusters every so many steps; in between only means and selection are new.
        seed: Chooses the tokens that k-means starts from.

    Raises:
        ValueError: If a setting is out of range, or two of them contradict each other.
    """

    query_clusters: int | None = None
    key_clusters: int | None = None
    max_key_clusters: int | None = None
    outlier_factor: float = math.inf
    angular: bool = True
    metric: Literal["logits", "tokens"] = "logits"
    score: Score | None = None
    budget: Budget = field(default_factory=lambda: Tokens(0.1))
    compensate: bool = True
    hard_layers: Literal["sparse", "dense"] = "sparse"
    first_iterations: int = 3
    iterations: int = 1
    recluster_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self)
        check_counts(
            self, "query_clusters", "key_clusters", "first_iterations", "iterations", "recluster_every"
        )
        if self.max_key_clusters is not None and self.max_key_clusters < (self.key_clusters or 1):
            raise ValueError(
                f"AdaCluster.max_key_clusters ({self.max_key_clusters}) must not be below key_clusters "
                f"({self.key_clusters})"
            )
        if self.hard_layers not in ("sparse", "dense"):
            raise ValueError(f'AdaCluster.hard_layers must be "sparse" or "dense", got {self.hard_layers!r}')
        if self.metric not in ("logits", "tokens"):
            raise ValueError(f'AdaCluster.metric must be "logits" or "tokens", got {self.metric!r}')
        if math.isinf(self.outlier_factor) and (
            self.max_key_clusters is not None or self.hard_layers == "dense"
        ):
            raise ValueError(
                "AdaCluster.max_key_clusters and hard_layers are about stages for outliers, of which there are none with "
                "an infinite outlier_factor; give a finite one (the paper's is 1.5), or leave these two out"
            )
        if not self.outlier_factor > 0:
            raise ValueError(f"AdaCluster.outlier_factor must be positive, got {self.outlier_factor}")
        if self.score is not None:
            check_score(self.score)

    @classmethod
    def paper(cls) -> AdaCluster:
        """The paper's settings: 65 query clusters, TensorQuest, a quarter of the clusters, nothing compensated.

        The starting count and the cap are not printed; 200 and 600 follow from the reported mean of 412 and from the
        share of layers (15 %) that the cap leaves dense.
        """
        return cls(
            query_clusters=65,
            key_clusters=200,
            max_key_clusters=600,
            outlier_factor=1.5,
            metric="tokens",
            score="quest",
            budget=TopK(0.25),
            compensate=False,
            hard_layers="dense",
        )

    def __call__(
        self, query: Tensor, key: Tensor, *, layout: Layout | None = None, previous: Plan | None = None
    ) -> Plan:
        """Plan one attention call.

        Args:
            query: ``[batch, heads, tokens, head_dim]``, after normalisation and position embedding.
            key: Like ``query``.
            layout: Where the video sits; ``None`` means that all tokens are video.
            previous: The plan of this layer's last step, to start from.

        Returns:
            A plan; a dense one, with its reason, if the keys need more than ``max_key_clusters`` and ``hard_layers`` is
            ``"dense"``.

        Raises:
            ValueError: If query, key and layout do not fit each other, or ``previous`` is no plan.
        """
        layout = layout or Layout.video_only(query.shape[-2])
        check_attention_inputs(query, key, layout)
        former = usable(previous, query, layout)
        if previous is not None and previous.is_dense and previous.layout.same_shape(layout):
            return Plan.dense(layout, previous.dense_reason or "")
        video_query, video_key = video_parts(query, key, layout)
        age = 0
        if former is None:
            found = self._first(video_query, video_key, layout)
            if isinstance(found, str):
                return Plan.dense(layout, found)
            queries, keys = found
        elif former.age + 1 < self.recluster_every:
            age = former.age + 1
            former_queries, former_keys, _ = former.parts()
            queries, keys = regroup(video_query, former_queries), regroup(video_key, former_keys)
        else:
            queries, keys = self._refined(former, video_query, video_key, layout)
        ranking = self.score or ("residual" if self.compensate else "moment")
        score = score_clusters(ranking, queries.means, video_key, keys)
        return Plan(
            layout,
            queries,
            keys,
            self.budget.reads(score, keys.counts),
            compensate=self.compensate,
            max_reads=self.budget.max_reads(layout.video_tokens),
            age=age,
            carry="plan" if age + 1 < self.recluster_every else "centroids",
        )

    def _first(self, query: Tensor, key: Tensor, layout: Layout) -> tuple[Clusters, Clusters] | str:
        """Cluster queries and keys from scratch; a string says why the layer stays dense."""
        of_queries, of_keys = self._forms(query, key, layout)
        keys = self._first_keys(key, layout, of_keys)
        if isinstance(keys, str):
            return keys
        queries = cluster_tokens(
            query,
            self.query_clusters or round(query.shape[2] ** 0.5),
            layout,
            iterations=self.first_iterations,
            metric=self._query_metric,
            seed=self.seed,
            form=of_queries,
        )
        return queries, keys

    def _refined(self, former: Plan, query: Tensor, key: Tensor, layout: Layout) -> tuple[Clusters, Clusters]:
        """Cluster queries and keys from the centroids of a former step."""
        start_queries, start_keys = former.centroids()
        of_queries, of_keys = self._forms(query, key, layout)
        again = {"iterations": self.iterations}
        queries = refine(query, start_queries, layout, metric=self._query_metric, form=of_queries, **again)
        keys = refine(key, start_keys, layout, metric="euclidean", form=of_keys, **again)
        return queries, keys

    @property
    def _query_metric(self) -> Metric:
        return "cosine" if self.angular else "euclidean"

    def _forms(self, query: Tensor, key: Tensor, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
        """Forms that queries and keys are clustered under; ``None`` for the tokens' own distances."""
        if self.metric == "tokens":
            return None, None
        valid = layout.video_valid()
        return form_of_queries(key, valid), form_of_keys(query, valid)

    def _first_keys(self, key: Tensor, layout: Layout, form: Tensor | None) -> Clusters | str:
        """Cluster keys at once, or in stages; a string says why the layer stays dense."""
        start = min(self.key_clusters or round(4 * key.shape[2] ** 0.5), key.shape[2])
        if not math.isinf(self.outlier_factor):
            return self._staged_keys(key, layout, form, start)
        return cluster_tokens(
            key,
            start,
            layout,
            iterations=self.first_iterations,
            metric="euclidean",
            seed=self.seed,
            form=form,
        )

    def _staged_keys(self, key: Tensor, layout: Layout, form: Tensor | None, start: int) -> Clusters | str:
        """Cluster keys in stages until none is far from its centroid.

        The count is the layer's: all its heads and samples get as many clusters as the neediest head, some empty, on
        whatever rank the head is. This is the only place that reads a value back from the device, once a video.
        """
        valid = layout.video_valid()
        tokens = key.shape[2]
        most_allowed = self.max_key_clusters or start + start // 2
        seeds = spread_tokens(key, start, self.seed, valid)
        stage = kmeans(key, seeds, iterations=self.first_iterations, include=valid, form=form)
        centroids = stage.centroids
        far = distances(key, stage.members.labels, stage.centroids, form)
        members = (stage.members.labels >= 0).sum()
        sums = total(torch.stack([far.sum(dtype=torch.float64), members.double()]), layout.ranks)
        limit = (self.outlier_factor * sums[0] / sums[1]).to(far.dtype)
        outlier = far > limit
        stages = 0
        while (most := int(largest(outlier.sum(-1).max(), layout.ranks))) > 0:
            room = most_allowed - centroids.shape[2]
            if room < 1 and self.hard_layers == "sparse":
                break
            if room < 1:
                return f"method: keys need more than {most_allowed} clusters"
            stages += 1
            wanted = max(_MIN_STAGE, math.ceil(2 * most * start / tokens))
            seeds = spread_tokens(key, min(wanted, room), self.seed + stages, outlier)
            stage = kmeans(key, seeds, iterations=self.first_iterations, include=outlier, form=form)
            centroids = torch.cat([centroids, stage.centroids], dim=2)
            outlier = outlier & (distances(key, stage.members.labels, stage.centroids, form) > limit)
        found = kmeans(key, centroids, iterations=1, include=valid, form=form)
        return as_clusters(key, found, "euclidean")
