"""What a scene shows, before it is painted: its script, the size of its clip, and the words and paths of single objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adamac.embedded.training import drawing
from adamac.embedded.training.drawing import BACKGROUNDS, COLOURS, HIDDEN_ON, SHAPES
from adamac.embedded.training.motions import MOTIONS, WORLD_HEIGHT, Path, move

SIZES = {"small ": 12.0, "": 18.0, "big ": 26.0}
"""Half extents in world units, by the word that goes before the colour."""

NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}


Painter = Callable[[np.ndarray, int], dict[str, np.ndarray]]
"""Paints frame ``t`` onto a canvas and returns the corners of every named object."""


@dataclasses.dataclass
class Script:
    """What a scene shows before it is painted; lengths in world units."""

    caption: str
    background: str
    painter: Painter
    finish: Callable[[np.ndarray, int], np.ndarray] | None = None
    text: str | None = None
    cut: int | None = None
    background_after: str | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """Size of a clip and the scale between world units and pixels."""

    frames: int
    height: int
    width: int

    @property
    def scale(self) -> float:
        """Pixels in a world unit."""
        return self.height / WORLD_HEIGHT

    @property
    def room(self) -> float:
        """Width of the frame in world units."""
        return self.width / self.scale


def choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """One of some options, all alike."""
    return options[int(rng.integers(len(options)))]


def pick_background(rng: np.random.Generator, *colours: str) -> str:
    """A background on which every one of the colours can be seen."""
    hidden = {name for colour in colours for name in HIDDEN_ON.get(colour, ())}
    return choose(rng, [name for name in BACKGROUNDS if name not in hidden])


def article(words: str) -> str:
    """The words with a or an before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def two_colours(rng: np.random.Generator) -> tuple[str, str]:
    """Two colours that differ."""
    first, second = rng.choice(list(COLOURS), 2, replace=False)
    return str(first), str(second)


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object with its words and its path."""

    shape: str
    colour: str
    path: Path
    scale: float
    flip: bool = False
    size_word: str = ""

    @property
    def name(self) -> str:
        """What a caption calls it."""
        return f"{self.size_word}{self.colour} {self.shape}"

    def paint(self, canvas: np.ndarray, t: int) -> np.ndarray:
        """Paint it onto frame ``t``; returns its corners, ``(n, 2)`` in pixels."""
        path, s = self.path, self.scale
        return drawing.sprite(
            canvas,
            self.shape,
            self.colour,
            path.x[t] * s,
            path.y[t] * s,
            path.size[t] * s,
            path.angle[t],
            self.flip,
        )


def mover(
    rng: np.random.Generator,
    stage: Stage,
    bottom: float = WORLD_HEIGHT,
    motions: tuple[str, ...] = MOTIONS,
    shapes: tuple[str, ...] = tuple(SHAPES),
    sizes: tuple[str, ...] = tuple(SIZES),
) -> tuple[Thing, str]:
    """An object with a random motion, and the words for both."""
    shape, colour = choose(rng, shapes), choose(rng, list(COLOURS))
    size_word = choose(rng, sizes)
    allowed = [m for m in motions if not (m == "spinning" and shape in ("ball", "ring"))]
    motion = choose(rng, allowed)
    if motion in ("growing", "shrinking"):
        size_word = ""
    path = move(motion, rng, SIZES[size_word], stage.frames, stage.room, 0.0, bottom)
    thing = Thing(shape, colour, path, stage.scale, motion == "moving left", size_word)
    return thing, f"{article(thing.name)} {motion}"
