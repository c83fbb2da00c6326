"""Softmax attention in which each cluster of queries reads its own share of each cluster of keys.

Every token carries a label: the cluster it belongs to, or ``-1`` if it is padding, which nothing reads and which reads
nothing. ``reads[i, j]`` says how many tokens of key cluster ``j`` the rows of query cluster ``i`` read exactly: none, all,
or the first so many in the order of the sequence (that is how a budget in tokens is met to the token). With ``compensate``
the tokens that a row skips are not forgotten: the ``n`` skipped tokens of a cluster, with mean key ``c`` and mean value
``m``, enter the row's softmax as ``n`` keys ``c`` with value ``m``. That is exact if they are all alike, and costs one key.

The two implementations share no code on purpose: ``reference`` is the meaning and ``gather`` is held to it.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Impl = Literal["auto", "reference", "gather"]


def resolve(impl: Impl) -> str:
    """Say which implementation ``"auto"`` stands for.

    Raises:
        ValueError: If the name is unknown.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    return "gather" if impl == "auto" else impl


def cluster_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_labels: Tensor,
    k_labels: Tensor,
    reads: Tensor,
    *,
    compensate: bool,
    scale: float,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from each query cluster to what it reads of each key cluster.

    Args:
        query: ``[batch, heads, q_tokens, head_dim]``.
        key: ``[batch, heads, k_tokens, head_dim]``.
        value: ``[batch, heads, k_tokens, head_dim]``.
        q_labels: ``[batch, heads, q_tokens]`` integers from -1 to ``q_clusters - 1``.
        k_labels: ``[batch, heads, k_tokens]`` integers from -1 to ``k_clusters - 1``.
        reads: ``[batch, heads, q_clusters, k_clusters]`` integers from 0 to the key cluster's size.
        compensate: Whether skipped tokens enter through their mean.
        scale: Multiplier on the logits.
        impl: ``"reference"`` builds the dense mask; ``"gather"`` reads the selected keys only.

    Returns:
        Output ``[batch, heads, q_tokens, head_dim]`` in the query's dtype, and the log-sum-exp of each row's logits
        ``[batch, heads, q_tokens]`` in float32 (float64 for float64). A row that reads nothing gets zeros and -inf.
    """
    if resolve(impl) == "reference":
        from adamac.ops.cluster_attention.reference import reference as run
    else:
        from adamac.ops.cluster_attention.gather import gather as run
    return run(query, key, value, q_labels, k_labels, reads, compensate=compensate, scale=scale)
