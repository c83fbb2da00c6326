"""One matrix product a group: rows that are sorted by group, each group with a matrix of its own (the experts of a layer).

``torch`` is PyTorch's grouped matrix product; it takes float32, bfloat16 and float16 rows whose lengths are multiples of 16 bytes.
On a GPU it is one kernel for all groups in bfloat16 on Hopper and Blackwell (compute capability 9.0 and 10.0) alone; in float32
and float16, and on other GPUs, PyTorch itself loops over the groups and waits for the device to know how long each is.
``reference`` is such a loop that takes anything and says what is meant.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

GroupedImpl = Literal["auto", "torch", "reference"]

# Rows and matrices are read in steps of this many bytes.
_STEP = 16


def grouped_mm(
    rows: Tensor, weights: Tensor, counts: Tensor, *, impl: GroupedImpl = "auto", ends: Tensor | None = None
) -> Tensor:
    """Multiply each group's rows by its matrix; differentiable in rows and weights.

    Args:
        rows: ``[n, width_in]``, the first ``counts[0]`` rows are group 0's, and so on.
        weights: ``[groups, width_in, width_out]`` in the dtype of the rows.
        counts: ``[groups]`` integers, 0 for an empty group. Where they add up to less than ``n``, the rows beyond are not read:
            their answers and gradients are undefined (zeros from ``reference``), and the gradient of the weights is without them.
        impl: ``"torch"``, ``"reference"`` or ``"auto"``, which is ``"torch"`` where that works.
        ends: :func:`ends_of` the counts, where several products share them.

    Returns:
        ``[n, width_out]``.

    Raises:
        ValueError: If shapes or dtypes do not fit, or ``impl="torch"`` cannot run on these.
    """
    _check(rows, weights, counts)
    # Without rows there is nothing to launch, and not every kernel takes that.
    if chosen(impl, rows, weights) == "torch" and len(rows):
        ends = ends_of(counts) if ends is None else ends
        product = torch.nn.functional.grouped_mm(rows, weights, offs=ends)
        if (
            product.requires_grad
        ):  # its backward refuses a gradient that was expanded (stride 0), such as that of a sum
            product.register_hook(Tensor.contiguous)
        return product
    from adamac.ops.grouped_mm import reference

    return reference.grouped_mm(rows, weights, counts)


def ends_of(counts: Tensor) -> Tensor:
    """Where each group's rows end: ``[groups]`` int32."""
    return counts.cumsum(0, dtype=torch.int32)


def chosen(impl: GroupedImpl, rows: Tensor, weights: Tensor) -> Literal["torch", "reference"]:
    """Say which implementation will run.

    Raises:
        ValueError: If the name is unknown, or PyTorch's kernel is asked for where it cannot run.
    """
    if impl not in get_args(GroupedImpl):
        raise ValueError(f"impl must be one of {', '.join(get_args(GroupedImpl))}; got {impl!r}")
    if impl == "reference":
        return "reference"
    problem = torch_problem(rows, weights)
    if impl == "torch" and problem is not None:
        raise ValueError(f'impl="torch" cannot run: {problem}; use impl="auto"')
    return "torch" if problem is None else "reference"


def torch_problem(rows: Tensor, weights: Tensor) -> str | None:
    """Say why PyTorch's grouped product cannot take these, or ``None`` if it can."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"PyTorch {torch.__version__} has no grouped_mm"
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {rows.dtype}"
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:
        return f"compiled it takes bfloat16 alone, not {rows.dtype}"
    if rows.device.type == "cuda" and torch.cuda.get_device_capability(rows.device) < (8, 0):
        return "the GPU is older than compute capability 8.0 (Ampere)"
    for width in weights.shape[1:]:
        if width * rows.dtype.itemsize % _STEP:
            return f"a row of {width} {rows.dtype} values is no multiple of {_STEP} bytes"
    return None


def torch_waits(dtype: torch.dtype, device: torch.device) -> str | None:
    """Say why PyTorch's grouped product in a dtype waits for a device, or ``None`` if it does not."""
    if dtype != torch.bfloat16:
        return f"in {dtype} PyTorch loops over the experts and waits for the device; bfloat16 does not"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major not in (9, 10):
            return f"on compute capability {major}.{minor} PyTorch loops over the experts and waits for the device"
    return None


def _check(rows: Tensor, weights: Tensor, counts: Tensor) -> None:
    if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[1]:
        raise ValueError(
            "expected rows [n, width_in] and weights [groups, width_in, width_out]; "
            f"got {tuple(rows.shape)} and {tuple(weights.shape)}"
        )
    if counts.shape != weights.shape[:1]:
        raise ValueError(f"expected a count for each of {len(weights)} groups; got {tuple(counts.shape)}")
    if rows.dtype != weights.dtype:
        raise ValueError(f"rows are {rows.dtype} but weights are {weights.dtype}; cast one to the other")
