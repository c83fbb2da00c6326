"""Layers and training steps on two ranks and on four, and what constants of two said of both. Part of `moe_page.py`."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from .gpu_page import table
from .moe.cases import BASELINE, COPY_PER_EXPERT
from .moe.summary import cost_line, ok, predictions
from .moe_fabrics import said
from .moe_foreseen import WITHIN, WORDS, error_line
from .moe_grid import PASSES, Shape, shapes
from .moe_steps import best, by_best, by_copies, trained

Row = dict[str, Any]
SIDES = (BASELINE, "bigmac")


def section(rows: list[Row], before: list[Row]) -> str:
    """Tables and words; ``before`` are rows of the run whose constants the projection was made with."""
    stamp = rows[0]
    return "\n\n".join(
        [
            f"{max(row['ranks'] for row in rows)} × {stamp['device']} of one host at commit `{stamp['commit']}` (`h200/moe_ranks.jsonl`), as many tokens on each rank "
            "whatever their number. Two ranks: both fabrics at once, each on a pair of GPUs; four: one fabric after the other, alone. Forward / forward + backward.",
            layer_table(rows),
            layer_words(rows, before),
            step_table(rows),
            step_words(rows),
        ]
    )


def verdict_words(rows: list[Row]) -> str:
    """One line on four ranks, beside the verdict on two."""
    told = []
    for fabric in dict.fromkeys(fabric for fabric, _ in places(rows)):
        shape, steps = _xl(rows, fabric, 4), trained(_of(rows, fabric, 4), "xl", fabric)
        told.append(f"{WORDS[fabric]} {_pair(map(shape.best, PASSES))}, a training step {by_best(steps):.2f}")
    return (
        f"**And on four ranks?** [The same layer](#four-ranks) between the best dispatchers, forward / forward + backward: {'; '.join(told)}. "
        "More ranks mean more to send for the same products, so it pays through shared memory there, and over NVLink in the layer, not in training."
    )


def layer_table(rows: list[Row]) -> str:
    """Best times of both sides and their ratios."""
    lines = []
    for fabric, ranks in places(rows):
        for shape in _here(rows, fabric, ranks):
            times = (_pair(_best_ms(shape, name, side) for name in PASSES) for side in SIDES)
            ratios = (_pair(map(found, PASSES)) for found in (shape.copies, shape.best))
            lines.append([WORDS[fabric], str(ranks), _words(shape), *times, *ratios])
    head = ["fabric", "ranks", "layer", "baseline's best, ms", "BigMac's best, ms", "copy per expert", "best"]
    return table(head, lines)


def layer_words(rows: list[Row], before: list[Row]) -> str:
    """What more ranks change, in bytes and in verdicts, and what the projection had said of it."""
    layers = ok(rows, "moe_layer")
    flags = [entry["equal"] for row in layers for entry in row["bytes"].values()]
    two, four = (_xl(rows, "nvlink", ranks) for ranks in (2, 4))
    sent = "; ".join(
        f"{arm} {' and '.join(f'{_sent_mib(shape, arm):.0f}' for shape in (two, four))}"
        for arm in (f"{side}/{way}" for side in SIDES for way in ("all_gather", COPY_PER_EXPERT, "per_rank"))
    )
    through = [_xl(rows, "shm", ranks) for ranks in (2, 4)]
    told, now = said(before, 4, None), four.best("forward", "predicted_ms")
    alone = {row["preset"]: row for row in ok(before, "moe_layer") if _is_xl(row, "none")}
    times = " and ".join(_pair(alone[side][name]["p50_ms"] for name in PASSES) for side in SIDES)
    return (
        f"Bytes counted are the formula's in {sum(flags)} of {len(flags)} passes. XL top-8 forward, balanced, MiB of rows that a rank sends over NVLink on two ranks and on four: {sent}. "
        f"So BigMac gains with the ranks, by the best dispatcher forward: over NVLink {two.best('forward'):.2f}, then {four.best('forward'):.2f}; through shared memory "
        f"{through[0].best('forward'):.2f}, then {through[1].best('forward'):.2f}. On one rank the layer takes {times} ms (`{alone[BASELINE]['commit']}`, `h200/moe.jsonl`).\n\n"
        f"[The projection](#more-ranks-a-projection) had said {told[1]:.2f} between the best for four ranks over NVLink, and the constants of this run {now:.2f}, before it was measured: "
        f"{told[1] / four.best('forward') - 1:.0%} and {now / four.best('forward') - 1:.0%} too good. Each side was said within 15 %, but the baseline's best too slow and BigMac's too fast."
    )


def step_table(rows: list[Row]) -> str:
    """Training steps by their best dispatcher."""
    lines = []
    for fabric, ranks, model, steps in _trainings(rows):
        pair = [best(steps, side) for side in SIDES]
        cells = (
            f"{row['p50_ms']:,.0f} / {row['p95_ms']:,.0f} / {row['p99_ms']:,.0f} ({row['dispatcher']})"
            for row in pair
        )
        speeds = (f"{row['tokens_per_s']:,.0f}" for row in pair)
        peak = max(row["peak_gib"] for row in steps.values())
        lines.append(
            [WORDS[fabric], str(ranks), model, *cells, *speeds, f"{by_copies(steps):.2f}", f"{by_best(steps):.2f}", f"{peak:.1f}"]
        )  # fmt: skip
    head = ["fabric", "ranks", "model", "baseline, p50 / p95 / p99 ms", "BigMac", "tokens/s", "tokens/s, BigMac", "copy per expert", "best", "peak, GiB"]  # fmt: skip
    return table(head, lines)


def step_words(rows: list[Row]) -> str:
    """How much of its tokens a second a rank keeps on four."""
    kept = []
    for fabric in dict.fromkeys(fabric for fabric, _ in places(rows)):
        two, four = (trained(_of(rows, fabric, ranks), "xl", fabric) for ranks in (2, 4))
        shares = [best(four, side)["tokens_per_s"] / best(two, side)["tokens_per_s"] / 2 for side in SIDES]
        kept.append(f"{WORDS[fabric]} {shares[0]:.2f} of the baseline's and {shares[1]:.2f} of BigMac's")
    few = sorted({row["n"] for row in ok(rows, "moe_model")})
    return (
        f"A training step of XL keeps, from two ranks to four at their best, of the tokens a second of each rank: over {'; through '.join(kept)}. {few[0]} to {few[-1]} steps of each, so "
        "a 99th percentile is little more than the slowest."
    )


def cost_section(rows: list[Row]) -> str:
    """How near constants of two ranks came on two and on four."""
    groups = [
        (f"{WORDS[fabric]}, {ranks} ranks, {PASSES[name]}", _errors(rows, fabric, ranks, name))
        for fabric, ranks in places(rows)
        for name in PASSES
    ]
    return "\n\n".join(
        [
            f"**Four ranks by constants of two.** `adamac advise moe --measure` fitted a fabric on two ranks; then two and four were timed (`{rows[0]['commit']}`, `h200/moe_ranks.jsonl`).",
            table(["said before it was timed", "points", "within 15 %", "median error", "worst"], (error_line(*group) for group in groups)),
            cause_words(rows),
        ]
    )  # fmt: skip


def target_lines(rows: list[Row]) -> Iterable[list[str]]:
    """The cost model's target on four ranks, by fabric."""
    for fabric in dict.fromkeys(fabric for fabric, _ in places(rows)):
        yield cost_line(
            f"cost model on 4 ranks by constants of 2, {fabric}", predictions(_of(rows, fabric, 4))
        )


