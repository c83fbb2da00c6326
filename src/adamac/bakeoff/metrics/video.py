"""Compare a video with the dense arm's video of the same case."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adamac.bakeoff.metrics.fidelity import psnr, ssim
from adamac.bakeoff.metrics.motion import flicker, motion, motion_correlation, optical_flow, sharpness

# Below this many pixels a frame the dense video stands still, and a ratio of motions would be a ratio of noise.
_STILL = 0.05
_NOTHING = 1e-6


@dataclass(frozen=True)
class Comparison:
    """One video against dense, on float frames before any codec.

    Attributes:
        psnr_db: From the mean squared error over the whole video.
        psnr_worst_db: Of the worst frame.
        ssim: Mean over frames.
        ssim_worst: Of the worst frame.
        flicker_ratio: Flicker over dense's; ``None`` where dense has none.
        motion_ratio: Length of optical flow over dense's; ``None`` where dense stands still.
        motion_correlation: Likeness of the two flow fields; ``None`` where dense stands still.
        sharpness_ratio: Sharpness over dense's.
    """

    psnr_db: float
    psnr_worst_db: float
    ssim: float
    ssim_worst: float
    flicker_ratio: float | None
    motion_ratio: float | None
    motion_correlation: float | None
    sharpness_ratio: float | None


def compare(video: NDArray[np.floating], dense: NDArray[np.floating]) -> Comparison:
    """Compare two videos of one case.

    Args:
        video: ``[frames, height, width, 3]``, values from 0 to 1.
        dense: Of the same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    if video.shape != dense.shape:
        raise ValueError(f"video has shape {video.shape} but dense has {dense.shape}")
    pairs = list(zip(video, dense, strict=True))
    likeness = [ssim(frame, reference) for frame, reference in pairs]
    flow, dense_flow = optical_flow(video), optical_flow(dense)
    moves = motion(dense_flow) >= _STILL
    return Comparison(
        psnr_db=psnr(video, dense),
        psnr_worst_db=min(psnr(frame, reference) for frame, reference in pairs),
        ssim=float(np.mean(likeness)),
        ssim_worst=min(likeness),
        flicker_ratio=_ratio(flicker(video), flicker(dense)),
        motion_ratio=motion(flow) / motion(dense_flow) if moves else None,
        motion_correlation=motion_correlation(flow, dense_flow) if moves else None,
        sharpness_ratio=_ratio(sharpness(video), sharpness(dense)),
    )


def _ratio(value: float, dense: float) -> float | None:
    return value / dense if dense > _NOTHING else None
