"""Text of few words, and a recipe so small that every line runs in a blink."""

from __future__ import annotations

import random

from adamac.moe.lm.corpus import Corpus
from adamac.moe.lm.recipe import Recipe

WORDS = [
    "the",
    "ball",
    "rolls",
    "over",
    "a",
    "hill",
    "and",
    "an",
    "owl",
    "sees",
    "it",
    "fall",
    "into",
    "deep",
    "water",
    "where",
    "fish",
    "wait",
    "for",
    "rain",
]


def babble(documents: int, seed: int = 0) -> str:
    """Documents of a few known words, with a line of signs between them."""
    draw = random.Random(seed)
    return "\n=====\n".join(" ".join(draw.choices(WORDS, k=60)) + ".\n" for _ in range(documents))


def tiny_recipe(corpus: Corpus, **changes) -> Recipe:
    """A recipe for a prepared corpus."""
    values = {
        "data": (str(corpus.folder),),
        "preset": "bigmac",
        "num_experts": 4,
        "top_k": 2,
        "layers": 2,
        "heads": 2,
        "hidden": 16,
        "context": 16,
        "steps": 6,
        "batch": 4,
        "warmup": 2,
        "eval_every": 3,
        "eval_tokens": 200,
        "save_every": 2,
        **changes,
    }
    return Recipe(**values)
