"""A recipe: everything that decides what a training run computes, as one frozen value that is kept with the run."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from adamac.moe.lm.model import GPTConfig
from adamac.moe.presets import preset

CADENCE = ("eval_every", "save_every", "log_every")
"""Fields that change nothing of what is learnt."""
SEEDS = 2**32
"""Seeds below it, of either sign: with a step and a rank they still make numbers that torch takes as seeds."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, on what and how.

    The defaults are a model that learns something in about two minutes on two processor cores.

    Attributes:
        data: Text files and directories, or one prepared corpus; none is the built-in corpus.
        separator: What stands between documents; ``None`` gathers paragraphs.
        held_out: Share of documents that is held out.
        vocab: Size of the vocabulary; 257 means plain bytes.
        preset: Name of the shape of the experts.
        num_experts: Of the fine-grained baseline, as in :func:`adamac.moe.presets.preset`.
        top_k: Likewise.
        ratio: Likewise.
        moe: Fields of :class:`adamac.moe.presets.MoEConfig` that differ from the preset.
        layers: Number of transformer blocks.
        heads: Attention heads.
        hidden: Width of the model.
        context: Tokens in a training window, and the most that the model reads.
        tied: Whether the output shares the embedding's matrix.
        steps: Optimizer steps.
        batch: Windows in an optimizer step, over all ranks.
        micro_batch: Windows that a rank computes at once; ``None`` is its whole share.
        lr: Peak learning rate.
        final_lr: Share of the peak that is left at the end.
        warmup: Steps over which the learning rate rises to its peak.
        weight_decay: AdamW's, of matrices alone.
        betas: AdamW's.
        eps: AdamW's.
        clip: Largest norm of the gradient.
        eval_every: Steps between evaluations; there is one at the end anyway.
        eval_tokens: Held-out tokens of an evaluation at most.
        save_every: Steps between checkpoints; there is one at the end anyway.
        log_every: Steps between rows.
        seed: Of the initial weights and the order of windows.
    """

    data: tuple[str, ...] = ()
    separator: str | None = None
    held_out: float = 0.02
    vocab: int = 4096
    preset: str = "bigmac_stable"
    num_experts: int = 16
    top_k: int = 4
    ratio: float = 0.25
    moe: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    heads: int = 4
    hidden: int = 128
    context: int = 128
    tied: bool = True
    steps: int = 900
    batch: int = 8
    micro_batch: int | None = None
    lr: float = 6e-3
    final_lr: float = 0.1
    warmup: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    eval_every: int = 300
    eval_tokens: int = 50_000
    save_every: int = 300
    log_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers that nothing else checks."""
        for name in ("steps", "batch", "eval_every", "eval_tokens", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_tokens < self.context:
            raise ValueError(
                f"eval_tokens must be at least the context ({self.context}), as whole windows are read; got {self.eval_tokens}"
            )
        if abs(self.seed) >= SEEDS:
            raise ValueError(f"seed must lie between -{SEEDS} and {SEEDS}, got {self.seed}")
        if self.separator == "":
            raise ValueError("separator must be some text, or None to gather paragraphs; got an empty one")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch:
            raise ValueError(f"micro_batch must be 1 to batch ({self.batch}), got {self.micro_batch}")
        for name in ("lr", "eps", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be over 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "final_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        self.model(self.vocab)

    def model(self, vocab: int) -> GPTConfig:
        """Shape of the model for a vocabulary as large as the corpus gave."""
        experts = preset(self.preset, self.hidden, self.num_experts, self.top_k, self.ratio, changes=self.moe)
        return GPTConfig(
            vocab=vocab,
            layers=self.layers,
            heads=self.heads,
            hidden=self.hidden,
            context=self.context,
            moe=experts,
            tied=self.tied,
        )

    def learning_rate(self, step: int) -> float:
        """Rate of update number ``step``, counted from 0: a linear rise, then half a cosine."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (
            self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        values = asdict(self)
        return values | {"data": list(self.data), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Read :meth:`to_dict`'s result.

        Raises:
            ValueError: If something is missing or unknown.
        """
        try:
            read: dict[str, Any] = {**values, "data": tuple(values["data"]), "betas": tuple(values["betas"])}
            return cls(**read)
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a recipe: {error}") from None

    def differences(self, other: Recipe) -> list[str]:
        """What differs from another recipe in what is computed, in words: not how often something is written or measured."""
        names = [item.name for item in fields(self) if item.name not in CADENCE]
        here, there = (
            vars(recipe) | {"data": [os.path.abspath(path) for path in recipe.data]}
            for recipe in (self, other)
        )
        return [
            f"{name} {getattr(other, name)!r} (now {getattr(self, name)!r})"
            for name in names
            if here[name] != there[name]
        ]
