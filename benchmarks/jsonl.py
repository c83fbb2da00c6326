"""Rows of results: one JSON object a line, each with the machine, the versions and the commit it was measured on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from adamac.bakeoff.machine import machine_stamp


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file by these rows; rounds floats to six digits, of which a measurement has fewer."""
    stamp = machine_stamp("cuda" if torch.cuda.is_available() else "cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(short(row | stamp)) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def short(entry: Any) -> Any:
    """Round floats to six digits, of which a measurement has fewer."""
    if isinstance(entry, dict):
        return {name: short(value) for name, value in entry.items()}
    if isinstance(entry, (list, tuple)):
        return [short(value) for value in entry]
    return float(f"{entry:.6g}") if isinstance(entry, float) else entry
