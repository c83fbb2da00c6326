"""Where a model runs and in which dtype: found, or refused, before anything is loaded."""

from __future__ import annotations

import torch

from adamac.bakeoff.errors import BadInput

_DTYPES = ("float32", "bfloat16", "float16")


def find_device(name: str) -> torch.device:
    """Find a device by its name, and make sure that a tensor can be made there.

    Args:
        name: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" or another of torch's.

    Raises:
        BadInput: If torch knows no such device, or it is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(
            f"device: torch knows no device {name!r}; expected auto, cpu, cuda or cuda:1"
        ) from None
    if device.type == "cuda":
        _check_gpu(device)
    elif device.type == "meta":
        raise BadInput("device: on meta nothing is computed; expected auto, cpu, cuda or cuda:1")
    else:
        try:
            torch.empty(1, device=device)
        except Exception:  # a back end that is not there raises anything
            raise BadInput(f"device: {name} was asked for, but torch cannot use it here") from None
    return device


def _check_gpu(device: torch.device) -> None:
    number = torch.cuda.device_count()
    if not torch.cuda.is_available():
        raise BadInput(f"device: {device} was asked for, but torch sees no GPU here")
    if device.index is not None and device.index >= number:
        raise BadInput(f"device: {device} was asked for, but GPUs here are cuda:0 to cuda:{number - 1}")


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """Find the dtype of a model's weights by its name.

    Args:
        name: "auto" (float32 on a CPU, bfloat16 elsewhere), "float32", "bfloat16" or "float16".
        device: Where they will be.

    Raises:
        BadInput: If it is none of these.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise BadInput(f"dtype must be auto, {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, got {name!r}")
    return getattr(torch, name)
