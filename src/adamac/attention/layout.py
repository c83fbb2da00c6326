"""Where the video sits in a joint sequence of video and text, and which tokens are padding.

Wan's self-attention holds video alone; HunyuanVideo appends text to it, padded to a fixed length; CogVideoX puts text in
front. Sparse attention clusters video tokens only: every query reads every valid text key, and text queries read
everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adamac.ops.segment import Segments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Layout:
    """The parts of one self-attention sequence.

    Attributes:
        tokens: Length of the sequence, video, text and padding together.
        video_start: First video token.
        video_stop: One past the last video token. Everything outside is text.
        valid: ``[batch, tokens]`` bool, false for padding, which is dropped; ``None`` means that all are valid.
        grid: ``(frames, height, width)`` of the video tokens in raster order, where known; methods that cut tiles
            need it.
        ranks: The ranks among which the heads of the layer are spread; ``None`` if all are here. What a method decides for
            a whole layer it has to decide with them (:mod:`adamac.attention.agree`), in the same calls on every rank.
    """

    tokens: int
    video_start: int
    video_stop: int
    valid: Tensor | None = None
    grid: tuple[int, int, int] | None = None
    ranks: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.video_start < self.video_stop <= self.tokens:
            raise ValueError(
                f"video tokens {self.video_start}..{self.video_stop} must be a non-empty part of a sequence of "
                f"{self.tokens} tokens"
            )
        if self.valid is not None and (self.valid.ndim != 2 or self.valid.shape[1] != self.tokens):
            raise ValueError(
                f"valid must be [batch, tokens] for the {self.tokens} tokens of the sequence, got shape "
                f"{tuple(self.valid.shape)}"
            )
        if self.grid is not None and self.grid[0] * self.grid[1] * self.grid[2] != self.video_tokens:
            raise ValueError(f"grid {self.grid} does not hold {self.video_tokens} video tokens")

    @classmethod
    def video_only(cls, tokens: int, grid: tuple[int, int, int] | None = None) -> Layout:
        """A sequence of video tokens alone, none of them padding."""
        return cls(tokens, 0, tokens, grid=grid)

    @property
    def video_tokens(self) -> int:
        """How many video tokens there are, padded ones included."""
        return self.video_stop - self.video_start

    @property
    def text_tokens(self) -> int:
        """How many text tokens there are, padded ones included."""
        return self.tokens - self.video_tokens

    def video(self, sequence: Tensor) -> Tensor:
        """Cut the video tokens out of ``[batch, heads, tokens, dim]``."""
        return sequence[:, :, self.video_start : self.video_stop]

    def video_valid(self) -> Tensor | None:
        """``[batch, 1, video_tokens]`` bool, or ``None`` if all are valid."""
        if self.valid is None:
            return None
        return self.valid[:, None, self.video_start : self.video_stop]

    def with_text(self, members: Segments) -> Segments:
        """Extend clusters of the video tokens to the sequence: valid text is one more cluster, padding is in none."""
        if self.valid is not None:
            labels = members.labels.new_full((*members.labels.shape[:2], self.tokens), members.number)
            labels[:, :, self.video_start : self.video_stop] = members.labels
            return Segments(labels.masked_fill(~self.valid[:, None], -1), members.number + 1)
        starts, order = members.starts, members.order
        tokens = torch.arange(self.tokens, device=order.device, dtype=order.dtype)
        text = torch.cat([tokens[: self.video_start], tokens[self.video_stop :]])
        order = torch.cat([order + self.video_start, text.expand(*order.shape[:2], -1)], dim=-1)
        return Segments.listed(order, torch.nn.functional.pad(starts, (0, 1), value=self.tokens))

    def same_shape(self, other: Layout) -> bool:
        """Whether a plan made for the other layout has the right shapes for this one."""
        mine = (self.tokens, self.video_start, self.video_stop)
        return mine == (other.tokens, other.video_start, other.video_stop)


def check_attention_inputs(query: Tensor, key: Tensor, layout: Layout, value: Tensor | None = None) -> None:
    """Refuse tensors that cannot be attended.

    Raises:
        ValueError: Naming what was expected and what came.
    """
    named = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, tensor in named.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must be [batch, heads, tokens, head_dim], got shape {tuple(tensor.shape)}"
            )
        if tensor.shape != query.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but query has {tuple(query.shape)}; self-attention needs "
                "them equal (repeat grouped heads first)"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} but query is {query.dtype} on {query.device}; "
                "move them to one dtype and device"
            )
    if not query.dtype.is_floating_point:
        raise ValueError(f"query must be floating point, got {query.dtype}")
    if query.shape[2] == 0:
        raise ValueError("query has zero tokens; there is nothing to attend to")
    if query.shape[2] != layout.tokens:
        raise ValueError(
            f"layout is for {layout.tokens} tokens but query has {query.shape[2]}; make it from query"
        )
    if layout.valid is not None and layout.valid.shape[0] not in (1, query.shape[0]):
        raise ValueError(
            f"layout.valid has batch {layout.valid.shape[0]} but query has batch {query.shape[0]}"
        )
    if layout.valid is not None and layout.valid.dtype != torch.bool:
        raise ValueError(f"layout.valid must be bool, got {layout.valid.dtype}")
    if layout.valid is not None and layout.valid.device != query.device:
        raise ValueError(f"layout.valid is on {layout.valid.device} but query is on {query.device}; move it")
