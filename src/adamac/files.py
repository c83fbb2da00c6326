"""Files that are whole or absent: what a kill leaves behind must be readable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    force(part)
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as :func:`write_text` does; NaN and infinity, which JSON does not have, are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def force(path: Path) -> None:
    """Return once what was written to a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
