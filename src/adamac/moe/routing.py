"""A routing: which experts each token goes to, and with what weight.

A :class:`Router` makes it, a dispatcher moves rows by it, the experts never see it. The router always reads the full width of the
model, also where the rows that travel are narrow: what is cheap to compute need not be narrow, and a choice made from more is
better (BigMac, section 3). It computes in float32 whatever the dtype of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adamac.moe.presets import MoEConfig
from adamac.ops.gate import Gated, gate
from adamac.ops.precision import accurate


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with what weight.

    Attributes:
        experts: ``[tokens, top_k]`` int64, distinct within a token.
        weights: ``[tokens, top_k]`` float, what each expert's answer is multiplied by.
        num_experts: How many experts there are on all ranks together.
        dropped: ``[tokens, top_k]`` bool, the choices that an expert had no room for; ``None`` if none was dropped.
        finite: A bool scalar, whether the router's logits were; ``None`` if nobody looked.
        taken: ``[num_experts]`` float, tokens by expert, dropped ones too; ``None`` if nobody counted. Believed, not counted
            again: who makes a routing of other experts from this one leaves it out.
        room: The most of these tokens that an expert takes, where that is limited: no more choices of it are left. Believed:
            buffers of static shapes are made for so many, and who undoes drops leaves it out too.
    """

    experts: Tensor
    weights: Tensor
    num_experts: int
    dropped: Tensor | None = None
    finite: Tensor | None = None
    taken: Tensor | None = None
    room: int | None = None

    @classmethod
    def even(
        cls,
        tokens: int,
        top_k: int,
        num_experts: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Routing:
        """Make a routing of sets at random that loads all experts alike: exactly, if ``num_experts`` divides ``tokens``.

        For measurements: the load is even, but a token's experts lie on as many ranks as a random choice's do. Weights are
        equal.
        """
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-tokens // num_experts)
        # In a block of as many tokens as experts, every slot of a token is one turn of the same random circle.
        circle = torch.rand(blocks, num_experts, generator=generator).argsort(1)
        turns = torch.rand(blocks, num_experts, generator=generator).topk(top_k, 1).indices
        places = (torch.arange(num_experts)[:, None] + turns[:, None, :]) % num_experts
        experts = circle.gather(1, places.flatten(1)).view(-1, top_k)[:tokens]
        weights = torch.full((tokens, top_k), 1 / top_k, dtype=dtype, device=device)
        return cls(experts.to(device), weights, num_experts)

    @property
    def tokens(self) -> int:
        """How many tokens are routed."""
        return self.experts.shape[0]

    @property
    def top_k(self) -> int:
        """How many experts a token takes."""
        return self.experts.shape[1]

    def load(self) -> Tensor:
        """Count the tokens that each expert takes: ``[num_experts]`` int64, dropped ones left out."""
        if self.taken is not None and self.dropped is None:
            return self.taken.long()
        chosen = self.experts.flatten()
        kept = torch.ones_like(chosen) if self.dropped is None else (~self.dropped).flatten().long()
        return chosen.new_zeros(self.num_experts).scatter_add_(0, chosen, kept)

    def detached(self) -> Routing:
        """The same routing, held without what led to it."""
        return replace(self, weights=self.weights.detach())

    def part(self, start: int, end: int) -> Routing:
        """The routing of some of the tokens."""
        dropped = None if self.dropped is None else self.dropped[start:end]
        experts, weights = self.experts[start:end], self.weights[start:end]
        return Routing(experts, weights, self.num_experts, dropped, self.finite, room=self.room)


class Router(nn.Module):
    """Chooses ``top_k`` experts for each token by a linear map of the full width.

    The weight of an expert is its score: of a softmax over all experts, or its own sigmoid; scaled to add up to 1 over the
    chosen if ``normalise``. With ``balance="bias"`` a bias per expert is added when choosing, and only then.

    Attributes:
        bias: ``[num_experts]``, what is added; ``None`` if the load is not balanced so.
        load: ``[num_experts]`` int64, this rank's tokens by expert in training since the last change of the bias; ``None``: none
            yet. A pass that activation checkpointing repeats may count twice, all its experts alike.
    """

    def __init__(
        self, config: MoEConfig, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden, device=device, dtype=dtype))
        self.bias: Tensor | None
        biased = config.balance == "bias"
        zeros = torch.zeros(config.num_experts, device=device, dtype=torch.float32) if biased else None
        self.register_buffer("bias", zeros)
        # No buffer: DistributedDataParallel writes the first rank's over those of the others before a pass.
        self.load: Tensor | None = None

    def forward(self, tokens: Tensor) -> tuple[Routing, dict[str, Tensor]]:
        """Route tokens.

        Args:
            tokens: ``[tokens, hidden]``.

        Returns:
            The routing, and the losses by name, unweighted: ``"balance"`` (1 at an even load) and ``"z"``, those that the
            configuration asks for; of this rank's tokens.
        """
        config = self.config
        with torch.autocast(tokens.device.type, enabled=False):
            logits = _Logits.apply(tokens, self.weight)
        room = self._room(len(tokens))
        gated = gate(logits, config.top_k, config.score, normalise=config.normalise, bias=self.bias)
        routing = Routing(
            gated.experts,
            gated.weights,
            config.num_experts,
            None
            if room is None
            else beyond_capacity(gated.experts, gated.weights.detach(), config.num_experts, room),
            gated.finite,
            gated.load if len(tokens) < _EXACT else None,
            room,
        )
        if self.bias is not None and self.training and torch.is_grad_enabled():
            self.load = routing.load() if self.load is None else self.load + routing.load()
        return routing, self._losses(logits, gated)

    def rebalance(self, load: Tensor) -> None:
        """Move the bias a step against the load: down for the experts with more than the mean, up for those with less.

        Args:
            load: ``[num_experts]``, tokens by expert over all ranks since the last step.
        """
        assert self.bias is not None, "only a router that balances by a bias is rebalanced"
        load = load.to(self.bias.dtype)
        self.bias += self.config.bias_rate * (load.mean() - load).sign()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move or cast the router; the bias is only moved, as its steps would vanish in half precision."""
        before = self.bias
        super()._apply(fn, recurse)
        if before is not None and self.bias is not None and self.bias.dtype != before.dtype:
            self.bias = before.to(self.bias.device)
        if self.load is not None:
            self.load = fn(self.load)
        return self

    def _room(self, tokens: int) -> int | None:
        """Tokens that an expert takes; ``None`` if that is not limited."""
        config = self.config
        if config.capacity is None or not tokens:
            return None
        return math.ceil(config.capacity * tokens * config.top_k / config.num_experts)

    def _losses(self, logits: Tensor, gated: Gated) -> dict[str, Tensor]:
        losses, tokens = {}, max(1, len(logits))
        if self.config.balance == "loss":
            # The shares of tokens and of scores that each expert has, multiplied and added up: 1 over the experts if even.
            scale = self.config.num_experts / (tokens * tokens * self.config.top_k)
            losses["balance"] = torch.dot(gated.mass, gated.load) * scale
        if self.config.z_weight:
            losses["z"] = logits.logsumexp(-1).square().sum() / tokens
        return losses


# Tokens that float32 counts one by one.
_EXACT = 2**24
_HALVES = (torch.bfloat16, torch.float16)


class _Logits(torch.autograd.Function):
    """The router's linear map, accurate whatever the dtype; what is kept for the backward are the tokens as they came.

    Autograd by itself would keep a copy of all tokens in float32, twice as large as they are in half precision.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        if tokens.is_cuda and tokens.dtype == weight.dtype and tokens.dtype in _HALVES:
            # Products of halves are exact in float32, and are added up in it: no wide copy of the tokens is needed.
            return torch.mm(tokens, weight.T, out_dtype=torch.float32)
        rows = accurate(tokens)
        return nn.functional.linear(rows, weight.to(rows.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,), (tokens, weight) = gradients, ctx.saved_tensors
        of_tokens, of_weight = None, None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_tokens = (gradient @ weight.to(gradient.dtype)).to(tokens.dtype)
            if ctx.needs_input_grad[1]:
                of_weight = (gradient.T @ tokens.to(gradient.dtype)).to(weight.dtype)
        return of_tokens, of_weight


def beyond_capacity(experts: Tensor, weights: Tensor, num_experts: int, room: int) -> Tensor:
    """Find the choices that an expert has no room for: those of least weight, and of equal ones the later tokens.

    Args:
        experts: ``[tokens, top_k]`` int64.
        weights: ``[tokens, top_k]``.
        num_experts: How many experts there are.
        room: How many tokens an expert takes.

    Returns:
        ``[tokens, top_k]`` bool.
    """
    by_weight = weights.flatten().sort(descending=True, stable=True).indices
    experts_sorted, within = experts.flatten()[by_weight].sort(stable=True)
    order = by_weight[within]  # expert after expert, the heaviest first
    bounds = torch.arange(num_experts, device=experts.device)
    starts = torch.searchsorted(experts_sorted, bounds)
    place = torch.arange(len(order), device=experts.device) - starts[experts_sorted]
    return torch.empty_like(order, dtype=torch.bool).scatter_(0, order, place >= room).view_as(experts)
