"""Cluster attention in plain torch on any device: gather what a query cluster reads, then a small dense attention.

Tokens are sorted by cluster once a head. Keys and values stand side by side in one table with a row for each token and, if
skipped tokens are compensated, a row for the mean of each cluster below them; what a query cluster reads is then a list of
rows, picked in one gather. On a CPU this is really faster than dense attention, because the products that follow are large
enough to run at full speed. On a GPU it is correct but launches too many small kernels.
"""

from __future__ import annotations

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
    pairs = torch.cat([key, value], dim=-1)
    means = segment_mean(pairs, k_labels, k_clusters) if compensate else None
    q_sizes, k_sizes = segment_counts(q_labels, q_clusters), segment_counts(k_labels, k_clusters)
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            at = (sample, head)
            tokens = _by_cluster(k_labels[at])
            table = _Table.of(pairs[at].index_select(0, tokens), k_sizes[at], None if means is None else means[at])
            rows = _by_cluster(q_labels[at])
            in_order = query[at].index_select(0, rows)
            out, log_sum = _one_head(in_order, q_sizes[at].tolist(), table, reads[at], scale)
            output[at].index_copy_(0, rows, out)
            lse[at].index_copy_(0, rows, log_sum)
    return output, lse


def _by_cluster(labels: Tensor) -> Tensor:
    """List the tokens cluster after cluster, each in the order of the sequence; padding is left out."""
    order = torch.argsort(labels, stable=True)  # padding, labelled -1, comes first
    return order[int((labels < 0).sum()) :]


def _one_head(
    query: Tensor, sizes: list[int], table: _Table, reads: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from queries that are sorted by cluster."""
    output, lse = torch.zeros_like(query), accurate(query).new_full(query.shape[:1], -torch.inf)
    stop = 0
    for size, row_reads, index in zip(sizes, reads, table.selected(reads), strict=True):
        start, stop = stop, stop + size
        if size == 0 or len(index) == 0:
            continue
        key, value, log_size = table.read(row_reads, index)
        step = max(1, _SLICE_ELEMENTS // len(index))
        for first in range(start, stop, step):
            part = slice(first, min(first + step, stop))
            output[part], lse[part] = _attention(query[part], key, value, log_size, scale)
    return output, lse


@dataclass
class _Table:
    """All that one head can read.

    Attributes:
        rows: ``[k_tokens, 2 * head_dim]`` key and value of each token, cluster after cluster; if skipped tokens are
            compensated, ``[k_clusters, 2 * head_dim]`` means follow.
        ends: ``[k_clusters]`` one past the last row of each cluster.
        sizes: ``[k_clusters]`` tokens of each cluster.
        rank: ``[k_tokens]`` position of each token within its cluster.
        compensate: Whether the means are there.
    """

    rows: Tensor
    ends: Tensor
    sizes: Tensor
    rank: Tensor
    compensate: bool

    @classmethod
    def of(cls, pairs: Tensor, sizes: Tensor, means: Tensor | None) -> _Table:
        """Make the table of keys and values that are sorted by cluster."""
        ends = sizes.cumsum(0)
        rank = torch.arange(len(pairs), device=pairs.device) - (ends - sizes).repeat_interleave(sizes)
        rows = pairs if means is None else torch.cat([pairs, means.to(pairs.dtype)])
        return cls(rows, ends, sizes, rank, means is not None)

    def selected(self, reads: Tensor) -> tuple[Tensor, ...]:
        """List, for each query cluster, the rows of what it reads, then the rows of the means that it reads."""
        chosen = self.rank < reads.repeat_interleave(self.sizes, dim=1)
        if self.compensate:
            chosen = torch.cat([chosen, reads < self.sizes], dim=1)
        return chosen.nonzero()[:, 1].split(chosen.sum(1).tolist())

    def read(self, reads: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pick keys and values; the last of them stand for several tokens each, of which the logarithm comes third."""
        rows = self.rows.index_select(0, index)
        log_size = None
        if self.compensate:
            left = self.sizes - reads
            skipped = left.nonzero().squeeze(1)
            log_size = accurate(left[skipped].to(rows.dtype)).log()
            means = rows[len(rows) - len(skipped) :]
            partly = reads[skipped].nonzero().squeeze(1)  # the mean of the rest is not the mean of all
            for place in partly.tolist():
                end, rest = int(self.ends[skipped[place]]), int(left[skipped[place]])
                means[place] = accurate(self.rows[end - rest : end]).mean(0)
        key, value = rows.chunk(2, dim=1)
        return key, value, log_size


def _attention(
    query: Tensor, key: Tensor, value: Tensor, log_size: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from ``[rows, dim]`` to ``[keys, dim]``; the last keys stand for ``exp(log_size)`` tokens each."""
    logits = accurate(query @ key.T).mul_(scale)
    if log_size is not None:
        logits[:, len(key) - len(log_size) :] += log_size
    peak = logits.amax(1, keepdim=True)
    weights = logits.sub_(peak).exp_()  # in place: the logits are the largest tensor here
    total = weights.sum(1, keepdim=True)
    output = (weights.to(value.dtype) @ value) / total
    return output.to(query.dtype), (peak + total.log()).squeeze(1)
