"""True softmax mass between clusters: what every score estimates. It costs dense attention."""

from __future__ import annotations

import torch
from torch import Tensor

from adamac.attention.plan import Clusters
from adamac.ops.precision import accurate
from adamac.ops.segment import segment_mean

# Rows of softmax weights held at once for each head.
_ROWS = 512


def softmax_mass(query: Tensor, key: Tensor, queries: Clusters, keys: Clusters) -> Tensor:
    """Average, over the rows of each query cluster, the softmax mass that falls on each key cluster.

    The softmax is over the video keys.

    Args:
        query: ``[batch, heads, video_tokens, head_dim]``.
        key: Like ``query``.
        queries: Clusters of ``query``.
        keys: Clusters of ``key``.

    Returns:
        ``[batch, heads, q_clusters, k_clusters]``; the rows of an empty query cluster are zeros.
    """
    query, key = accurate(query), accurate(key)
    scale = query.shape[-1] ** -0.5
    batch, heads, tokens, _ = query.shape
    padding = (keys.labels < 0).unsqueeze(-2)
    slots = keys.labels.long().clamp_min(0).unsqueeze(-2)
    per_row = query.new_zeros(batch, heads, tokens, keys.num_clusters)
    for start in range(0, tokens, _ROWS):
        rows = query[:, :, start : start + _ROWS] @ key.transpose(-1, -2) * scale
        weights = rows.masked_fill_(padding, -torch.inf).softmax(-1)
        part = per_row[:, :, start : start + _ROWS]
        part.scatter_add_(-1, slots.expand_as(weights), weights)
    return segment_mean(per_row, queries.members)


def mass_score(query: Tensor, key: Tensor, queries: Clusters, keys: Clusters) -> Tensor:
    """The true mass in the form of a score: log weight per token, ``-inf`` for empty clusters."""
    mass = softmax_mass(query, key, queries, keys)
    sizes = keys.counts.unsqueeze(-2)
    # Mass that rounds to zero is not that of an empty cluster, which no budget may spend anything on.
    weight = (mass / sizes.clamp_min(1)).clamp_min(torch.finfo(mass.dtype).tiny)
    return weight.log().masked_fill(sizes == 0, -torch.inf)
