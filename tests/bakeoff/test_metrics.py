"""Video metrics against their definitions, and against scikit-image where it has them."""

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from adamac.bakeoff.metrics.fidelity import psnr, ssim
from adamac.bakeoff.metrics.motion import flicker, motion, motion_correlation, optical_flow, sharpness
from adamac.bakeoff.metrics.sanity import frames_problem, latents_problem
from adamac.bakeoff.metrics.video import compare
from adamac.bakeoff.rows import IDENTICAL_DB


@pytest.fixture
def image() -> np.ndarray:
    noise = np.random.default_rng(0).random((64, 96, 3))
    blurred = cv2.GaussianBlur(noise, (0, 0), 3)
    return ((blurred - blurred.min()) / np.ptp(blurred)).astype(np.float32)


@pytest.fixture
def video(image: np.ndarray) -> np.ndarray:
    return np.stack([np.roll(image, 2 * place, axis=1) for place in range(6)])


def noisy(frames: np.ndarray, amount: float = 0.05) -> np.ndarray:
    return np.clip(frames + np.random.default_rng(1).normal(0, amount, frames.shape), 0, 1).astype(np.float32)


def test_psnr_is_that_of_scikit_image(image):
    expected = peak_signal_noise_ratio(image, noisy(image), data_range=1)
    assert psnr(noisy(image), image) == pytest.approx(expected, rel=1e-6)


def test_ssim_is_that_of_scikit_image(image):
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = structural_similarity(image, noisy(image), data_range=1, channel_axis=-1, **settings)
    assert ssim(noisy(image), image) == pytest.approx(expected, abs=1e-5)


def test_psnr_does_not_round_to_eight_bits(image):
    assert psnr(image * (1 - 1e-4), image) > 80


def test_a_video_is_identical_to_itself(video):
    same = compare(video, video)
    assert (same.psnr_db, same.ssim) == (IDENTICAL_DB, pytest.approx(1))
    assert same.motion_ratio == same.flicker_ratio == same.sharpness_ratio == 1


def test_the_worst_frame_is_found(video):
    damaged = video.copy()
    damaged[3] = noisy(video[3], 0.2)
    found = compare(damaged, video)
    assert found.psnr_worst_db == pytest.approx(psnr(damaged[3], video[3]))
    assert found.ssim_worst == pytest.approx(ssim(damaged[3], video[3]))


def test_a_frozen_video_has_no_motion(video):
    frozen = np.repeat(video[:1], len(video), axis=0)
    assert compare(frozen, video).motion_ratio < 0.05


def test_flow_measures_pixels_a_frame(video):
    assert motion(optical_flow(video)) == pytest.approx(2, abs=0.3)


def test_motion_that_goes_the_other_way_is_anticorrelated(video):
    flow = optical_flow(video)
    assert motion_correlation(-flow, flow) == pytest.approx(-1)


def test_nothing_is_said_of_motion_where_dense_stands_still(video):
    still = np.repeat(video[:1], len(video), axis=0)
    found = compare(video, still)
    assert found.motion_ratio is None
    assert found.flicker_ratio is None


def test_shimmer_flickers_more_than_steady_change(image):
    ramp = np.stack([image * share for share in (0.2, 0.4, 0.6, 0.8)])
    assert flicker(ramp) < 1e-6 < flicker(noisy(ramp))


def test_blur_lowers_sharpness(video):
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 2) for frame in video])
    assert compare(blurred, video).sharpness_ratio == pytest.approx(sharpness(blurred) / sharpness(video))
    assert sharpness(blurred) < sharpness(video)


def test_videos_of_different_shapes_are_not_compared(video):
    with pytest.raises(ValueError, match="shape"):
        compare(video[:, :32], video)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda video: video * np.nan, "NaN"),
        (lambda video: video + np.inf, "infinite"),
        (lambda video: video * 0, "black"),
        (lambda video: video * 0 + 0.7, "constant"),
        (lambda video: video[:0], "empty"),
    ],
)
def test_what_is_no_picture_is_named(video, spoil, problem):
    assert problem in frames_problem(spoil(video))


def test_a_dark_picture_is_a_picture(video):
    assert frames_problem(video * 0.02) is None


def test_broken_latents_are_named():
    good = torch.randn(1, 4, 2, 3, 3)
    assert latents_problem(good) is None
    assert "NaN" in latents_problem(good * float("nan"))
    assert "infinite" in latents_problem(good / 0)
    assert "constant" in latents_problem(good * 0)
    assert "missing" in latents_problem(None)
