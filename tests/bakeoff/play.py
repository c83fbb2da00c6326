"""Two pipelines for tests: a real one with random weights, and a play one that does as its prompt says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from adamac.bakeoff.config import Config
from adamac.bakeoff.prompts import Prompt


class PlayPipeline:
    """Draws noise that drifts; prompts name what goes wrong: nan latents, nan frames, black, constant, raise."""

    _execution_device = torch.device("cpu")

    def __init__(self):
        self.transformer = torch.nn.Identity()
        self.calls: list[tuple[str, int]] = []

    def __call__(
        self,
        prompt: str,
        generator: torch.Generator,
        output_type: str,
        callback_on_step_end: Any,
        num_inference_steps: int = 4,
        height: int = 32,
        width: int = 48,
        num_frames: int = 5,
    ):
        if height % 8:
            raise ValueError(f"height has to be divisible by 8 but is {height}")
        self.calls.append((prompt, num_inference_steps))
        if prompt == "raise":
            raise RuntimeError("this prompt fails\nwith a second line")
        latents = torch.randn(1, 4, num_frames, height // 8, width // 8, generator=generator)
        for step in range(num_inference_steps):
            self.transformer(latents)
            if prompt == "nan latents":
                latents = latents * float("nan")
            callback_on_step_end(self, step, step, {"latents": latents})
        image = torch.nn.functional.interpolate(latents[:, :1, 0], (height, width), mode="bilinear")[0, 0]
        image = image.sigmoid().numpy()
        frames = np.stack([np.roll(image, 2 * place, axis=1) for place in range(num_frames)])
        frames = np.repeat(frames[..., None], 3, axis=-1)
        if prompt == "nan frames":
            frames[1, 0, 0] = np.nan
        if prompt == "black":
            frames = np.zeros_like(frames)
        if prompt == "constant":
            frames = np.full_like(frames, 0.5)
        return SimpleNamespace(frames=frames[None])

    def set_progress_bar_config(self, disable: bool):
        pass


class Silence:
    """Progress that remembers what it was told."""

    def __init__(self):
        self.rows = []
        self.total = None

    def begins(self, videos, done):
        self.total = videos

    def works_on(self, what):
        pass

    def step_done(self, step):
        pass

    def finished(self, row):
        self.rows.append(row)


def config_of(*texts: str, **changes: Any) -> Config:
    """A small run of the play pipeline: dense by two kernels, a category for each prompt."""
    prompts = tuple(Prompt(f"p{place}", f"category {place}", text) for place, text in enumerate(texts))
    settings = {"model": "play", "prompts": prompts, "arms": ("dense", "dense-math"), "fps": 8}
    return Config(**(settings | changes))


def save_tiny_wan(folder: Path, heads: int = 1) -> None:
    """Save a stock WanPipeline of random weights whose 64 x 64 pixels and 7 frames are 1,024 tokens."""
    from diffusers import WanPipeline

    WanPipeline(**_tiny_parts(channels=4, heads=heads)).save_pretrained(str(folder))


def save_tiny_wan_from_image(folder: Path) -> None:
    """The same for WanImageToVideoPipeline, as Wan 2.2 has it: no encoder of images."""
    from diffusers import WanImageToVideoPipeline

    # Latents, those of the image, and which frames are given: one of each of two frames that make a latent one.
    WanImageToVideoPipeline(**_tiny_parts(channels=4 + 4 + 2)).save_pretrained(str(folder))


def _tiny_parts(channels: int, heads: int = 1) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "moves"]
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = UMT5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return dict(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_temporal=2,
            scale_factor_spatial=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=heads,
            attention_head_dim=64,
            in_channels=channels,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=64,
        ),
    )
