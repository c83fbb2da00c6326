"""Claims about layers that are replayed: what is timed under that name, and what the page says of it."""

from __future__ import annotations

import pytest
from benchmarks.moe.cases import FABRICS, CapturedCase, cases
from benchmarks.moe.run import Run, run
from benchmarks.moe_captured import gain_words, layers, memory_words, target_lines, unmeasured, verdict_words

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


def test_a_stopped_layer_is_named_unless_another_run_measured_it():
    stopped = timed("fine_grained", "all_gather", 2.0) | {"arm": "all", "status": "stopped", "tokens": 4096}
    measured = [row | {"tokens": 4096} for row in shape(1.8, 0.9)]
    assert unmeasured([stopped, *measured]) == []
    for other in ({"ranks": 4}, {"fabric": "nvlink"}, {"hidden": 1024}, {"routing": "trained_like"}):
        (row,) = unmeasured([stopped | other, *measured])
        assert row["arm"] == f"h {other.get('hidden', 2048):,}, top-8, r 1/4"


def test_memory_is_told_for_each_number_of_ranks():
    rows = [
        row | {"arm": row["arm"].replace("static_gather, captured", way)} | {what: gib * row["ranks"]}
        for ranks in (2, 4)
        for row in shape(1.8, 0.9, fabric="nvlink", ranks=ranks)
        for way, what, gib in (
            ("static_gather", "peak_gib", 2.0),
            ("static_gather, captured", "pool_gib", 3.0),
        )
        if row.get("captured") or way == "static_gather"
    ]
    rows = [row | {"peak_gib": 1.0} if "all_gather" in row["arm"] else row for row in rows]
    told = memory_words(rows)
    assert "on two ranks 1.00, 4.00, 6.00 GiB (fine_grained) and 1.00, 4.00, 6.00 GiB (bigmac)" in told
    assert "on four ranks 1.00, 8.00, 12.00 GiB (fine_grained)" in told
    assert memory_words([row | {"fabric": "shm"} for row in rows]) == ""


def test_what_replaying_gains_is_told_of_sockets_apart():
    fast, slow = shape(1.0, 0.5), shape(2.5, 4.0, fabric="sockets")
    assert "Over sockets" not in gain_words(fast)
    told = gain_words(fast + slow)
    assert "at h 2,048 3.00 times as fast in the median (2.00 to 4.00)" in told
    assert "Over sockets it gains nothing, 0.65 in the median (0.50 to 0.80)" in told


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


def test_a_verdict_names_the_steps_that_were_replayed_and_the_one_that_was_not():
    both = [step(side, "local", ms, captured=True) for side, ms in (("fine_grained", 6.0), ("bigmac", 3.0))]
    plain = [step(side, "all_gather", 9.0) for side in ("fine_grained", "bigmac")]
    alone = [row | {"fabric": "none", "ranks": 1} for row in both]
    told = verdict_words([], both + plain + alone)
    assert "shared memory, 2 ranks, 2.00; one GPU, 2.00; over NVLink on four ranks none was replayed" in told
    four = [row | {"fabric": "nvlink", "ranks": 4} for row in both]
    assert "none was replayed" not in verdict_words([], both + four)
