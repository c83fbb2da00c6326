"""Is a video that is spread over ranks the one that a single rank makes? To be asked before such videos are timed.

Small models of all families, in float32, whose heads and tokens do not divide among the ranks. Every rank makes the sparse
video by itself, then all make it together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import adamac
from adamac.attention import AdaCluster, Schedule, Tokens

from .build import arguments, build
from .models import MODELS, Model, tiny
from .ranks import Ranks

_HEAD_DIM = 64
_METHOD = AdaCluster(query_clusters=8, key_clusters=16, outlier_factor=1.5, budget=Tokens(0.2))
_STEPS = 4
_DISAGREES = 1e-3
"""Relative error of latents above which two videos are not the same: float32 rounds to 1e-6 in the few steps made."""


@dataclass(frozen=True)
class Check:
    """One family.

    Attributes:
        model: Its name.
        error: Relative difference of the latents, spread against single, of the rank on which it is largest.
        effect: Relative difference of sparse against dense latents, which says what the error has to be compared with.
        sparse: Whether all calls but those of the first step were sparse.
    """

    model: str
    error: float
    effect: float
    sparse: bool

    @property
    def passed(self) -> bool:
        """Whether the videos are the same, and sparse."""
        return self.sparse and self.error <= min(_DISAGREES, self.effect / 10)

    def __str__(self) -> str:
        word = "agrees" if self.passed else "DISAGREES"
        sparse = "" if self.sparse else ", not sparse"
        return f"{self.model}: {word}, error {self.error:.1e}, sparse against dense {self.effect:.1e}{sparse}"


def check_ranks(ranks: Ranks, device: str) -> list[Check]:
    """Check all families; every rank has to make this call."""
    return [_check(MODELS[name], ranks, device) for name in ("wan-1.3b", "hunyuan-129f", "cogvideox-2b")]


def _check(model: Model, ranks: Ranks, device: str) -> Check:
    model = _uneven(model, ranks.size)
    pipe = build(model, device, torch.float32)
    dense = _video(model, pipe, device)
    single, _ = _sparse_video(model, pipe, device)
    ranks.spread(pipe)
    together, report = _sparse_video(model, pipe, device)
    error = ranks.most(_difference(together, single)) or 0.0
    sparse = set(report.dense_calls) == {"schedule: first steps"} and report.sparse_calls > 0
    return Check(model.name, error, _difference(single, dense), sparse)


def _uneven(model: Model, ranks: int) -> Model:
    """A small model with one head too many and 3 x 9 x 7 tokens."""
    small, heads = tiny(model), 2 * ranks + 1
    config: dict[str, Any] = small.config | {"num_attention_heads": heads, "attention_head_dim": _HEAD_DIM}
    if "rope_axes_dim" in config:
        config["rope_axes_dim"] = (16, 24, 24)
    return replace(small, config=config, heads=heads, head_dim=_HEAD_DIM, height=144, width=112, steps=_STEPS)


def _sparse_video(model: Model, pipe: Any, device: str) -> tuple[torch.Tensor, Any]:
    with adamac.enable(pipe, _METHOD, Schedule(first=1, min_tokens=1)) as handle:
        return _video(model, pipe, device), handle.report()


def _video(model: Model, pipe: Any, device: str) -> torch.Tensor:
    settings = arguments(model, device, torch.float32, guidance=True)
    return pipe(generator=torch.Generator("cpu").manual_seed(0), **settings).frames.double()


def _difference(video: torch.Tensor, expected: torch.Tensor) -> float:
    return float((video - expected).norm() / expected.norm())
