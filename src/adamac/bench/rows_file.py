"""Whether measured rows can be kept, asked before there are any to lose."""

from __future__ import annotations

import os
from pathlib import Path

from adamac.bakeoff.errors import BadInput


def check_can_append(out: Path) -> None:
    """Refuse a file that rows cannot be appended to; nothing is made.

    Raises:
        BadInput: Saying why.
    """
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    problem = None
    if out.is_dir():
        problem = "it is a directory"
    elif not (nearest.is_dir() or nearest == out):
        problem = f"{nearest} is no directory"
    elif not os.access(nearest, os.W_OK):
        problem = f"{nearest} may not be written"
    if problem is not None:
        raise BadInput(
            f"out: rows cannot be appended to {out} ({problem}); expected a file, choose another path"
        )