def cause_words(rows: list[Row]) -> str:
    """Where the errors on four ranks lie."""
    idle = [
        median(row["forward"]["p50_ms"] for row in ok(_of(rows, "shm", ranks), "moe_layer") if row["arm"] == "bigmac/all_gather")
        for ranks in (2, 4)
    ]  # fmt: skip
    far = [p for p in predictions(_of(rows, "shm", 4)) if abs(p[2] / p[3] - 1) > WITHIN]
    waiting = sum(row["preset"] == "bigmac" for row, *_ in far)
    gathered, copied = (
        median(predicted / ms - 1 for row, _, predicted, ms in predictions(_of(rows, "shm", 4)) if row["arm"] == f"{BASELINE}/{way}")
        for way in ("all_gather", COPY_PER_EXPERT)
    )  # fmt: skip
    return (
        f"Over NVLink the constants carry. Through shared memory {len(far)} points are off, {waiting} of them BigMac's, whose time the model gives to the host: it takes the floor of two ranks, "
        f"and on four the same launches take longer (bigmac/all_gather forward {idle[0]:.2f} ms in the median, then {idle[1]:.2f}). Messages are off in either direction: the gather of wide rows is "
        f"said {gathered:+.0%}, copies {copied:+.0%}, as if with four ranks a gather through the host's memory had a lower rate a rank and an exchange a higher one than with two. "
        "Next: the floor and the rates by number of ranks, where more can be measured."
    )


def places(rows: list[Row]) -> list[tuple[str, int]]:
    """Fabrics and numbers of ranks that layers were timed on."""
    return list(dict.fromkeys((row["fabric"], row["ranks"]) for row in ok(rows, "moe_layer")))


def _of(rows: list[Row], fabric: str, ranks: int) -> list[Row]:
    return [row for row in rows if (row["fabric"], row["ranks"]) == (fabric, ranks)]


def _here(rows: list[Row], fabric: str, ranks: int) -> list[Shape]:
    return shapes(_of(rows, fabric, ranks))


def _xl(rows: list[Row], fabric: str, ranks: int) -> Shape:
    return next(s for s in _here(rows, fabric, ranks) if (s.top_k, s.routing) == (8, "balanced"))


def _is_xl(row: Row, fabric: str) -> bool:
    return (row["fabric"], row["hidden"], row["top_k"], row["routing"], row["rivals"]) == (
        fabric,
        2048,
        8,
        "balanced",
        [],
    )


def _trainings(rows: list[Row]) -> Iterable[tuple[str, int, str, dict[str, Row]]]:
    for fabric, ranks in places(rows):
        for model in ("xl", "medium"):
            if steps := trained(_of(rows, fabric, ranks), model, fabric):
                yield fabric, ranks, model, steps


def _errors(rows: list[Row], fabric: str, ranks: int, name: str) -> list[float]:
    return [
        predicted / ms - 1
        for _, which, predicted, ms in predictions(_of(rows, fabric, ranks))
        if which == name
    ]


def _best_ms(shape: Shape, name: str, side: str) -> float:
    return min(row[name]["p50_ms"] for row in shape.arms.values() if row["preset"] == side)


def _pair(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def _sent_mib(shape: Shape, arm: str) -> float:
    return shape.arms[arm]["bytes"]["forward"]["payload"] / 2**20


def _words(shape: Shape) -> str:
    return f"h {shape.hidden:,}, top-{shape.top_k}, {'uneven' if shape.routing != 'balanced' else 'balanced'}"
