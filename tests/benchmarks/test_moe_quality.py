"""Claims about the benchmark of quality: runs are dealt out fairly, and compared where all of them are."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from benchmarks.moe_quality import ARMS, common_step, deal, table


def options(**changes) -> Namespace:
    whole = {"arms": ARMS, "seeds": (0, 1, 2), "devices": ("cuda:0", "cuda:1"), "work": Path("work")}
    return Namespace(**whole | {"change": ("sound_init=True",), "tiny": True, "steps": None} | changes)


def row(arm: str, seed: int, step: int, bits: float) -> dict:
    shape = {"steps": 30, "batch": 2, "context": 4, "parameters": 8, "flops_per_token": 9}
    return {"arm": arm, "seed": seed, "step": step, "bits_per_byte": bits, "time_s": 1.0} | shape


def test_every_run_has_a_place_of_its_own_and_devices_have_as_many_as_each_other():
    jobs = deal(options())
    assert len({job.folder for job in jobs}) == len(jobs) == len(ARMS) * 3
    assert abs(sum(job.device == "cuda:0" for job in jobs) * 2 - len(jobs)) <= 1
    assert {job.device for job in jobs if job.arm == "bigmac"} == {"cuda:0", "cuda:1"}


def test_an_arms_own_change_comes_after_everyones():
    (job,) = deal(options(arms=("bigmac,sound_init=False",), seeds=(0,)))
    words = job.command(options(), ["text"])
    at = words.index("--change")
    assert words[at : at + 3] == ["--change", "sound_init=True", "sound_init=False"]
    assert words[words.index("--preset") + 1] == "bigmac"


def test_arms_are_compared_at_the_last_step_that_all_reached():
    rows = [row(arm, seed, step, 3.0 - step / 100) for arm in "ab" for seed in (0, 1) for step in (10, 20)]
    rows.append(row("a", 0, 30, 1.0))
    assert common_step(rows) == 20
    text = table(rows)
    assert "After step 20 of 30, where time ran out, 160 tokens" in text
    assert "| a | 8 | 9 | 2.8000 | 0.0000 | 2 | 1 |" in text
    assert common_step([row("a", 0, 10, 1.0), row("b", 0, 20, 1.0)]) is None
