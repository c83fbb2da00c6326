"""How far a video is from another, frame by frame: PSNR and SSIM on floats.

Both have data from 0 to 1 and need no rounding to 8 bits. Small differences grow along a denoising trajectory, so these figures
measure how far two trajectories parted, not which video is better: read them beside the noise floor, which is dense against
dense with another kernel.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from adamac.bakeoff.rows import IDENTICAL_DB

# The window and the constants of Wang et al. 2004: 11 x 11 pixels, standard deviation 1.5.
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(video: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """Peak signal-to-noise ratio in dB, from the mean squared error over all that is given, data from 0 to 1."""
    error = float(np.mean(np.square(np.subtract(video, reference, dtype=np.float64))))
    return IDENTICAL_DB if error == 0 else min(IDENTICAL_DB, -10 * math.log10(error))


def ssim(image: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """Structural similarity of two images ``[height, width, channels]``, data from 0 to 1; 1 is identical.

    As scikit-image computes it with a Gaussian window and without the sample covariance: the mean over channels and over
    the pixels whose window lies inside the image.

    Raises:
        ValueError: If a side is shorter than the window.
    """
    if min(image.shape[:2]) < _WINDOW:
        raise ValueError(
            f"SSIM needs sides of {_WINDOW} pixels or more, got {image.shape[0]} x {image.shape[1]}"
        )
    first, second = image.astype(np.float64), reference.astype(np.float64)
    mean_1, mean_2 = _blur(first), _blur(second)
    variance_1 = _blur(first * first) - mean_1 * mean_1
    variance_2 = _blur(second * second) - mean_2 * mean_2
    covariance = _blur(first * second) - mean_1 * mean_2
    likeness = (2 * mean_1 * mean_2 + _C1) * (2 * covariance + _C2)
    likeness /= (mean_1**2 + mean_2**2 + _C1) * (variance_1 + variance_2 + _C2)
    border = _WINDOW // 2
    return float(likeness[border:-border, border:-border].mean())


def _blur(image: NDArray[np.float64]) -> NDArray[np.float64]:
    blurred = cv2.GaussianBlur(image, (_WINDOW, _WINDOW), _SIGMA, borderType=cv2.BORDER_REFLECT)
    return np.asarray(blurred, dtype=np.float64)
