"""The recipe runs from end to end and its parts do what the stock classes do."""

import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from adamac.embedded import muon
from adamac.embedded import vae as autoencoder


def test_whole_clips_are_coded_as_the_stock_class_codes_them():
    torch.manual_seed(0)
    vae = autoencoder.build(encoder_width=8, decoder_width=8).eval()
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    with torch.no_grad():
        mean, _ = autoencoder.moments(vae, video)
        torch.testing.assert_close(mean, vae.encode(video).latent_dist.mean, atol=1e-5, rtol=1e-4)
        rebuilt = autoencoder.decode(vae, mean).clamp(-1, 1)
        torch.testing.assert_close(rebuilt, vae.decode(mean).sample, atol=1e-5, rtol=1e-4)


def test_muon_updates_have_singular_values_near_one():
    values = torch.linalg.svdvals(muon.orthogonalise(torch.randn(3, 24, 16)))
    assert values.min() > 0.3
    assert values.max() < 1.5


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_run_ends_with_weights_that_load(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 24, (96, 56))
    for t in range(330):
        writer.write(np.full((56, 96, 3), 60 + 120 * (t // 30 % 2), np.uint8))
    writer.release()
    # A process of its own: the painters are forked, which must come before any thread is started.
    command = [sys.executable, "-m", "adamac.embedded.train", "--tiny", "--workers", "1"]
    command += ["--film", str(tmp_path / "film.avi"), "--output", str(tmp_path)]
    command += [f"--{stage}-minutes=0.0001" for stage in ("vae", "short", "full", "distil")]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    with zipfile.ZipFile(tmp_path / "weights.zip") as archive:
        archive.extractall(tmp_path / "weights")
    loaded = WanPipeline.from_pretrained(str(tmp_path / "weights"))
    assert not any(p.isnan().any() for p in loaded.transformer.parameters())
