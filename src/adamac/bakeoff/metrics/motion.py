"""What a video does in time, and how sharp it is: the damage that similarity to dense does not name.

Sparse attention can freeze a video (consistency rises, motion falls), make it shimmer, or blur it. Each is one number a
video, to be read as a ratio to dense.
"""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray


def flicker(frames: NDArray[np.floating]) -> float:
    """Mean absolute second difference in time: steady motion cancels out, shimmer does not.

    Args:
        frames: ``[frames, height, width, channels]``.
    """
    return float(np.abs(np.diff(frames, n=2, axis=0)).mean()) if len(frames) > 2 else 0.0


def optical_flow(frames: NDArray[np.floating]) -> NDArray[np.float32]:
    """Dense optical flow between neighbouring frames, by OpenCV's DIS method.

    Args:
        frames: ``[frames, height, width, 3]``, values from 0 to 1.

    Returns:
        ``[frames - 1, height, width, 2]``, pixels a frame.
    """
    gray = [cv2.cvtColor(_bytes(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = np.zeros((max(0, len(gray) - 1), *frames.shape[1:3], 2), np.float32)
    for out, (first, second) in zip(flow, pairwise(gray), strict=True):
        out[:] = method.calc(first, second, np.zeros_like(out))
    return flow


def motion(flow: NDArray[np.float32]) -> float:
    """Mean length of optical flow, pixels a frame."""
    return float(np.linalg.norm(flow, axis=-1).mean()) if flow.size else 0.0


def motion_correlation(flow: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Whether two videos move alike: the cosine between their flow fields, 1 if the same, 0 if unrelated."""
    lengths = float(np.linalg.norm(flow)) * float(np.linalg.norm(reference))
    return float(np.vdot(flow, reference)) / lengths if lengths else 0.0


def sharpness(frames: NDArray[np.floating]) -> float:
    """Variance of the Laplacian of the brightness, mean over frames."""
    gray = (cv2.cvtColor(np.ascontiguousarray(frame, np.float32), cv2.COLOR_RGB2GRAY) for frame in frames)
    return float(np.mean([cv2.Laplacian(image, cv2.CV_32F).var() for image in gray]))


def _bytes(frame: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.round(np.clip(frame, 0, 1) * 255).astype(np.uint8)
