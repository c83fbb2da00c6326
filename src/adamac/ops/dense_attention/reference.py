"""The meaning of dense attention."""

from __future__ import annotations

from torch import Tensor


def reference(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Weigh all values by the softmax of the logits, every step in the dtype of the inputs.

    In float64 it is the oracle; in the dtype of an implementation it is the eager computation that the error budget is
    measured by. It holds all logits at once.

    Args:
        query: ``[batch, heads, q_tokens, head_dim]``.
        key: ``[batch, heads, k_tokens, head_dim]``.
        value: Like ``key``.
        scale: Multiplier on the logits.

    Returns:
        Like ``query``.
    """
    return (query @ key.transpose(-1, -2) * scale).softmax(-1) @ value
