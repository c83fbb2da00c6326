"""Tokens that are routed as wanted by any router: their first features are their logits, which the router's matrix picks out.

A chosen expert's logit lies above 1 and every other's below -1, so that no rounding changes a choice and no two dtypes disagree.
The logits of the chosen differ, and so do their weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import LayerCase

# Of the popularity of experts, trained_like: the i-th most popular is taken in proportion to 1 / i to this power.
ZIPF = 0.5


@dataclass(frozen=True)
class Inputs:
    """What a layer is given on this rank.

    Attributes:
        x: ``[tokens, hidden]``.
        gradient: ``[tokens, hidden]``, that of the output.
        router: ``[num_experts, hidden]``, the router's matrix.
    """

    x: Tensor
    gradient: Tensor
    router: Tensor


def make(case: LayerCase, rank: int, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Inputs:
    """Make the inputs of a rank; each rank draws its own tokens, and all share popularity and router.

    Raises:
        ValueError: If the model is narrower than there are experts, or experts cannot be cut into equal sets.
    """
    if case.hidden < case.num_experts:
        raise ValueError(f"hidden must be at least the {case.num_experts} experts; got {case.hidden}")
    shared = torch.Generator(device).manual_seed(seed)
    own = torch.Generator(device).manual_seed(seed + 1 + rank)
    chosen = _balanced(case, own) if case.routing == "balanced" else _trained_like(case, shared, own)
    noise = torch.rand(case.tokens, case.num_experts, generator=own, device=device)
    logits = (-1 - noise).scatter(1, chosen, 1 + noise.gather(1, chosen))
    x = torch.randn(case.tokens, case.hidden, generator=own, device=device)
    x[:, : case.num_experts] = logits
    gradient = torch.randn(case.tokens, case.hidden, generator=own, device=device)
    router = torch.eye(case.num_experts, case.hidden, device=device)
    return Inputs(x.to(dtype), gradient.to(dtype), router.to(dtype))


def _balanced(case: LayerCase, own: torch.Generator) -> Tensor:
    """``[tokens, top_k]``: permutations of the experts, cut into sets."""
    sets, left = divmod(case.num_experts, case.top_k)
    if left or case.tokens % sets:
        raise ValueError(
            f"balanced routing needs top_k to divide num_experts and their quotient to divide tokens; got top-{case.top_k} of "
            f"{case.num_experts} and {case.tokens} tokens"
        )
    scores = torch.rand(case.tokens // sets, case.num_experts, generator=own, device=own.device)
    return scores.argsort(1).view(case.tokens, case.top_k)


def _trained_like(case: LayerCase, shared: torch.Generator, own: torch.Generator) -> Tensor:
    """``[tokens, top_k]``: drawn without replacement by popularity (Gumbel noise on its logarithm, the highest taken)."""
    order = torch.randperm(case.num_experts, generator=shared, device=shared.device)
    popularity = -ZIPF * (order + 1).float().log()
    uniform = torch.rand(case.tokens, case.num_experts, generator=own, device=own.device)
    gumbel = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
    return (popularity + gumbel).topk(case.top_k, dim=1).indices
