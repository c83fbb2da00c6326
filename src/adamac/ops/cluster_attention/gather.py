"""Cluster attention in plain torch on any device: gather what each query cluster reads, then batched dense attention.

What a row can read stands in one table, key and value side by side: the tokens of all heads, then, if skipped tokens are
compensated, the means of whole clusters and the means of the rests of clusters that are read in part. What a query cluster
reads is a list of entries of that table. Query clusters of about equal size are attended together, so that a call is a few
dozen large operations: hundreds of small ones would leave a CPU's threads waiting for each other. On a CPU this is really
faster than dense attention; on a GPU it is correct, but a kernel that gathers as it computes is faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adamac.ops.precision import accurate
from adamac.ops.segment import segment_counts, segment_mean

# Table elements gathered at once; 2^20 float32 values are 4 MiB, so that they are still in a cache when they are read.
_BATCH_ELEMENTS = 1 << 20
# Entries looked through at once to find those that are read.
_SEARCH_ELEMENTS = 1 << 20


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
    rows = accurate(query).reshape(-1, query.shape[-1])
    output, lse = torch.zeros_like(rows), rows.new_full(rows.shape[:1], -torch.inf)
    table = _Table.of(key, value, k_labels, reads, compensate)
    members = _Members.of(q_labels, reads.shape[-2])
    for clusters in members.by_size(table.lengths(), max(1, _SEARCH_ELEMENTS // table.width)):
        entries, log_size, lengths = table.find(clusters)
        index, filled = members.padded(clusters)
        sizes, start = members.sizes[clusters].tolist(), 0
        while start < len(clusters):
            longest = max(lengths[start:])
            stop = start + max(1, _BATCH_ELEMENTS // (longest * table.rows.shape[1]))
            part, real = index[start:stop, : sizes[start]], filled[start:stop, : sizes[start]]
            keys, values = table.pick(entries[start:stop, :longest])
            out, log_sum = _attention(rows[part], keys, values, log_size[start:stop, :longest], scale)
            output[part[real]] = out[real]
            lse[part[real]] = log_sum[real]
            start = stop
    return output.view_as(query).to(query.dtype), lse.view(query.shape[:-1])


@dataclass
class _Members:
    """The rows of every query cluster. Clusters of all heads are numbered through, and so are rows.

    Attributes:
        order: Rows, cluster after cluster.
        starts: ``[all query clusters]`` where each begins in that order.
        sizes: ``[all query clusters]`` how many rows it has.
    """

    order: Tensor
    starts: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, labels: Tensor, num_clusters: int) -> _Members:
        """Sort rows by cluster."""
        sizes, order, ends = _sorted(labels, num_clusters)
        first = torch.arange(len(order), device=labels.device).unsqueeze(1) * labels.shape[-1]
        return cls((order + first).reshape(-1), (ends[:, :-1] + first).reshape(-1), sizes.reshape(-1))

    def by_size(self, lengths: Tensor, piece: int) -> tuple[Tensor, ...]:
        """List the clusters that have rows and something to read, the largest first, in pieces of at most ``piece``."""
        order = self.sizes.argsort(descending=True, stable=True)
        order = order[(self.sizes[order] > 0) & (lengths[order] > 0)]
        return order.split(piece) if len(order) else ()

    def padded(self, clusters: Tensor) -> tuple[Tensor, Tensor]:
        """List rows as ``[clusters, most]``, and say which entries are real."""
        sizes = self.sizes[clusters].unsqueeze(1)
        slot = torch.arange(int(sizes.max()), device=sizes.device)
        place = self.starts[clusters].unsqueeze(1) + slot
        return self.order[place.clamp_max(len(self.order) - 1)], slot < sizes


@dataclass
class _Table:
    """All that can be read.

    Attributes:
        rows: ``[entries, 2 * head_dim]`` key and value of all tokens, then the means of all clusters, then the means of
            rests.
        log_size: ``[entries]`` log of how many tokens an entry stands for.
        sizes: ``[all heads, k_clusters]`` tokens of each cluster.
        tokens: ``[all heads, k_tokens]`` entries of the tokens in the order of clusters.
        labels: ``[all heads, k_tokens]`` their clusters; padding has ``k_clusters``.
        rank: ``[all heads, k_tokens]`` their positions within the cluster.
        reads: ``[all query clusters, k_clusters]``.
        means: ``[all query clusters, k_clusters]`` the entry that stands for what is skipped; ``None`` without
            compensation.
    """

    rows: Tensor
    log_size: Tensor
    sizes: Tensor
    tokens: Tensor
    labels: Tensor
    rank: Tensor
    reads: Tensor
    means: Tensor | None

    @classmethod
    def of(cls, key: Tensor, value: Tensor, labels: Tensor, reads: Tensor, compensate: bool) -> _Table:
        """Make the table."""
        q_clusters, k_clusters = reads.shape[-2:]
        tokens = key.shape[2]
        sizes, order, ends = _sorted(labels, k_clusters)
        entries = order + torch.arange(len(sizes), device=key.device).unsqueeze(1) * tokens
        in_order = torch.gather(labels.view_as(order), 1, order)
        rank = torch.arange(tokens, device=key.device) - torch.gather(ends, 1, in_order.clamp_min(0))
        in_order = in_order.masked_fill(in_order < 0, k_clusters)
        flat_reads = reads.reshape(-1, k_clusters)
        rows = torch.cat([accurate(key), accurate(value)], dim=-1).view(order.numel(), -1)
        log_size, means = rows.new_zeros(len(rows)), None
        if compensate:
            whole = segment_mean(rows.view(*labels.shape, -1), labels, k_clusters)
            head = torch.arange(len(flat_reads), device=key.device) // q_clusters
            means = (head * k_clusters).unsqueeze(1) + torch.arange(k_clusters, device=key.device) + len(rows)
            row, cluster = ((flat_reads > 0) & (flat_reads < sizes[head])).nonzero().unbind(1)
            means[row, cluster] = torch.arange(len(row), device=key.device) + len(rows) + sizes.numel()
            left = sizes[head[row], cluster] - flat_reads[row, cluster]
            start = head[row] * tokens + ends[head[row], cluster + 1] - left
            rests = _run_means(rows, entries.view(-1), start, left)
            rows = torch.cat([rows, whole.reshape(sizes.numel(), -1), rests])
            log_size = torch.cat(
                [log_size, *(size.to(rows.dtype).log() for size in (sizes.reshape(-1), left))]
            )
        return cls(rows, log_size, sizes, entries, in_order, rank, flat_reads, means)

    @property
    def width(self) -> int:
        """How many entries a query cluster may read."""
        return self.labels.shape[1] + (0 if self.means is None else self.means.shape[1])

    def lengths(self) -> Tensor:
        """How many entries each query cluster reads."""
        lengths = self.reads.sum(1)
        if self.means is None:
            return lengths
        head = self._head(torch.arange(len(self.reads), device=self.reads.device))
        return lengths + (self.reads < self.sizes[head]).sum(1)

    def find(self, clusters: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """List what some query clusters read.

        Returns:
            Entries ``[clusters, most]``; what to add to their logits ``[clusters, most]``: the log of how many tokens an
            entry stands for, ``-inf`` past a cluster's own; how many each cluster has.
        """
        head = self._head(clusters)
        reads, labels = self.reads[clusters], self.labels[head]
        # Of padding, whose ranks are negative, nothing is read.
        limit = torch.nn.functional.pad(reads, (0, 1), value=-labels.shape[1])
        chosen, entry = self.rank[head] < torch.gather(limit, 1, labels), self.tokens[head]
        if self.means is not None:
            chosen = torch.cat([chosen, reads < self.sizes[head]], dim=1)
            entry = torch.cat([entry, self.means[clusters]], dim=1)
        row = chosen.nonzero()[:, 0]
        lengths = chosen.sum(1)
        place = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
        found = row.new_zeros(len(clusters), int(lengths.max()))
        found[row, place] = entry[chosen]
        log_size = self.log_size[found]
        log_size[torch.arange(found.shape[1], device=row.device) >= lengths.unsqueeze(1)] = -torch.inf
        return found, log_size, lengths.tolist()

    def pick(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Gather keys and values ``[clusters, entries, head_dim]``."""
        picked = self.rows.index_select(0, entries.reshape(-1)).view(*entries.shape, -1)
        keys, values = picked.chunk(2, dim=2)
        return keys, values

    def _head(self, clusters: Tensor) -> Tensor:
        return clusters // (len(self.reads) // len(self.sizes))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, log_size: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from ``[clusters, rows, head_dim]`` to ``[clusters, entries, head_dim]``; also the log-sum-exp."""
    run = _fused if query.device.type == "cpu" else _eager
    return run(query, key, value, log_size, scale)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, log_size: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Use torch's own CPU kernel, called by the name under which it also gives the log-sum-exp."""
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.unsqueeze(1),
        key.unsqueeze(1),
        value.unsqueeze(1),
        attn_mask=log_size[:, None, None],
        scale=scale,
    )
    return output.squeeze(1), lse.squeeze(1)


