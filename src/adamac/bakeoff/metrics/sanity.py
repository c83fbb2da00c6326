"""Whether something is a picture at all: a black video is an error, not a result."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

# Floats from 0 to 1: half a step of 8-bit video is 0.002, so nobody can see what lies below these.
_BLACK = 2e-3
_CONSTANT = 1e-3


def latents_problem(latents: torch.Tensor | None) -> str | None:
    """Say what is wrong with the last step's latents, or ``None``."""
    if latents is None or latents.numel() == 0:
        return "are missing" if latents is None else "are empty"
    values = latents.detach().float()
    if values.isnan().any():
        return "turned NaN"
    if values.isinf().any():
        return "turned infinite"
    if values.max() == values.min():
        return "are constant"
    return None


def frames_problem(frames: NDArray[np.floating]) -> str | None:
    """Say what is wrong with a video, or ``None``.

    Args:
        frames: ``[frames, height, width, channels]``, values from 0 to 1.
    """
    if frames.size == 0:
        return f"are empty (shape {frames.shape})"
    if np.isnan(frames).any():
        return "turned NaN"
    if np.isinf(frames).any():
        return "turned infinite"
    if frames.max() < _BLACK:
        return "are black"
    if np.ptp(frames, axis=(1, 2)).max() < _CONSTANT:  # every frame one flat colour
        return "are constant"
    return None
