"""The meaning of cluster attention: a dense mask, one head at a time, in float32 (float64 stays float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from adamac.ops.precision import accurate
from adamac.ops.segment import Segments


def reference(
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
    """Compute :func:`adamac.ops.cluster_attention.cluster_attention` in the plainest way."""
    output = torch.empty_like(query)
    lse = accurate(query).new_empty(query.shape[:-1])
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            at = (sample, head)
            output[at], lse[at] = _one_head(
                accurate(query[at]),
                accurate(key[at]),
                accurate(value[at]),
                queries.labels[at],
                keys.labels[at],
                reads[at],
                compensate=compensate,
                scale=scale,
            )
    return output, lse


def _one_head(
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
    q_clusters, k_clusters = reads.shape
    padding = (k_labels < 0).unsqueeze(1)  # may hold anything, NaN too, which a weight of zero would not hide
    key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    member = k_labels == torch.arange(k_clusters, device=key.device).unsqueeze(1)  # [k_clusters, k_tokens]
    rank = (member.long().cumsum(1) - 1).mul(member).sum(0)  # position of each key within its cluster
    share = member.to(key.dtype) / member.sum(1, keepdim=True).clamp_min(1)
    mean_key, mean_value = share @ key, share @ value
    output, lse = torch.zeros_like(query), query.new_full(query.shape[:1], -torch.inf)
    for cluster in range(q_clusters):
        rows = q_labels == cluster
        if not rows.any():
            continue
        read = (k_labels >= 0) & (rank < reads[cluster][k_labels.clamp_min(0)])  # [k_tokens]
        logits = query[rows] @ key.T * scale
        logits = logits.masked_fill(~read, -torch.inf)
        values = value
        if compensate:
            skipped = (member & ~read).sum(1).to(key.dtype)
            logits = torch.cat([logits, query[rows] @ mean_key.T * scale + skipped.log()], dim=1)
            values = torch.cat([value, mean_value])
        lse[rows] = logits.logsumexp(1)
        # Not exp(logits - lse), which loses digits when logits are large. A row that reads nothing stays zero.
        weights = logits.softmax(1).masked_fill(lse[rows].isneginf().unsqueeze(1), 0.0)
        output[rows] = weights @ values
    return output, lse
