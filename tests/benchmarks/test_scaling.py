"""Claims about the end-to-end benchmark on several ranks, over gloo with tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.end_to_end import arms as arms_module
from benchmarks.end_to_end.arms import Arm
from benchmarks.end_to_end.check import Check, check_ranks
from benchmarks.end_to_end.ranks import Ranks
from benchmarks.end_to_end.rows import read
from benchmarks.end_to_end.run import Run, run
from benchmarks.end_to_end.scaling import scaling
from benchmarks.end_to_end.summary import table

from adamac.testing import run_ranks

OPTIONS = Run(
    models=("hunyuan-129f",),
    arms=("stock", "default_15"),
    rounds=1,
    dense_steps=1,
    first_steps=1,
    sparse_steps=1,
    device="cpu",
    tiny=True,
    minutes=5,
)


def refuses_heads(query: Any, key: Any, *, layout: Any, previous: Any = None) -> Any:
    """A method that fails on one rank."""
    if layout.ranks.rank() == 1:
        raise ValueError("no room")
    raise ValueError("no time")


def measured(rank: int, out: Path) -> tuple[list[dict[str, Any]], list[float], bool]:
    """Rows as this rank has them, what ranks say together, and whether the first one's word counts."""
    ranks = Ranks.join("cpu")
    arms_module.ARMS["broken"] = Arm("broken", "fails on each rank by itself", lambda: refuses_heads)
    options = replace(OPTIONS, out=out / f"rank{rank}.jsonl", arms=(*OPTIONS.arms, "broken"))
    rows = run(options, lambda line: None, ranks)
    return rows, ranks.slowest([1.0 + rank, 5.0 - rank]), ranks.say(rank == 0)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, list[Any]]:
    out = tmp_path_factory.mktemp("rows")
    return out, run_ranks(measured, 2, out)


def test_all_ranks_report_the_steps_of_the_slowest_and_the_first_one_writes(found):
    out, ((rows, slowest, word), others) = found
    assert (slowest, word) == ([2.0, 5.0], True)
    assert others[1:] == (slowest, word)
    assert [row["status"] for row in rows[:2]] == ["ok", "ok"]
    for row, other in zip(rows[:2], others[0], strict=False):
        for kind in ("dense", "first_sparse", "sparse"):
            assert (row[kind] or {}).get("step_ms") == (other[kind] or {}).get("step_ms")
    assert [path.name for path in out.iterdir()] == ["rank0.jsonl"]
    assert [row["ranks"] for row in read(out / "rank0.jsonl")] == [2, 2, 2]


def test_heads_are_spread_and_the_row_says_how_evenly_ranks_worked(found):
    sparse = found[1][0][0][1]
    assert sparse["sparse"]["sparse_calls"] == sparse["sparse"]["calls"] == 2
    assert 1 <= sparse["sparse"]["imbalance"] < 2


def test_an_arm_that_fails_is_a_row_on_every_rank_with_the_reason_of_its_own(found):
    broken = [rows[2] for rows, *_ in found[1]]
    assert [row["status"] for row in broken] == ["error", "error"]
    assert [row["reason"] for row in broken] == ["ValueError: no time", "ValueError: no room"]


def checked(rank: int) -> list[Check]:
    return check_ranks(Ranks.join("cpu"), "cpu")


def test_the_check_passes_for_all_families_and_can_fail():
    for checks in run_ranks(checked, 2):
        assert [str(check) for check in checks if not check.passed] == []
        assert len(checks) == 3
        assert all(not replace(check, error=check.effect).passed for check in checks)
        assert "DISAGREES" in str(replace(checks[0], error=1.0))


def test_efficiency_is_the_time_of_one_rank_over_all_ranks_together(tmp_path):
    single = run(replace(OPTIONS, arms=("stock",), out=tmp_path / "rows.jsonl"), lambda line: None)[0]
    single["dense"] |= {"p50_ms": 100.0}
    double = single | {"ranks": 2, "dense": single["dense"] | {"p50_ms": 62.5, "imbalance": 1.25}}
    drawn = scaling([single, double])
    assert "| stock | 1 | 100 |" in drawn
    assert "| stock | 2 | 62.5 |" in drawn
    assert "| 0.800 | 1.250 |" in drawn
    assert scaling([single]) == ""
    assert "spread over 2 ranks" in table([single, double])
    without = {name: value for name, value in single.items() if name != "ranks"}  # a row of an early run
    assert "| 0.800 |" in scaling([without, double])
