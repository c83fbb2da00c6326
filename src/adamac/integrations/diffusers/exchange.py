"""From a part of the sequence with all heads to the whole sequence with some heads, and back: DeepSpeed-Ulysses.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). diffusers has it for models whose sequence is all of one kind. HunyuanVideo and
CogVideoX attend over video and text together, and of these only the video is spread: each rank keeps the whole text, works
out all of it, and gives away nothing of it but the heads that it attended with. So padded text can be cut off as on one rank,
the sequence keeps its order, and no length has to divide: ranks take ``ceil`` or ``floor`` of their share of tokens and of
heads, which all know beforehand and need not tell each other.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from adamac.ops.dense_attention import wants_gradient


def shares(amount: int, ranks: int) -> list[int]:
    """Cut an amount into a share for each rank, the first ones one larger if it does not divide (as ``tensor_split``)."""
    each, more = divmod(amount, ranks)
    return [each + (rank < more) for rank in range(ranks)]


class Exchange:
    """The exchange between the ranks that share the sequences of one transformer.

    Attributes:
        group: The ranks.
        text: Where the text stands in the sequence.
        video_tokens: Video tokens of the call in progress, on all ranks together.
    """

    def __init__(self, group: ProcessGroup, text: Literal["none", "before", "after"]) -> None:
        self.group = group
        self.text = text
        self.video_tokens = 0
        self._ranks = dist.get_world_size(group)
        self._rank = dist.get_rank(group)

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor, text_tokens: int) -> tuple[Tensor, ...]:
        """Give away tokens of other ranks' heads for the other ranks' tokens of our heads.

        Args:
            query: ``[batch, heads, tokens, head_dim]``: this rank's video tokens and the whole text.
            key: Like ``query``.
            value: Like ``query``.
            text_tokens: How many of the tokens are text.

        Returns:
            Query, key and value, ``[batch, our_heads, all_tokens, head_dim]``.

        Raises:
            ValueError: If the tokens are not the rank's share, dtypes differ, or gradients are wanted, which would stop here.
        """
        batch, heads, tokens, head_dim = query.shape
        tokens_of, heads_of = shares(self.video_tokens, self._ranks), shares(heads, self._ranks)
        local = tokens_of[self._rank]
        if {part.dtype for part in (key, value)} != {query.dtype}:
            raise ValueError(
                f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
            )
        if tokens != local + text_tokens or not query.shape == key.shape == value.shape:
            raise ValueError(
                f"context parallelism: rank {self._rank} has {tokens} tokens of self-attention, expected its {local} of "
                f"{self.video_tokens} video tokens and {text_tokens} of text; call the transformer, not its blocks"
            )
        if wants_gradient(query, key, value):
            raise ValueError(
                "context parallelism is for inference: gradients would stop between ranks; use torch.no_grad()"
            )
        mine, first = heads_of[self._rank], sum(heads_of[: self._rank])
        width = 3 * batch * head_dim
        send = [local * width * count for count in heads_of]
        sent = query.new_empty(sum(send))
        # Tokens first: what arrives from all ranks is then the sequence in its order, and there is a place for the text.
        whole = query.new_empty(self.video_tokens + text_tokens, 3, batch, mine, head_dim)
        arrived, kept = self._cut(whole, text_tokens, axis=0)
        for index, part in enumerate((query, key, value)):
            video, text = self._cut(part, text_tokens, axis=2)
            kept[:, index] = text[:, first : first + mine].permute(2, 0, 1, 3)
            for piece, theirs in zip(sent.split(send), video.split(heads_of, dim=1), strict=True):
                there = piece.view(local, 3, batch, theirs.shape[1], head_dim)
                there[:, index] = theirs.permute(2, 0, 1, 3)
        self._swap(arrived.view(-1), sent, [count * width * mine for count in tokens_of], send)
        return whole.permute(1, 2, 3, 0, 4).unbind(0)

    def to_tokens(self, attended: Tensor, heads: int, text_tokens: int) -> Tensor:
        """Give back what was attended with our heads for our tokens' other heads; the text's from all heads to all ranks.

        Args:
            attended: ``[batch, our_heads, all_tokens, head_dim]``.
            heads: Of all ranks together.
            text_tokens: How many of the tokens are text.

        Returns:
            ``[batch, heads, tokens, head_dim]``: this rank's video tokens and the whole text.
        """
        batch, mine, _, head_dim = attended.shape
        tokens_of, heads_of = shares(self.video_tokens, self._ranks), shares(heads, self._ranks)
        width = batch * head_dim
        send = [mine * (count + text_tokens) * width for count in tokens_of]
        sent = attended.new_empty(sum(send))
        video, text = self._cut(attended, text_tokens, axis=2)
        # Heads first: what arrives from all ranks is then the heads in their order.
        for piece, part in zip(sent.split(send), video.split(tokens_of, dim=2), strict=True):
            place = piece.view(mine, part.shape[2] + text_tokens, batch, head_dim).permute(2, 0, 1, 3)
            for into, what in zip(self._cut(place, text_tokens, axis=2), (part, text), strict=True):
                into.copy_(what)
        tokens = tokens_of[self._rank] + text_tokens
        received = attended.new_empty(heads * tokens * width)
        self._swap(received, sent, [count * tokens * width for count in heads_of], send)
        return received.view(heads, tokens, batch, head_dim).permute(2, 0, 1, 3)

    def join(self, tokens: Tensor) -> Tensor:
        """Give every rank all tokens.

        Args:
            tokens: ``[batch, tokens, channels]``: this rank's video tokens.

        Returns:
            ``[batch, all_tokens, channels]``.
        """
        tokens_of = shares(self.video_tokens, self._ranks)
        # Parts of one length, because not every back end gathers others.
        part = pad(tokens.transpose(0, 1), (0, 0, 0, 0, 0, tokens_of[0] - tokens_of[self._rank])).contiguous()
        parts = [torch.empty_like(part) for _ in tokens_of]
        dist.all_gather(parts, part, group=self.group)
        joined = [each[:count] for each, count in zip(parts, tokens_of, strict=True)]
        return torch.cat(joined).transpose(0, 1)

    def _cut(self, sequence: Tensor, text_tokens: int, axis: int) -> tuple[Tensor, Tensor]:
        """Video and text of a tensor with an axis of tokens, as views."""
        video_tokens = sequence.shape[axis] - text_tokens
        start = text_tokens if self.text == "before" else 0
        video = sequence.narrow(axis, start, video_tokens)
        return video, sequence.narrow(axis, 0 if start else video_tokens, text_tokens)

    def _swap(self, received: Tensor, sent: Tensor, receive: list[int], send: list[int]) -> None:
        dist.all_to_all_single(received, sent, receive, send, group=self.group)
