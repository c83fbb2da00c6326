"""Procedural clips with captions and ground truth: the world that the embedded model knows.

A scene is drawn in two steps. First a *script* is chosen (which objects, where, in which colour,
doing what) together with the caption that says so; then every frame is painted and the box of every
object is written down. The script depends on the seed alone, so a clip is reproducible, and every
caption is true by construction. The world is small on purpose: eight categories, ten colours,
eight shapes, nine backgrounds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable

import numpy as np

from adamac.embedded.training import drawing
from adamac.embedded.training.drawing import BACKGROUNDS, COLOURS, HIDDEN_ON
from adamac.embedded.training.mechanisms import thin
from adamac.embedded.training.meetings import interaction
from adamac.embedded.training.motions import MOTIONS, WORLD_HEIGHT, Path, hold, triangle_wave
from adamac.embedded.training.script import NUMBER_WORDS, Script, Stage, Thing, choose, mover, pick_background

CATEGORIES = ("plain", "cut", "interaction", "thin", "small_fast", "text", "low_light", "reflection")
"""Ids of the categories, in the order in which they are reported."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
"""Characters for which the tokenizer has a token."""

# fmt: off
WORDS = (
    "A", "I", "1", "7", "HI", "GO", "NO", "UP", "OK", "ON", "IT", "WE", "42", "10", "24", "99", "CAT", "DOG",
    "SUN", "CAR", "RED", "TOP", "YES", "BIG", "SEA", "HOT", "100", "007", "365",
)
# fmt: on
"""What can be written in a frame. Among random characters a network this small spelled none in the same time."""

TEMPORAL_STRIDE = 4
"""Frames that share a latent of the autoencoder, after the first, which has its own."""

HELD_OUT_SHARE = 20
"""One caption in this many is kept out of training (chosen by a hash of the caption)."""


@dataclasses.dataclass(frozen=True)
class Track:
    """Ground truth of one object.

    Attributes:
        name: What the caption calls it.
        boxes: ``(frames, 4)`` left, top, right, bottom in pixels; zeros where it is out of view.
    """

    name: str
    boxes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Clip:
    """A rendered scene.

    Attributes:
        frames: ``(frames, height, width, 3)``, uint8 RGB.
        caption: What is to be seen.
        category: One of :data:`CATEGORIES`.
        tracks: Ground truth of every object.
        text: The characters written in the frame, or None.
        cut: Index of the first frame after the cut, or None.
    """

    frames: np.ndarray
    caption: str
    category: str
    tracks: tuple[Track, ...]
    text: str | None = None
    cut: int | None = None


def is_held_out(caption: str) -> bool:
    """Whether a caption belongs to the held-out share that training never sees."""
    return hashlib.sha256(caption.encode()).digest()[0] % HELD_OUT_SHARE == 0


def scene(
    category: str,
    seed: int,
    frames: int = 49,
    height: int = 112,
    width: int = 192,
    held_out: bool | None = None,
) -> Clip:
    """Render the scene of a seed.

    Args:
        category: One of :data:`CATEGORIES`.
        seed: Any non-negative integer; the same seed gives the same clip, bit for bit.
        frames: Number of frames.
        height: Frame height, pixels.
        width: Frame width, pixels.
        held_out: True for a caption of the held-out share, False for one of the training share,
            None for either.

    Returns:
        The clip with caption and ground truth.

    Raises:
        ValueError: If the category is unknown or a size is not positive.
    """
    if category not in _SCRIPTS:
        raise ValueError(f"category: expected one of {CATEGORIES}, got {category!r}")
    if min(frames, height, width) < 1:
        raise ValueError(
            f"frames, height and width: expected positive numbers, got {frames}, {height}, {width}"
        )
    rng = np.random.default_rng([CATEGORIES.index(category), seed])
    stage = Stage(frames, height, width)
    script = _SCRIPTS[category](rng, stage)
    while held_out is not None and is_held_out(script.caption) != held_out:
        script = _SCRIPTS[category](rng, stage)
    return _paint(script, category, stage)


def caption(category: str, seed: int, frames: int = 49) -> str:
    """The caption of ``scene(category, seed, frames)``, without painting it."""
    rng = np.random.default_rng([CATEGORIES.index(category), seed])
    return _SCRIPTS[category](rng, Stage(frames, 112, 192)).caption


def cut_caption(before: str, after: str) -> str:
    """The caption of two plain scenes with a cut between them."""
    return f"{before}, then cut to {after}"


_PLAIN = re.compile(rf"an? (?P<thing>.+) ({'|'.join(MOTIONS)}) on (?P<background>{'|'.join(BACKGROUNDS)})")


def can_follow(before: str, after: str) -> bool:
    """Whether two captions are plain ones that a cut may join: no small objects, another background."""
    scenes = [_PLAIN.fullmatch(words) for words in (before, after)]
    if not all(scenes):
        return False
    one, other = (scene for scene in scenes if scene)
    small = any(scene["thing"].startswith("small ") for scene in (one, other))
    return not small and one["background"] != other["background"] and one["thing"] != other["thing"]


