"""Claims about the page of GPU results and what it is drawn from."""

from __future__ import annotations

import pytest
from benchmarks.gpu_page import ROOT, Found, page
from benchmarks.gpu_scaling import efficiency, scaling_rows, verdict_rows
from benchmarks.gpu_steps import (
    by_run,
    latest_step_rows,
    newest,
    ratio,
    step_rows,
    tail,
    tail_rows,
    video_rows,
)
from benchmarks.gpu_targets import _steps, target_rows


def step(arm, p50_ms, commit, run, steps=10):
    taken = {"p50_ms": p50_ms, "p99_ms": 1.02 * p50_ms, "steps": steps}
    sparse = arm.startswith("default")
    kinds = {"sparse": taken if sparse else None, "dense": None if sparse else taken}
    kinds["first_sparse"] = taken if sparse else None
    about = {"commit": commit, "device": "GPU", "run": run, "ranks": 1}
    return {"model": "wan-14b", "arm": arm, "peak_gib": 30.0, **about, **kinds}


def test_the_page_in_the_documents_is_what_the_rows_say():
    assert (ROOT / "docs" / "results-gpu.md").read_text(encoding="utf-8") == page(Found.read())


def test_steps_are_compared_inside_of_one_run_alone():
    former = [step("stock", 30.0, "old", "2026-01"), step("best_dense", 20.0, "old", "2026-01")]
    latter = [step("best_dense", 12.0, "new", "2026-02"), step("default_15", 6.0, "new", "2026-02")]
    runs = by_run([*former, *latter])
    assert list(runs) == ["new, GPU", "old, GPU"]
    assert ratio(runs["new, GPU"], "wan-14b", "best_dense", "default_15") == 2.0
    assert ratio(runs["new, GPU"], "wan-14b", "stock", "default_15") is None


def test_a_tail_of_a_handful_of_steps_is_not_quoted():
    assert tail(step("default_15", 6.0, "new", "2026-02", steps=4)) is None
    assert tail(step("default_15", 6.0, "new", "2026-02")) == pytest.approx(1.02)


def test_steps_that_were_run_for_their_percentiles_alone_stand_apart_from_those_that_can_be_compared():
    former = [step(arm, ms, "old", "2026-01") for arm, ms in (("best_dense", 12.0), ("default_15", 6.0))]
    alone = step("default_15", 5.0, "new", "2026-02", steps=20)
    alone["sparse"] |= {"p95_ms": 5.1, "max_ms": 5.2}
    runs = by_run([*former, alone])
    assert [(line[1], line[2], line[-1]) for line in latest_step_rows(runs, ["wan-14b"])] == [
        ("best_dense", "12", "old, GPU"),
        ("default_15", "6", "old, GPU"),
    ]
    ((model, arm, *_, spread, steps, run),) = tail_rows(runs)
    assert (model, arm, spread, steps, run) == ("wan-14b", "default_15", "1.020", "20", "new, GPU")


def test_a_sparse_arm_that_never_came_to_a_sparse_step_counts_nowhere():
    stopped = step("default_15", 6.0, "new", "2026-02") | {"sparse": None}
    runs = by_run([step("best_dense", 12.0, "new", "2026-02"), stopped | {"dense": stopped["first_sparse"]}])
    assert newest(runs, "wan-14b", "best_dense") is not None
    assert newest(runs, "wan-14b", "default_15") is None
    assert ratio(runs["new, GPU"], "wan-14b", "best_dense", "default_15") is None


def test_the_newest_run_that_has_all_arms_of_a_model_is_taken():
    older = [step(arm, 9.0, "old", "2026-01") for arm in ("best_dense", "default_15")]
    runs = by_run([*older, step("best_dense", 12.0, "new", "2026-02")])
    assert newest(runs, "wan-14b", "best_dense") is runs["new, GPU"]
    assert newest(runs, "wan-14b", "best_dense", "default_15") is runs["old, GPU"]


def test_compiled_steps_are_held_against_compiled_dense_ones():
    run = [step("best_dense", 12.0, "new", "1"), step("best_dense+compile", 10.0, "new", "1")]
    run.append(step("default_15", 5.0, "new", "1") | {"arm": "default_15+compile"})
    (line,) = (row for row in step_rows(run) if row[1] == "default_15+compile")
    assert line[5] == "2.00"


def test_every_target_has_a_verdict_and_one_without_a_run_claims_nothing():
    found = Found.read()
    lines = list(target_rows(found.calls, found.steps, found.compiled))
    assert all(met in ("yes", "compiled", "**no**", "at 8 %", "about", "-") for *_, met in lines)
    for *_, measured, of_compiled, met in lines:
        assert ({measured, of_compiled} <= {"not run", "-"}) == (met == "-")


def test_a_target_that_only_compiled_steps_reach_says_so():
    rows = [step("best_dense", 12.0, "new", "1"), step("default_15", 8.0, "new", "1")]
    fast = [
        step(arm, p50_ms, "new", "1") | {"arm": f"{arm}+compile"}
        for arm, p50_ms in (("best_dense", 10.0), ("default_15", 4.0))
    ]
    lines = list(_steps(by_run(rows), by_run(fast)))
    assert ["step over best dense, 15 %", "wan-14b", "≥ 1.9×", "1.50×", "2.50×", "compiled"] in lines


def test_an_arm_is_held_against_the_dense_one_of_its_own_processes():
    slow_card = [step(arm, ms, "new", "1") for arm, ms in (("best_dense", 20.0), ("default_8", 8.0))]
    fast_card = [step(arm, ms, "new", "2") for arm, ms in (("best_dense", 10.0), ("default_15", 5.0))]
    (run,) = by_run([*slow_card, *fast_card]).values()
    assert ratio(run, "wan-14b", "best_dense", "default_15") == 2.0
    assert ratio(run, "wan-14b", "best_dense", "default_8") == 2.5


def test_efficiency_is_time_on_one_over_ranks_times_the_time_on_them():
    def spread(arm, p50_ms, ranks):
        row = step(arm, p50_ms, "new", "1") | {"ranks": ranks}
        kind = "sparse" if row["sparse"] else "dense"
        return row | {
            kind: row[kind] | {"stage_ms_per_step": {"plan": 1.0, "attend": 2.0}, "imbalance": 1.01}
        }

    rows = [spread("best_dense", 10.0, 1), spread("best_dense", 5.0, 2)]
    rows += [spread("default_15", 6.0, 1), spread("default_15", 4.0, 2)]
    assert efficiency(rows, "wan-14b", "best_dense", 2) == 1.0
    assert efficiency(rows, "wan-14b", "default_15", 2) == 0.75
    assert next(iter(verdict_rows(rows)))[-1] == "**no**"
    assert [row[7] for row in scaling_rows(rows)] == ["1.00", "1.00", "1.00", "0.75"]


def test_a_video_has_its_dense_steps_too():
    rows = [
        step("best_dense", 10.0, "new", "1"),
        step("default_15", 2.0, "new", "1"),
        step("stock", 20.0, "new", "1"),
    ]
    rows = [row | {"steps_of_video": 10, "dense_steps_of_video": 2} for row in rows]
    rows[:2] = [row | {"arm": row["arm"] + "+compile"} for row in rows[:2]]
    (line,) = video_rows(by_run(rows))
    spent = 2 * 10.0 + 8 * 2.0  # the step that clusters takes as long as the others here
    assert line[:2] == ["wan-14b", "default_15"]
    assert line[3:5] == [f"{100 / spent:.2f}×", f"{200 / spent:.2f}×"]
