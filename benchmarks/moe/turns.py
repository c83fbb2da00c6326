"""Timing: arms in turns, all ranks together, samples of the slowest rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .crew import Crew

Step = Callable[[], Any]

# Passes of an arm in a turn; and rounds of all arms, at least and at most.
INNER, LEAST, MOST = 4, 2, 6


def turns(
    steps: dict[str, Step],
    crew: Crew,
    budget_s: float,
    *,
    inner: int = INNER,
    untimed: int = 1,
    prepare: dict[str, Step] | None = None,
) -> dict[str, list[float]]:
    """Time steps that are warm, in turns.

    Args:
        steps: By name; all ranks have the same names in the same order.
        crew: The ranks.
        budget_s: After about so long no further round begins.
        inner: Timed passes of each turn.
        untimed: Passes before them.
        prepare: By name what begins a turn, untimed.

    Returns:
        Milliseconds of each pass by name, the slowest rank's.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    begin_s = time.perf_counter()
    for number in range(MOST):
        for name, step in steps.items():
            if prepare is not None:
                prepare[name]()
            found[name] += _turn(step, crew, inner, untimed)
        # All ranks have to decide alike, and one clock is enough for that.
        spent_s = crew.agree(time.perf_counter() - begin_s)[0]
        if number + 1 >= LEAST and spent_s * (number + 2) / (number + 1) > budget_s:
            break
    everyones = crew.agree(found)
    return {name: np.max([times[name] for times in everyones], axis=0).tolist() for name in steps}


def figures(times_ms: list[float]) -> dict[str, Any]:
    """Condense samples."""
    share = {f"p{share}_ms": float(np.quantile(times_ms, share / 100)) for share in (20, 50, 80, 95, 99)}
    return {"n": len(times_ms), **share}


def _turn(step: Step, crew: Crew, inner: int, untimed: int) -> list[float]:
    crew.together()
    for _ in range(untimed):
        step()
    marks = [_mark(crew)]
    for _ in range(inner):
        step()
        marks.append(_mark(crew))
    crew.wait()
    return [_between_ms(begin, end) for begin, end in pairwise(marks)]


def _mark(crew: Crew) -> Any:
    if crew.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_ms(begin: Any, end: Any) -> float:
    return 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)
