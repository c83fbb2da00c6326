"""Claims about what the page says of prefill and decoding."""

from __future__ import annotations

from benchmarks.moe.summary import models
from benchmarks.moe_serving import decode_words, steps


def token(side: str, ms: float, batch: int = 1, model: str = "xl", **changes) -> dict:
    row = {"benchmark": "moe_model", "status": "ok", "fabric": "none", "work": "decode", "model": model}
    row |= {
        "top_k": 8,
        "batch": batch,
        "prompt": 16,
        "preset": side,
        "arm": f"{side}/local",
        "ranks": 1,
        "n": 9,
    }
    return row | {"p50_ms": ms, "p95_ms": ms, "p99_ms": 1.1 * ms, "tokens_per_s": 1.0} | changes


GROWN = [token("fine_grained", 60.0), token("bigmac", 40.0)]
WAITING = [
    row | {"step": "static", "captured": False, "p50_ms": 1e9, "not_captured": "it waits"} for row in GROWN
]
CAPTURED = [row | {"step": "static", "captured": True, "p50_ms": 5.0, "p99_ms": 5.5} for row in GROWN]


def test_a_captured_step_is_never_taken_for_one_that_grows():
    rows = [*GROWN, *WAITING, *CAPTURED]
    assert list(steps(rows, captured=False).values()) == GROWN
    assert list(steps(rows, captured=True).values()) == CAPTURED
    shown = models("none", [GROWN[0], WAITING[0], CAPTURED[0]])
    for what in ("decode", "decode, static, not captured (it waits)", "decode, captured"):
        assert f"| {what}, batch 1, prompt 16 |" in shown


def test_gains_tails_and_ratios_are_those_of_the_rows():
    said = decode_words([*GROWN, *WAITING, *CAPTURED], [token("fine_grained", 80.0), token("bigmac", 64.0)])
    assert "60 and 40 ms piece by piece and 5.0 and 5.0 ms captured (XL, one text)" in said
    assert "8 to 12 times as fast, and the 99th percentile is within 10% of the median" in said
    assert "seems 1.50 to 1.50 times as fast there (1.25 to 1.25 in the run before)" in said
    assert "it is 1.00 to 1.00" in said
    assert "not reached" not in said


def test_a_model_whose_captured_steps_are_missing_is_named():
    medium = [token(side, 30.0, model="medium") for side in ("fine_grained", "bigmac")]
    said = decode_words([*GROWN, *CAPTURED, *medium], GROWN)
    assert "The captured steps of Medium were not reached in time." in said


def test_what_one_side_alone_came_to_is_not_compared():
    assert decode_words([*GROWN, *WAITING], GROWN) == "No captured step was reached in time."
    assert decode_words([*GROWN, CAPTURED[0]], GROWN) == "No captured step was reached in time."
    assert decode_words([GROWN[0], *CAPTURED], GROWN) == "No captured step was reached in time."
