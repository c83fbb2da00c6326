"""Claims about layers that are replayed: what is timed under that name, and what the page says of it."""

from __future__ import annotations

import pytest
from benchmarks.moe.cases import FABRICS, CapturedCase, cases
from benchmarks.moe.run import Run, run
from benchmarks.moe_captured import layers, target_lines

WAYS = ("all_gather", "all_to_all", "per_rank", "static_gather")


def test_on_a_processor_static_shapes_are_timed_and_nothing_is_called_replayed(tmp_path):
    options = Run(plan="tiny", out=tmp_path / "rows.jsonl", fabrics=("gloo",), parts=("captured",))
    rows = [row for row in run(options, say=lambda line: None) if row["benchmark"] == "moe_captured"]
    by_status = {status: [row for row in rows if row["status"] == status] for status in ("ok", "absent")}
    assert [row["dispatcher"] for row in by_status["ok"]] == [*WAYS, *WAYS]
    assert all(entry["equal"] for row in by_status["ok"] for entry in row["bytes"].values())
    assert [row["arm"] for row in by_status["absent"]] == [
        f"{side}/static_gather, captured" for side in ("fine_grained", "bigmac")
    ]
    assert all(
        "CUDA graphs are for GPUs" in row["reason"] and "forward" not in row for row in by_status["absent"]
    )


def test_the_grid_has_every_shape_once_more():
    found = cases("grid", FABRICS["shm"], ("captured",))
    shapes = {(case.hidden, case.top_k, case.ratio) for case in found}
    assert len(found) == len(shapes) == 27
    assert all(isinstance(case, CapturedCase) and case.routing == "balanced" for case in found)


def timed(side: str, way: str, ms: float, *, captured: bool = False, **changes) -> dict:
    row = {"benchmark": "moe_captured", "status": "ok", "fabric": "shm", "ranks": 2, "routing": "balanced"}
    row |= {"hidden": 2048, "top_k": 8, "ratio": 0.25, "preset": side, "dispatcher": way}
    row |= {"arm": f"{side}/{way}{', captured' * captured}", "forward": {"p50_ms": ms, "n": 8}}
    row |= {"forward_backward": {"p50_ms": 3 * ms}} | ({"captured": True} if captured else {})
    return row | changes


def shape(wide: float, narrow: float, **changes) -> list[dict]:
    """Both sides take 2 ms launched piece by piece, and so long replayed."""
    sides = {"fine_grained": wide, "bigmac": narrow}
    return [
        row
        for side, ms in sides.items()
        for row in (
            timed(side, "all_gather", 2.0, **changes),
            timed(side, "static_gather", ms, captured=True, **changes),
        )
    ]


@pytest.mark.parametrize(
    ("wide", "narrow", "ratio", "verdict"),
    [
        (1.8, 0.9, "2.00", "met"),
        (1.8, 1.0, "1.80", "missed"),
        (3.0, 1.0, "2.00", "met"),  # the baseline is launched where that is faster
    ],
)
def test_a_target_is_judged_by_the_best_way_of_either_side(wide, narrow, ratio, verdict):
    (line,) = target_lines(shape(wide, narrow), [])
    assert line == [
        "layer, XL top-8, best way, replaying too, shm",
        "≥ 2 ×",
        ratio,
        ratio,
        verdict,
    ]


def test_other_ranks_routings_and_shapes_are_no_target_and_a_side_that_was_not_replayed_is_no_layer():
    for changes in ({"ranks": 4}, {"routing": "trained_like"}, {"hidden": 1024}, {"top_k": 4}):
        assert target_lines(shape(1.8, 0.9, **changes), []) == []
    assert layers([row for row in shape(1.8, 0.9) if row["arm"] != "bigmac/static_gather, captured"]) == []


def test_a_shape_that_was_timed_at_length_and_in_the_grid_counts_as_at_length():
    long = [row | {"forward": row["forward"] | {"n": 24}} for row in shape(1.8, 0.9)]
    for rows in (long + shape(1.0, 1.0), shape(1.0, 1.0) + long):
        (found,) = layers(rows)
        assert found.best("forward") == 2.0


def step(side: str, way: str, ms: float, *, captured: bool = False, **changes) -> dict:
    row = {
        "benchmark": "moe_model",
        "status": "ok",
        "work": "train",
        "model": "xl",
        "fabric": "shm",
        "ranks": 2,
    }
    row |= {"preset": side, "dispatcher": way, "arm": f"{side}/{way}{', captured' * captured}", "n": 4}
    return row | {"p50_ms": ms, "captured": captured} | changes


def test_a_training_step_is_judged_by_the_best_way_too_and_not_without_both_replays():
    plain = [step(side, "all_to_all", ms) for side, ms in (("fine_grained", 9.0), ("bigmac", 4.0))]
    replays = [
        step(side, "static_gather", ms, captured=True)
        for side, ms in (("fine_grained", 5.0), ("bigmac", 2.0))
    ]
    (line,) = target_lines([], plain + replays)
    assert line[2:] == ["2.50", "-", "met"]
    assert target_lines([], plain + replays[:1]) == []
    assert target_lines([], [row | {"ranks": 4} for row in plain + replays]) == []
