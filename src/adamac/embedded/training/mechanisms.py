"""Scenes of things with thin parts that turn or swing: a wheel, a pendulum, a clock, a windmill."""

from __future__ import annotations

import cv2
import numpy as np

from adamac.embedded.training import drawing
from adamac.embedded.training.drawing import COLOURS
from adamac.embedded.training.motions import within
from adamac.embedded.training.script import (
    NUMBER_WORDS,
    Painter,
    Script,
    Stage,
    article,
    choose,
    pick_background,
)


def thin(rng: np.random.Generator, stage: Stage) -> Script:
    """Thin parts that turn or swing."""
    kind = choose(rng, tuple(_MECHANISMS))
    colour = choose(rng, list(COLOURS))
    backdrop = pick_background(rng, colour)
    words, painter = _MECHANISMS[kind](rng, stage, colour)
    return Script(f"{words} on {backdrop}", backdrop, painter)


def _turning(rng: np.random.Generator, frames: int) -> tuple[str, np.ndarray]:
    """A direction of rotation: its word and the angle in every frame."""
    word, sign = choose(rng, (("clockwise", 1), ("counterclockwise", -1)))
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

    return f"{article(colour)} wheel with {NUMBER_WORDS[count]} thin spokes turning {word}", painter


def _pendulum(rng: np.random.Generator, stage: Stage, colour: str) -> tuple[str, Painter]:
    shape = choose(rng, ("ball", "star", "heart", "square"))
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

    return f"{article(colour)} {shape} swinging on a thin string", painter


def _clock(rng: np.random.Generator, stage: Stage, colour: str) -> tuple[str, Painter]:
    centre = np.array([within(rng, 50, stage.room - 50), 56]) * stage.scale
    radius = within(rng, 36, 44) * stage.scale
    speed = rng.uniform(0.1, 0.16)
    start = rng.uniform(0, 2 * np.pi, 2)
    face = (250, 248, 240) if colour != "white" else (70, 70, 80)

    def painter(canvas: np.ndarray, t: int) -> dict[str, np.ndarray]:
        drawing.polygon(canvas, drawing.circle(radius, *centre), COLOURS[colour])
        drawing.polygon(canvas, drawing.circle(radius * 0.88, *centre), face)
        ink = (30, 30, 34) if colour != "white" else (240, 240, 240)
        for angle, reach, thick in ((start[0] + t * speed / 6, 0.5, 4.0), (start[1] + t * speed, 0.78, 2.6)):
            end = centre + radius * reach * np.array([np.sin(angle), -np.cos(angle)])
            drawing.rod(canvas, centre, end, thick * stage.scale, ink)
        return {"clock": np.stack([centre - radius, centre + radius])}

    return f"{article(colour)} clock with two thin turning hands", painter


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
