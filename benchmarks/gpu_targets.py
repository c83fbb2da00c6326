"""What was to be reached on one H100, and whether it was, in one table. Part of `gpu_page.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .gpu_steps import SPARSE_ARMS, Row, arm, ratio, tail

Rows = dict[tuple[str, str], Row]
CALLS = {  # speed-up of a call over the fastest dense kernel, compensated
    ("cogvideox-2b", 15): 2.0,
    ("wan-1.3b", 15): 3.5,
    ("wan-14b", 15): 4.5,
    ("hunyuan-129f", 15): 4.8,
    ("wan-14b", 8): 7.0,
    ("hunyuan-129f", 8): 7.5,
    ("hunyuan-193f", 8): 8.0,
}
PLANNING = 0.08  # of the fastest dense kernel, from 75,000 tokens on
STEPS = {  # over the best dense step at 15 % and at 8 %, over stock diffusers
    "cogvideox-2b": (1.25, 1.3, 1.67),
    "wan-1.3b": (1.5, 1.6, 1.85),
    "wan-14b": (1.9, 2.1, 2.4),
    "hunyuan-129f": (2.2, 2.6, 4.0),
    "hunyuan-193f": (2.8, 3.6, 4.31),
}
TAIL = 1.05
STATE_GB = 0.5  # Wan2.1-14B, both guidance branches
PEAK = 1.10  # over dense
# Steps of stock diffusers that were measured on such a card without a row being kept (2026-11-21, one forward, cuDNN).
STOCK_WITHOUT_ROWS_MS = {"wan-14b": 12_600.0}


def target_rows(attention: Rows, runs: dict[str, list[Row]]) -> Iterable[list[str]]:
    """Rows of the table: what, where, target, measured, met."""
    newest = next(iter(runs.values()))
    yield from _calls(attention)
    yield from _steps(newest)
    yield from _stock(runs)
    yield from _tails(newest)
    yield from _memory(newest)


def _calls(attention: Rows) -> Iterable[list[str]]:
    for (shape, density), target in CALLS.items():
        reached = attention[shape, f"adamac {density}% compensated"]["speedup"]
        yield _line(f"one call at {density} %", shape, f"≥ {target:g}×", f"{reached:.2f}×", reached >= target)
    for shape in ("wan-14b", "hunyuan-129f", "hunyuan-193f"):
        share = 1 / attention[shape, "adamac 15% compensated, plan"]["speedup"]
        yield _line("planning ÷ dense", shape, f"≤ {PLANNING:.0%}", f"{share:.1%}", share <= PLANNING)


def _steps(run: list[Row]) -> Iterable[list[str]]:
    for model, (*targets, _) in STEPS.items():
        for name, target in zip(SPARSE_ARMS, targets, strict=True):
            reached = ratio(run, model, "best_dense", name)
            what = f"step over best dense, {_percent(name)}"
            if reached is None:
                yield _line(what, model, f"≥ {target:g}×", "not run", None)
            else:
                yield _line(what, model, f"≥ {target:g}×", f"{reached:.2f}×", reached >= target)


def _stock(runs: dict[str, list[Row]]) -> Iterable[list[str]]:
    newest, *older = runs.values()
    for model, (*_, target) in STEPS.items():
        found = [arm(newest, model, name) for name in SPARSE_ARMS]
        stock, whose = _stock_ms(newest, older, model)
        if stock is None or None in found:
            yield _line("step over stock, 15 / 8 %", model, f"≥ {target:g}×", "not run", None)
            continue
        reached = [stock / row["sparse"]["p50_ms"] for row in found if row]
        measured = " / ".join(f"{times:.2f}×" for times in reached) + whose
        met = "at 8 %" if reached[0] < target <= reached[1] else reached[0] >= target
        yield _line("step over stock, 15 / 8 %", model, f"≥ {target:g}×", measured, met)


def _stock_ms(newest: list[Row], older: list[list[Row]], model: str) -> tuple[float | None, str]:
    """A stock step, and whose it is where the same run has none."""
    if row := arm(newest, model, "stock"):
        return row["dense"]["p50_ms"], ""
    for run in older:
        if row := arm(run, model, "stock"):
            return row["dense"]["p50_ms"], " (stock of the run before)"
    return STOCK_WITHOUT_ROWS_MS.get(model), " (stock of a measurement without rows)"


def _tails(run: list[Row]) -> Iterable[list[str]]:
    for row in run:
        if row["arm"] in SPARSE_ARMS and (spread := tail(row)):
            what = f"p99 / p50 of a sparse step, {_percent(row['arm'])}"
            yield _line(what, row["model"], f"≤ {TAIL}", f"{spread:.3f}", spread <= TAIL)


def _memory(run: list[Row]) -> Iterable[list[str]]:
    dense, sparse = arm(run, "wan-14b", "best_dense"), arm(run, "wan-14b", "default_15")
    if not dense or not sparse:
        return
    state = 2 * sparse["state_bytes"] / 1e9
    measured = f"{state:.2f} GB (2 × what one branch held)"
    yield _line("state, both branches", "wan-14b", f"≤ {STATE_GB} GB", measured, state <= STATE_GB)
    peak = sparse["peak_gib"] / dense["peak_gib"]
    measured = f"{peak - 1:+.1%} (one branch)"
    yield _line("peak over dense", "wan-14b", f"≤ {PEAK - 1:+.0%}", measured, peak <= PEAK)


def _percent(name: str) -> str:
    return f"{name.removeprefix('default_')} %"


def _line(what: str, where: str, target: str, measured: str, met: Any) -> list[str]:
    verdict = met if isinstance(met, str) else {True: "yes", False: "**no**", None: "-"}[met]
    return [what, where, target, measured, verdict]
