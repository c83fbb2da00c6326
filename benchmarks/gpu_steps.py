"""Denoising steps by run: how long they take, over what, and where their time goes. Part of `gpu_page.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
SPARSE_ARMS = ("default_15", "default_8")


def by_run(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the commit that they were measured at, newest first; ratios are taken inside of one run alone."""
    runs: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["run"], reverse=True):
        runs.setdefault(row["commit"], []).append(row)
    return {commit: sorted(run, key=lambda row: row["run"]) for commit, run in runs.items()}


def arm(run: Iterable[Row], model: str, name: str) -> Row | None:
    """The row of a model's arm, if it was run."""
    return next((row for row in run if (row["model"], row["arm"]) == (model, name)), None)


def usual(row: Row) -> Row:
    """Steps of the kind that an arm has most of: sparse ones, or else dense ones."""
    return row["sparse"] or row["dense"]


def ratio(run: list[Row], model: str, base: str, name: str) -> float | None:
    """How many times as fast an arm's usual step is as a dense arm's, in one run."""
    slow, fast = arm(run, model, base), arm(run, model, name)
    return usual(slow)["p50_ms"] / usual(fast)["p50_ms"] if slow and fast else None


def tail(row: Row) -> float | None:
    """Ratio of a step's 99th percentile to its median, from ten steps on."""
    steps = usual(row)
    return steps["p99_ms"] / steps["p50_ms"] if steps["steps"] >= 10 else None


def step_rows(run: list[Row]) -> Iterable[list[str]]:
    """Rows of the table of steps."""
    for row in run:
        steps, model = usual(row), row["model"]
        over = (ratio(run, model, base, row["arm"]) for base in ("stock", "best_dense"))
        first = f"{row['first_sparse']['p50_ms']:,.0f}" if row["first_sparse"] else "-"
        spread = tail(row)
        yield [
            model,
            row["arm"],
            f"{steps['p50_ms']:,.0f}",
            f"{spread:.3f}" if spread else "-",
            *(f"{times:.2f}" if times else "-" for times in over),
            first,
            f"{row['peak_gib']:.1f}",
            str(steps["steps"]),
        ]


def profile_rows(run: list[Row]) -> Iterable[list[str]]:
    """What a step's time is spent on; what no stage's clock saw is not attention."""
    for row in run:
        stages = usual(row).get("stage_ms_per_step")
        if stages is None:  # stock has no clocks
            continue
        step = usual(row)["p50_ms"]
        attention = sum(stages.values())
        parts = [stages["plan"], stages["attend"] + stages["dense"], step - attention]
        share = (step - attention) / step
        yield [row["model"], row["arm"], *(f"{part:,.0f}" for part in parts), f"{share:.0%}"]
