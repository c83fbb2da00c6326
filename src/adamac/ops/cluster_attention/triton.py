"""What surrounds the kernels of cluster attention: tables on the device, memory, launches. Nothing is read back.

The whole is one operator of torch's library (``adamac::cluster_attention``) with a description of its outputs, so that
``torch.compile`` passes it by and a CUDA graph can hold it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamac.ops.launch import attention_launch, interpreted, power_of_two
from adamac.ops.segment import Segments, segment_mean

# Lists of tokens that are made at once, in bytes; heads beyond that wait for the next round.
_LIST_BYTES = 1 << 30


def triton_cluster_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Segments,
    keys: Segments,
    reads: Tensor,
    *,
    compensate: bool,
    scale: float,
    most: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`adamac.ops.cluster_attention.cluster_attention` with the Triton kernel."""
    if compensate:
        means = [segment_mean(part, keys, impl="triton").to(part.dtype) for part in (key, value)]
    else:
        means = [key.new_empty(0), value.new_empty(0)]
    return _operator(
        query,
        key,
        value,
        *means,
        queries.order,
        queries.starts,
        keys.order,
        keys.starts,
        reads.int(),
        key.shape[2] if most is None else most,
        compensate,
        scale,
    )


@torch.library.custom_op("adamac::cluster_attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    q_order: Tensor,
    q_starts: Tensor,
    k_order: Tensor,
    k_starts: Tensor,
    reads: Tensor,
    most: int,
    compensate: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from adamac.ops.cluster_attention import kernels

    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    batch, heads, q_tokens, dim = query.shape
    k_tokens = key.shape[2]
    q_clusters, k_clusters = reads.shape[-2:]
    launch = attention_launch(query.device, query.dtype, dim)
    width = max(16, power_of_two(dim))
    reads = reads.contiguous()
    ends = reads.cumsum(-1, dtype=torch.int32)
    tile_cluster, tile_first = tiles(q_starts, q_tokens, launch.rows)
    output = torch.empty_like(query)
    lse = torch.empty(batch, heads, q_tokens, dtype=torch.float32, device=query.device)
    capacity = max(1, min(most, k_tokens))
    at_once = max(1, min(batch * heads, _LIST_BYTES // (4 * q_clusters * capacity)))
    listed = torch.empty(at_once, q_clusters, capacity, dtype=torch.int32, device=query.device)
    block = 64 if interpreted() else 1024
    for head_from in range(0, batch * heads, at_once):
        count = min(at_once, batch * heads - head_from)
        kernels.list_kernel[(math.ceil(capacity / block), count * q_clusters)](
            ends,
            reads,
            k_order,
            k_starts,
            listed,
            head_from,
            q_clusters,
            k_clusters,
            k_tokens,
            capacity,
            BLOCK=block,
            STEPS=max(1, k_clusters.bit_length()),
            num_warps=4,
        )
        kernels.attend_kernel[(tile_cluster.shape[-1], count)](
            query,
            key,
            value,
            mean_key,
            mean_value,
            q_order,
            k_order,
            q_starts,
            k_starts,
            reads,
            ends,
            tile_cluster,
            tile_first,
            listed,
            output,
            lse,
            head_from,
            heads,
            q_tokens,
            k_tokens,
            q_clusters,
            k_clusters,
            tile_cluster.shape[-1],
            capacity,
            dim,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *output.stride()[:3],
            scale * math.log2(math.e),
            COMPENSATE=compensate,
            ROWS=launch.rows,
            KEYS=launch.keys,
            WIDTH=width,
            FULL=width == dim,
            UPCAST=interpreted(),
            PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return output, lse


@_operator.register_fake
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


def tiles(starts: Tensor, tokens: int, rows: int) -> tuple[Tensor, Tensor]:
    """Cut each query cluster into tiles of at most ``rows`` rows.

    How many tiles there are depends on the data; the tables have room for the most there can be. Padding is cut into
    tiles too, as one more cluster, because its output has to be written.

    Args:
        starts: ``[batch, heads, clusters + 1]`` where each cluster begins; the last is where padding begins.
        tokens: Rows of a head, padding included.
        rows: Rows of a tile.

    Returns:
        Two int32 tensors ``[batch, heads, tiles]``: the cluster of each tile, ``clusters`` for padding and
        ``clusters + 1`` for a spare one, and its first row in the order of clusters.
    """
    clusters = starts.shape[-1] - 1
    bounds = torch.nn.functional.pad(starts, (0, 1), value=tokens)
    needed = (bounds.diff() + rows - 1) // rows
    ends = needed.cumsum(-1, dtype=torch.int32)
    number = math.ceil(tokens / rows) + clusters + 1
    tile = torch.arange(number, device=starts.device, dtype=torch.int32).expand(*starts.shape[:-1], number)
    cluster = torch.searchsorted(ends, tile.contiguous(), right=True)
    own = cluster.clamp_max(clusters)
    within = tile - (torch.gather(ends, -1, own) - torch.gather(needed, -1, own))
    return cluster.int(), (torch.gather(bounds, -1, own) + within * rows).int()
