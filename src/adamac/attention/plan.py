"""A plan: which key clusters each query cluster reads exactly, and whether what is skipped still counts.

A *method* (``AdaCluster``, ``SVG2``, ``BlockTopK``, ...) turns ``(query, key)`` into a plan; :func:`adamac.attention.attend`
turns ``(query, key, value, plan)`` into an output. Methods therefore differ in their plans alone, and a comparison of two
methods compares just that.

A plan covers the video tokens of a sequence. Text is not part of it: the executor lets every query read all valid text and
every text query read everything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from adamac.attention.layout import Layout
from adamac.attention.packed import Packed
from adamac.ops.segment import Segments


@dataclass(frozen=True)
class Clusters:
    """A partition of the video tokens of every head.

    Heads may differ in how many clusters they use: they are padded to the widest with clusters of no members, which no
    query reads.

    Attributes:
        members: The tokens of each cluster; padding is in none.
        means: ``[batch, heads, clusters, head_dim]`` float32, mean member (not normalised).
        centroids: What a later clustering starts from: the means, or their like on the unit sphere; ``None`` if there is
            no later clustering.
        variances: Like ``means``, the members' mean squared deviation from their mean by coordinate; ``None`` if it was not
            asked for. It is not kept between steps.
    """

    members: Segments
    means: Tensor
    centroids: Tensor | None = None
    variances: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """``[batch, heads, video_tokens]`` integers, the cluster of each token; -1 for padding."""
        return self.members.labels

    @property
    def counts(self) -> Tensor:
        """``[batch, heads, clusters]`` int64, members of each cluster; 0 is an empty cluster."""
        return self.members.counts

    @property
    def num_clusters(self) -> int:
        """How many clusters, empty ones included."""
        return self.members.number


@dataclass(frozen=True)
class Plan:
    """What each query cluster reads.

    A dense plan (``dense_reason`` set) has no clusters: everything reads everything, for the reason given.

    Attributes:
        layout: The sequence that the plan is for.
        queries: Clusters of the video queries.
        keys: Clusters of the video keys.
        reads: ``[batch, heads, q_clusters, k_clusters]`` integers: how many tokens of key cluster ``j`` the rows of query
            cluster ``i`` read exactly, from none to all of them. A cluster read in part is read from its first token
            in the order of the sequence.
        compensate: Whether tokens that are skipped enter the softmax through their cluster's mean key and mean value.
        max_reads: The most video tokens that a row reads, known without looking at values; ``None`` if it is not.
        age: Steps since the clusters were made.
        carry: What the method wants back at the next step: the whole plan, or the centroids alone, or nothing.
        start: Rounded centroids of queries and keys, in a plan of which nothing else was carried over.
        dense_reason: Why this plan is dense, or ``None``.
    """

    layout: Layout
    queries: Clusters | None = None
    keys: Clusters | None = None
    reads: Tensor | None = None
    compensate: bool = False
    max_reads: int | None = None
    age: int = 0
    carry: Literal["plan", "centroids", "nothing"] = "plan"
    start: tuple[Packed, Packed] | None = None
    dense_reason: str | None = None

    @classmethod
    def dense(cls, layout: Layout, reason: str) -> Plan:
        """The plan in which everything reads everything."""
        return cls(layout, dense_reason=reason)

    @property
    def is_dense(self) -> bool:
        """Whether everything reads everything, without looking at values."""
        return self.dense_reason is not None

    def parts(self) -> tuple[Clusters, Clusters, Tensor]:
        """Clusters of queries, clusters of keys, and reads.

        Raises:
            ValueError: If the plan has none, because it is dense or because they were not carried over.
        """
        if self.queries is None or self.keys is None or self.reads is None:
            reason = (
                "of which only centroids were carried over"
                if self.start
                else f"that is dense ({self.dense_reason})"
            )
            raise ValueError(f"a plan {reason} has no clusters")
        return self.queries, self.keys, self.reads

    def carried(self) -> Plan | None:
        """Reduce the plan to what its method wants back at the next step, as ``previous``.

        The mask of padding is not carried over: the next step brings it again.
        """
        if self.carry == "nothing":
            return None
        layout = replace(self.layout, valid=None)
        if self.is_dense:
            return replace(self, layout=layout)
        if self.carry == "plan":
            queries, keys, _ = self.parts()
            queries, keys = replace(queries, variances=None), replace(keys, variances=None)
            return replace(self, layout=layout, queries=queries, keys=keys)
        return Plan(layout, start=tuple(map(Packed.of, self.centroids())), age=self.age)  # ty: ignore[invalid-argument-type]

    def centroids(self) -> tuple[Tensor, Tensor]:
        """What clustering queries and keys starts from at a later step.

        Raises:
            ValueError: If the plan has no centroids.
        """
        if self.start is not None:
            return self.start[0].centroids(), self.start[1].centroids()
        queries, keys, _ = self.parts()
        if queries.centroids is None or keys.centroids is None:
            raise ValueError("a plan made of tiles has no centroids to start from")
        return queries.centroids, keys.centroids

    def density(self) -> Tensor:
        """Share of (query, key) pairs computed exactly, text included, in tokens: ``[batch, heads]`` float64.

        Pairs with padding count neither above nor below. A dense plan gives a single 1.
        """
        return self._density

    @cached_property
    def _density(self) -> Tensor:
        if self.is_dense:
            return torch.ones(1, 1, dtype=torch.float64)
        queries, _, reads = self.parts()
        rows = queries.counts.double()
        video_pairs = (reads.sum(-1).double() * rows).sum(-1)
        video, text = rows.sum(-1), self._text_tokens()
        # Text queries read all, video queries read all text.
        pairs = video_pairs + video * text + text * (video + text)
        return pairs / (video + text).square().clamp_min(1)  # a sample without a token reads nothing

    def cost(self) -> Tensor:
        """Density plus the centroids that each row reads, in units of dense attention: ``[batch, heads]`` float64."""
        if self.is_dense or not self.compensate:
            return self.density()
        queries, keys, reads = self.parts()
        rows = queries.counts.double()
        centroids = (reads < keys.counts.unsqueeze(-2)).sum(-1).double()
        tokens = rows.sum(-1) + self._text_tokens()
        return self.density() + (centroids * rows).sum(-1) / tokens.square().clamp_min(1)

    def state_bytes(self) -> int:
        """Bytes that keeping this plan for the next step holds."""
        held = 0 if self.reads is None else self.reads.nbytes
        held += sum(packed.nbytes for packed in self.start or ())
        for clusters in (self.queries, self.keys):
            if clusters is not None:
                held += clusters.members.nbytes()
                tensors = {id(t): t for t in (clusters.means, clusters.centroids) if t is not None}
                held += sum(tensor.nbytes for tensor in tensors.values())
        return held

    def check(self) -> None:
        """Read the values and verify every invariant; for tests and debugging, since it waits for the device.

        Raises:
            ValueError: Naming the invariant that is broken.
        """
        if self.is_dense:
            return
        queries, keys, reads = self.parts()
        for name, clusters in (("queries", queries), ("keys", keys)):
            labels, size = clusters.labels, clusters.num_clusters
            if labels.shape[-1] != self.layout.video_tokens:
                raise ValueError(
                    f"{name} label {labels.shape[-1]} tokens, the video has {self.layout.video_tokens}"
                )
            if labels.min() < -1 or labels.max() >= size:
                raise ValueError(f"{name} labels must lie in -1..{size - 1}")
            if not torch.equal(Segments(labels, size).counts, clusters.counts):
                raise ValueError(f"{name} counts differ from the labels")
            valid = self.layout.video_valid()
            if valid is not None and not torch.equal((labels >= 0), valid.expand_as(labels)):
                raise ValueError(f"{name}: exactly the padding must be labelled -1")
        if reads.min() < 0 or (reads > keys.counts.unsqueeze(-2)).any():
            raise ValueError("reads must lie between 0 and the size of the key cluster")
        if self.max_reads is not None and reads.sum(-1).max() > self.max_reads:
            raise ValueError(
                f"a row reads {int(reads.sum(-1).max())} tokens, more than max_reads ({self.max_reads})"
            )

    def _text_tokens(self) -> Tensor:
        queries, _, _ = self.parts()
        if self.layout.valid is None:
            return queries.counts.new_full((1, 1), self.layout.text_tokens).double()
        valid = self.layout.valid.sum(-1) - self.layout.video(self.layout.valid[:, None, :, None]).sum(
            (1, 2, 3)
        )
        return valid.double().unsqueeze(1)
