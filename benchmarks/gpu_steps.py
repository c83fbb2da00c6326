"""Denoising steps by run: how long they take, over what, and where their time goes. Part of `gpu_page.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
Runs = dict[str, list[Row]]
SPARSE_ARMS = ("default_15", "default_8")
COMPILED = "+compile"


def by_run(rows: Iterable[Row]) -> Runs:
    """Rows by commit and card, newest first; ratios are taken inside of one such run alone."""
    runs: Runs = {}
    for row in sorted(rows, key=lambda row: row["run"], reverse=True):
        runs.setdefault(f"{row['commit']}, {row['device'].removesuffix(' 80GB HBM3')}", []).append(row)
    return {commit: sorted(run, key=lambda row: row["run"]) for commit, run in runs.items()}


def arm(run: Iterable[Row], model: str, name: str) -> Row | None:
    """The row of a model's arm, if its usual steps were run."""
    return next((row for row in run if (row["model"], row["arm"]) == (model, name) and usual(row)), None)


def newest(runs: Runs, model: str, *names: str) -> list[Row] | None:
    """The newest run in which a model has all these arms."""
    return next((run for run in runs.values() if all(arm(run, model, name) for name in names)), None)


def usual(row: Row) -> Row | None:
    """Steps of the kind that an arm is for, if it came to them: sparse ones, of a dense arm dense ones."""
    return row["sparse"] if row["first_sparse"] else row["dense"]


def p50_ms(row: Row) -> float:
    """Median of an arm's usual steps, which it has to have."""
    steps = usual(row)
    assert steps is not None
    return steps["p50_ms"]


def ratio(run: list[Row], model: str, base: str, name: str) -> float | None:
    """How many times as fast an arm's usual step is as a dense arm's, in one run."""
    row = arm(run, model, name)
    return over(run, base, row) if row else None


def over(run: list[Row], base: str, row: Row) -> float | None:
    """How many times as fast a row's usual step is as a dense arm's: of the same processes if these had that arm."""
    same = [other for other in run if other["run"] == row["run"]]
    slow = arm(same, row["model"], base) or arm(run, row["model"], base)
    return p50_ms(slow) / p50_ms(row) if slow else None


def tail(row: Row) -> float | None:
    """Ratio of a step's 99th percentile to its median, from ten steps on."""
    steps = usual(row)
    return steps["p99_ms"] / steps["p50_ms"] if steps and steps["steps"] >= 10 else None


def step_rows(run: list[Row]) -> Iterable[list[str]]:
    """Rows of the table of one run's steps."""
    return (_step_row(row, run) for row in run if usual(row))


def latest_step_rows(runs: Runs, models: Iterable[str]) -> Iterable[list[str]]:
    """Rows of the table of steps: the newest of each model's arms that can be compared, and which run it is of."""
    for model in models:
        found: dict[str, list[str]] = {}
        for name, run in runs.items():
            for row in run:
                if row["model"] == model and usual(row) and not _alone(row, run):
                    found.setdefault(row["arm"], [*_step_row(row, run), name])
        yield from (found[name] for name in sorted(found, key=_place))


def tail_rows(runs: Runs) -> Iterable[list[str]]:
    """Percentiles of steps of arms that were run for these alone."""
    for name, run in runs.items():
        for row in run:
            spread, steps = tail(row), usual(row)
            if spread and steps and _alone(row, run):
                times = (f"{steps[key]:,.0f}" for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms"))
                yield [row["model"], row["arm"], *times, f"{spread:.3f}", str(steps["steps"]), name]


def _alone(row: Row, run: list[Row]) -> bool:
    """Whether a sparse arm's run has no dense one of the model to compare it with."""
    return bool(row["first_sparse"]) and not any(
        other["model"] == row["model"] and not other["first_sparse"] for other in run
    )


def _place(name: str) -> tuple[int, str]:
    """Dense arms first, then ours, then other methods."""
    order = ("stock", "best_dense", *SPARSE_ARMS)
    plain = name.removesuffix(COMPILED)
    return (order.index(plain) if plain in order else len(order), name)


def _step_row(row: Row, run: list[Row]) -> list[str]:
    steps = usual(row)
    assert steps is not None
    dense = "best_dense" + (COMPILED if row["arm"].endswith(COMPILED) else "")
    ratios = (over(run, base, row) for base in ("stock", dense))
    first = f"{row['first_sparse']['p50_ms']:,.0f}" if row["first_sparse"] else "-"
    spread = tail(row)
    return [
        row["model"],
        row["arm"],
        f"{steps['p50_ms']:,.0f}",
        f"{spread:.3f}" if spread else "-",
        *(f"{times:.2f}" if times else "-" for times in ratios),
        first,
        f"{row['peak_gib']:.1f}",
        str(steps["steps"]),
    ]


def profile_rows(runs: Runs) -> Iterable[list[str]]:
    """What a step's time is spent on, each arm's newest; what no stage's clock saw is not attention."""
    seen = set()
    for name, row in ((name, row) for name, run in runs.items() for row in run):
        steps = usual(row)
        stages = steps and steps.get("stage_ms_per_step")
        if steps is None or not stages or (row["model"], row["arm"]) in seen:  # stock has no clocks
            continue
        seen.add((row["model"], row["arm"]))
        step, attention = steps["p50_ms"], sum(stages.values())
        parts = [stages["plan"], stages["attend"] + stages["dense"], step - attention]
        share = (step - attention) / step
        yield [row["model"], row["arm"], *(f"{part:,.0f}" for part in parts), f"{share:.0%}", name]


def video_rows(runs: Runs) -> Iterable[list[str]]:
    """Denoising of a whole video with compiled blocks: the schedule's dense steps, one that clusters, and the rest sparse."""
    for name, run in runs.items():
        for row in run:
            dense = arm(run, row["model"], "best_dense" + COMPILED)
            first = row["first_sparse"]
            if dense is None or first is None or usual(row) is None:
                continue
            steps, early = row["steps_of_video"], row["dense_steps_of_video"]
            spent = early * p50_ms(dense) + first["p50_ms"] + (steps - early - 1) * p50_ms(row)
            stock = arm(run, row["model"], "stock")
            over = [steps * p50_ms(base) / spent for base in (dense, stock) if base]
            ratios = [f"{times:.2f}×" for times in over]
            arm_name = row["arm"].removesuffix(COMPILED)
            yield [row["model"], arm_name, f"{spent / 1e3:,.0f}", *ratios, *["-"] * (2 - len(ratios)), name]