def _paint(script: Script, category: str, stage: Stage) -> Clip:
    """Paint all frames of a script and collect the boxes."""
    video = np.empty((stage.frames, stage.height, stage.width, 3), np.uint8)
    boxes: dict[str, np.ndarray] = {}
    for t in range(stage.frames):
        after = script.cut is not None and t >= script.cut
        backdrop = script.background_after if after else script.background
        canvas = drawing.background(backdrop, stage.height, stage.width).copy()
        for name, corners in script.painter(canvas, t).items():
            track = boxes.setdefault(name, np.zeros((stage.frames, 4)))
            track[t] = drawing.box_of(corners, stage.height, stage.width)
        video[t] = canvas if script.finish is None else script.finish(canvas, t)
    tracks = tuple(Track(name, track) for name, track in boxes.items())
    return Clip(video, script.caption, category, tracks, script.text, script.cut)


def _plain(rng: np.random.Generator, stage: Stage) -> Script:
    thing, words = mover(rng, stage)
    backdrop = pick_background(rng, thing.colour)
    return Script(f"{words} on {backdrop}", backdrop, lambda canvas, t: {thing.name: thing.paint(canvas, t)})


def _cut(rng: np.random.Generator, stage: Stage) -> Script:
    """Two scenes one after the other; the second shows another object before another backdrop."""
    before, words_before = mover(rng, stage, sizes=("", "big "))
    after, words_after = mover(rng, stage, sizes=("", "big "))
    while after.colour == before.colour or after.shape == before.shape:
        after, words_after = mover(rng, stage, sizes=("", "big "))
    backdrop = pick_background(rng, before.colour)
    backdrop_after = pick_background(rng, after.colour)
    while backdrop_after == backdrop:
        backdrop_after = pick_background(rng, after.colour)
    cut = cut_frame(rng, stage.frames)

    def painter(canvas: np.ndarray, t: int) -> dict[str, np.ndarray]:
        thing = before if t < cut else after
        return {thing.name: thing.paint(canvas, t)}

    return Script(
        cut_caption(f"{words_before} on {backdrop}", f"{words_after} on {backdrop_after}"),
        backdrop,
        painter,
        cut=cut,
        background_after=backdrop_after,
    )


def cut_frame(rng: np.random.Generator, frames: int) -> int:
    """A frame about halfway at which a latent begins: no latent has to hold both scenes."""
    halfway = frames * rng.uniform(0.42, 0.58)
    aligned = 1 + TEMPORAL_STRIDE * max(round((halfway - 1) / TEMPORAL_STRIDE), 0)
    return min(aligned, max(frames - 1, 1))


def _small_fast(rng: np.random.Generator, stage: Stage) -> Script:
    """One to three small objects, each moving about half of its own width or more in a frame.

    At this size a star is a dot, so only balls and squares are asked for.
    """
    count, shape = int(rng.integers(1, 4)), choose(rng, ("ball", "square"))
    colour, manner = choose(rng, list(COLOURS)), choose(rng, tuple(_FLIGHTS))
    backdrop = pick_background(rng, colour)
    size = 7.0
    time = np.arange(stage.frames)
    things = []
    for _ in range(count):
        slow, fast = _FLIGHTS[manner]
        velocity = rng.uniform(slow, fast) * rng.choice([-1, 1], 2) ** (manner == "bouncing around")
        start = rng.uniform(0, 1, 2) * (stage.room, WORLD_HEIGHT)
        x, y = start[0] + velocity[0] * time, start[1] + velocity[1] * time
        if manner == "bouncing around":
            x = triangle_wave(x, size, stage.room - size)
            y = triangle_wave(y, size, WORLD_HEIGHT - size)
        else:  # what leaves the frame comes back in on the other side
            x = (x + 10) % (stage.room + 20) - 10
            y = (y + 10) % (WORLD_HEIGHT + 20) - 10
        things.append(Thing(shape, colour, hold(x, y, size, stage.frames), stage.scale))
    noun = shape if count == 1 else f"{shape}s"
    return Script(
        f"{NUMBER_WORDS[count]} small fast {colour} {noun} {manner} on {backdrop}",
        backdrop,
        lambda canvas, t: {
            f"{colour} {shape} {i + 1}": thing.paint(canvas, t) for i, thing in enumerate(things)
        },
    )


_FLIGHTS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "flying right": ((5.0, 0.0), (7.0, 0.0)),
    "flying left": ((-7.0, 0.0), (-5.0, 0.0)),
    "falling down": ((0.0, 4.0), (0.0, 6.0)),
    "bouncing around": ((3.5, 3.0), (5.5, 5.0)),
}
"""Slowest and fastest velocity (right, down) of each manner, world units a frame."""

_TEXT_MOTIONS = ("staying still", "moving right", "moving left", "moving up", "moving down", "growing")


