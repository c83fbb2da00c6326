"""Carry out a plan."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from adamac.attention.layout import Layout, check_attention_inputs
from adamac.attention.plan import Plan
from adamac.ops.cluster_attention import Impl, cluster_attention, resolve
from adamac.ops.precision import accurate


@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    scale: float | None = ...,
    impl: Impl = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    scale: float | None = ...,
    impl: Impl = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    impl: Impl = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend as the plan says.

    Video queries read what the plan selects and all valid text; text queries read everything; padding reads nothing and
    is read by nothing. The softmax is exact over what is read, with each row's own query, and over the means of what is
    skipped if the plan compensates. A plan that selects everything gives dense attention.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, any floating dtype.
        key: Like ``query``.
        value: Like ``query``.
        plan: Made by a method from the same query and key (or an earlier step's, of the same shapes).
        scale: Multiplier on the logits; ``None`` means ``head_dim ** -0.5``.
        impl: ``"reference"``, ``"gather"``, or ``"auto"``.
        return_lse: Also return the log-sum-exp of each row's logits, which lets results over parts of the keys be
            merged.

    Returns:
        Output like ``query``, in its dtype; padded rows are zeros. With ``return_lse`` also ``[batch, heads, tokens]``
        float32 (float64 for float64), ``-inf`` for padded rows.

    Raises:
        ValueError: If the tensors do not fit each other or the plan.
    """
    check_attention_inputs(query, key, plan.layout, value)
    resolve(impl)  # a dense plan has no use for it, but a wrong name is refused all the same
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if plan.is_dense:
        output = dense_attention(query, key, value, plan.layout, scale=scale)
        return (output, _dense_lse(query, key, plan.layout, scale)) if return_lse else output
    reads = plan.parts()[2]
    if reads.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"plan is for batch and heads {tuple(reads.shape[:2])} but query has {tuple(query.shape[:2])}; "
            "make the plan from the same tensors"
        )
    q_labels, k_labels, reads = with_text(plan)
    output, lse = cluster_attention(
        query, key, value, q_labels, k_labels, reads, compensate=plan.compensate, scale=scale, impl=impl
    )
    return (output, lse) if return_lse else output


def dense_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """Attend densely with torch's kernel, dropping padding instead of masking it where samples allow that.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        key: Like ``query``.
        value: Like ``query``.
        layout: Says which tokens are padding.
        scale: Multiplier on the logits.

    Returns:
        Like ``query``; padded rows are zeros.
    """
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if layout.valid is None:
        return sdpa(query, key, value, scale=scale)
    output = torch.zeros_like(query)
    for sample in range(query.shape[0]):  # each sample has its own length
        valid = layout.valid[sample if layout.valid.shape[0] > 1 else 0].nonzero().squeeze(1)
        parts = [tensor[sample : sample + 1, :, valid] for tensor in (query, key, value)]
        output[sample, :, valid] = sdpa(parts[0], parts[1], parts[2], scale=scale)[0]
    return output


def with_text(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Make text one more cluster on either side: all rows read all of it, and its rows read everything."""
    layout = plan.layout
    queries, keys, reads = plan.parts()
    q_labels = layout.label(queries.labels, queries.num_clusters)
    k_labels = layout.label(keys.labels, keys.num_clusters)
    if layout.text_tokens == 0:
        return q_labels, k_labels, reads
    text = (k_labels == keys.num_clusters).sum(-1)[..., None, None]  # [batch, heads, 1, 1]
    reads = torch.cat([reads, keys.counts.unsqueeze(-2)], dim=-2)
    reads = torch.cat([reads, text.expand(*reads.shape[:-1], 1)], dim=-1)
    return q_labels, k_labels, reads


def _dense_lse(query: Tensor, key: Tensor, layout: Layout, scale: float) -> Tensor:
    """Log-sum-exp of dense attention, a slice of rows at a time, since torch's kernel does not give it."""
    query, key = accurate(query), accurate(key)
    lse = query.new_empty(query.shape[:-1])
    for start in range(0, query.shape[2], 256):
        logits = query[:, :, start : start + 256] @ key.transpose(-1, -2) * scale
        if layout.valid is not None:
            logits = logits.masked_fill(~layout.valid[:, None, None], -torch.inf)
        lse[:, :, start : start + 256] = logits.logsumexp(-1)
    if layout.valid is not None:
        lse = lse.masked_fill(~layout.valid[:, None], -torch.inf)
    return lse
