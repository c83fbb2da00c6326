"""The experts' activation in plain torch."""

from __future__ import annotations

from torch import Tensor

from adamac.ops.activation import ACTIVATIONS


def activate(inner: Tensor, activation: str, gated: bool) -> Tensor:
    """Compute :func:`adamac.ops.activation.activate`, of all rows."""
    if not gated:
        return ACTIVATIONS[activation](inner)
    gate, up = inner.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up
