"""Claims about the grid of layers: which rows make a shape, where BigMac pays, and how often the cost model said so before."""

from __future__ import annotations

from itertools import product

import pytest
from benchmarks.moe.rows import read
from benchmarks.moe_grid import (
    PASSES,
    Shape,
    again_words,
    fabric_table,
    shapes,
    skewed_words,
    store,
    thinned,
    where_words,
)
from benchmarks.moe_grid_cost import Verdict, layer_points, lines, verdict_line, verdicts
from benchmarks.moe_page import later

# Milliseconds of a shape by arm: 8 / 4 by copies, 3 / 2 between the best.
WIDE = {"all_to_all": 8.0, "all_gather": 3.0, "per_rank": 4.0}
NARROW = {"all_to_all": 4.0, "all_gather": 2.5, "per_rank": 2.0}


def layer(side: str, way: str, ms: float, said: float | None = None, **changes) -> dict:
    row = {
        "benchmark": "moe_layer",
        "status": "ok",
        "fabric": "shm",
        "hidden": 2048,
        "top_k": 8,
        "ratio": 0.25,
    }
    row |= {"tokens": 4096, "routing": "balanced", "experts": "auto", "rivals": [], "num_experts": 64}
    row |= {"arm": f"{side}/{way}", "preset": side, "dispatcher": way}
    times = {"n": 8, "p50_ms": ms, "predicted_ms": ms if said is None else said}
    return row | dict.fromkeys(PASSES, times) | changes


def layers(wide: dict = WIDE, narrow: dict = NARROW, **changes) -> list[dict]:
    sides = {"fine_grained": wide, "bigmac": narrow}
    return [layer(side, way, ms, **changes) for side, times in sides.items() for way, ms in times.items()]


def test_ratios_are_by_copies_and_between_the_best_of_either_side():
    (shape,) = shapes(layers())
    assert (shape.copies("forward"), shape.best("forward"), shape.pays) == (2.0, 1.5, True)
    assert shape.best("forward", "predicted_ms") == 1.5


def test_a_shape_pays_only_if_it_does_in_both_passes():
    rows = layers()
    for row in rows:
        if row["preset"] == "bigmac":
            row["forward_backward"] = {"n": 8, "p50_ms": 2.9}
    (shape,) = shapes(rows)
    assert shape.best("forward") > 1.05 > shape.best("forward_backward") > 1
    assert not shape.pays


def test_a_shape_that_lacks_an_arm_is_none_and_ratios_are_never_taken_across_shapes():
    assert shapes(layers()[:-1]) == []
    mixed = layers()[:3] + layers(ratio=0.125)[3:]
    assert shapes(mixed) == []
    assert len(shapes(layers() + layers(ratio=0.125) + layers(routing="trained_like"))) == 3


def test_words_count_shapes_by_width_and_name_them_where_they_are_few():
    rows = layers() + layers(narrow=WIDE, hidden=1024)
    words = where_words(shapes(rows))
    assert (
        "- Shared memory: in 1 of 2 shapes (h 2,048, top-8, r 1/4): 0 of 1 at h 1,024, 1 of 1 at h 2,048."
        in words
    )


def test_a_shape_that_pays_is_bold_and_one_that_was_not_measured_is_a_dash():
    found = shapes(layers() + layers(narrow=WIDE, hidden=1024) + layers(ratio=0.5))
    first, second = fabric_table(found).splitlines()[-2:]
    assert first == "| r 1/2, top-8 | - | **1.50 / 1.50** | - | 2.00 / 2.00 |"
    assert second == "| r 1/4, top-8 | 1.00 / 1.00 | **1.50 / 1.50** | 1.00 / 1.00 | 2.00 / 2.00 |"


def test_uneven_routing_is_compared_with_the_same_shapes_and_what_was_not_reached_is_seen():
    rows = layers() + layers(hidden=1024) + layers(narrow=WIDE, routing="trained_like")
    words = skewed_words(rows, [])
    assert (
        "- Shared memory: 1 of 2 shapes, it pays in 0; ratio 1.00 in the median, 0.67 times that of the same"
        in words
    )
    assert "another verdict in 1." in words


