"""What experts compute: a grouped product, an activation, and a grouped product back.

``separate`` is that, one after another, through :func:`adamac.ops.grouped_mm.grouped_mm`. Between the products lie the widest rows of
the layer, top_k times as many as tokens: an activation of its own reads and writes them once more, and its backward three
times. ``fused`` does it where the first product has them in registers, in both directions; what it leaves to PyTorch are the
products without an activation beside them. On an H100 it gained nothing over PyTorch's faster products, so that ``auto`` is
``separate`` (docs/decisions/activation-stays-apart.md).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adamac.ops.activation import activate
from adamac.ops.grouped_mm import GroupedImpl, ends_of, grouped_mm, torch_problem
from adamac.ops.launch import interpreted, triton_problem

MlpImpl = Literal["auto", "fused", "torch", "reference"]


def grouped_mlp(
    rows: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    activation: str,
    *,
    gated: bool = False,
    impl: MlpImpl = "auto",
) -> Tensor:
    """Let each group's two matrices answer its rows; differentiable in rows and matrices.

    Args:
        rows: ``[n, width]``, the first ``counts[0]`` rows are group 0's, and so on.
        up: ``[groups, width, inner]`` in the dtype of the rows, or ``2 * inner`` with the gate first.
        down: ``[groups, inner, width]``.
        counts: ``[groups]`` integers that add up to ``n``, or to less: what answers to the rows beyond, and their gradient, is
            undefined, and the gradient of the matrices does not depend on them.
        activation: A key of :data:`adamac.ops.activation.ACTIVATIONS`.
        gated: Whether the activated first half of the inner values multiplies the second.
        impl: ``"fused"``, ``"torch"`` or ``"reference"`` (separate, with that grouped product), or ``"auto"``. All but
            ``"reference"`` apply the activation by a kernel where one runs.

    Returns:
        ``[n, width]``.

    Raises:
        ValueError: If shapes or dtypes do not fit, or the implementation that is asked for cannot run on these.
    """
    if impl == "fused":
        check_fused(rows, up, gated=gated)
        if len(rows):
            from adamac.ops.grouped_mlp import triton as kernels

            return kernels.grouped_mlp(rows, up, down, counts, activation)
    through: GroupedImpl = "auto" if impl == "fused" else impl
    ends = ends_of(counts)
    inner = grouped_mm(rows, up, counts, impl=through, ends=ends)
    by = "torch" if impl == "reference" else "auto"
    active = activate(inner, activation, gated=gated, rows=ends[-1:], impl=by)
    return grouped_mm(active, down, counts, impl=through, ends=ends)


def check_fused(rows: Tensor, up: Tensor, *, gated: bool = False) -> None:
    """Refuse what the fused kernels cannot take.

    Raises:
        ValueError: Saying why.
    """
    if problem := fused_problem(rows, up, gated=gated):
        raise ValueError(f'impl="fused" cannot run: {problem}; use impl="auto"')


def fused_problem(rows: Tensor, up: Tensor, *, gated: bool = False) -> str | None:
    """Say why the fused kernels cannot take these, or ``None`` if they can."""
    if gated:
        return "gated experts have two products before the activation"
    if problem := triton_problem(rows.device, rows.dtype) or torch_problem(rows, up):
        return problem
    if not interpreted() and torch.cuda.get_device_capability(rows.device) < (9, 0):
        return "the GPU is older than compute capability 9.0 (Hopper): it does not fetch tiles by itself"
    return None
