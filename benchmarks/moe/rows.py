"""Rows: one JSON object a line, in the file as soon as it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.jsonl import short

from adamac.bakeoff.machine import machine_stamp, version_of

Row = dict[str, Any]


class RowFile:
    """A file that rows are added to; those of other runs stay as they are."""

    def __init__(self, path: Path) -> None:
        """Make its folder."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Add a row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(short(row)) + "\n")


def read(path: Path) -> list[Row]:
    """Read the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def stamp(device: str, commit: str | None) -> Row:
    """Machine, versions and commit.

    Args:
        device: Torch's name of it.
        commit: Names the commit where the code is a copy without its repository.
    """
    found = machine_stamp(device) | {
        name: version_of(name) for name in ("triton", "transformers", "deepspeed")
    }
    found.pop("diffusers", None)
    if device == "cuda":
        import torch

        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found if commit is None else found | {"commit": commit}