def test_uneven_shapes_are_of_the_later_run_where_it_was_on_that_fabric():
    rows = layers() + layers(narrow=WIDE, routing="trained_like")
    rows += [row | {"fabric": "nvlink"} for row in rows]
    again = [row | {"commit": "abc1234"} for row in layers(routing="trained_like", fabric="nvlink")]
    words = skewed_words(rows, again)
    assert "- NVLink: 1 of 1 shapes, it pays in 1;" in words
    assert "- Shared memory: 1 of 1 shapes, it pays in 0;" in words
    assert "(`abc1234`, `h200/moe_grid_uneven.jsonl`)" in words
    assert "the 1 shapes that the run of the grid had come out 50% apart in the median" in words


def test_runs_are_compared_by_the_layers_that_both_have():
    former = (
        layers(wide={way: 2 * ms for way, ms in WIDE.items()})
        + layers(rivals=["deepspeed"])
        + layers(tokens=9)
    )
    words = again_words(layers(), former)
    assert (
        "shared memory times by 25% in the median and 50% at most, ratios between the best by 50% and 50%"
        in words
    )
    assert "is 1.50 here and was 3.00" in words


@pytest.mark.parametrize(
    ("said", "measured", "agrees"),
    [(1.2, 1.06, True), (0.9, 1.05, True), (1.04, 1.06, False), (1.06, 1.0, False)],
)
def test_a_verdict_is_right_if_both_are_on_the_same_side_of_what_pays(said, measured, agrees):
    assert Verdict(None, "forward", said, measured).agrees == agrees  # type: ignore[arg-type]


def test_wrong_verdicts_are_told_apart_by_what_they_promised():
    found = [Verdict(None, "forward", *pair) for pair in ((2.0, 2.0), (1.2, 1.0), (1.0, 1.1), (1.0, 0.9))]  # type: ignore[arg-type]
    assert verdict_line("x", found) == ["x", "4", "2 (50%)", "2", "1", "1", "3", "10.1%"]


def test_what_is_said_of_a_shape_is_the_best_of_what_was_said_of_each_side():
    rows = layers()
    for row in rows:
        said = {"fine_grained/per_rank": 1.0, "bigmac/all_to_all": 0.5}.get(row["arm"], 9.0)
        row |= {name: row[name] | {"predicted_ms": said} for name in PASSES}
    assert [(v.said, v.measured) for v in verdicts(rows)] == [(2.0, 1.5)] * 2


def test_thinned_rows_keep_every_figure_that_they_keep(tmp_path):
    row = layer("bigmac", "per_rank", 2.0) | {"python": "3.12.3", "commit": "c6f9614"}
    row["forward"] = {"n": 8, "p50_ms": 2.0, "p80_ms": 2.125, "p99_ms": 3.0, "over_best_baseline": 1.5}
    row["bytes"] = {"forward": {"payload": 7, "payload_formula": 7, "equal": True}}
    thin = thinned(row)
    assert thin["forward"] == {"n": 8, "p50_ms": 2.0, "p80_ms": 2.125}
    assert thin["bytes"] == {"forward": {"payload": 7, "equal": True}}
    assert thin["commit"] == "c6f9614"
    assert "python" not in thin
    store([row], tmp_path / "rows.jsonl")
    assert read(tmp_path / "rows.jsonl") == [thin]


def test_the_grid_is_whole_where_routing_is_balanced_and_was_foreseen_everywhere():
    rows = later().grid
    even = shapes(rows, "balanced")
    wanted = set(product((1024, 2048, 4096), (4, 8, 16), (0.5, 0.25, 0.125)))
    for fabric in ("nvlink", "shm", "sockets"):
        assert {shape.key for shape in even if shape.fabric == fabric} == wanted
    # Both passes of all arms of all shapes, and no layer that constants were compared with.
    assert len(layer_points(rows)) == 2 * 6 * len(shapes(rows))
    everything, *_ = lines(layer_points(rows))
    assert everything[1] == str(2 * 6 * len(shapes(rows)))


def test_what_the_page_says_of_the_grid_holds():
    even = shapes(later().grid, "balanced")
    by_place: dict[tuple[str, int], list[Shape]] = {}
    for shape in even:
        by_place.setdefault((shape.fabric, shape.hidden), []).append(shape)
    # Narrow layers end at the host, but through sockets; there and at width 4,096 through shared memory all shapes pay.
    assert not any(shape.pays for fabric in ("nvlink", "shm") for shape in by_place[fabric, 1024])
    assert all(shape.pays for shape in by_place["shm", 4096])
    assert all(shape.pays for shape in even if shape.fabric == "sockets")
