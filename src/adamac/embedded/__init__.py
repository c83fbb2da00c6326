"""The embedded pipeline: a small text-to-video ``WanPipeline`` that ships with the package.

It is a real text-to-video model of stock diffusers classes, trained by us on a procedural world and
on Big Buck Bunny (CC BY 3.0), small enough to run on a processor: what adamac does to a production
model can be tried, tested and measured on it without a download. ``MODEL_CARD.md`` says what it can do.

Importing this module imports neither torch nor diffusers; how the model was trained is in :mod:`adamac.embedded.training`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

CATEGORIES = ("plain", "cut", "interaction", "thin", "small_fast", "text", "low_light", "reflection")
"""Ids of the prompt categories."""

GENERATION = {
    "height": 112,
    "width": 192,
    "num_frames": 49,
    "num_inference_steps": 10,
    "guidance_scale": 1.0,
    "max_sequence_length": 64,
}
"""Arguments of the pipeline call for which the model was trained: 13 x 14 x 24 = 4,368 tokens."""

FPS = 12
"""Frames a second at which the videos are meant to be shown."""

_HERE = Path(__file__).parent


def path() -> Path:
    """Folder of the weights, for ``WanPipeline.from_pretrained``."""
    return _HERE / "weights"


def load(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> WanPipeline:
    """Load the pipeline.

    Args:
        device: Where to put it.
        dtype: Type of the weights; float32 if None.

    Returns:
        A stock ``diffusers.WanPipeline``; call it with ``**GENERATION``.
    """
    import torch
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    with warnings.catch_warnings():
        # torch_dtype, which all supported versions of diffusers know, is called dtype in the newest.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        parts = WanPipeline.from_pretrained(str(path()), torch_dtype=dtype or torch.float32)
    return parts.to(device)


def prompts(category: str | None = None) -> list[dict[str, str]]:
    """Held-out prompts, none of which was a training caption.

    Args:
        category: One of :data:`CATEGORIES`; None for all.

    Returns:
        Dictionaries with ``id``, ``category``, ``prompt`` and ``expect``; in each category the one
        that looks best comes first.

    Raises:
        ValueError: If the category is unknown.
    """
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"category: expected one of {CATEGORIES}, got {category!r}")
    lines = (_HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    return [e for e in entries if category in (None, e["category"])]
