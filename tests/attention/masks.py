"""What a plan says, spelled out pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

from adamac.attention import Plan


def exact_pairs(plan: Plan) -> Tensor:
    """Say which query reads which key exactly: ``[batch, heads, tokens, tokens]`` bool, text and padding included."""
    batch, heads, _ = plan.queries.labels.shape
    layout = plan.layout
    pairs = torch.zeros(batch, heads, layout.tokens, layout.tokens, dtype=torch.bool)
    video = slice(layout.video_start, layout.video_stop)
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[video] = False
    pairs[:, :, text] = True
    pairs[..., text] = True
    for sample, head, row in torch.cartesian_prod(*map(torch.arange, plan.queries.labels.shape)).tolist():
        cluster = plan.queries.labels[sample, head, row]
        for k_cluster, count in enumerate(plan.reads[sample, head, cluster].tolist() if cluster >= 0 else ()):
            members = (plan.keys.labels[sample, head] == k_cluster).nonzero().flatten()[:count]
            pairs[sample, head, layout.video_start + row, layout.video_start + members] = True
    valid = valid_tokens(plan, batch)
    return pairs & valid[:, None, :, None] & valid[:, None, None, :]


def valid_tokens(plan: Plan, batch: int) -> Tensor:
    """Say which tokens are no padding: ``[batch, tokens]`` bool."""
    if plan.layout.valid is None:
        return torch.ones(batch, plan.layout.tokens, dtype=torch.bool)
    return plan.layout.valid.cpu().expand(batch, -1)


def skipped_clusters(plan: Plan) -> Tensor:
    """Count, for each video row, the key clusters of which it skips a token: ``[batch, heads, video_tokens]``."""
    counts = torch.zeros(plan.queries.labels.shape, dtype=torch.long)
    for sample, head, row in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        cluster = plan.queries.labels[sample, head, row]
        if cluster >= 0:
            sizes = plan.keys.counts[sample, head]
            counts[sample, head, row] = (plan.reads[sample, head, cluster] < sizes).sum()
    return counts
