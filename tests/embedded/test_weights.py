"""What is promised of the shipped weights."""

import subprocess
import sys

import pytest
import torch

from adamac import embedded

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pipeline():
    return embedded.load()


def test_importing_is_light():
    code = "import sys, adamac.embedded; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_folder_is_at_most_16_mebibytes_of_safetensors_and_text():
    files = [f for f in embedded.path().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 16 * 2**20
    assert {f.suffix for f in files} == {".safetensors", ".json"}


def test_default_videos_have_at_least_four_thousand_tokens(pipeline):
    size, transformer = embedded.GENERATION, pipeline.transformer.config
    spatial = pipeline.vae_scale_factor_spatial
    frames = 1 + (size["num_frames"] - 1) // pipeline.vae_scale_factor_temporal
    tokens = frames * (size["height"] // spatial) * (size["width"] // spatial)
    assert tuple(transformer.patch_size) == (1, 1, 1)
    assert tokens == 4368
    assert transformer.attention_head_dim in (64, 128)


def test_two_steps_at_a_small_size_make_a_finite_picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    small = embedded.GENERATION | {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
    noise = torch.Generator().manual_seed(0)
    frames = pipeline(
        prompt=embedded.prompts("plain")[0]["prompt"], generator=noise, output_type="pt", **small
    ).frames
    assert frames.shape == (1, 5, 3, 32, 48)
    assert frames.isfinite().all()
    assert frames.std() > 0.01


def test_an_unknown_category_is_named():
    with pytest.raises(ValueError, match="category: expected one of"):
        embedded.prompts("landscape")
