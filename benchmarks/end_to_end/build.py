"""Pipelines with random weights: no text encoder, no autoencoder, no files.

Weights are what the classes themselves draw when they are made, right on the device and in the dtype of the benchmark: linear
layers uniform within the root of their width, norms one. That keeps activations finite through all layers, which the
benchmark checks on the latents of every turn. Entries that diffusers keeps in float32 when it loads a model are in float32
here too, since they decide how long norms and modulation take.

All three pipelines do without a text encoder and an autoencoder when prompts come as embeddings and videos leave as latents;
without an autoencoder they assume the compression that the real ones have (4 frames, 8 pixels), so nothing has to stand in.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch

from .models import Model

Pipeline = Any
"""A diffusers pipeline; its attributes are those of its class, not of the base class."""


def build(model: Model, device: str, dtype: torch.dtype) -> Pipeline:
    """Make the pipeline of a model, on the device."""
    scheduler = getattr(diffusers, model.scheduler)(**model.scheduler_config)
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    if model.pipeline == "HunyuanVideoPipeline":
        parts |= {"tokenizer_2": None, "text_encoder_2": None}
    pipe = getattr(diffusers, model.pipeline)(
        transformer=_transformer(model, device, dtype), scheduler=scheduler, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(model: Model, device: str, dtype: torch.dtype, *, guidance: bool) -> dict[str, Any]:
    """Arguments of the pipeline call, but for the callback.

    Args:
        model: Whose pipeline is called.
        device: Of the embeddings.
        dtype: Of the embeddings.
        guidance: Whether classifier-free guidance is on; a distilled model has none to turn off.
    """
    text = model.text
    free = model.guidance != "embedded"  # classifier-free: the pipeline runs a negative prompt as well
    settings: dict[str, Any] = {
        "height": model.height,
        "width": model.width,
        "num_frames": model.frames,
        "num_inference_steps": model.steps,
        "guidance_scale": model.guidance_scale if guidance or not free else 1.0,
        "output_type": "latent",
        "prompt_embeds": _embeddings(model, device, dtype, seed=0),
    }
    if free and guidance:
        settings["negative_prompt_embeds"] = _embeddings(model, device, dtype, seed=1)
    if text.masked:
        mask = torch.zeros(1, text.tokens, dtype=torch.long, device=device)
        mask[:, : text.valid] = 1
        settings["prompt_attention_mask"] = mask
    if text.pooled:
        settings["pooled_prompt_embeds"] = torch.zeros(1, text.pooled, device=device, dtype=dtype)
    return settings


@contextmanager
def few_layers(pipe: Pipeline, model: Model, layers: int | None) -> Generator[None]:
    """Leave only the first layers of each list of blocks, for a warm-up; ``None`` leaves all."""
    transformer = pipe.transformer
    whole = {name: getattr(transformer, name) for name in model.layers}
    try:
        for name, blocks in whole.items():
            setattr(transformer, name, blocks[:layers])
        yield
    finally:
        for name, blocks in whole.items():
            setattr(transformer, name, blocks)


@contextmanager
def compiled_blocks(pipe: Pipeline, model: Model) -> Generator[None]:
    """Compile the transformer's blocks, and take that off again."""
    # Not by diffusers' compile_repeated_blocks, which does not know the blocks of CogVideoX.
    blocks = [block for name in model.layers for block in getattr(pipe.transformer, name)]
    for block in blocks:
        block.compile(fullgraph=True)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        # What was compiled refers to hooks that are gone now; kept, it would count against torch's limit of recompilations.
        torch._dynamo.reset()


def _transformer(model: Model, device: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(device), _default_dtype(dtype):
        transformer = getattr(diffusers, model.transformer)(**model.config)
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return transformer.to(device).eval().requires_grad_(False)


def _embeddings(model: Model, device: str, dtype: torch.dtype, *, seed: int) -> torch.Tensor:
    """Random in place of a prompt, zeros in place of its padding."""
    text = model.text
    noise = torch.Generator("cpu").manual_seed(seed)
    embeddings = torch.randn(1, text.tokens, text.width, generator=noise)
    embeddings[:, text.valid :] = 0
    return embeddings.to(device, dtype)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)
