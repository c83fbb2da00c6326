"""What a plan does to the output of attention, beside what it costs.

The judge of a plan is the *output error*, ||out - dense|| / ||dense||: how far its output is from that of dense attention,
both in float64, so that nothing but the plan is judged. The *mass kept*, the share of the dense softmax on what is read
exactly, is reported beside it; by itself it misleads, because it does not see compensation, nor that dropping whole groups
of like keys biases the output more than dropping as much mass at random.

Rows of queries are sampled, one from each of equal stretches of the sequence, so that long sequences stay affordable: the
cost is that of dense attention for the sampled rows alone. Where the stretches are hardly longer than a token, a row may be
drawn twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adamac.attention.attend import with_text
from adamac.attention.layout import Layout, check_attention_inputs
from adamac.attention.plan import Plan
from adamac.ops.cluster_attention import cluster_attention
from adamac.ops.kmeans import spread_tokens
from adamac.ops.segment import Segments

# Rows of float64 softmax weights held at once for each head.
_ROWS = 256


@dataclass(frozen=True)
class Judgement:
    """What a plan does and costs, ``[batch, heads]`` float64 each.

    Attributes:
        output_error: ||out - dense|| / ||dense|| over the sampled rows of each head.
        mass_kept: Mean share of the dense softmax on what is read exactly.
        density: See :meth:`adamac.attention.Plan.density`.
        cost: See :meth:`adamac.attention.Plan.cost`.
        overall_error: The output error of all heads and samples together.
    """

    output_error: Tensor
    mass_kept: Tensor
    density: Tensor
    cost: Tensor
    overall_error: float

    def summary(self) -> dict[str, float]:
        """The overall error, the worst head's, and means over the heads, as plain numbers for a row of results."""
        return {
            "output_error": self.overall_error,
            "output_error_worst_head": float(self.output_error.amax()),
            "mass_kept": float(self.mass_kept.mean()),
            "density": float(self.density.mean()),
            "cost": float(self.cost.mean()),
        }


@dataclass(frozen=True)
class DenseRows:
    """Dense attention of a sample of the query rows, in float64, to judge many plans by.

    Attributes:
        query: ``[batch, heads, rows, head_dim]`` float64; ``key`` and ``value`` hold all tokens.
        key: ``[batch, heads, tokens, head_dim]`` float64.
        value: Like ``key``.
        tokens: ``[batch, rows]`` where in the sequence the rows are.
        output: ``[batch, heads, rows, head_dim]`` of dense attention.
        lse: ``[batch, heads, rows]``, log-sum-exp of the rows' logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    tokens: Tensor
    output: Tensor
    lse: Tensor

    @classmethod
    def sample(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        *,
        rows: int = 1024,
        text: bool = False,
        seed: int = 0,
    ) -> DenseRows:
        """Attend densely from a sample of the rows.

        Args:
            query: ``[batch, heads, tokens, head_dim]``.
            key: Like ``query``.
            value: Like ``query``.
            layout: Says which tokens are text and which are padding.
            rows: How many rows of each sample; as many as there are, if that is fewer.
            text: Whether text rows may be drawn too. They read everything under any plan.
            seed: The same seed gives the same rows.

        Raises:
            ValueError: If the tensors do not fit the layout, or a sample has no row to judge.
        """
        check_attention_inputs(query, key, layout, value)
        tokens = _sample_tokens(query, layout, rows, text, seed)
        query, key, value = query.double(), key.double(), value.double()
        query = query.gather(2, tokens[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        output, lse = _dense(query, key, value, layout)
        return cls(query, key, value, tokens, output, lse)

    def judge(self, plan: Plan) -> Judgement:
        """Hold a plan for these tensors against dense attention."""
        shape = self.lse.shape[:2]
        density, cost = plan.density().expand(shape), plan.cost().expand(shape)
        if plan.is_dense:
            return Judgement(torch.zeros_like(density), torch.ones_like(density), density, cost, 0.0)
        queries, keys, reads = with_text(plan)
        judged = queries.labels.gather(2, self.tokens.unsqueeze(1).expand(-1, shape[1], -1))

        def attend(compensate: bool) -> tuple[Tensor, Tensor]:
            tensors = (self.query, self.key, self.value, Segments(judged, queries.number), keys, reads)
            return cluster_attention(*tensors, compensate=compensate, scale=_scale(self.query), impl="gather")

        exact, exact_lse = attend(compensate=False)
        output = attend(compensate=True)[0] if plan.compensate else exact
        error, size = (output - self.output).square().sum((2, 3)), self.output.square().sum((2, 3))
        mass_kept = (exact_lse - self.lse).exp().mean(-1)
        return Judgement(
            (error / size).sqrt(), mass_kept, density, cost, float((error.sum() / size.sum()).sqrt())
        )


def judge_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    rows: int = 1024,
    text: bool = False,
    seed: int = 0,
) -> Judgement:
    """Judge one plan; for several plans of the same tensors use :class:`DenseRows`, whose arguments these are."""
    return DenseRows.sample(query, key, value, plan.layout, rows=rows, text=text, seed=seed).judge(plan)


def _sample_tokens(query: Tensor, layout: Layout, rows: int, text: bool, seed: int) -> Tensor:
    """Draw rows that are spread over the sequence: ``[batch, rows]``."""
    tokens = torch.arange(layout.tokens, device=query.device)
    include = torch.ones(query.shape[0], layout.tokens, dtype=torch.bool, device=query.device)
    if not text:
        include &= (tokens >= layout.video_start) & (tokens < layout.video_stop)
    if layout.valid is not None:
        include &= layout.valid
    rows = min(rows, int(include.sum(1).amin()))
    if rows < 1:
        raise ValueError("there is no row to judge a plan by: rows is below 1, or a sample is padding alone")
    positions = tokens.view(1, 1, -1, 1).expand(query.shape[0], 1, -1, 1)
    return spread_tokens(positions, rows, seed, include.unsqueeze(1))[:, 0, :, 0]


def _dense(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Attend to all valid keys, a slice of rows at a time."""
    outputs, sums = [], []
    for rows in query.split(_ROWS, dim=2):
        logits = rows @ key.transpose(-1, -2) * _scale(query)
        if layout.valid is not None:
            logits = logits.masked_fill(~layout.valid[:, None, None], -torch.inf)
        sums.append(logits.logsumexp(-1))
        outputs.append(logits.softmax(-1) @ value)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _scale(query: Tensor) -> float:
    return query.shape[-1] ** -0.5
