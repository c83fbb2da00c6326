"""Claims about the page of GPU results and what it is drawn from."""

from __future__ import annotations

import pytest
from benchmarks.gpu_page import ROOT, calls, drawn, read
from benchmarks.gpu_steps import by_run, ratio, tail
from benchmarks.gpu_targets import target_rows


def step(arm, p50_ms, commit, run, steps=10):
    taken = {"p50_ms": p50_ms, "p99_ms": 1.02 * p50_ms, "steps": steps}
    sparse = arm.startswith("default")
    kinds = {"sparse": taken if sparse else None, "dense": None if sparse else taken}
    return {"model": "wan-14b", "arm": arm, "commit": commit, "run": run, **kinds}


def test_the_page_in_the_documents_is_what_the_rows_say():
    assert (ROOT / "docs" / "results-gpu.md").read_text(encoding="utf-8") == drawn()


def test_steps_are_compared_inside_of_one_run_alone():
    former = [step("stock", 30.0, "old", "2026-01"), step("best_dense", 20.0, "old", "2026-01")]
    latter = [step("best_dense", 12.0, "new", "2026-02"), step("default_15", 6.0, "new", "2026-02")]
    runs = by_run([*former, *latter])
    assert list(runs) == ["new", "old"]
    assert ratio(runs["new"], "wan-14b", "best_dense", "default_15") == 2.0
    assert ratio(runs["new"], "wan-14b", "stock", "default_15") is None


def test_a_tail_of_a_handful_of_steps_is_not_quoted():
    assert tail(step("default_15", 6.0, "new", "2026-02", steps=4)) is None
    assert tail(step("default_15", 6.0, "new", "2026-02")) == pytest.approx(1.02)


def test_every_target_has_a_verdict_and_one_without_a_run_claims_nothing():
    lines = list(target_rows(calls("attention.jsonl"), by_run(read("end_to_end.jsonl"))))
    assert all(met in ("yes", "**no**", "at 8 %", "-") for *_, met in lines)
    assert all((measured == "not run") == (met == "-") for *_, measured, met in lines)
