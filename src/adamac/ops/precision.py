"""The precision that references and statistics are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def accurate(values: Tensor) -> Tensor:
    """Return the values in float32, or as they are if they already are float64."""
    return values if values.dtype == torch.float64 else values.float()
