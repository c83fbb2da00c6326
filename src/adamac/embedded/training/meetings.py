"""Scenes of two objects that collide, pass, push or circle each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from adamac.embedded.training.drawing import SHAPES
from adamac.embedded.training.motions import WORLD_HEIGHT, Path, hold, within
from adamac.embedded.training.script import (
    SIZES,
    Script,
    Stage,
    Thing,
    article,
    choose,
    pick_background,
    two_colours,
)


def interaction(rng: np.random.Generator, stage: Stage) -> Script:
    """Two objects that collide, hide each other, push or circle."""
    kind = choose(rng, tuple(_MEETINGS))
    colours = two_colours(rng)
    shapes = (choose(rng, list(SHAPES)), choose(rng, list(SHAPES)))
    paths, order = _MEETINGS[kind](rng, stage)
    left, right = (Thing(shapes[i], colours[i], paths[i], stage.scale) for i in (0, 1))
    backdrop = pick_background(rng, *colours)

    def painter(canvas: np.ndarray, t: int) -> dict[str, np.ndarray]:
        drawn = {}
        for index in order:
            thing = (left, right)[index]
            drawn[thing.name] = thing.paint(canvas, t)
        return drawn

    first, second = article(left.name), article(right.name)
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
