"""A router's choice in plain torch."""

from __future__ import annotations

from torch import Tensor

from adamac.ops.gate import LEAST_SUM, Gated


def gate(logits: Tensor, top_k: int, score: str, normalise: bool, bias: Tensor | None) -> Gated:
    """Compute :func:`adamac.ops.gate.gate`."""
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    ranked = scores.detach() if bias is None else scores.detach() + bias
    experts = ranked.topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if normalise:
        weights = _normalised(weights)
    shares = scores if score == "softmax" else _normalised(scores)  # a softmax adds up to 1 already
    taken = experts.flatten()
    load = logits.new_zeros(logits.shape[1]).index_add_(0, taken, logits.new_ones(len(taken)))
    return Gated(experts, weights, shares.sum(0), load, logits.detach().isfinite().all())


def _normalised(scores: Tensor) -> Tensor:
    """Scores scaled to add up to 1 over the last axis."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(LEAST_SUM)
