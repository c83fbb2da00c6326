"""From how much work on sparse attention pays on a GPU: below it, calls stay dense.

A plan is some dozens of small kernels, which the host needs milliseconds to put in the queue. Dense attention that takes less
than that cannot be beaten, however few keys are read. What counts is therefore the work of the dense call, not its length
alone: four operations for each (query, key, channel), over all samples and heads. ``benchmarks/crossover.py`` measures where
the two meet; the rows are in ``benchmarks/results/h200/crossover.jsonl``. On a processor there is no queue, and sparse
attention already pays at the shortest sequences that were measured (4,096 tokens).
"""

from __future__ import annotations

import torch

from adamac.ops.launch import capability

LEAST_TOKENS = 1024
"""On any device: below it a plan has next to nothing to choose from."""

LEAST_WORK = {9: 3e12}
"""Floating-point operations of the smallest dense call worth replacing, by a GPU's major compute capability: measured."""

LEAST_WORK_ELSEWHERE = 1e12
"""For GPUs that were not measured: they do about as much in the time that the host needs."""


def work(tokens: int, heads: int, head_dim: int) -> float:
    """Floating-point operations of dense attention among ``tokens`` tokens, over the heads of all samples."""
    return 4.0 * heads * head_dim * tokens**2


def too_small(tokens: int, heads: int, head_dim: int, device: torch.device) -> str | None:
    """Say why a call is too small to be sparse on a device, or ``None`` if it is not.

    Args:
        tokens: Video tokens.
        heads: Heads of all samples.
        head_dim: Width of a head.
        device: Where it runs.
    """
    if tokens < LEAST_TOKENS:
        return f"too small: fewer than {LEAST_TOKENS:,} video tokens"
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return too_little_work(tokens, heads, head_dim, capability(index)[0])


def too_little_work(tokens: int, heads: int, head_dim: int, capability: int) -> str | None:
    """Say why a call is too little work for a GPU of this major compute capability, or ``None``."""
    least = LEAST_WORK.get(capability, LEAST_WORK_ELSEWHERE)
    asked = work(tokens, heads, head_dim)
    if asked >= least:
        return None
    return (
        f"too small: {asked / 1e12:.2g} TFLOP of dense attention, sparse pays from {least / 1e12:.2g} on here"
    )
