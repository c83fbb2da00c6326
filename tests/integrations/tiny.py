"""Tiny random pipelines of each family, with prompts given as embeddings: no text encoder, no VAE, no files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor

Run = Callable[..., Tensor]


def wan_transformer(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    return WanTransformer3DModel(**(settings | changes)).eval()


def wan_pipe(two: bool = False, scheduler: Any = None, **changes: Any) -> WanPipeline:
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=scheduler or UniPCMultistepScheduler(**flow),
            transformer=wan_transformer(**changes),
            transformer_2=wan_transformer(seed=1, **changes) if two else None,
            boundary_ratio=0.5 if two else None,
        )
    )


def run_wan(
    pipe: WanPipeline, *, seed: int = 0, steps: int = 4, guidance: float = 5.0, **more: Any
) -> Tensor:
    """Make a video of 3 x 8 x 10 = 240 tokens."""
    noise = torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = dict(
        prompt_embeds=torch.randn(1, 7, 16, generator=noise),
        negative_prompt_embeds=torch.randn(1, 7, 16, generator=noise),
        height=128,
        width=160,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=noise,
        output_type="latent",
    )
    return pipe(**(settings | more)).frames


def hunyuan_pipe(**changes: Any) -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    transformer = HunyuanVideoTransformer3DModel(**(settings | changes)).eval()
    return quiet(
        HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=None,
            tokenizer_2=None,
        )
    )


def run_hunyuan(pipe: HunyuanVideoPipeline, *, seed: int = 0, steps: int = 4, **more: Any) -> Tensor:
    """Make two videos in one batch whose texts are padded differently: 5 and 11 of 12 tokens are valid."""
    noise = torch.Generator().manual_seed(seed)
    mask = torch.zeros(2, 12, dtype=torch.long)
    mask[0, :5] = 1
    mask[1, :11] = 1
    settings: dict[str, Any] = dict(
        prompt_embeds=torch.randn(2, 12, 16, generator=noise),
        pooled_prompt_embeds=torch.randn(2, 8, generator=noise),
        prompt_attention_mask=mask,
        height=128,
        width=160,
        num_frames=9,
        num_inference_steps=steps,
        generator=noise,
        output_type="latent",
    )
    return pipe(**(settings | more)).frames


def cogvideox_pipe(**changes: Any) -> CogVideoXPipeline:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=20,
        sample_height=16,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=7,
    )
    transformer = CogVideoXTransformer3DModel(**(settings | changes)).eval()
    return quiet(
        CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=transformer,
            scheduler=CogVideoXDDIMScheduler(),
        )
    )


def run_cogvideox(pipe: CogVideoXPipeline, *, seed: int = 0, steps: int = 4, **more: Any) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = dict(
        prompt_embeds=torch.randn(1, 7, 16, generator=noise),
        negative_prompt_embeds=torch.randn(1, 7, 16, generator=noise),
        height=128,
        width=160,
        num_frames=9,
        num_inference_steps=steps,
        generator=noise,
        output_type="latent",
    )
    return pipe(**(settings | more)).frames


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
