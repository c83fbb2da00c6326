"""The self-attention calls of real video models, and tensors of those shapes to time them on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adamac.attention.layout import Layout


@dataclass(frozen=True)
class Shape:
    """One self-attention call.

    Attributes:
        video: Video tokens.
        heads: Attention heads.
        head_dim: Width of a head.
        text: Text tokens that are not padding.
        text_first: Whether text stands before the video.
        what: The model, and the video that has so many tokens.
    """

    video: int
    heads: int
    head_dim: int
    text: int = 0
    text_first: bool = False
    what: str = ""

    @property
    def tokens(self) -> int:
        """Length of the joint sequence."""
        return self.video + self.text

    def layout(self) -> Layout:
        """Where the video sits."""
        start = self.text if self.text_first else 0
        return Layout(self.tokens, start, start + self.video)


SHAPES = {
    "tiny": Shape(1024, 2, 64, what="none; to try the benchmark"),
    "cogvideox-2b": Shape(17_550, 30, 64, 226, True, "CogVideoX-2B, 49 frames, 480x720"),
    "wan-1.3b": Shape(32_760, 12, 128, what="Wan2.1-1.3B, 81 frames, 480x832"),
    "wan-14b": Shape(75_600, 40, 128, what="Wan2.1-14B, 81 frames, 720x1280"),
    "hunyuan-129f": Shape(118_800, 24, 128, 64, what="HunyuanVideo, 129 frames, 720x1280"),
    "hunyuan-193f": Shape(176_400, 24, 128, 64, what="HunyuanVideo, 193 frames, 720x1280"),
}
"""By name. HunyuanVideo's text is what is left when its padding is dropped; 64 tokens are a prompt of usual length."""

TOPICS = 512
RUN = 40
SHARPNESS = 4.0
NOISE = 0.6


def draw(
    shape: Shape, device: torch.device | str, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw query, key and value that are alike to those of trained attention, as :func:`adamac.testing.attention_like`.

    Each run of 40 neighbouring tokens is about one of 512 topics, and topics return. In each head a topic has a direction;
    a key is its topic's direction and noise of 0.6, a query looks for keys of its topic (mean logit 4, lengths vary by a
    third), a value follows the topic too. The tensors are drawn on the device, fresh for each seed, and lie in memory as a
    transformer's projections leave them: token by token, heads side by side.

    Returns:
        Three tensors ``[1, heads, tokens, head_dim]``, views of ``[1, tokens, heads, head_dim]``.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    topic = torch.randint(TOPICS, (shape.tokens // RUN + 1,), generator=generator, device=device)
    topic = topic.repeat_interleave(RUN)[: shape.tokens]

    def about(directions: Tensor) -> Tensor:
        return directions[topic].add_(normal(shape.tokens, shape.heads, shape.head_dim), alpha=NOISE)

    directions = normal(TOPICS, shape.heads, shape.head_dim)
    length = (0.3 * normal(shape.tokens, shape.heads, 1)).exp() * SHARPNESS / shape.head_dim**0.5
    query = about(directions) * length
    parts = query, about(directions), about(normal(TOPICS, shape.heads, shape.head_dim))
    query, key, value = (part.unsqueeze(0).transpose(1, 2) for part in parts)
    return query, key, value


def drift(tensor: Tensor, share: float, seed: int) -> Tensor:
    """The same tensor a denoising step earlier: noise of this share of its deviation added."""
    generator = torch.Generator(tensor.device).manual_seed(seed)
    noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
    return tensor + share * tensor.std() * noise
