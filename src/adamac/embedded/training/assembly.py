"""Putting the parts together as a stock ``WanPipeline``, saving it, and looking at what it makes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from transformers import PreTrainedTokenizerFast

from adamac.embedded.training import dit


def pipeline(
    vae: AutoencoderKLWan, denoiser: dit.Denoiser, tokenizer: PreTrainedTokenizerFast
) -> WanPipeline:
    """A stock pipeline around trained parts."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=dit.FLOW_SHIFT,
        num_train_timesteps=dit.TIMESTEPS,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=denoiser.text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=denoiser.transformer,
    )


def save(
    vae: AutoencoderKLWan, denoiser: dit.Denoiser, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Save in half precision (fp16 keeps three more bits of these small weights than bf16)."""
    parts = pipeline(copy.deepcopy(vae).half(), dit.copy_of(denoiser).half(), tokenizer)
    parts.save_pretrained(str(folder), safe_serialization=True)
    for file in folder.rglob("*.json"):
        _make_portable(file)


def _make_portable(file: Path) -> None:
    """Take out of a configuration what only holds where it was written."""
    if file.name == "tokenizer.json":  # the tokenizer itself, not a configuration
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    for name in ("_name_or_path", "is_local", "local_files_only"):
        settings.pop(name, None)
    text = json.dumps(settings, indent=2) + "\n"
    # transformers 5 names the class TokenizersBackend, which transformers 4 does not have.
    file.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")


def restore(folder: Path) -> tuple[AutoencoderKLWan, dit.Denoiser, PreTrainedTokenizerFast]:
    """The parts of a saved pipeline in float32, ready for more training."""
    parts = WanPipeline.from_pretrained(str(folder), torch_dtype=torch.float32)
    denoiser = dit.Denoiser(parts.transformer, parts.text_encoder)
    for parameter in denoiser.parameters():
        parameter.requires_grad_(True)
    return parts.vae.float(), denoiser.float(), parts.tokenizer


@torch.no_grad()
def sample(
    parts: WanPipeline, prompts: list[str], generation: dict, guidance: float, seed: int = 0, group: int = 8
) -> np.ndarray:
    """Generate one video for each prompt: ``(prompts, frames, height, width, 3)``, uint8 RGB."""
    device = parts.transformer.device
    settings = generation | {"guidance_scale": guidance}
    videos = []
    for start in range(0, len(prompts), group):
        some = prompts[start : start + group]
        noise = [torch.Generator(device).manual_seed(seed + start + i) for i in range(len(some))]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            made = parts(prompt=some, generator=noise, output_type="np", **settings).frames
        videos.append((np.asarray(made) * 255).round().astype(np.uint8))
    return np.concatenate(videos)


def contact_sheet(videos: np.ndarray, titles: list[str], columns: int, path: Path) -> None:
    """Write a PNG: one row for each video, ``columns`` frames of it, its title above."""
    chosen = np.linspace(0, videos.shape[1] - 1, columns).round().astype(int)
    rows = []
    for video, title in zip(videos, titles, strict=True):
        strip = np.concatenate(list(video[chosen]), axis=1)
        banner = np.full((14, strip.shape[1], 3), 255, np.uint8)
        cv2.putText(banner, title, (2, 11), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        rows += [banner, strip]
    cv2.imwrite(str(path), np.concatenate(rows)[..., ::-1])
