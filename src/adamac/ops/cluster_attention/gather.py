"""Cluster attention in plain torch on any device: gather what each query cluster reads, then batched dense attention.

What a row can read stands in one table, key and value side by side: the tokens of all heads, then, if skipped tokens are
compensated, the means of all clusters. What a query cluster reads is a list of entries of that table. Query clusters of about
equal size are attended together, so that a call is a few dozen large operations: hundreds of small ones would leave a CPU's
threads waiting for each other. On a CPU this is really faster than dense attention; on a GPU it is right and slow, it waits
for the device, and is there for what no kernel takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adamac.ops.precision import accurate
from adamac.ops.segment import Segments, segment_mean

# Table elements gathered at once; 2^20 float32 values are 4 MiB, so that they are still in a cache when they are read.
_BATCH_ELEMENTS = 1 << 20
# Entries looked through at once to find those that are read.
_SEARCH_ELEMENTS = 1 << 20


def gather(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Segments,
    keys: Segments,
    reads: Tensor,
    *,
    compensate: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`adamac.ops.cluster_attention.cluster_attention`, reading the selected keys only."""
    rows = accurate(query).reshape(-1, query.shape[-1])
    output, lse = torch.zeros_like(rows), rows.new_full(rows.shape[:1], -torch.inf)
    table = _Table.of(key, value, keys, reads, compensate)
    members = _Members.of(queries)
    for clusters in members.by_size(table.lengths(), max(1, _SEARCH_ELEMENTS // table.width)):
        entries, log_size, lengths = table.find(clusters)
        index, filled = members.padded(clusters)
        sizes, start = members.sizes[clusters].tolist(), 0
        while start < len(clusters):
            longest = max(lengths[start:])
            stop = start + max(1, _BATCH_ELEMENTS // (longest * table.rows.shape[1]))
            part, real = index[start:stop, : sizes[start]], filled[start:stop, : sizes[start]]
            picked = table.pick(entries[start:stop, :longest])
            out, log_sum = _attention(rows[part], *picked, log_size[start:stop, :longest], scale)
            if real.all():  # no copies of copies where clusters are of one size
                output[part], lse[part] = out, log_sum
            else:
                output[part[real]], lse[part[real]] = out[real], log_sum[real]
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
    def of(cls, queries: Segments) -> _Members:
        """Number the rows and clusters of all heads through."""
        order = queries.order.long().flatten(0, -2)
        first = torch.arange(len(order), device=order.device).unsqueeze(1) * order.shape[-1]
        starts = queries.starts[..., :-1].long().flatten(0, -2) + first
        return cls((order + first).reshape(-1), starts.reshape(-1), queries.counts.reshape(-1))

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
        rows: ``[entries, 2 * head_dim]`` key and value of all tokens, then the means of all clusters.
        tokens: ``[all heads * k_tokens]`` entries of the tokens, head after head in the order of clusters.
        starts: ``[all heads, k_clusters]`` where each cluster begins in that order.
        sizes: ``[all heads, k_clusters]`` tokens of each cluster.
        reads: ``[all query clusters, k_clusters]``.
        compensate: Whether the means of what is skipped are read.
        picked: What was gathered last.
    """

    rows: Tensor
    tokens: Tensor
    starts: Tensor
    sizes: Tensor
    reads: Tensor
    compensate: bool
    picked: Tensor

    @classmethod
    def of(cls, key: Tensor, value: Tensor, keys: Segments, reads: Tensor, compensate: bool) -> _Table:
        """Make the table."""
        order = keys.order.long().flatten(0, -2)
        first = torch.arange(len(order), device=order.device).unsqueeze(1) * order.shape[1]
        both = torch.cat([accurate(key), accurate(value)], dim=-1)
        rows = both.view(order.numel(), -1)
        if compensate:
            rows = torch.cat([rows, segment_mean(both, keys).view(-1, rows.shape[1])])
        starts = keys.starts[..., :-1].long().flatten(0, -2) + first
        sizes = keys.counts.flatten(0, -2)
        flat_reads = reads.reshape(-1, keys.number).long()
        return cls(rows, (order + first).reshape(-1), starts, sizes, flat_reads, compensate, rows[:0])

    @property
    def width(self) -> int:
        """How many entries a query cluster may read."""
        return len(self.tokens) // len(self.sizes) + (self.sizes.shape[1] if self.compensate else 0)

    def lengths(self) -> Tensor:
        """How many entries each query cluster reads."""
        lengths = self.reads.sum(1)
        if not self.compensate:
            return lengths
        head = self._head(torch.arange(len(self.reads), device=self.reads.device))
        return lengths + (self.reads < self.sizes[head]).sum(1)

    def find(self, clusters: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """List what some query clusters read.

        Returns:
            Entries ``[clusters, most]``; what to add to their logits ``[clusters, most]``: the log of how many tokens an
            entry stands for, ``-inf`` past a cluster's own; how many each cluster has.
        """
        head, reads = self._head(clusters), self.reads[clusters]
        left = self.sizes[head] - reads if self.compensate else torch.zeros_like(reads)
        exact, skipped = reads.sum(1), left > 0
        lengths = exact + skipped.sum(1)
        # Past its own entries a row has one that is read by somebody: padding might hold anything, NaN too.
        found = self.tokens[0].repeat(len(clusters), int(lengths.max()))
        weight = self.rows.new_full(found.shape, -torch.inf)
        # Runs of tokens: which pair of clusters each belongs to, and its position within the run and within the row.
        pair, within = _runs(reads.reshape(-1))
        row, cluster = pair // reads.shape[1], pair % reads.shape[1]
        place = torch.arange(len(row), device=row.device) - (exact.cumsum(0) - exact)[row]
        found[row, place] = self.tokens[self.starts[head[row], cluster] + within]
        weight[row, place] = 0.0
        row, cluster = skipped.nonzero().unbind(1)
        place = exact[row] + (skipped.cumsum(1) - 1)[row, cluster]
        found[row, place] = len(self.tokens) + head[row] * reads.shape[1] + cluster
        weight[row, place] = left[row, cluster].to(weight.dtype).log()
        return found, weight, lengths.tolist()

    def pick(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Gather keys and values ``[clusters, entries, head_dim]`` into memory that the next call takes again."""
        number = entries.numel()
        if len(self.picked) < number:  # fresh memory for each batch would cost as much as filling it
            self.picked = self.rows.new_empty(number, self.rows.shape[1])
        torch.index_select(self.rows, 0, entries.reshape(-1), out=self.picked[:number])
        keys, values = self.picked[:number].view(*entries.shape, -1).chunk(2, dim=2)
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


def _runs(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Spell runs out: for each of their elements, in order, the number of its run and its position within."""
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    return owner, torch.arange(len(owner), device=owner.device) - first[owner]
