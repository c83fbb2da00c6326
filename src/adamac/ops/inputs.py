"""What an operation refuses before it runs: a kernel given tensors that do not fit each other reads what is not theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from adamac.ops.segment import Segments


def check_shape(name: str, tensor: Tensor | Segments, expected: tuple[int, ...], *, like: Tensor) -> None:
    """Refuse a tensor of another shape than expected, or on another device than the tensor it goes with.

    Raises:
        ValueError: Naming what was expected and what came.
    """
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {expected} to fit the rest, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the rest is on {like.device}; move all to one device"
        )


def check_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse query, key and value that cannot be attended together.

    Raises:
        ValueError: Naming what was expected and what came.
    """
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            "query and key must be [batch, heads, tokens, head_dim], got shapes "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    expected = (*query.shape[:2], key.shape[2], query.shape[3])
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != expected:
            raise ValueError(
                f"{name} must have shape {expected} to fit the query, got {tuple(tensor.shape)} (repeat grouped heads "
                "first)"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} but query is {query.dtype} on {query.device}; move them "
                "to one dtype and device"
            )