def _text(rng: np.random.Generator, stage: Stage) -> Script:
    """A short word or number in big characters."""
    text = choose(rng, WORDS)
    count = len(text)
    colour, motion = choose(rng, list(COLOURS)), choose(rng, _TEXT_MOTIONS)
    backdrop = pick_background(rng, colour)
    tall = (88.0, 76.0, 64.0)[count - 1]
    half_width, half_height = 0.36 * tall * count, 0.4 * tall
    path = _text_path(rng, stage, motion, half_width, half_height)

    def painter(canvas: np.ndarray, t: int) -> dict[str, np.ndarray]:
        s = stage.scale
        return {
            text: drawing.letters(canvas, text, colour, path.x[t] * s, path.y[t] * s, tall * path.size[t] * s)
        }

    return Script(
        f'the text "{text}" in big {colour} letters {motion} on {backdrop}', backdrop, painter, text=text
    )


def _text_path(
    rng: np.random.Generator, stage: Stage, motion: str, half_width: float, half_height: float
) -> Path:
    """Slow enough to be read; ``size`` of the path is a factor on the letters' height."""
    time = np.arange(stage.frames) - (stage.frames - 1) / 2
    x, y = stage.room / 2, WORLD_HEIGHT / 2
    free_x = max(stage.room / 2 - half_width - 2, 0.0)
    free_y = max(WORLD_HEIGHT / 2 - half_height - 2, 0.0)
    size = np.ones(stage.frames)
    half_time = max((stage.frames - 1) / 2, 1)
    if motion == "growing":
        size = np.clip(0.5 + 0.0125 * np.arange(stage.frames), 0.5, 1.05)
    elif motion in ("moving right", "moving left"):
        speed = min(1.2, free_x / half_time)
        x = x + (speed if motion == "moving right" else -speed) * time
    elif motion in ("moving up", "moving down"):
        speed = min(0.8, free_y / half_time)
        y = y + (speed if motion == "moving down" else -speed) * time
    else:
        x, y = x + rng.uniform(-0.5, 0.5) * free_x, y + rng.uniform(-0.5, 0.5) * free_y
    return hold(x, y, size, stage.frames)


def _low_light(rng: np.random.Generator, stage: Stage) -> Script:
    """A scene at a third of the light, under sensor noise."""
    thing, words = mover(rng, stage, sizes=("", "big "))
    while thing.colour in ("black", "brown", "purple"):  # would be black in the dark
        thing, words = mover(rng, stage, sizes=("", "big "))
    backdrop = choose(rng, ("a gray background", "a pale blue background", "a meadow", "a beach"))
    while backdrop in HIDDEN_ON.get(thing.colour, ()):
        backdrop = choose(rng, ("a gray background", "a pale blue background", "a meadow"))
    light, noise_level = rng.uniform(0.28, 0.36), 5.0
    noise = np.random.default_rng(rng.integers(2**32))

    def finish(canvas: np.ndarray, t: int) -> np.ndarray:
        # A turned copy of one noise field a few frames long would repeat: draw every frame anew.
        grain = noise.standard_normal(canvas.shape, np.float32) * noise_level
        return (canvas * np.float32(light) + grain).clip(0, 255).astype(np.uint8)

    return Script(
        f"in the dark, {words} on {backdrop}, noisy low light",
        backdrop,
        lambda canvas, t: {thing.name: thing.paint(canvas, t)},
        finish,
    )


def _reflection(rng: np.random.Generator, stage: Stage) -> Script:
    """An object above a mirror or above water, with its image upside down below."""
    surface, ripple = choose(rng, (("a mirror", 0.0), ("water", 2.2)))
    horizon = 62.0
    motions = ("staying still", "moving right", "moving left", "bouncing up and down", "spinning")
    thing, words = mover(rng, stage, horizon, motions, sizes=("",))
    backdrop = pick_background(rng, thing.colour)
    line = round(horizon * stage.scale)
    tint = np.array((60, 120, 160) if ripple else (120, 124, 132), np.float32)
    rows = np.arange(stage.height - line)

    def finish(canvas: np.ndarray, t: int) -> np.ndarray:
        source = np.clip(line - 1 - rows, 0, line - 1)
        image = canvas[source].astype(np.float32)
        if ripple:
            wave = ripple * stage.scale * np.sin(rows / stage.scale * 0.7 - t * 0.5)
            columns = (np.arange(stage.width) + np.round(wave)[:, None]).astype(int) % stage.width
            image = image[rows[:, None], columns]
        out = canvas.copy()
        out[line:] = image * 0.62 + tint * 0.38
        return out

    return Script(
        f"{words} above {surface} with its reflection on {backdrop}",
        backdrop,
        lambda canvas, t: {thing.name: thing.paint(canvas, t)},
        finish,
    )


_SCRIPTS: dict[str, Callable[[np.random.Generator, Stage], Script]] = {
    "plain": _plain,
    "cut": _cut,
    "interaction": interaction,
    "thin": thin,
    "small_fast": _small_fast,
    "text": _text,
    "low_light": _low_light,
    "reflection": _reflection,
}
