"""Cluster attention by kernels: tables on the device, memory, launches. Nothing is read back.

The whole is one operator of torch's library (``adamac::cluster_attention``) with a description of its outputs, so that
``torch.compile`` passes it by and a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adamac.ops.cluster_attention import kernels
from adamac.ops.launch import attention_launch, interpreted, power_of_two
from adamac.ops.segment import Segments

# Lists, and the means behind packed tokens, are filled up to whole blocks of keys, so that nobody reads past their ends.
_PIECE = 128
# Memory for packed keys and values and for lists, in bytes; heads that do not fit wait for the next round.
_WORKSPACE_BYTES = 1 << 30


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
    max_reads: int | None,
    impl: str = "triton",
) -> tuple[Tensor, Tensor]:
    """Compute :func:`adamac.ops.cluster_attention.cluster_attention` with the kernel named, ``"triton"`` or ``"hopper"``."""
    q_starts, k_starts = queries.starts, keys.starts  # before the orders, which they may bring
    lists = (queries.order, q_starts, keys.order, k_starts, reads.int())
    max_reads = key.shape[2] if max_reads is None else min(max_reads, key.shape[2])
    return _operator(query, key, value, *lists, max(max_reads, 1), compensate, scale, impl)


@torch.library.custom_op("adamac::cluster_attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_order: Tensor,
    q_starts: Tensor,
    k_order: Tensor,
    k_starts: Tensor,
    reads: Tensor,
    max_reads: int,
    compensate: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(query):  # Triton launches on the current device
        tables = (q_order, q_starts, k_order, k_starts, reads)
        parts = (_rows_in_one_piece(part) for part in (query, key, value))
        return _attend(*parts, *tables, max_reads, compensate, scale, impl)


@_operator.register_fake
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_rows_in_one_piece(query)), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _rows_in_one_piece(part: Tensor) -> Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_order: Tensor,
    q_starts: Tensor,
    k_order: Tensor,
    k_starts: Tensor,
    reads: Tensor,
    max_reads: int,
    compensate: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Make tables and memory, then pack, list and attend, some heads at a time."""
    batch, heads, q_tokens, dim = query.shape
    k_tokens = key.shape[2]
    q_clusters, k_clusters = reads.shape[-2:]
    reads, k_order, k_starts = reads.contiguous(), k_order.contiguous(), k_starts.contiguous()
    ends = reads.cumsum(-1, dtype=torch.int32)
    launch = attention_launch(query.device, query.dtype, dim)
    tables = tiles(q_starts, q_tokens, 128 if impl == "hopper" else launch.rows)
    output = torch.empty_like(query)
    lse = torch.empty(batch, heads, q_tokens, dtype=torch.float32, device=query.device)
    means = _whole(k_clusters) if compensate else 0
    room = _Room.of(key, batch * heads, q_clusters, _whole(k_clusters), means, _whole(max_reads))
    packed, listed, skipped = (room.keys, room.values), room.listed, room.skipped
    at_once, rows, capacity = len(listed), room.keys.shape[1], listed.shape[-1]
    counted = torch.arange(_whole(k_tokens), dtype=torch.int32, device=query.device)
    for head_from in range(0, batch * heads, at_once):
        count = min(at_once, batch * heads - head_from)
        for source, target in zip((key, value), packed, strict=True):
            _pack(source, target, k_order, k_starts, head_from, count)
        _list(ends, reads, k_starts, listed, head_from, count)
        if compensate:
            _skip(reads, k_starts, skipped, head_from, count)
        arguments = (
            query,
            *packed,
            q_order.contiguous(),
            q_starts.contiguous(),
            k_starts,
            ends,
            *tables,
            listed,
            counted,
            skipped,
            output,
            lse,
            head_from,
            heads,
            q_tokens,
            k_tokens,
            q_clusters,
            k_clusters,
            means,
            tables[0].shape[-1],
            capacity,
            rows,
            *query.stride()[:3],
            *output.stride()[:3],
            scale * math.log2(math.e),
        )
        grid = (tables[0].shape[-1], count)
        if impl == "hopper":
            from adamac.ops.cluster_attention import hopper_kernels

            hopper_kernels.attend_kernel[grid](*arguments, **hopper_kernels.configuration(dim))
            continue
        width = max(16, power_of_two(dim))
        kernels.attend_kernel[grid](
            *arguments,
            dim,
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


@dataclass(frozen=True)
class _Room:
    """Memory for one round of heads.

    Attributes:
        keys: ``[heads of a round, rows, head_dim]``, packed, with means behind them.
        values: Like ``keys``.
        listed: ``[heads of a round, q_clusters, capacity]`` int32.
        skipped: ``[heads of a round, q_clusters, means]`` float32.
    """

    keys: Tensor
    values: Tensor
    listed: Tensor
    skipped: Tensor

    @classmethod
    def of(
        cls, key: Tensor, heads: int, q_clusters: int, k_clusters: int, means: int, capacity: int
    ) -> _Room:
        """Take memory for as many heads as may be done at once, or for as many as there is room for.

        Raises:
            torch.OutOfMemoryError: If there is no room for one head.
        """
        rows, dim = key.shape[2] + k_clusters, key.shape[3]
        a_head = 4 * q_clusters * (capacity + means) + 2 * rows * dim * key.element_size()
        at_once = max(1, min(heads, _WORKSPACE_BYTES // a_head))
        while True:
            try:
                return cls(
                    key.new_empty(at_once, rows, dim),
                    key.new_empty(at_once, rows, dim),
                    key.new_empty(at_once, q_clusters, capacity, dtype=torch.int32),
                    key.new_empty(at_once, q_clusters, means, dtype=torch.float32),
                )
            except torch.OutOfMemoryError as error:
                if at_once == 1:
                    raise torch.OutOfMemoryError(
                        f"out of memory: sparse attention needs {a_head / 2**20:.0f} MiB of its own to do one head of "
                        f"{key.shape[2]} tokens, and {key.device} has no such room; offload weights, or take fewer "
                        "query clusters or a smaller budget"
                    ) from error
            at_once = (at_once + 1) // 2


def _pack(source: Tensor, target: Tensor, order: Tensor, starts: Tensor, head_from: int, count: int) -> None:
    """Copy the keys or values of some heads into the order of clusters, and their means behind them."""
    clusters, dim = starts.shape[-1] - 1, source.shape[-1]
    kernels.pack_kernel[(_whole(clusters), count)](
        source,
        target,
        order,
        starts,
        head_from,
        source.shape[1],
        source.shape[2],
        clusters,
        target.shape[1],
        dim,
        *source.stride()[:3],
        ROWS=16 if interpreted() else 64,
        WIDTH=power_of_two(dim),
        num_warps=4,
    )


def _list(ends: Tensor, reads: Tensor, starts: Tensor, listed: Tensor, head_from: int, count: int) -> None:
    """List what the query clusters of some heads read."""
    q_clusters, k_clusters = reads.shape[-2:]
    block = 64 if interpreted() else 1024
    kernels.list_kernel[(count * q_clusters, math.ceil(listed.shape[-1] / block))](
        ends,
        reads,
        starts,
        listed,
        head_from,
        q_clusters,
        k_clusters,
        listed.shape[-1],
        BLOCK=block,
        PIECE=_PIECE,
        num_warps=4,
    )


def _skip(reads: Tensor, starts: Tensor, skipped: Tensor, head_from: int, count: int) -> None:
    """Work out how much the query clusters of some heads skip."""
    q_clusters, k_clusters = reads.shape[-2:]
    means = skipped.shape[-1]
    kernels.skip_kernel[(count * q_clusters,)](
        reads,
        starts,
        skipped,
        head_from,
        q_clusters,
        k_clusters,
        means,
        BLOCK=_PIECE if interpreted() else 1024,
        num_warps=4,
    )


def _whole(number: int) -> int:
    return -(-number // _PIECE) * _PIECE


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
    *leading, bounds = starts.shape
    clusters, number = bounds - 1, math.ceil(tokens / rows) + bounds
    starts = starts.contiguous()
    # Two pieces of memory: halves of one would begin at addresses for which kernels are compiled anew.
    tables = [torch.empty(*leading, number, dtype=torch.int32, device=starts.device) for _ in range(2)]
    kernels.tile_kernel[(starts.numel() // bounds,)](
        starts,
        *tables,
        tokens,
        clusters,
        number,
        ROWS=rows,
        BLOCK=power_of_two(bounds),
        PIECE=_PIECE,
        num_warps=4,
    )
    return tables[0], tables[1]
