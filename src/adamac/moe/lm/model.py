"""A small GPT with experts in every layer.

Pre-norm blocks of causal attention (rotary positions, no biases) and a :class:`adamac.moe.layer.MoE` of any configuration in
place of the feed-forward network. Nothing else is in it, so that two models differ in their experts alone: no dropout, no
linear biases, one RMSNorm before each half of a block and one at the end.

Initialisation: every matrix with standard deviation ``hidden ** -0.5``, and what writes to the residual smaller by
``sqrt(2 * layers)``, so that it keeps its size at any depth. The experts draw themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adamac.moe.layer import MoE
from adamac.moe.presets import MoEConfig


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of a model.

    Attributes:
        vocab: Number of token ids.
        layers: Blocks.
        heads: Attention heads of a block.
        hidden: Width.
        context: Most tokens that it reads.
        moe: The experts of every block.
        tied: Whether the output reads with the embedding's matrix.
        rope_base: Longest wavelength of rotary positions, over two pi.
        norm_eps: Added to mean squares.
    """

    vocab: int
    layers: int
    heads: int
    hidden: int
    context: int
    moe: MoEConfig
    tied: bool = True
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Check what can be checked without building it."""
        for name in ("vocab", "layers", "heads", "hidden", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden must be a multiple of twice the heads (rotary positions turn pairs), got hidden {self.hidden} "
                f"and {self.heads} heads"
            )
        if self.moe.hidden != self.hidden:
            raise ValueError(f"the experts are for hidden {self.moe.hidden}, the model has {self.hidden}")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    def dropless(self) -> GPTConfig:
        """The same model with experts that take all tokens that choose them."""
        return replace(self, moe=replace(self.moe, capacity=None))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """Read :meth:`to_dict`'s result.

        Raises:
            ValueError: If something is missing or unknown.
        """
        try:
            read: dict[str, Any] = {**values, "moe": MoEConfig(**values["moe"])}
            return cls(**read)
        except (TypeError, KeyError) as error:
            known = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"not a model configuration ({error}); expected {known}") from None


Keep = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(layer, key, value)`` of new tokens to key and value of all tokens so far, ``[batch, heads, tokens, head_dim]``."""


@dataclass(frozen=True)
class View:
    """What the tokens of a call are, where they are not the beginning of a text each.

    Attributes:
        positions: ``[batch, tokens]`` int64, place of each token in its text.
        mask: ``[batch, 1, tokens, keys]``, what each token reads, as bool or as what is added to its scores; ``None`` is all
            before it and itself.
        valid: ``[batch, tokens]`` bool, which are no padding; ``None`` is all. Padding reaches no expert.
        keep: Stores keys and values of earlier calls; ``None`` where there are none.
    """

    positions: Tensor
    mask: Tensor | None = None
    valid: Tensor | None = None
    keep: Keep | None = None


class RMSNorm(nn.Module):
    """Divide by the root mean square and scale, computed in float32 at least."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last axis."""
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (normed * self.weight).to(x.dtype)


def rotations(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines that turn each pair of a head at each position, ``[batch, 1, tokens, head_dim // 2]``."""
    wide = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide)
    angles = positions.to(wide)[:, None, :, None] * base ** (-pairs / head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs ``(i, i + head_dim / 2)`` of ``[batch, heads, tokens, head_dim]``."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], view: View | None) -> Tensor:
        """Attend: ``[batch, tokens, hidden]`` to the same."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = rotate(query, turn), rotate(key, turn)
        if view is not None and view.keep is not None:
            key, value = view.keep(self.layer, key, value)
        mask = None if view is None else view.mask
        causal = mask is None and x.shape[1] > 1  # a single token reads all there is
        attended = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and experts, each reading a normed residual and adding to it."""

    def __init__(self, config: GPTConfig, layer: int, **experts: Any) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config, layer)
        self.moe_norm = RMSNorm(config.hidden, config.norm_eps)
        self.moe = MoE(config.moe, **experts)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], view: View | None) -> Tensor:
        """One layer: ``[batch, tokens, hidden]`` to the same."""
        x = x + self.attention(self.attention_norm(x), turn, view)
        normed = self.moe_norm(x)
        if view is None or view.valid is None:
            return x + self.moe(normed)
        x = x.clone()
        x[view.valid] += self.moe(normed[view.valid])
        return x


class GPT(nn.Module):
    """Token ids to the logits of the next token.

    Attributes:
        config: Its shape.
    """

    def __init__(self, config: GPTConfig, **experts: Any) -> None:
        """Build and initialise it from torch's random numbers.

        Args:
            config: Shape.
            **experts: Passed to every :class:`adamac.moe.layer.MoE`: ``dispatcher`` and ``group``.
        """
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        blocks = [Block(config, layer, **experts) for layer in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.hidden, config.vocab, bias=False)
        self._initialise(blocks)

    def forward(self, ids: Tensor, view: View | None = None) -> Tensor:
        """Compute logits.

        Args:
            ids: ``[batch, tokens]`` int64.
            view: What the tokens are; ``None``: each row is the beginning of a text.

        Returns:
            ``[batch, tokens, vocab]``.
        """
        return self.logits(self.features(ids, view))

    def features(self, ids: Tensor, view: View | None = None) -> Tensor:
        """What the output matrix reads: ``[batch, tokens, hidden]``."""
        x = self.embedding(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None] if view is None else view.positions
        turn = rotations(positions, self.config.head_dim, self.config.rope_base, x.dtype)
        for block in self.blocks:
            x = block(x, turn, view)
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """Read the vocabulary's logits from features."""
        return functional.linear(features, self.output_matrix)

    @property
    def output_matrix(self) -> Tensor:
        """``[vocab, hidden]``."""
        return self.embedding.weight if self.head is None else self.head.weight

    @contextmanager
    def without_capacity(self) -> Generator[None]:
        """Let experts take all tokens that choose them, for a while."""
        routers = [moe.router for moe in self.moes]
        try:
            for router in routers:
                router.config = replace(router.config, capacity=None)
            yield
        finally:
            for router in routers:
                router.config = self.config.moe

    @property
    def moes(self) -> list[MoE]:
        """The experts of each block."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    @torch.no_grad()
    def _initialise(self, blocks: list[Block]) -> None:
        reading, writing = self.config.hidden**-0.5, (2 * self.config.layers) ** -0.5
        nn.init.normal_(self.embedding.weight, std=reading)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=reading)
        for block in blocks:
            nn.init.normal_(block.attention.qkv.weight, std=reading)
            nn.init.normal_(block.attention.out.weight, std=reading * writing)
            block.moe.reset_parameters(writing)
