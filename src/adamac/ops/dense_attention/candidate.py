"""What an implementation of dense attention has to offer to be considered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Candidate:
    """One implementation.

    Attributes:
        name: What a user calls it.
        unfit: Given query, key and value, says in one line why it cannot attend these, or ``None``. Looks at shapes,
            strides, dtype and device only, and computes nothing.
        run: Given query, key, value and scale, attends; the output may have any strides.
    """

    name: str
    unfit: Callable[[Tensor, Tensor, Tensor], str | None]
    run: Callable[[Tensor, Tensor, Tensor, float], Tensor]


def first_line(error: BaseException) -> str:
    """Name an error in one line of at most 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__