def _eager(
    query: Tensor, key: Tensor, value: Tensor, log_size: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Use plain products, which run anywhere."""
    logits = torch.baddbmm(log_size.unsqueeze(1), query, key.transpose(1, 2), alpha=scale)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def _sorted(labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the tokens of each head by cluster.

    Returns:
        Sizes ``[all heads, clusters]``; tokens in sorted order ``[all heads, tokens]``, padding first; bounds
        ``[all heads, clusters + 1]`` of each cluster in that order.
    """
    sizes = segment_counts(labels, num_clusters).view(-1, num_clusters)
    order = torch.argsort(labels, dim=-1, stable=True).view(len(sizes), -1)
    outside = labels.shape[-1] - sizes.sum(1, keepdim=True)
    return sizes, order, torch.cat([outside, sizes], dim=1).cumsum(1)


def _run_means(rows: Tensor, order: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Average ``length`` rows from ``start`` on, in the given order of rows."""
    owner = torch.arange(len(start), device=rows.device).repeat_interleave(length)
    within = torch.arange(len(owner), device=rows.device) - (length.cumsum(0) - length)[owner]
    members = rows.index_select(0, order[start[owner] + within])
    # One head of one "sample": the segments are numbered through already.
    return segment_mean(members[None, None], owner[None, None], len(start))[0, 0].to(rows.dtype)
