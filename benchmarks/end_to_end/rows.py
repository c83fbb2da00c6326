"""Rows: one JSON object a line for each arm of a run, rewritten as the arm goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.jsonl import short

from adamac.bakeoff.machine import machine_stamp, version_of
from adamac.bakeoff.stats import percentile

from .arms import Arm
from .models import DENSE_SHARE, Model
from .turn import KINDS, Tally, Turn


class Record:
    """What is known of one arm on one model so far.

    Attributes:
        status: ``"ok"``, ``"stopped"`` at the time limit, or ``"error"``.
        reason: Why it is not ok.
    """

    def __init__(self, arm: Arm, common: dict[str, Any], model: Model) -> None:
        """Begin with nothing measured."""
        self.arm = arm
        self.status = "ok"
        self.reason = ""
        self._common = common
        self._model = model
        self._tallies = {kind: Tally() for kind in KINDS}
        self._turns = 0
        self._peak_gib: float | None = None
        self._peak_kind: str | None = None
        self._state_bytes = 0
        self._impl: str | None = None

    def add(self, turn: Turn) -> None:
        """Add a turn."""
        self._turns += 1
        for kind in KINDS:
            step_ms = [time_ms for step_kind, time_ms in turn.steps if step_kind == kind]
            self._tallies[kind].add(step_ms, turn.reports.get(kind))
        if turn.peak_gib is not None:
            self._peak_gib = max(turn.peak_gib, self._peak_gib or 0.0)
        self._peak_kind = turn.peak_kind
        self._state_bytes = max(
            [self._state_bytes, *(report.state_bytes for report in turn.reports.values())]
        )
        self._impl = turn.impl

    def end(self, status: str, reason: str) -> None:
        """Say why nothing more will come."""
        self.status, self.reason = status, reason

    def row(self) -> dict[str, Any]:
        """The row."""
        method = None if self.arm.method is None else self.arm.method()
        return self._common | {
            "arm": self.arm.name,
            "note": self.arm.note,
            "status": self.status,
            "reason": self.reason,
            "method": None if method is None else type(method).__name__,
            "settings": None if method is None else repr(method),  # names the budget's class too
            "impl": self._impl,
            "compiled": self.arm.compiled,
            "schedule": "dense" if self.arm.is_dense else f"first {DENSE_SHARE:.0%} of the steps dense",
            "turns": self._turns,
            **{kind: _figures(self._tallies[kind]) for kind in KINDS},
            "video_s_projected": self._projected_s(),
            "peak_gib": self._peak_gib,
            "peak_kind": self._peak_kind,
            "state_bytes": self._state_bytes,
        }

    def _projected_s(self) -> float | None:
        """Time of all steps of a whole video, from medians; ``None`` where a kind was not measured."""
        row = {kind: percentile(tally.step_ms, 0.5) for kind, tally in self._tallies.items()}
        return projected_s(self._common, row, is_dense=self.arm.is_dense)


def projected_s(
    common: dict[str, Any], median_ms: dict[str, float | None], *, is_dense: bool
) -> float | None:
    """Time of all steps of a whole video, from the medians of its kinds of steps.

    Args:
        common: Entries of the row that hold for all arms.
        median_ms: Median of each kind.
        is_dense: Whether every step is dense.

    Returns:
        Seconds; ``None`` where a kind was not measured, or layers are missing, with which a video would be another.
    """
    steps, dense_steps = common["steps_of_video"], common["dense_steps_of_video"]
    sparse_steps = steps - dense_steps - 1
    counts = (
        {"dense": steps} if is_dense else {"dense": dense_steps, "first_sparse": 1, "sparse": sparse_steps}
    )
    times = [(median_ms[kind], count) for kind, count in counts.items()]
    if common["layers"] < common["layers_of_model"] or any(time_ms is None for time_ms, _ in times):
        return None
    return sum(time_ms * count for time_ms, count in times if time_ms is not None) / 1e3


class RowFile:
    """A file of rows; those of other runs stay as they are."""

    def __init__(self, path: Path) -> None:
        """Remember what is in the file already."""
        self._path = path
        self._former = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)

    def save(self, rows: list[dict[str, Any]]) -> None:
        """Write all rows of this run after the former ones, all or nothing."""
        lines = self._former + [json.dumps(short(row)) for row in rows]
        fresh = self._path.with_name(self._path.name + ".tmp")
        fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(fresh, self._path)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def stamp(device: str, commit: str | None) -> dict[str, Any]:
    """Machine, versions and commit.

    Args:
        device: Torch's name of it.
        commit: Names the commit where the code is a copy without its repository.
    """
    found = machine_stamp(device) | {"triton": version_of("triton")}
    return found if commit is None else found | {"commit": commit}


def _figures(tally: Tally) -> dict[str, Any] | None:
    """Condense the steps of one kind; ``None`` if there were none."""
    times, calls = tally.step_ms, tally.calls
    if not times:
        return None
    figures: dict[str, Any] = {"steps": len(times), "min_ms": min(times), "max_ms": max(times)}
    figures |= {f"p{share}_ms": percentile(times, share / 100) for share in (50, 95, 99)}
    if calls:
        figures |= {
            "density": tally.density / calls,
            "cost": tally.cost / calls,
            "calls": calls,
            "sparse_calls": tally.sparse_calls,
            "dense_calls": dict(tally.dense_calls),
            "stage_ms_per_step": {
                stage: 1e3 * time_s / len(times) for stage, time_s in tally.seconds.items()
            },
        }
    if tally.rank_seconds:
        spent = tally.rank_seconds.values()
        figures["imbalance"] = max(spent) * len(spent) / sum(spent)
    return figures | {"step_ms": times}
