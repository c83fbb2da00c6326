"""How an operation is run: which implementation ``"auto"`` stands for, and what a Triton kernel is launched with."""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "torch", "triton"]

# Compute capability from which the kernels are known to work (Ampere).
_OLDEST = (8, 0)


def chosen(impl: Impl, tensor: Tensor) -> str:
    """Say which implementation of a clustering operation will run on a tensor's device.

    Raises:
        ValueError: If the name is unknown, or Triton is asked for where it cannot run.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    if impl == "torch":
        return "torch"
    problem = triton_problem(tensor.device, tensor.dtype)
    if impl == "triton" and problem is not None:
        raise ValueError(f'impl="triton" cannot run: {problem}; use impl="auto"')
    # The interpreter is there to be tested, never chosen.
    return "triton" if impl == "triton" or (problem is None and not interpreted()) else "torch"


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why Triton kernels cannot run on a device, or ``None`` if they can."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {dtype}"
    if not interpreted() and device.type != "cuda":
        return f"the tensors are on {device.type}, not on a GPU"
    missing = _triton_missing()
    if missing is not None or interpreted():
        return missing
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    found = capability(device.index if device.index is not None else torch.cuda.current_device())
    if found < _OLDEST:
        return f"the GPU has compute capability {found[0]}.{found[1]}, the kernels need 8.0 (Ampere)"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device (``TRITON_INTERPRET=1``, which Triton itself reads)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Launch:
    """What an attention kernel is launched with.

    Attributes:
        rows: Query rows of a program.
        keys: Keys that it reads at once.
        warps: Warps of a program.
        stages: Blocks of keys in flight.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def attention_launch(device: torch.device, dtype: torch.dtype, head_dim: int) -> Launch:
    """Choose the launch configuration of cluster attention.

    Args:
        device: Where it runs.
        dtype: Of query, key and value.
        head_dim: Width of a head.
    """
    if interpreted():
        return Launch(16, 16, 4, 1)
    row_bytes = power_of_two(head_dim) * dtype.itemsize
    if row_bytes <= 128:
        return Launch(128, 64, 4, 3)
    if row_bytes <= 256:  # more than two blocks in flight fit into Hopper's shared memory only
        return Launch(128, 64, 8, 3 if capability(device.index or 0)[0] == 9 else 2)
    return Launch(64, 32, 4, 2) if row_bytes <= 512 else Launch(32, 32, 4, 1)


def power_of_two(number: int) -> int:
    """The next power of two, which the sides of Triton's blocks must be."""
    return 1 << max(0, number - 1).bit_length()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device has no room, which says nothing about who met it; Triton's is a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


@functools.cache
def _triton_missing() -> str | None:
    """Import Triton once; say why it cannot be used, or ``None``."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "the package triton is not installed"
        return f"the package triton cannot be imported, reinstall it: {error}"
    except Exception as error:  # a library of it that does not fit the machine raises anything
        lines = str(error).splitlines() or [""]
        return f"the package triton cannot be imported, reinstall it: {type(error).__name__}: {lines[0]}"
    return None


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return torch.cuda.get_device_capability(index)
