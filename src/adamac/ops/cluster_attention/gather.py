"""Cluster attention in plain torch on any device: gather what a query cluster reads, then a small dense attention.

Tokens are sorted by cluster once a head. Keys and values stand side by side in one table with a row for each token and, if
skipped tokens are compensated, a row for the mean of each cluster below them; what a query cluster reads is then a list of
rows, picked in one gather. On a CPU this is really faster than dense attention, because the products that follow are large
enough to run at full speed. On a GPU it is correct but launches too many small kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adamac.ops.precision import accurate
from adamac.ops.segment import segment_counts, segment_mean

# Logits held at once, in elements: 2^21 float32 values are 8 MiB. Few query clusters are large enough to be cut by it.
_SLICE_ELEMENTS = 1 << 21


def gather(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_labels: Tensor,
    k_labels: Tensor,
    reads: Tensor,
    *,
    compensate: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`adamac.ops.cluster_attention.cluster_attention`, reading the selected keys only."""
    q_clusters, k_clusters = reads.shape[-2:]
    output = torch.zeros_like(query)
    lse = accurate(query).new_full(query.shape[:-1], -torch.inf)
    means = None
    if compensate:
        means = torch.cat([segment_mean(part, k_labels, k_clusters) for part in (key, value)], dim=-1)
    q_sizes, k_sizes = segment_counts(q_labels, q_clusters), segment_counts(k_labels, k_clusters)
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            at = (sample, head)
            table = _Table.of(
                key[at], value[at], k_labels[at], k_sizes[at], None if means is None else means[at]
            )
            rows = _by_cluster(q_labels[at])
            in_order = query[at].index_select(0, rows)
            out, log_sum = _one_head(in_order, q_sizes[at], table, reads[at], scale)
            output[at].index_copy_(0, rows, out)
            lse[at].index_copy_(0, rows, log_sum)
    return output, lse


def _by_cluster(labels: Tensor) -> Tensor:
    """List the tokens cluster after cluster, each in the order of the sequence; padding is left out."""
    order = torch.argsort(labels, stable=True)  # padding, labelled -1, comes first
    return order[int((labels < 0).sum()) :]


@dataclass
class _Picked:
    """What one query cluster reads; the last ``len(log_size)`` rows stand for ``exp(log_size)`` tokens each."""

    key: Tensor
    value: Tensor
    log_size: Tensor


def _one_head(
    query: Tensor, sizes: Tensor, table: _Table, reads: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from queries that are sorted by cluster."""
    output, lse = torch.zeros_like(query), accurate(query).new_full(query.shape[:1], -torch.inf)
    filled = sizes > 0
    stop = 0
    for size, picked in zip(sizes[filled].tolist(), table.pick(reads[filled]), strict=True):
        start, stop = stop, stop + size
        if not len(picked.key):
            continue
        step = max(1, _SLICE_ELEMENTS // len(picked.key))
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            output[rows], lse[rows] = _attention(query[rows], picked, scale)
    return output, lse


@dataclass
class _Table:
    """All that one head can read.

    Attributes:
        rows: ``[k_tokens, 2 * head_dim]`` key and value of each token, cluster after cluster; if skipped tokens are
            compensated, ``[k_clusters, 2 * head_dim]`` means follow.
        sizes: ``[k_clusters]`` tokens of each cluster.
        compensate: Whether the means are there.
    """

    rows: Tensor
    sizes: Tensor
    compensate: bool

    @classmethod
    def of(cls, key: Tensor, value: Tensor, labels: Tensor, sizes: Tensor, means: Tensor | None) -> _Table:
        """Make the table of one head's keys and values."""
        order = _by_cluster(labels)
        tokens, dim = len(order), key.shape[1]
        rows = key.new_empty(tokens + (0 if means is None else len(means)), 2 * dim)
        rows[:tokens, :dim], rows[:tokens, dim:] = key.index_select(0, order), value.index_select(0, order)
        if means is not None:
            rows[tokens:] = means
        return cls(rows, sizes, means is not None)

    def pick(self, reads: Tensor) -> Iterator[_Picked]:
        """Gather, for each query cluster, the tokens that it reads and the means of those that it skips."""
        ends = self.sizes.cumsum(0)
        tokens = torch.arange(int(ends[-1]), device=reads.device)
        rank = tokens - (ends - self.sizes).repeat_interleave(self.sizes)
        chosen = rank < reads.repeat_interleave(self.sizes, dim=1)
        left = (self.sizes - reads) if self.compensate else torch.zeros_like(reads)
        skipped = left > 0
        if self.compensate:
            chosen = torch.cat([chosen, skipped], dim=1)
        indices = chosen.nonzero()[:, 1].split(chosen.sum(1).tolist())
        log_sizes = left[skipped].double().log().split(skipped.sum(1).tolist())
        spans = self._spans(reads, left, ends)
        for cluster, (index, log_size) in enumerate(zip(indices, log_sizes, strict=True)):
            rows = self.rows.index_select(0, index)
            for place, start, stop in spans[cluster]:  # the mean of the rest is not the mean of all
                rows[place] = accurate(self.rows[start:stop]).mean(0)
            yield _Picked(*rows.chunk(2, dim=1), log_size)

    @staticmethod
    def _spans(reads: Tensor, left: Tensor, ends: Tensor) -> list[list[tuple[int, int, int]]]:
        """Find the clusters read in part: their place in the list of means, from its end, and the rows left over."""
        skipped = left > 0
        partly = skipped & (reads > 0)
        cluster = partly.nonzero()[:, 0]
        place = (skipped.cumsum(1) - skipped.sum(1, keepdim=True) - 1)[partly]
        stop = ends.expand_as(left)[partly]
        spans: list[list[tuple[int, int, int]]] = [[] for _ in reads]
        for row, *span in torch.stack([cluster, place, stop - left[partly], stop], dim=1).tolist():
            spans[row].append(tuple(span))
        return spans


def _attention(query: Tensor, picked: _Picked, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from ``[rows, head_dim]`` to what is picked."""
    logits = accurate(query @ picked.key.T).mul_(scale)
    logits[:, len(picked.key) - len(picked.log_size) :].add_(picked.log_size)
    weights = logits.softmax(1)
    # The heaviest weight is exp(its logit - lse), and softmax is faster than the steps it is made of.
    lse = logits.amax(1) - weights.amax(1).log()
    return weights.to(query.dtype) @ picked.value, lse
