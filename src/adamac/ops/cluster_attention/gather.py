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

# Table elements gathered at once; 2^22 float32 values are 16 MiB, half of it keys.
_BATCH_ELEMENTS = 1 << 22


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
    for clusters in _batches(members.sizes, table.lengths(), table.rows.shape[1]):
        index, filled = members.padded(clusters)
        keys, values, log_size = table.pick(clusters)
        part, part_lse = _attention(rows[index], keys, values, log_size, scale)
        output[index[filled]] = part[filled]
        lse[index[filled]] = part_lse[filled]
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
        rows: ``[entries, 2 * head_dim]`` key and value: tokens sorted by cluster, head after head; then the means of all
            clusters; then the means of rests.
        log_size: ``[entries]`` log of how many tokens an entry stands for.
        sizes: ``[all heads, k_clusters]`` tokens of each cluster.
        labels: ``[all heads, k_tokens]`` cluster of each token in sorted order; padding has ``k_clusters``.
        rank: ``[all heads, k_tokens]`` its position within the cluster.
        reads: ``[all query clusters, k_clusters]``.
        means: ``[all query clusters, k_clusters]`` the entry that stands for what is skipped; ``None`` without
            compensation.
    """

    rows: Tensor
    log_size: Tensor
    sizes: Tensor
    labels: Tensor
    rank: Tensor
    reads: Tensor
    means: Tensor | None

    @classmethod
    def of(cls, key: Tensor, value: Tensor, labels: Tensor, reads: Tensor, compensate: bool) -> _Table:
        """Make the table."""
        q_clusters, k_clusters = reads.shape[-2:]
        tokens, dim = key.shape[2:]
        sizes, order, ends = _sorted(labels, k_clusters)
        heads = len(sizes)
        flat_reads = reads.reshape(-1, k_clusters)
        position = (order + torch.arange(heads, device=key.device).unsqueeze(1) * tokens).reshape(-1)
        pairs = torch.cat(
            [accurate(part).reshape(-1, dim).index_select(0, position) for part in (key, value)], dim=1
        )
        in_order = labels.reshape(-1)[position].view(heads, tokens)
        rank = torch.arange(tokens, device=key.device) - torch.gather(ends, 1, in_order.clamp_min(0))
        in_order = in_order.masked_fill(in_order < 0, k_clusters)
        parts, log_sizes, means = [pairs], [pairs.new_zeros(len(pairs))], None
        if compensate:
            parts += [segment_mean(part, labels, k_clusters).view(-1, dim) for part in (key, value)]
            parts[1:] = [torch.cat(parts[1:], dim=1).to(pairs.dtype)]
            log_sizes.append(sizes.reshape(-1).to(pairs.dtype).log())
            head = torch.arange(len(flat_reads), device=key.device) // q_clusters
            means = (
                (head * k_clusters).unsqueeze(1) + torch.arange(k_clusters, device=key.device) + len(pairs)
            )
            row, cluster = ((flat_reads > 0) & (flat_reads < sizes[head])).nonzero().unbind(1)
            stop = ends[head[row], cluster + 1]
            start = ends[head[row], cluster] + flat_reads[row, cluster]
            means[row, cluster] = torch.arange(len(row), device=key.device) + len(pairs) + sizes.numel()
            parts.append(_run_means(pairs.view(heads, tokens, -1), head[row], start, stop))
            log_sizes.append((stop - start).to(pairs.dtype).log())
        return cls(torch.cat(parts), torch.cat(log_sizes), sizes, in_order, rank, flat_reads, means)

    def lengths(self) -> Tensor:
        """How many entries each query cluster reads."""
        lengths = self.reads.sum(1)
        if self.means is None:
            return lengths
        head = self._head(torch.arange(len(self.reads), device=self.reads.device))
        return lengths + (self.reads < self.sizes[head]).sum(1)

    def pick(self, clusters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gather what some query clusters read, padded to the longest.

        Returns:
            Keys and values ``[clusters, entries, head_dim]``, and what to add to their logits ``[clusters, entries]``:
            the log of how many tokens an entry stands for, ``-inf`` for padding.
        """
        head = self._head(clusters)
        reads, labels = self.reads[clusters], self.labels[head]
        # Of padding, whose ranks are negative, nothing is read.
        limit = torch.nn.functional.pad(reads, (0, 1), value=-labels.shape[1])
        chosen = self.rank[head] < torch.gather(limit, 1, labels)
        entry = head.unsqueeze(1) * labels.shape[1] + torch.arange(labels.shape[1], device=head.device)
        if self.means is not None:
            chosen = torch.cat([chosen, reads < self.sizes[head]], dim=1)
            entry = torch.cat([entry, self.means[clusters]], dim=1)
        row, column = chosen.nonzero().unbind(1)
        lengths = chosen.sum(1)
        place = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
        index = row.new_zeros(len(clusters), int(lengths.max()))
        index[row, place] = entry[row, column]
        log_size = self.log_size[index]
        log_size[torch.arange(index.shape[1], device=row.device) >= lengths.unsqueeze(1)] = -torch.inf
        picked = self.rows.index_select(0, index.view(-1)).view(*index.shape, -1)
        keys, values = picked.chunk(2, dim=2)
        return keys, values, log_size

    def _head(self, clusters: Tensor) -> Tensor:
        return clusters // (len(self.reads) // len(self.sizes))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, log_size: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from ``[clusters, rows, head_dim]`` to ``[clusters, entries, head_dim]``; also the log-sum-exp."""
    if query.device.type == "cpu":
        # torch's own CPU kernel, called by the name under which it also gives the log-sum-exp.
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.unsqueeze(1),
            key.unsqueeze(1),
            value.unsqueeze(1),
            attn_mask=log_size[:, None, None],
            scale=scale,
        )
        return output.squeeze(1), lse.squeeze(1)
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


def _run_means(rows: Tensor, head: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Average runs of rows; through running sums in float64, since differences of sums cancel."""
    running = torch.nn.functional.pad(rows.double().cumsum(1), (0, 0, 1, 0))
    sums = running[head, stop] - running[head, start]
    return (sums / (stop - start).unsqueeze(1)).to(rows.dtype)


def _batches(sizes: Tensor, lengths: Tensor, width: int) -> list[Tensor]:
    """Group query clusters of about equal size, so that little is padded and a batch is of a bounded size."""
    order = sizes.argsort(descending=True, stable=True)
    order = order[(sizes[order] > 0) & (lengths[order] > 0)]
    batches: list[Tensor] = []
    start, longest = 0, 0
    for stop, length in enumerate(lengths[order].tolist()):
        longest = max(longest, length)
        if stop > start and (stop - start + 1) * longest * width > _BATCH_ELEMENTS:
            batches.append(order[start:stop])
            start, longest = stop, length
    return [*batches, order[start:]] if len(order) else []
