"""Motions of the little world: where an object is in every frame, by the words that name them.

Lengths are in units of 1/112 of the frame's height and times in frames, so a motion looks the same
in a clip of 17 frames and in one of 49: the longer clip only shows more of it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

WORLD_HEIGHT = 112.0
"""Height of a frame in world units; the width follows from the frame's shape."""

HEADINGS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}

MOTIONS = (
    "staying still",
    "moving right",
    "moving left",
    "moving up",
    "moving down",
    "bouncing up and down",
    "spinning",
    "moving in a circle",
    "growing",
    "shrinking",
)
"""Every motion that :func:`move` knows."""


@dataclasses.dataclass(frozen=True)
class Path:
    """Placement of one object over time; every array has one entry for each frame.

    Attributes:
        x: Centre from the left, world units.
        y: Centre from the top, world units.
        size: Half extent, world units.
        angle: Clockwise turn, radians.
    """

    x: np.ndarray
    y: np.ndarray
    size: np.ndarray
    angle: np.ndarray


def hold(
    x: np.ndarray | float,
    y: np.ndarray | float,
    size: np.ndarray | float,
    frames: int,
    angle: np.ndarray | float = 0.0,
) -> Path:
    """A path from arrays or constants, each spread over ``frames``."""
    return Path(*(np.broadcast_to(np.asarray(v, float), (frames,)) for v in (x, y, size, angle)))


def within(rng: np.random.Generator, low: float, high: float) -> float:
    """A uniform draw, or the middle where the interval is empty."""
    return float(rng.uniform(low, high)) if high > low else (low + high) / 2


def straight(
    rng: np.random.Generator,
    start_low: float,
    start_high: float,
    sign: int,
    frames: int,
    slow: float = 1.8,
    fast: float = 2.8,
) -> np.ndarray:
    """Positions of a steady motion that stays between two bounds, ``(frames,)``."""
    room = max(start_high - start_low, 0.0)
    speed = min(rng.uniform(slow, fast), room / max(frames - 1, 1))
    travel = speed * (frames - 1)
    start = within(rng, start_low, start_high - travel)
    track = start + speed * np.arange(frames)
    return track if sign > 0 else (start_low + start_high) - track


def triangle_wave(track: np.ndarray, low: float, high: float) -> np.ndarray:
    """Fold a line back into ``[low, high]``: steady motion that bounces off both ends."""
    span = max(high - low, 1e-6)
    return low + span - np.abs((track - low) % (2 * span) - span)


def move(
    motion: str,
    rng: np.random.Generator,
    size: float,
    frames: int,
    width: float,
    top: float = 0.0,
    bottom: float = WORLD_HEIGHT,
) -> Path:
    """Draw a path that shows ``motion`` for an object of half extent ``size``.

    Args:
        motion: One of :data:`MOTIONS`.
        rng: Source of where and how fast.
        size: Half extent, world units.
        frames: Number of frames.
        width: Width of the frame, world units.
        top: Upper bound of the room for the object, world units.
        bottom: Lower bound, world units.

    Returns:
        The path; the object stays inside the room as far as its size allows.

    Raises:
        ValueError: If the motion is not known.
    """
    edge = size * 1.25
    time = np.arange(frames)
    x, y = within(rng, edge, width - edge), within(rng, top + edge, bottom - edge)
    if motion == "staying still":
        return hold(x, y, size, frames)
    if motion.startswith("moving ") and motion.split()[-1] in HEADINGS:
        across, down = HEADINGS[motion.split()[-1]]
        if across:
            return hold(straight(rng, edge, width - edge, across, frames), y, size, frames)
        slow, fast = 1.0, 1.6
        return hold(x, straight(rng, top + edge, bottom - edge, down, frames, slow, fast), size, frames)
    if motion == "bouncing up and down":
        phase = np.abs(np.sin(np.pi * (time + rng.uniform(0, 14)) / 14))
        leap = min(bottom - top - 2 * edge, within(rng, 36, 50))
        return hold(x, bottom - edge - leap * phase, size, frames)
    if motion == "spinning":
        return hold(x, y, size, frames, rng.uniform(0, 6) + time * rng.uniform(0.14, 0.2))
    if motion == "moving in a circle":
        radius = max(min((bottom - top) / 2 - edge, 30.0), 0.0)
        turn = rng.uniform(0, 2 * np.pi) + time * 2 * np.pi / 30
        x = within(rng, edge + radius, width - edge - radius)
        y = within(rng, top + edge + radius, bottom - edge - radius)
        return hold(x + radius * np.cos(turn), y + radius * np.sin(turn), size, frames)
    if motion in ("growing", "shrinking"):
        rate = 0.025 if motion == "growing" else -0.016
        start = 0.55 if motion == "growing" else 1.4
        room = min(width, bottom - top) / 2 / 1.25
        sizes = np.minimum(size * np.maximum(start + rate * time, 0.3), room)
        edge = float(sizes.max()) * 1.25
        return hold(within(rng, edge, width - edge), within(rng, top + edge, bottom - edge), sizes, frames)
    raise ValueError(f"motion: expected one of {MOTIONS}, got {motion!r}")
