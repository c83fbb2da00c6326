"""The models as data: configurations, shapes, schedulers and calls, as their publishers give them.

A transformer's configuration names what differs from the defaults of its class in diffusers. Sources: ``config.json`` and
``scheduler_config.json`` of the repository named in ``source``, and the example of the pipeline in diffusers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

Guidance = Literal["separate", "batched", "embedded"]

# Share of the steps that the schedule of a whole video leaves dense, at the start.
DENSE_SHARE = 0.1
# All three video autoencoders make one latent frame of the first frame and of every four further ones, and shrink sides by 8.
_FRAMES_PER_LATENT, _PIXELS_PER_LATENT = 4, 8


@dataclass(frozen=True)
class Text:
    """What stands in for an encoded prompt.

    Attributes:
        tokens: Length after padding.
        valid: Tokens of a prompt of usual length; the rest is padding.
        width: Of each token's embedding.
        pooled: Width of the pooled embedding; 0 if the model takes none.
        joint: Whether text is part of the self-attention sequence.
        masked: Whether the pipeline takes a mask of the valid tokens.
    """

    tokens: int
    valid: int
    width: int = 4096
    pooled: int = 0
    joint: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Model:
    """One model at one shape.

    Attributes:
        name: On the command line and in rows.
        source: Repository whose configuration this is.
        pipeline: Name of the class in diffusers.
        transformer: Likewise.
        config: What differs from the defaults of the transformer's class.
        heads: Attention heads, for rows.
        head_dim: Likewise.
        layers: Name of each list of blocks, and the entry of the configuration with its length.
        depth: Length of each, in the same order.
        patch: Latents in a token: frames, height, width.
        scheduler: Name of the class in diffusers.
        scheduler_config: What differs from its defaults.
        height: Pixels.
        width: Pixels.
        frames: Frames of the video.
        steps: Denoising steps of a whole video.
        guidance: How guidance is computed: two forwards a step, one forward of a batch of two, or none of its own.
        guidance_scale: Scale of the pipeline call.
        text: The prompt's stand-in.
    """

    name: str
    source: str
    pipeline: str
    transformer: str
    config: dict[str, Any]
    heads: int
    head_dim: int
    layers: dict[str, str]
    depth: tuple[int, ...]
    scheduler: str
    scheduler_config: dict[str, Any]
    height: int
    width: int
    frames: int
    guidance: Guidance
    guidance_scale: float
    text: Text
    patch: tuple[int, int, int] = (1, 2, 2)
    steps: int = 50

    @property
    def video_tokens(self) -> int:
        """Video tokens of a sample."""
        frames = (self.frames - 1) // _FRAMES_PER_LATENT + 1
        sides = (self.height // _PIXELS_PER_LATENT, self.width // _PIXELS_PER_LATENT)
        return math.prod(size // step for size, step in zip((frames, *sides), self.patch, strict=True))

    @property
    def num_layers(self) -> int:
        """Blocks of all lists together."""
        return sum(self.depth)

    @property
    def dense_steps(self) -> int:
        """Steps that the schedule of a whole video leaves dense."""
        return math.ceil(DENSE_SHARE * self.steps - 1e-9)

    def shortened(self, layers: int) -> Model:
        """The model with fewer layers, of each list its share and at least one."""
        depth = tuple(max(1, round(length * layers / self.num_layers)) for length in self.depth)
        entries = dict(zip(self.layers.values(), depth, strict=True))
        return replace(self, config=self.config | entries, depth=depth)


_WAN: dict[str, Any] = dict(
    pipeline="WanPipeline",
    transformer="WanTransformer3DModel",
    head_dim=128,
    layers={"blocks": "num_layers"},
    scheduler="UniPCMultistepScheduler",
    frames=81,
    guidance="separate",
    guidance_scale=5.0,
    # Cross-attention alone reads it, all 512 tokens: the pipeline fills up with zeros and masks nothing.
    text=Text(tokens=512, valid=60),
)
_HUNYUAN: dict[str, Any] = dict(
    source="hunyuanvideo-community/HunyuanVideo",
    pipeline="HunyuanVideoPipeline",
    transformer="HunyuanVideoTransformer3DModel",
    config={},  # the defaults of the class are this model
    heads=24,
    head_dim=128,
    layers={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    depth=(20, 40),
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_config={"shift": 7.0},
    height=720,
    width=1280,
    # The scale is an input of the distilled transformer.
    guidance="embedded",
    guidance_scale=6.0,
    # A prompt of two sentences is about 60 tokens; its template's own tokens are cut off, the rest up to 256 is masked.
    text=Text(tokens=256, valid=60, pooled=768, joint=True, masked=True),
)


def _wan_scheduler(flow_shift: float) -> dict[str, Any]:
    """Settings of Wan's scheduler; diffusers advises a shift of 3 for 480p and 5 for 720p."""
    return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift}


_ALL = (
    Model(
        name="cogvideox-2b",
        source="zai-org/CogVideoX-2b",
        pipeline="CogVideoXPipeline",
        transformer="CogVideoXTransformer3DModel",
        config={},  # the defaults of the class are this model
        heads=30,
        head_dim=64,
        layers={"transformer_blocks": "num_layers"},
        depth=(30,),
        scheduler="CogVideoXDDIMScheduler",
        scheduler_config={
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": 3.0,
            "timestep_spacing": "trailing",
        },
        height=480,
        width=720,
        frames=49,
        guidance="batched",
        guidance_scale=6.0,
        text=Text(
            tokens=226, valid=226, joint=True
        ),  # padded to 226 and nothing masked: padding is attended too
    ),
    Model(
        name="wan-1.3b",
        source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        config={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        heads=12,
        depth=(30,),
        scheduler_config=_wan_scheduler(3.0),
        height=480,
        width=832,
        **_WAN,
    ),
    Model(
        name="wan-14b",
        source="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        config={},  # the defaults of the class are this model
        heads=40,
        depth=(40,),
        scheduler_config=_wan_scheduler(5.0),
        height=720,
        width=1280,
        **_WAN,
    ),
    Model(name="hunyuan-129f", frames=129, **_HUNYUAN),
    # As many tokens as the longest video of the AdaCluster paper: 49 latent frames of 3,600 tokens.
    Model(name="hunyuan-193f", frames=193, **_HUNYUAN),
)

MODELS: dict[str, Model] = {model.name: model for model in _ALL}
"""Every model by its name."""

_TINY_SIZE: dict[str, Any] = dict(heads=2, head_dim=16, height=128, width=160, frames=9, steps=10)
_TINY_CONFIG: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": dict(text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2),
    "HunyuanVideoTransformer3DModel": dict(
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
    ),
    "CogVideoXTransformer3DModel": dict(
        text_embed_dim=16,
        time_embed_dim=8,
        max_text_seq_length=8,
        num_layers=2,
        sample_width=20,
        sample_height=16,
        sample_frames=9,
    ),
}


def tiny(model: Model) -> Model:
    """A model of the same classes with 240 video tokens, for rehearsals."""
    config = _TINY_CONFIG[model.transformer] | dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4
    )
    text = replace(model.text, tokens=8, valid=5, width=16, pooled=8 if model.text.pooled else 0)
    depth = tuple(config[entry] for entry in model.layers.values())
    return replace(model, config=config, depth=depth, text=text, **_TINY_SIZE)
