"""Prefill and decoding: what a token takes piece by piece, and replayed from a CUDA graph. Part of `moe_page.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .moe.cases import BASELINE
from .moe.summary import models, ok

Row = dict[str, Any]
Steps = dict[tuple[str, int, str], Row]
SIDES = (BASELINE, "bigmac")
TITLES = {"xl": "XL", "medium": "Medium"}


def section(rows: list[Row], earlier: list[Row]) -> str:
    """Tables and words.

    Args:
        rows: Of the longest run of prefill and decoding.
        earlier: Of runs before, in which nothing was captured.
    """
    stamp = rows[-1]
    return "\n\n".join(
        [
            f"One GPU, prompts of {_prompt(rows):,} tokens, random weights, commit `{stamp['commit']}` (`h200/moe_serving.jsonl`); the machine's other cards "
            "and cores were at work. *Captured*: the step is replayed from a CUDA graph, as `generate` does on one GPU.",
            models("none", rows),
            decode_words(rows, earlier),
        ]
    )


def decode_words(rows: list[Row], earlier: list[Row]) -> str:
    """What a decoded token waits for, and what it takes if nothing waits."""
    growing, captured = (_whole(steps(rows, captured=way)) for way in (False, True))
    captured = {key: row for key, row in captured.items() if key in growing}
    if not captured:
        return "No captured step was reached in time."
    gains = [growing[key]["p50_ms"] / row["p50_ms"] for key, row in captured.items()]
    tail = max(row["p99_ms"] / row["p50_ms"] for row in captured.values())
    told = [
        f"{_pair(growing, model, batch, '.0f')} piece by piece and {_pair(captured, model, batch, '.1f')} captured ({TITLES[model]}, {_texts(batch)})"
        for model, batch in dict.fromkeys(key[:2] for key in captured)
    ]
    before = steps(earlier, captured=False)
    return (
        f"**A decoded token** takes, baseline and BigMac, {'; '.join(told)}: {min(gains):.0f} to {max(gains):.0f} times as fast, and the 99th percentile is within "
        f"{tail - 1:.0%} of the median. {_not_captured(growing, captured)}"
        f"Piece by piece sixteen texts take {_span(_batched(growing))} times as long as one, so it is the host that is waited for, and its time goes with what else it does. BigMac seems "
        f"{_span(_ratios(growing))} times as fast there ({_span(_ratios(before))} in the run before), with more launches than the baseline; captured, where the device sets the time, it is "
        f"{_span(_ratios(captured))}: it has two projections more, and four times as many inner values to activate. So the former are no gain of a shape. "
        "A reason that fits and was not measured: torch takes cuDNN's attention on this card, which plans anew for every number of keys; the baseline, whose turns "
        "come first, pays for plans that BigMac finds ready. The captured step always has the same number of keys. It takes the "
        "likeliest token; `generate` may draw one by temperature and top-k besides, which was not timed."
    )


def steps(rows: Iterable[Row], *, captured: bool) -> Steps:
    """Decoding steps by model, texts and side: those replayed from a graph, or those that grow, as all are in rows of former runs."""
    kind = ("static", True) if captured else ("growing", False)
    found = [row for row in ok(list(rows), "moe_model") if row["work"] == "decode"]
    return {
        (row["model"], row["batch"], row["preset"]): row
        for row in found
        if (row.get("step", "growing"), row.get("captured", False)) == kind
    }


def _whole(found: Steps) -> Steps:
    """Only what both sides came to."""
    return {key: row for key, row in found.items() if all((*key[:2], side) in found for side in SIDES)}


def _not_captured(growing: Steps, captured: Steps) -> str:
    missing = sorted({key[0] for key in growing} - {key[0] for key in captured})
    names = " and ".join(TITLES[model] for model in missing)
    return f"The captured steps of {names} were not reached in time. " if missing else ""


def _ratios(found: Steps) -> list[float]:
    """Baseline over BigMac."""
    return [
        found[model, batch, BASELINE]["p50_ms"] / row["p50_ms"]
        for (model, batch, side), row in found.items()
        if side == "bigmac" and (model, batch, BASELINE) in found
    ]


def _batched(found: Steps) -> list[float]:
    """A step of the most texts over one of the fewest, by model and side; 1 where there is one number of texts alone."""
    ends = []
    for model, side in dict.fromkeys((key[0], key[2]) for key in found):
        times = {key[1]: row["p50_ms"] for key, row in found.items() if (key[0], key[2]) == (model, side)}
        ends.append(times[max(times)] / times[min(times)])
    return ends


def _span(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _pair(found: Steps, model: str, batch: int, form: str) -> str:
    return " and ".join(f"{found[model, batch, side]['p50_ms']:{form}}" for side in SIDES) + " ms"


def _texts(batch: int) -> str:
    return "one text" if batch == 1 else f"{batch} texts at once"


def _prompt(rows: list[Row]) -> int:
    return next(row["prompt"] for row in rows if "prompt" in row)
