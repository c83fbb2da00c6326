"""Carry out a plan."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from adamac.attention.layout import Layout, check_attention_inputs
from adamac.attention.plan import Plan
from adamac.ops import dense_attention as dense
from adamac.ops.cluster_attention import Impl, cluster_attention, resolve
from adamac.ops.precision import accurate
from adamac.ops.segment import Segments


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
        impl: ``"reference"``, ``"gather"``, ``"triton"``, ``"hopper"``, or ``"auto"``.
        return_lse: Also return the log-sum-exp of each row's logits, which lets results over parts of the keys be
            merged.

    Returns:
        Output like ``query``, in its dtype; padded rows are zeros. With ``return_lse`` also ``[batch, heads, tokens]``
        float32 (float64 for float64), ``-inf`` for padded rows.

    Raises:
        ValueError: If the tensors do not fit each other or the plan, or ``plan`` is no :class:`Plan`.
    """
    if not isinstance(plan, Plan):
        raise ValueError(
            f"plan must be a Plan, as AdaCluster()(query, key) makes one, got {type(plan).__name__}"
        )
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
    if reads.device != query.device:
        raise ValueError(
            f"plan is on {reads.device} but query is on {query.device}; make the plan from the same tensors"
        )
    queries, keys, reads = with_text(plan)
    max_reads = None if plan.max_reads is None else plan.max_reads + plan.layout.text_tokens
    options = {"compensate": plan.compensate, "scale": scale, "max_reads": max_reads, "impl": impl}
    output, lse = cluster_attention(query, key, value, queries, keys, reads, **options)
    return (output, lse) if return_lse else output


def dense_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """Attend densely with the fastest kernel of the machine, dropping padding where that needs no waiting.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        key: Like ``query``.
        value: Like ``query``.
        layout: Says which tokens are padding.
        scale: Multiplier on the logits.

    Returns:
        Like ``query``; padded rows are zeros.
    """
    if layout.valid is None:
        return dense.dense_attention(query, key, value, scale=scale)
    if layout.valid.device.type != "cpu":
        # To drop padding the host would have to count it, and wait for the device; who knows the lengths already trims
        # the sequence before it comes here, and needs no mask.
        return _masked_dense_attention(query, key, value, layout.valid, scale)
    output = torch.zeros_like(query)
    for sample in range(query.shape[0]):  # each sample has its own length
        valid = layout.valid[sample if layout.valid.shape[0] > 1 else 0].nonzero().squeeze(1)
        parts = [tensor[sample : sample + 1, :, valid] for tensor in (query, key, value)]
        output[sample, :, valid] = dense.dense_attention(parts[0], parts[1], parts[2], scale=scale)[0]
    return output


def _masked_dense_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float) -> Tensor:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    padded = ~valid[:, None, :, None]
    # Padding may hold anything, and what is no number stays so under a mask and times a weight of zero.
    key, value = key.masked_fill(padded, 0.0), value.masked_fill(padded, 0.0)
    output = sdpa(query, key, value, attn_mask=valid[:, None, None], scale=scale)
    return output.masked_fill(padded, 0.0)


def with_text(plan: Plan) -> tuple[Segments, Segments, Tensor]:
    """Make text one more cluster on either side: all rows read all of it, and its rows read everything."""
    queries, keys, reads = plan.parts()
    layout = plan.layout
    if layout.text_tokens == 0:
        return queries.members, keys.members, reads
    q_members, k_members = layout.with_text(queries.members), layout.with_text(keys.members)
    text = k_members.counts[..., -1:].unsqueeze(-2)  # [batch, heads, 1, 1]
    reads = torch.cat([reads, keys.counts.unsqueeze(-2).to(reads.dtype)], dim=-2)
    reads = torch.cat([reads, text.to(reads.dtype).expand(*reads.shape[:-1], 1)], dim=-1)
    return q_members, k_members, reads


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
