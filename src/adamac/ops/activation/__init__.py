"""The experts' activation, on the widest rows of a layer: what memory can carry is all that it should take.

``torch`` is plain torch on any device. ``triton`` is one kernel each way, of gated experts too, where plain torch takes two or three.
It computes in float32 and is told on the device how many rows there are: of a buffer that is longer than that, the rest is
neither read nor written, and costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from adamac.ops.launch import Impl, chosen

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "relu2": lambda x: functional.relu(x).square(),
}


def activate(
    inner: Tensor, activation: str, *, gated: bool = False, rows: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """Apply the activation, or multiply the activated first half of each row by the second; differentiable.

    Args:
        inner: ``[..., width]``, or ``[..., 2 * width]`` with the gate first.
        activation: A key of :data:`ACTIVATIONS`.
        gated: Whether the rows have a gate.
        rows: One integer, on the same device: of ``[n, width]``, how many of the first rows there are; ``None`` means all. In
            the rows beyond, answers and gradients are undefined.
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``[..., width]`` in the dtype of ``inner``.

    Raises:
        ValueError: If shapes do not fit, or the activation is unknown, or the implementation that is asked for cannot run on these.
    """
    _check(inner, activation, gated, rows)
    if chosen(impl, inner) == "triton":
        if torch.is_grad_enabled() and inner.requires_grad:
            return _Activate.apply(inner, activation, gated, rows)
        from adamac.ops.activation import triton as kernels

        return kernels.activate(inner, activation, gated, rows)
    from adamac.ops.activation import reference

    return reference.activate(inner, activation, gated)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, activation: str, gated: bool, rows: Tensor | None) -> Tensor:
        from adamac.ops.activation import triton as kernels

        ctx.save_for_backward(inner, rows)
        ctx.activation, ctx.gated = activation, gated
        return kernels.activate(inner, activation, gated, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        from adamac.ops.activation import triton as kernels

        inner, rows = ctx.saved_tensors
        return kernels.gradient(inner, gradients[0], ctx.activation, ctx.gated, rows), None, None, None


def _check(inner: Tensor, activation: str, gated: bool, rows: Tensor | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if not inner.ndim or (gated and inner.shape[-1] % 2):
        expected = "[..., 2 * width], the gate first" if gated else "[..., width]"
        raise ValueError(f"expected inner {expected}; got {tuple(inner.shape)}")
    if rows is None:
        return
    if inner.ndim != 2:
        raise ValueError(f"rows are counted of inner [n, width]; got {tuple(inner.shape)}")
    if rows.numel() != 1 or rows.is_floating_point() or rows.device != inner.device:
        raise ValueError(
            f"expected rows to be one integer on {inner.device}; "
            f"got {tuple(rows.shape)} {rows.dtype} on {rows.device}"
        )
