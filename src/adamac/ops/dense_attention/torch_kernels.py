"""The kernels that come with torch: the one it picks itself, and each of its fused ones by name.

Torch's order of preference is not an order of speed, and changes between releases: torch 2.11 picks cuDNN on an H100, where
flash (FlashAttention 2) takes 1.7 times as long. So they are offered one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from adamac.ops.dense_attention.candidate import Candidate


def native(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend with whichever kernel torch picks."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)


def _fused(
    name: str, back_end: SDPBackend, can_use: Callable[[SDPAParams, bool], bool], product: str
) -> Candidate:
    """Offer one fused kernel of torch, with torch's own word on what it is fit for."""

    def unfit(query: Tensor, key: Tensor, value: Tensor) -> str | None:
        if query.device.type != "cuda":
            return f"{product} needs a CUDA device, got {query.device.type}; use impl='native'"
        params = SDPAParams(query, key, value, None, 0.0, False, False)
        with sdpa_kernel(back_end):  # a user may have switched this kernel off for torch's own choice
            if can_use(params, False):
                return None
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                can_use(params, True)
        words = [str(warning.message).split(" (Triggered")[0].replace("\n", " ").strip() for warning in told]
        return f"torch cannot use {product} here: {' '.join(words) or 'it does not say why'}"[:300]

    def run(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        with sdpa_kernel(back_end):
            return native(query, key, value, scale)

    return Candidate(name, unfit, run)


KERNELS = (
    Candidate("native", lambda query, key, value: None, native),
    _fused("cudnn", SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention, "cuDNN's kernel"),
    _fused("flash", SDPBackend.FLASH_ATTENTION, can_use_flash_attention, "the flash kernel"),
    _fused("efficient", SDPBackend.EFFICIENT_ATTENTION, can_use_efficient_attention, "the efficient kernel"),
)
