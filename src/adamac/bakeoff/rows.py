"""Rows: one JSON object a video, appended as soon as the video exists.

A row stands alone: it says what was asked, on which machine, what came out and how long it took. Append, flush and fsync
mean that a killed run keeps every finished row; a torn last line is dropped when reading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adamac.bakeoff.errors import BadInput
from adamac.files import write_text

IDENTICAL_DB = 100.0
"""PSNR is capped here, since JSON has no infinity: beyond it two videos differ by rounding of floats alone."""


class Key(NamedTuple):
    """What identifies a row within a run."""

    arm: str
    prompt_id: str
    seed: int


@dataclass(kw_only=True)
class Row:
    """One video, or the reason why there is none.

    Attributes:
        arm: Which way of computing attention made it.
        prompt_id: Identifies the prompt within the run.
        prompt: The prompt itself.
        category: What kind of scene it is.
        seed: Seed of the initial noise.
        status: ``"ok"`` or ``"error"``.
        reason: Why it is an error.
        first_call: Whether this was the arm's first call in its process, without a warm-up before it, or compiled something.
        latency_s: The whole pipeline call: text, denoising, decoding.
        text_s: From the call to the first denoising step: text encoding and preparation.
        denoise_s: All denoising steps.
        decode_s: From the last step to float frames on the host.
        step_s: Each denoising step.
        peak_gib: Peak memory during this video; ``peak_kind`` says of what.
        peak_kind: ``"cuda allocated"``, ``"process resident"``, or ``"process resident since start"``.
        shape: Frames, height and width of the video.
        density: Share of (query, key) pairs computed exactly, mean over calls; ``None`` where nothing was installed.
        cost: Density plus the centroids read, in units of dense attention.
        calls: Self-attention calls seen.
        sparse_calls: Those that were sparse.
        dense_calls: Those that were not, by reason.
        attention_s: Seconds by stage: plan, attend, dense.
        state_bytes: What the method holds between steps.
        psnr_db: Against the dense arm's float frames of the same case; see :mod:`adamac.bakeoff.metrics.video`.
        psnr_worst_db: Of the worst frame.
        ssim: Mean over frames.
        ssim_worst: Of the worst frame.
        flicker_ratio: Flicker, relative to dense.
        motion_ratio: Motion, relative to dense.
        motion_correlation: Of the two optical flows.
        sharpness_ratio: Sharpness, relative to dense.
        video: Video file, relative to the run's directory.
        details: File with density by step, layer and head, likewise.
        time: When it was finished, UTC.
        machine: Where; see :mod:`adamac.bakeoff.machine`.
    """

    arm: str
    prompt_id: str
    prompt: str
    category: str
    seed: int
    status: Literal["ok", "error"] = "ok"
    reason: str = ""
    first_call: bool = False
    latency_s: float | None = None
    text_s: float | None = None
    denoise_s: float | None = None
    decode_s: float | None = None
    step_s: list[float] = field(default_factory=list)
    peak_gib: float | None = None
    peak_kind: str = ""
    shape: list[int] = field(default_factory=list)
    density: float | None = None
    cost: float | None = None
    calls: int | None = None
    sparse_calls: int | None = None
    dense_calls: dict[str, int] = field(default_factory=dict)
    attention_s: dict[str, float] = field(default_factory=dict)
    state_bytes: int | None = None
    psnr_db: float | None = None
    psnr_worst_db: float | None = None
    ssim: float | None = None
    ssim_worst: float | None = None
    flicker_ratio: float | None = None
    motion_ratio: float | None = None
    motion_correlation: float | None = None
    sharpness_ratio: float | None = None
    video: str | None = None
    details: str | None = None
    time: str = ""
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there is a video."""
        return self.status == "ok"

    @property
    def key(self) -> Key:
        """What identifies this row within its run."""
        return Key(self.arm, self.prompt_id, self.seed)

    def to_json(self) -> str:
        """One line of JSON; figures that JSON cannot hold are refused."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Read one line; fields of other versions are ignored.

        Raises:
            ValueError: If the line is not a whole row.
        """
        known = {item.name for item in fields(cls)}
        value = json.loads(line)
        try:
            return cls(**{name: entry for name, entry in value.items() if name in known})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a row: {error}") from None


def append_row(path: Path, row: Row) -> None:
    """Add a row, and return once it is on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(row.to_json() + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Read every whole row; a torn last line, which a kill can leave, is dropped.

    Raises:
        BadInput: If any other line is not a row: then the file was not written by a run.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is damaged: expected lines of JSON, got {error.reason}") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(Row.from_json(line))
        except ValueError as error:
            if number < len(lines):
                raise BadInput(
                    f"{path}, line {number}: {error}; take the line out, and --resume makes its video again"
                ) from None
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the whole file at once, to complete rows or to drop a torn line."""
    write_text(path, "".join(row.to_json() + "\n" for row in rows))
