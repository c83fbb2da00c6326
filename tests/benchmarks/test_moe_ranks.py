"""Claims about the page's part on two ranks and four: what is compared with what, and that nothing is mixed between them."""

from __future__ import annotations

import pytest
from benchmarks.moe_page import later, runs
from benchmarks.moe_ranks import cost_section, layer_table, layer_words, places, step_table, target_lines

from adamac.moe import preset
from adamac.moe.traffic import bytes_sent

ROWS = later().ranks


def cells(table: str, *first: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith("| " + " | ".join(first) + " |"))
    return line.strip("| ").split(" | ")[len(first) :]


def test_both_fabrics_were_timed_on_two_ranks_and_on_four_by_every_dispatcher():
    assert set(places(ROWS)) == {(fabric, ranks) for fabric in ("nvlink", "shm") for ranks in (2, 4)}
    for place in places(ROWS):
        arms = {
            row["arm"]
            for row in ROWS
            if row["benchmark"] == "moe_layer" and (row["fabric"], row["ranks"]) == place
        }
        assert len(arms) == 6


def test_ratios_are_of_one_number_of_ranks():
    times = {}
    for row in ROWS:
        if row["benchmark"] == "moe_layer" and (row["fabric"], row["top_k"], row["routing"]) == (
            "shm",
            8,
            "balanced",
        ):
            times.setdefault((row["ranks"], row["preset"]), []).append(row["forward"]["p50_ms"])
    for ranks in (2, 4):
        wide, narrow = (min(times[ranks, side]) for side in ("fine_grained", "bigmac"))
        found = cells(layer_table(ROWS), "shared memory", str(ranks), "h 2,048, top-8, balanced")
        assert [cell.split(" / ")[0] for cell in found[:2]] == [f"{wide:.2f}", f"{narrow:.2f}"]
        assert found[3].split(" / ")[0] == f"{wide / narrow:.2f}"


def test_bytes_of_copies_grow_with_the_share_that_leaves_a_rank():
    config, words = preset("bigmac", 2048, 64, 8), layer_words(ROWS, runs()[0])
    two, four = (bytes_sent(config, 16384, ranks, "all_to_all", 2) / 2**20 for ranks in (2, 4))
    assert four == pytest.approx(1.5 * two)  # of two ranks half the rows leave, of four three quarters
    assert f"bigmac/all_to_all {two:.0f} and {four:.0f}" in words


def test_constants_of_two_ranks_are_judged_on_four_alone_for_the_target():
    lines = list(target_lines(ROWS))
    assert [line[0].rsplit(", ")[-1] for line in lines] == ["nvlink", "shm"]
    assert all(line[2].endswith("of 36 points") for line in lines)
    carried = [row for row in ROWS if row["benchmark"] == "moe_layer"]
    assert {row["predicted_from_ranks"] for row in carried} == {2}
    assert cost_section(ROWS).count(" ranks, forward |") == 4


def test_training_steps_of_other_numbers_of_ranks_are_lines_of_their_own():
    table = step_table(ROWS)
    two, four = (cells(table, "NVLink", str(ranks), "xl") for ranks in (2, 4))
    assert two != four
    assert len(table.splitlines()) == 2 + 5
