"""What a router makes of its logits: the experts of each token, their weights, and sums over all tokens.

``torch`` is plain torch, some twenty small operations. ``triton`` reads the logits once, one launch forward and one backward: with so
little to compute, what a router takes on a GPU is what the host needs to launch it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adamac.ops.launch import Impl, chosen

# Sigmoids of one token may all underflow. A sum is taken to be at least this: small enough to change nothing else, and large
# enough that a gradient divided by it is finite (and zero, times the slope of such a sigmoid).
LEAST_SUM = 1e-20


@dataclass(frozen=True)
class Gated:
    """Of ``[tokens, num_experts]`` logits.

    Attributes:
        experts: ``[tokens, top_k]`` int64, the best first.
        weights: ``[tokens, top_k]``, their scores, scaled to add up to 1 if asked for.
        mass: ``[num_experts]``, each expert's scores added up over tokens, a token's scores scaled to add up to 1.
        load: ``[num_experts]`` in the dtype of the logits, tokens by expert.
        finite: A bool scalar, whether all logits are.
    """

    experts: Tensor
    weights: Tensor
    mass: Tensor
    load: Tensor
    finite: Tensor


def gate(
    logits: Tensor,
    top_k: int,
    score: Literal["softmax", "sigmoid"],
    *,
    normalise: bool = False,
    bias: Tensor | None = None,
    impl: Impl = "auto",
) -> Gated:
    """Choose ``top_k`` experts for each token; ``weights`` and ``mass`` are differentiable in the logits.

    Args:
        logits: ``[tokens, num_experts]``.
        top_k: Experts of a token.
        score: What is made of logits.
        normalise: Whether a token's weights are scaled to add up to 1.
        bias: ``[num_experts]``, added to the scores for the choice alone.
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.

    Raises:
        ValueError: If the implementation that is asked for cannot run on these.
    """
    if chosen(impl, logits) == "triton" and logits.dtype == torch.float32 and len(logits):
        experts, weights, mass, counted = _Gate.apply(logits, bias, top_k, score, normalise)
        return Gated(experts, weights, mass, counted[:-1], counted[-1] == 0)
    from adamac.ops.gate import reference

    return reference.gate(logits, top_k, score, normalise, bias)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, top_k: int, score: str, normalise: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from adamac.ops.gate import triton as kernels

        experts, weights, sums = kernels.gate(logits, bias, top_k, score, normalise)
        ctx.save_for_backward(logits, experts)
        ctx.score, ctx.normalise = score, normalise
        mass, counted = sums[: logits.shape[1]], sums[logits.shape[1] :]
        ctx.mark_non_differentiable(experts, counted)
        ctx.set_materialize_grads(False)
        return experts, weights, mass, counted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        from adamac.ops.gate import triton as kernels

        logits, experts = ctx.saved_tensors
        _, of_weights, of_mass, _ = gradients
        if of_weights is None and of_mass is None:
            return None, None, None, None, None
        found = kernels.gradient(logits, experts, of_weights, of_mass, ctx.score, ctx.normalise)
        return found, None, None, None, None
