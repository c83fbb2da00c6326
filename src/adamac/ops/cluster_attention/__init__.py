"""Softmax attention in which each cluster of queries reads its own share of each cluster of keys.

Every token belongs to a cluster, or to none if it is padding, which nothing reads and which reads nothing. ``reads[i, j]``
says how many tokens of key cluster ``j`` the rows of query cluster ``i`` read exactly: none, all, or the first so many in
the order of the sequence (that is how a budget in tokens is met to the token). With ``compensate`` the tokens that a row
skips are not forgotten: the ``n`` skipped tokens of a cluster enter the row's softmax as ``n`` keys that equal the cluster's
mean key, with the cluster's mean value. That is exact if the members are all alike, and costs one key.

The implementations share no code on purpose: ``reference`` is the meaning and the others are held to it. ``gather`` is
plain torch, made for CPUs; ``triton`` packs keys by cluster and reads them by list as it computes, and ``hopper`` does the
same with that generation's own instructions.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from adamac.ops.cluster_attention.fitness import KERNELS, dismiss, in_one_line, problem
from adamac.ops.inputs import check_attention, check_shape
from adamac.ops.launch import interpreted, is_out_of_memory
from adamac.ops.segment import Segments

Impl = Literal["auto", "reference", "gather", "triton", "hopper"]


def resolve(impl: Impl, query: Tensor | None = None) -> str:
    """Say which implementation will run.

    Args:
        impl: A name, or ``"auto"``.
        query: The query tensor; ``None`` means that it is not known yet, and ``"auto"`` stays.

    Raises:
        ValueError: If the name is unknown, or it is known that the implementation cannot run there.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    if query is None or impl in ("reference", "gather"):
        return impl
    if impl == "auto":
        # The interpreter is there to be tested, never chosen.
        usable = [name for name in KERNELS if not interpreted() and problem(name, query) is None]
        return usable[0] if usable else "gather"
    found = problem(impl, query)
    if found is not None:
        raise ValueError(f'impl="{impl}" cannot run: {found}; use impl="auto"')
    return impl


def refused(query: Tensor) -> dict[str, str]:
    """Say which kernels ``"auto"`` does not use for a query although they stand before what it uses, and why."""
    chosen = resolve("auto", query)
    better = KERNELS[: KERNELS.index(chosen)] if chosen in KERNELS else KERNELS
    return {name: found for name in better if (found := problem(name, query)) is not None}


def cluster_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Segments,
    keys: Segments,
    reads: Tensor,
    *,
    compensate: bool,
    scale: float,
    max_reads: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from each query cluster to what it reads of each key cluster.

    Args:
        query: ``[batch, heads, q_tokens, head_dim]``.
        key: ``[batch, heads, k_tokens, head_dim]``.
        value: ``[batch, heads, k_tokens, head_dim]``.
        queries: Clusters of the query tokens, ``q_clusters`` of them.
        keys: Clusters of the key tokens, ``k_clusters`` of them.
        reads: ``[batch, heads, q_clusters, k_clusters]`` integers from 0 to the key cluster's size.
        compensate: Whether skipped tokens enter through their cluster's means.
        scale: Multiplier on the logits.
        max_reads: The most tokens that a query cluster reads, if it does not read all there are; ``None`` if that is not known.
            Lists are made this long, so nothing has to be read back from the device.
        impl: ``"reference"`` builds the dense mask; the others read the selected keys only.

    Returns:
        Output ``[batch, heads, q_tokens, head_dim]`` in the query's dtype, and the log-sum-exp of each row's logits
        ``[batch, heads, q_tokens]`` in float32 (float64 for float64). A row that reads nothing gets zeros and -inf.

    Raises:
        ValueError: If the tensors do not fit each other, or the implementation named is unknown or cannot run here.
        RuntimeError: If the kernel named fails as it runs; with ``"auto"`` the next takes its place, for good, and
            :func:`refused` says why.
        torch.OutOfMemoryError: If the GPU has no room for one head.
    """
    _check(query, key, value, queries, keys, reads)
    resolved = resolve(impl, query)
    options = {"compensate": compensate, "scale": scale}
    if resolved == "reference":
        from adamac.ops.cluster_attention.reference import reference

        return reference(query, key, value, queries, keys, reads, **options)
    if resolved == "gather":
        from adamac.ops.cluster_attention.gather import gather

        return gather(query, key, value, queries, keys, reads, **options)
    from adamac.ops.cluster_attention.triton import triton_cluster_attention

    try:
        return triton_cluster_attention(
            query, key, value, queries, keys, reads, max_reads=max_reads, impl=resolved, **options
        )
    except Exception as error:  # whatever a compiler or driver raises at what it was not tried at
        if is_out_of_memory(error):
            raise
        if impl != "auto":
            raise RuntimeError(
                f'impl="{impl}" failed as it ran: {in_one_line(error)}; use impl="auto"'
            ) from error
        dismiss(resolved, query, error)
    return cluster_attention(
        query, key, value, queries, keys, reads, max_reads=max_reads, impl=impl, **options
    )


def _check(
    query: Tensor, key: Tensor, value: Tensor, queries: Segments, keys: Segments, reads: Tensor
) -> None:
    check_attention(query, key, value)
    check_shape("queries", queries, tuple(query.shape[:3]), like=query)
    check_shape("keys", keys, tuple(key.shape[:3]), like=query)
    check_shape("reads", reads, (*query.shape[:2], queries.number, keys.number), like=query)
