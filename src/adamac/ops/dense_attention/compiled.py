"""Dense attention as one opaque operator, for graphs that torch compiles.

A compiler must not look inside: the choice is measured on the device, and some implementations are no graphs of torch's. When
the compiled code first runs, outside of any capture, the operator chooses as it does eagerly. Which implementation wins shows
in the strides of its output, and a compiler wants to know them beforehand, so here the output is laid out like the query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adamac.ops.dense_attention.dispatch import run


@torch.library.custom_op("adamac::dense_attention", mutates_args=())
def opaque_dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, impl: str) -> Tensor:
    """Attend; see :func:`adamac.ops.dense_attention.dense_attention`. It has no gradient."""
    output = run(query, key, value, scale, impl)
    laid_out = torch.empty_like(query)
    return output if output.stride() == laid_out.stride() else laid_out.copy_(output)


@opaque_dense_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, impl: str) -> Tensor:
    return torch.empty_like(query)
