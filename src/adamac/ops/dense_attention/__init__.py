"""Softmax attention of every query to every key, with the fastest kernel that the machine has.

Dense steps and layers cost as much as ever, so they should use the best dense kernel, and a claim about sparse attention has
to be made against it. Which one that is differs by card, dtype and head_dim; ``"auto"`` finds it by measuring once, and what
it found can be read back with :func:`choices`. Nothing is masked: callers drop padding.

- ``native``: as torch picks; what ``auto`` means off CUDA, at full precision, for gradients and for fewer than 128 tokens.
- ``cudnn``, ``flash``, ``efficient``: one of torch's fused kernels.
- ``flash4``: the package flash-attn-4, for Hopper and data-centre Blackwell.
- ``auto``: the fastest of these that agrees with the reference.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adamac.ops.dense_attention.compiled import opaque_dense_attention
from adamac.ops.dense_attention.dispatch import Place, choices, resolve, run, wants_gradient
from adamac.ops.dense_attention.probe import Choice
from adamac.ops.dense_attention.torch_kernels import native
from adamac.ops.inputs import check_attention

__all__ = ["Choice", "Impl", "Place", "choices", "dense_attention", "resolve"]

Impl = Literal["auto", "native", "cudnn", "flash", "efficient", "flash4"]


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, impl: Impl = "auto"
) -> Tensor:
    """Attend from every query to every key.

    The first call with ``"auto"`` for a (device, dtype, head_dim) on a GPU measures for some milliseconds and waits for the
    device; later ones do not. In a CUDA graph's capture nothing can be measured: call it once before, or it stays with
    ``"native"`` and :func:`choices` says so. In compiled code it is one opaque operator that chooses when it first runs.

    Args:
        query: ``[batch, heads, q_tokens, head_dim]``.
        key: ``[batch, heads, k_tokens, head_dim]``.
        value: Like ``key``.
        scale: Multiplier on the logits.
        impl: ``"auto"``, or one implementation, which is then used or refused.

    Returns:
        Like ``query``, in its dtype; the strides are those that the implementation writes.

    Raises:
        ValueError: If the tensors do not fit each other, or the implementation named is unknown, unfit for them, or
            disagrees with the reference at first use.
        RuntimeError: If not one implementation agrees with the reference, or the one named fails as it runs; with
            ``"auto"`` the next fastest takes its place, for good, and :func:`choices` says why.
    """
    check_attention(query, key, value)
    on_gpu = query.device.type == "cuda"
    if impl == "native" or (impl == "auto" and not on_gpu):
        return native(query, key, value, scale)
    if torch.compiler.is_compiling():
        if impl == "auto" and wants_gradient(query, key, value):
            return native(query, key, value, scale)
        return opaque_dense_attention(query, key, value, scale, impl)
    return run(query, key, value, scale, impl)
