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
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from adamac.embedded import drawing
from adamac.embedded.drawing import BACKGROUNDS, COLOURS, HIDDEN_ON, SHAPES
from adamac.embedded.motions import (
    MOTIONS,
    WORLD_HEIGHT,
    Path,
    hold,
    move,
    triangle_wave,
    within,
)

CATEGORIES = ("plain", "cut", "interaction", "thin", "small_fast", "text", "low_light", "reflection")
"""Ids of the categories, in the order in which they are reported."""

SIZES = {"small ": 12.0, "": 18.0, "big ": 26.0}
"""Half extents in world units, by the word that goes before the colour."""

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

NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}

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


# ---------------------------------------------------------------- words and single objects


def _choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _pick_background(rng: np.random.Generator, *colours: str) -> str:
    """A background on which every one of the colours can be seen."""
    hidden = {name for colour in colours for name in HIDDEN_ON.get(colour, ())}
    return _choose(rng, [name for name in BACKGROUNDS if name not in hidden])


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _two_colours(rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.choice(list(COLOURS), 2, replace=False)
    return str(first), str(second)


@dataclasses.dataclass(frozen=True)
class _Thing:
    """One object with its words and its path."""

    shape: str
    colour: str
    path: Path
    scale: float
    flip: bool = False
    size_word: str = ""

    @property
    def name(self) -> str:
        return f"{self.size_word}{self.colour} {self.shape}"

    def paint(self, canvas: np.ndarray, t: int) -> np.ndarray:
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


def _mover(
    rng: np.random.Generator,
    stage: Stage,
    bottom: float = WORLD_HEIGHT,
    motions: tuple[str, ...] = MOTIONS,
    shapes: tuple[str, ...] = tuple(SHAPES),
    sizes: tuple[str, ...] = tuple(SIZES),
) -> tuple[_Thing, str]:
    """An object with a random motion, and the words for both."""
    shape, colour = _choose(rng, shapes), _choose(rng, list(COLOURS))
    size_word = _choose(rng, sizes)
    allowed = [m for m in motions if not (m == "spinning" and shape in ("ball", "ring"))]
    motion = _choose(rng, allowed)
    if motion in ("growing", "shrinking"):
        size_word = ""
    path = move(motion, rng, SIZES[size_word], stage.frames, stage.room, 0.0, bottom)
    thing = _Thing(shape, colour, path, stage.scale, motion == "moving left", size_word)
    return thing, f"{_article(thing.name)} {motion}"


# ---------------------------------------------------------------- the eight categories


def _plain(rng: np.random.Generator, stage: Stage) -> Script:
    thing, words = _mover(rng, stage)
    backdrop = _pick_background(rng, thing.colour)
    return Script(f"{words} on {backdrop}", backdrop, lambda canvas, t: {thing.name: thing.paint(canvas, t)})


def _cut(rng: np.random.Generator, stage: Stage) -> Script:
    """Two scenes one after the other; the second shows another object before another backdrop."""
    before, words_before = _mover(rng, stage, sizes=("", "big "))
    after, words_after = _mover(rng, stage, sizes=("", "big "))
    while after.colour == before.colour or after.shape == before.shape:
        after, words_after = _mover(rng, stage, sizes=("", "big "))
    backdrop = _pick_background(rng, before.colour)
    backdrop_after = _pick_background(rng, after.colour)
    while backdrop_after == backdrop:
        backdrop_after = _pick_background(rng, after.colour)
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


def _interaction(rng: np.random.Generator, stage: Stage) -> Script:
    """Two objects that collide, hide each other, push or circle."""
    kind = _choose(rng, tuple(_MEETINGS))
    colours = _two_colours(rng)
    shapes = (_choose(rng, list(SHAPES)), _choose(rng, list(SHAPES)))
    paths, order = _MEETINGS[kind](rng, stage)
    left, right = (_Thing(shapes[i], colours[i], paths[i], stage.scale) for i in (0, 1))
    backdrop = _pick_background(rng, *colours)

    def painter(canvas: np.ndarray, t: int) -> dict[str, np.ndarray]:
        drawn = {}
        for index in order:
            thing = (left, right)[index]
            drawn[thing.name] = thing.paint(canvas, t)
        return drawn

    first, second = _article(left.name), _article(right.name)
    return Script(f"{kind.format(first, second)} on {backdrop}", backdrop, painter)


_SIZE = SIZES[""]
_Meeting = tuple[tuple[Path, Path], tuple[int, int]]


def _collide(rng: np.random.Generator, stage: Stage) -> _Meeting:
    """They come from both sides, touch in the middle of the clip and bounce back."""
    middle, y = stage.room / 2 + rng.uniform(-12, 12), within(rng, 30, WORLD_HEIGHT - 30)
    away = np.abs(np.arange(stage.frames) - stage.frames * rng.uniform(0.42, 0.58))
    reach = stage.room / 2 - 12 - 2 * _SIZE
    gap = _SIZE + np.minimum(away * rng.uniform(1.8, 2.4), reach)
    return ((hold(middle - gap, y, _SIZE, stage.frames), hold(middle + gap, y, _SIZE, stage.frames)), (0, 1))


def _cross(order: tuple[int, int]) -> Callable[[np.random.Generator, Stage], _Meeting]:
    """The first passes the second, which stands still; the painting order says who is in front."""

    def meeting(rng: np.random.Generator, stage: Stage) -> _Meeting:
        x, y = stage.room / 2 + rng.uniform(-15, 15), within(rng, 30, WORLD_HEIGHT - 30)
        speed = min(rng.uniform(2.2, 2.9), (stage.room - 4 * _SIZE) / max(stage.frames - 1, 1))
        time = np.arange(stage.frames) - (stage.frames - 1) / 2
        passing = hold(stage.room / 2 + speed * time, y + rng.uniform(-8, 8), _SIZE, stage.frames)
        return (passing, hold(x, y, _SIZE * 1.3, stage.frames)), order

    return meeting


def _push(rng: np.random.Generator, stage: Stage) -> _Meeting:
    """The first moves right, meets the second and moves it along."""
    speed = rng.uniform(1.6, 2.2)
    y = within(rng, 40, WORLD_HEIGHT - 30)
    x = within(rng, 1.3 * _SIZE, stage.room - 3.6 * _SIZE - speed * (stage.frames - 1))
    pusher = np.minimum(x + speed * np.arange(stage.frames), stage.room - 3.4 * _SIZE)
    contact = pusher[int(stage.frames * rng.uniform(0.3, 0.5))] + 2.1 * _SIZE
    pushed = np.maximum(contact, pusher + 2.1 * _SIZE)
    return (hold(pusher, y, _SIZE, stage.frames), hold(pushed, y, _SIZE, stage.frames)), (0, 1)


def _orbit(rng: np.random.Generator, stage: Stage) -> _Meeting:
    """They circle around a common centre."""
    x = within(rng, 60, stage.room - 60)
    turn = rng.uniform(0, 2 * np.pi) + np.arange(stage.frames) * 2 * np.pi / 32
    offset = 30 * np.stack([np.cos(turn), np.sin(turn)])
    middle = WORLD_HEIGHT / 2
    one, other = (
        hold(x + sign * offset[0], middle + sign * offset[1], _SIZE * 0.9, stage.frames) for sign in (1, -1)
    )
    return (one, other), (0, 1)


_MEETINGS: dict[str, Callable[[np.random.Generator, Stage], _Meeting]] = {
    "{} and {} collide and bounce apart": _collide,
    "{} passes in front of {}": _cross((1, 0)),
    "{} passes behind {}": _cross((0, 1)),
    "{} pushes {} to the right": _push,
    "{} and {} circle around each other": _orbit,
}


def _thin(rng: np.random.Generator, stage: Stage) -> Script:
    """Thin parts that turn or swing."""
    kind = _choose(rng, tuple(_MECHANISMS))
    colour = _choose(rng, list(COLOURS))
    backdrop = _pick_background(rng, colour)
    words, painter = _MECHANISMS[kind](rng, stage, colour)
    return Script(f"{words} on {backdrop}", backdrop, painter)


def _turning(rng: np.random.Generator, frames: int) -> tuple[str, np.ndarray]:
    """A direction of rotation: its word and the angle in every frame."""
    word, sign = _choose(rng, (("clockwise", 1), ("counterclockwise", -1)))
    return word, rng.uniform(0, 6) + sign * np.arange(frames) * rng.uniform(0.09, 0.13)


def _spoke_ends(centre: np.ndarray, radius: float, angle: float, count: int) -> np.ndarray:
    spokes = angle + np.arange(count) * 2 * np.pi / count
    return centre + radius * np.stack([np.cos(spokes), np.sin(spokes)], axis=1)


def _wheel(rng: np.random.Generator, stage: Stage, colour: str) -> tuple[str, Painter]:
    count, radius = int(rng.integers(3, 6)), within(rng, 36, 44) * stage.scale
    word, angle = _turning(rng, stage.frames)
    centre = np.array([within(rng, 50, stage.room - 50), 56]) * stage.scale
    paint = COLOURS[colour]

    def painter(canvas: np.ndarray, t: int) -> dict[str, np.ndarray]:
        for end in _spoke_ends(centre, radius, angle[t], count):
            drawing.rod(canvas, centre, end, 2.6 * stage.scale, paint)
        bits = drawing.SUBPIXEL_BITS
        cv2.circle(
            canvas,
            tuple(np.round(centre * 16).astype(int).tolist()),
            round(radius * 16),
            paint,
            max(round(3 * stage.scale), 1),
            cv2.LINE_AA,
            bits,
        )
        return {"wheel": np.stack([centre - radius - 2, centre + radius + 2])}

    return f"{_article(colour)} wheel with {NUMBER_WORDS[count]} thin spokes turning {word}", painter


def _pendulum(rng: np.random.Generator, stage: Stage, colour: str) -> tuple[str, Painter]:
    shape = _choose(rng, ("ball", "star", "heart", "square"))
    pivot = np.array([within(rng, 60, stage.room - 60), 4]) * stage.scale
    length = within(rng, 62, 74) * stage.scale
    phase = (np.arange(stage.frames) + rng.uniform(0, 30)) * 2 * np.pi / 30
    swing = within(rng, 0.5, 0.75) * np.sin(phase)
    string = drawing.COLOURS["brown"]

    def painter(canvas: np.ndarray, t: int) -> dict[str, np.ndarray]:
        end = pivot + length * np.array([np.sin(swing[t]), np.cos(swing[t])])
        drawing.rod(canvas, pivot, end, 2.2 * stage.scale, string)
        bob = drawing.sprite(canvas, shape, colour, *end, 16 * stage.scale, -swing[t])
        return {f"{colour} {shape}": bob, "string": np.stack([pivot, end])}

    return f"{_article(colour)} {shape} swinging on a thin string", painter


def _clock(rng: np.random.Generator, stage: Stage, colour: str) -> tuple[str, Painter]:
    centre = np.array([within(rng, 50, stage.room - 50), 56]) * stage.scale
    radius = within(rng, 36, 44) * stage.scale
    speed = rng.uniform(0.1, 0.16)
    start = rng.uniform(0, 2 * np.pi, 2)
    face = (250, 248, 240) if colour != "white" else (70, 70, 80)

    def painter(canvas: np.ndarray, t: int) -> dict[str, np.ndarray]:
        drawing.polygon(canvas, drawing._circle(radius, *centre), COLOURS[colour])
        drawing.polygon(canvas, drawing._circle(radius * 0.88, *centre), face)
        ink = (30, 30, 34) if colour != "white" else (240, 240, 240)
        for angle, reach, thick in ((start[0] + t * speed / 6, 0.5, 4.0), (start[1] + t * speed, 0.78, 2.6)):
            end = centre + radius * reach * np.array([np.sin(angle), -np.cos(angle)])
            drawing.rod(canvas, centre, end, thick * stage.scale, ink)
        return {"clock": np.stack([centre - radius, centre + radius])}

    return f"{_article(colour)} clock with two thin turning hands", painter


def _windmill(rng: np.random.Generator, stage: Stage, colour: str) -> tuple[str, Painter]:
    centre = np.array([within(rng, 45, stage.room - 45), 44]) * stage.scale
    word, angle = _turning(rng, stage.frames)
    foot = np.array([centre[0], stage.height])
    count = int(rng.integers(3, 5))

    def painter(canvas: np.ndarray, t: int) -> dict[str, np.ndarray]:
        drawing.rod(canvas, centre, foot, 4 * stage.scale, (120, 116, 112))
        ends = _spoke_ends(centre, 38 * stage.scale, angle[t], count)
        for end in ends:
            drawing.rod(canvas, centre, end, 4 * stage.scale, COLOURS[colour])
        return {"windmill": np.concatenate([ends, centre[None], foot[None]])}

    return f"a windmill with {NUMBER_WORDS[count]} thin {colour} blades turning {word}", painter


_MECHANISMS = {"wheel": _wheel, "pendulum": _pendulum, "clock": _clock, "windmill": _windmill}


def _small_fast(rng: np.random.Generator, stage: Stage) -> Script:
    """One to three small objects, each moving about half of its own width or more in a frame.

    At this size a star is a dot, so only balls and squares are asked for.
    """
    count, shape = int(rng.integers(1, 4)), _choose(rng, ("ball", "square"))
    colour, manner = _choose(rng, list(COLOURS)), _choose(rng, tuple(_FLIGHTS))
    backdrop = _pick_background(rng, colour)
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
        things.append(_Thing(shape, colour, hold(x, y, size, stage.frames), stage.scale))
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
    text = _choose(rng, WORDS)
    count = len(text)
    colour, motion = _choose(rng, list(COLOURS)), _choose(rng, _TEXT_MOTIONS)
    backdrop = _pick_background(rng, colour)
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
    thing, words = _mover(rng, stage, sizes=("", "big "))
    while thing.colour in ("black", "brown", "purple"):  # would be black in the dark
        thing, words = _mover(rng, stage, sizes=("", "big "))
    backdrop = _choose(rng, ("a gray background", "a pale blue background", "a meadow", "a beach"))
    while backdrop in HIDDEN_ON.get(thing.colour, ()):
        backdrop = _choose(rng, ("a gray background", "a pale blue background", "a meadow"))
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
    surface, ripple = _choose(rng, (("a mirror", 0.0), ("water", 2.2)))
    horizon = 62.0
    motions = ("staying still", "moving right", "moving left", "bouncing up and down", "spinning")
    thing, words = _mover(rng, stage, horizon, motions, sizes=("",))
    backdrop = _pick_background(rng, thing.colour)
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
    "interaction": _interaction,
    "thin": _thin,
    "small_fast": _small_fast,
    "text": _text,
    "low_light": _low_light,
    "reflection": _reflection,
}
