"""What is known of each supported model family, as data.

One seam serves them all: their self-attention calls ``torch.nn.functional.scaled_dot_product_attention``. What differs is
which modules those are, where text sits, and how the latent grid becomes tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput


class UnsupportedModelError(ValueError):
    """The model is not one that adamac knows how to make sparse."""


@dataclass(frozen=True)
class Family:
    """The facts of one model family.

    Attributes:
        name: For messages.
        transformer: Name of the diffusers class.
        self_attention: Pattern of the names of its self-attention modules; cross-attention and token refiners do not
            match, so they are never touched.
        text: Where text tokens sit in the self-attention sequence.
        patch: Names of the configuration entries of the patch: one with (frames, height, width), or two with
            frames and side.
        frames_first: Whether latents are ``[batch, frames, channels, height, width]``, not channels first.
        text_mask: Name of the transformer's argument ``[batch, text_tokens]`` that says which text tokens are no
            padding; ``None`` if text is never masked in self-attention. Its padding stands at the end of the sequence,
            and the model discards what attention gives for it.
        guidance_in_batch: Whether its pipelines compute both branches of classifier-free guidance in one batch, so that a
            call has twice the heads.
        rounds_frames: Whether its pipelines make one frame more than the next lower multiple of the VAE's factor if asked for
            a number that is not one more than a multiple.
        split: How context parallelism cuts and joins the video tokens of its sequences, in diffusers' terms; empty where
            diffusers knows. Text is not cut.
        unsplit: Entries of the configuration, with the value at which the model reads positions within the sequence, so
            that it cannot be cut.
    """

    name: str
    transformer: str
    self_attention: str
    text: Literal["none", "before", "after"]
    patch: tuple[str, ...]
    frames_first: bool = False
    text_mask: str | None = None
    guidance_in_batch: bool = False
    rounds_frames: bool = False
    split: dict[str, Any] = field(default_factory=dict)
    unsplit: dict[str, Any] = field(default_factory=dict)

    def modules(self, transformer: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
        """Self-attention modules by name, in the order in which they run."""
        pattern = re.compile(self.self_attention)
        return [(name, module) for name, module in transformer.named_modules() if pattern.fullmatch(name)]

    def blocks(self, transformer: torch.nn.Module) -> list[torch.nn.Module]:
        """The blocks that self-attention modules are part of, in the order in which they run."""
        names = dict.fromkeys(name.rpartition(".")[0] for name, _ in self.modules(transformer))
        return [transformer.get_submodule(name) for name in names]

    def grid(self, transformer: Any, latents: torch.Tensor) -> tuple[int, int, int] | None:
        """Token grid (frames, height, width) of latents, or ``None`` if they are not 5-D."""
        if latents.ndim != 5:
            return None
        shape = latents.shape
        frames = shape[1] if self.frames_first else shape[2]
        steps: list[Any] = [getattr(transformer.config, entry) for entry in self.patch]
        if len(steps) == 1:
            per_frame, per_row, per_column = steps[0]
        else:  # CogVideoX 1.0 has no patch in time: its entry is None
            per_frame, per_row, per_column = steps[0] or 1, steps[1], steps[1]
        return frames // per_frame, shape[3] // per_row, shape[4] // per_column


_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
_POSITIONS = ContextParallelInput(split_dim=0, expected_dims=2)
_POSITIONS_MADE = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
_JOINED = ContextParallelOutput(gather_dim=1, expected_dims=3)

FAMILIES = (
    Family(
        name="Wan 2.1 and 2.2",
        transformer="WanTransformer3DModel",
        self_attention=r"blocks\.\d+\.attn1",
        text="none",
        patch=("patch_size",),
        rounds_frames=True,
    ),
    Family(
        name="HunyuanVideo",
        transformer="HunyuanVideoTransformer3DModel",
        self_attention=r"(single_)?transformer_blocks\.\d+\.attn",
        text="after",
        patch=("patch_size_t", "patch_size"),
        text_mask="encoder_attention_mask",
        split={
            "rope": {0: _POSITIONS_MADE, 1: _POSITIONS_MADE},
            "transformer_blocks.0": {"hidden_states": _TOKENS},
            "proj_out": _JOINED,
        },
        unsplit={"image_condition_type": "token_replace"},
    ),
    Family(
        name="CogVideoX",
        transformer="CogVideoXTransformer3DModel",
        self_attention=r"transformer_blocks\.\d+\.attn1",
        text="before",
        patch=("patch_size_t", "patch_size"),
        frames_first=True,
        guidance_in_batch=True,
        split={
            "": {"image_rotary_emb": [_POSITIONS, _POSITIONS]},
            "transformer_blocks.0": {"hidden_states": _TOKENS},
            "proj_out": _JOINED,
        },
    ),
)


def family_of(transformer: torch.nn.Module) -> Family:
    """Find the family of a transformer.

    Raises:
        UnsupportedModelError: Listing what is supported.
    """
    names = {cls.__name__ for cls in type(transformer).__mro__}
    for family in FAMILIES:
        if family.transformer in names:
            return family
    supported = "; ".join(f"{family.name} ({family.transformer})" for family in FAMILIES)
    raise UnsupportedModelError(f"{type(transformer).__name__} is not supported; supported are {supported}")


def transformers_of(pipe_or_transformer: Any) -> list[torch.nn.Module]:
    """List the denoising transformers: both of Wan 2.2, one of the others.

    Raises:
        UnsupportedModelError: If there is none.
    """
    return list(transformers_by_name(pipe_or_transformer).values())


def transformers_by_name(pipe_or_transformer: Any) -> dict[str, torch.nn.Module]:
    """The denoising transformers by the names that pipelines have for them, of which Wan 2.2 may lack either.

    Raises:
        UnsupportedModelError: If there is none.
    """
    if isinstance(pipe_or_transformer, torch.nn.Module):
        return {"transformer": _uncompiled(pipe_or_transformer)}
    found = {name: getattr(pipe_or_transformer, name, None) for name in ("transformer", "transformer_2")}
    transformers = {
        name: _uncompiled(module) for name, module in found.items() if isinstance(module, torch.nn.Module)
    }
    if not transformers:
        raise UnsupportedModelError(
            f"{type(pipe_or_transformer).__name__} has no transformer to make sparse; expected a diffusers pipeline of "
            + ", ".join(family.name for family in FAMILIES)
        )
    return transformers


def _uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """The module within what ``torch.compile(module)`` returned, or the module itself."""
    return getattr(module, "_orig_mod", module)
