"""What this rank holds of a tensor that FSDP2 divided, written from the whole.

Every rank has the whole at hand, read from a file or drawn from the same seed, so that nothing is sent.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def written_whole(*tensors: Tensor) -> Generator[list[Tensor]]:
    """Write tensors as if this rank had all of them: of those that are divided it then keeps its share.

    Args:
        *tensors: Divided or not.

    Yields:
        What is to be written: a tensor itself or, of a divided one, memory for the whole of it for so long.
    """
    wholes = [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if is_divided(tensor) else tensor
        for tensor in tensors
    ]
    yield wholes
    for tensor, whole in zip(tensors, wholes, strict=True):
        if whole is not tensor:
            put(tensor, whole)


@torch.no_grad()
def put(tensor: Tensor, whole: Tensor) -> None:
    """Copy a value into a tensor, of a divided one this rank's share; every rank has to call it with the same value."""
    if is_divided(tensor):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(tensor, DTensor)
        whole = whole.to(tensor.device, tensor.dtype)
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``."""
    # Asked for by what it can do: importing DTensor to ask costs half a second where nothing is divided.
    return hasattr(tensor, "to_local")
