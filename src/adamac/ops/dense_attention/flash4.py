"""FlashAttention 4: the package ``flash-attn-4``, written in CuTe DSL for Hopper and Blackwell.

On an H100 it is 1.15 to 1.2 times as fast as cuDNN at head_dim 128 and 1.33 times at 64. It compiles a kernel when a dtype
and head_dim are first met, which takes seconds. On other cards the package falls back to kernels in the manner of Ampere, which ignore part of what
they are asked (block sparsity, silently); it is refused there, although plain dense attention would be right, because
nothing is gained.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adamac.ops.dense_attention.candidate import Candidate, first_line

# Compute capabilities, by their first number, that have a kernel of their own: Hopper, data-centre Blackwell.
_HOPPER, _BLACKWELL = (9,), (10, 11)


@functools.cache
def _load() -> tuple[Callable[..., Any] | None, str | None]:
    """Import the package once: its function, or why there is none."""
    try:
        return importlib.import_module("flash_attn.cute").flash_attn_func, None
    except ModuleNotFoundError as error:
        if error.name in ("flash_attn", "flash_attn.cute"):
            return None, "flash-attn-4 is not installed; pip install 'adamac[flash4]'"
        return None, f"flash-attn-4 cannot be imported, reinstall 'adamac[flash4]': {first_line(error)}"
    except Exception as error:  # an extension that does not fit the driver raises anything
        return None, f"flash-attn-4 cannot be imported, reinstall 'adamac[flash4]': {first_line(error)}"


def _unfit(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if query.device.type != "cuda" or torch.version.hip is not None:
        return f"flash-attn-4 needs an NVIDIA GPU, got {query.device.type}; use impl='native'"
    capability = torch.cuda.get_device_capability(query.device)
    return unfit_for(capability, query.dtype, query.shape[-1]) or _load()[1]


def unfit_for(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
    """Say in one line why there is no kernel for a card, dtype and head_dim, or ``None``.

    Args:
        capability: The card's compute capability.
        dtype: Of query, key and value.
        head_dim: Width of a head.
    """
    if capability[0] not in _HOPPER + _BLACKWELL:
        return (
            f"flash-attn-4 needs Hopper or data-centre Blackwell (compute capability 9, 10 or 11), got "
            f"{capability[0]}.{capability[1]}; use impl='auto'"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn-4 needs float16 or bfloat16, got {dtype}; use impl='auto'"
    fits = 8 <= head_dim <= 256 if capability[0] in _HOPPER else 8 <= head_dim <= 128 or head_dim == 256
    if not fits or head_dim % 8:
        widths = "8 to 256" if capability[0] in _HOPPER else "8 to 128, or 256,"
        return f"flash-attn-4 needs a head_dim of {widths} divisible by 8, got {head_dim}; use impl='auto'"
    return None


def _run(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    attend, problem = _load()
    if attend is None:
        raise ValueError(problem)
    # It wants tokens before heads, which is how pipelines have them in memory: no copy.
    tokens_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    with torch.cuda.device(query.device):  # it launches on the current device, not on the tensors'
        result = attend(*tokens_first, softmax_scale=scale)
    # A pair with the log-sum-exp, which is None unless asked for.
    output = result[0] if isinstance(result, tuple) else result
    return output.transpose(1, 2)


FLASH4 = Candidate("flash4", _unfit, _run)
