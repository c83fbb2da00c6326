"""Other people's kernels at the same work, as far as they are installed: blocks instead of clusters, and another k-means.

FlexAttention (compiled) and flash-attn-4 read whole blocks of 128 keys, the same number for every 128 queries: the number of
pairs is that of a sparse contender, but which blocks those are is drawn at random, nothing is planned or compensated, and
what is timed is the kernel alone. flash-kmeans does what one step of clustering the keys does: assign each key to its
nearest centroid and update the centroids.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamac.attention.layout import Layout
from adamac.ops.dense_attention.candidate import first_line
from adamac.ops.error_budget import over_budget

BLOCK = 128


@dataclass(frozen=True)
class Blocks:
    """Which blocks of 128 keys each block of 128 queries reads.

    Attributes:
        chosen: ``[heads, query blocks, blocks read]``, int32, ascending; whole blocks of keys only.
        q_tokens: Length of the queries.
        k_tokens: Length of the keys.
    """

    chosen: Tensor
    q_tokens: int
    k_tokens: int

    @property
    def density(self) -> float:
        """Share of the pairs."""
        return self.chosen.shape[-1] * BLOCK / self.k_tokens


def draw_blocks(query: Tensor, key: Tensor, density: float, seed: int = 0) -> Blocks:
    """Draw blocks for a density, the same number for every block of queries.

    Raises:
        ValueError: If there is less than one whole block of keys.
    """
    heads, q_tokens, k_tokens = query.shape[1], query.shape[2], key.shape[2]
    whole = k_tokens // BLOCK
    if whole < 1:
        raise ValueError(f"blocks of {BLOCK} keys need as many keys at least, got {k_tokens}")
    number = min(max(round(density * k_tokens / BLOCK), 1), whole)
    generator = torch.Generator(query.device).manual_seed(seed)
    dice = torch.rand(heads, -(-q_tokens // BLOCK), whole, generator=generator, device=query.device)
    return Blocks(dice.topk(number).indices.sort(-1).values.int(), q_tokens, k_tokens)


def block_contenders(
    query: Tensor, key: Tensor, value: Tensor, density: float
) -> dict[str, Callable[[], Tensor] | str]:
    """Kernels over random blocks, by name: a call, or why there is none.

    Each call's output is ``[1, heads, q_tokens, head_dim]`` and has been held to the meaning of its blocks.
    """
    blocks = draw_blocks(query, key, density)
    found: dict[str, Callable[[], Tensor] | str] = {}
    for name, make in (("flex blocks", _flex), ("flash4 blocks", _flash4)):
        try:
            call = make(query, key, value, blocks)
            wrong = _disagreement(call(), query, key, value, blocks)
        except Exception as error:  # a package that is missing, or a compiler that refuses, raises anything
            wrong = first_line(error)
        found[f"{name} {density:.0%}"] = call if wrong is None else wrong
    return found


def kmeans_contender(key: Tensor, centroids: Tensor, layout: Layout) -> Callable[[], Any] | str:
    """One iteration of flash-kmeans on the video keys, from given centroids ``[1, heads, clusters, head_dim]``."""
    points = layout.video(key)[0].contiguous()  # not timed: it wants heads one after another
    start = centroids[0].to(points.dtype).contiguous()

    def call() -> Any:
        iterate = importlib.import_module("flash_kmeans").batch_kmeans_Euclid
        return iterate(points, start.shape[1], max_iters=1, init_centroids=start)

    try:
        call()
    except ImportError as error:
        return f"flash-kmeans is not installed ({error})"
    except Exception as error:  # one that does not compile would take the rows of a whole shape with it
        return f"flash-kmeans does not run: {first_line(error)}"
    return call


def _flex(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import BlockMask

    if query.device.type != "cuda":
        raise ValueError("FlexAttention is timed on a GPU only")
    counts = torch.full_like(blocks.chosen[..., 0], blocks.chosen.shape[-1])[None]
    indices = torch.nn.functional.pad(
        blocks.chosen, (0, -(-blocks.k_tokens // BLOCK) - blocks.chosen.shape[-1])
    )
    # All blocks are whole: none needs the mask function, which is there because the class wants one.
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(indices[None]),
        counts,
        indices[None],
        BLOCK_SIZE=BLOCK,
        seq_lengths=(blocks.q_tokens, blocks.k_tokens),
    )
    return lambda: _compiled_flex()(query, key, value, block_mask=mask)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flash4(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> Callable[[], Tensor]:
    try:
        attend = importlib.import_module("flash_attn.cute").flash_attn_func
    except ModuleNotFoundError as error:
        if error.name not in ("flash_attn", "flash_attn.cute"):
            raise
        raise ValueError(
            "flash-attn-4, which is for GPUs, is not installed; pip install 'adamac[flash4]'"
        ) from error
    tables_of = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    if torch.cuda.get_device_capability(query.device)[0] not in (9, 10):
        raise ValueError("flash-attn-4 ignores block sparsity on this card")
    counts = torch.full_like(blocks.chosen[..., 0], blocks.chosen.shape[-1])[None]
    room = -(-blocks.k_tokens // BLOCK) - blocks.chosen.shape[-1]
    indices = torch.nn.functional.pad(blocks.chosen, (0, room))[None].contiguous()
    tables = tables_of(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(BLOCK, BLOCK),
    )
    parts = [part.transpose(1, 2) for part in (query, key, value)]

    def call() -> Tensor:
        output = attend(*parts, block_sparse_tensors=tables)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return call


def _disagreement(output: Tensor, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> str | None:
    """What is wrong with some rows of the first head, judged by the sum over their blocks in fp64."""
    rows = torch.linspace(0, blocks.q_tokens - 1, 16, device=query.device).long()
    lane = torch.arange(BLOCK, device=query.device)
    oracle, eager = [], []
    for row in rows.tolist():
        tokens = (blocks.chosen[0, row // BLOCK].long()[:, None] * BLOCK + lane).flatten()
        q, k, v = query[0, 0, row], key[0, 0, tokens], value[0, 0, tokens]
        for outputs, dtype in ((oracle, torch.float64), (eager, query.dtype)):
            weights = ((k.to(dtype) @ q.to(dtype)) * q.shape[-1] ** -0.5).softmax(0)
            outputs.append(weights @ v.to(dtype))
    return over_budget(output[0, 0, rows], torch.stack(oracle), torch.stack(eager))
