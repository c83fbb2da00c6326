"""A file of measured rows: whether it can be written, asked before there are any to lose, and how they are appended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def append_rows(out: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a file, one JSON object a line; the file and its folder are made if need be."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
