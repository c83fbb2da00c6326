"""Figures from rows that were made up, so that each can be worked out by hand."""

import io

import pytest
from rich.console import Console

from adamac.bakeoff.config import RunDirectory
from adamac.bakeoff.report.table import arms_table, lines
from adamac.bakeoff.report.words import verdict, warnings
from adamac.bakeoff.rows import Row
from adamac.bakeoff.summary import summarise

PROMPTS = [{"id": f"p{place}", "category": f"c{place % 2}", "text": "a ball"} for place in range(4)]
RUN = {
    "config": {"arms": ["dense", "dense-flash", "adacluster"], "prompts": PROMPTS, "seeds": [0]},
    "methods": {"adacluster": "AdaCluster()"},
    "notes": {},
    "first_calls": {
        "adacluster": {"latency_s": 9.0, "text_s": 1.0, "decode_s": 1.0, "step_s": [4.0, 2.0, 1.0]}
    },
    "dense_attention_share": 0.5,
}


def row(arm: str, place: int, latency_s: float, **changes) -> Row:
    prompt = PROMPTS[place]
    timed = {"latency_s": latency_s, "text_s": 0.5, "decode_s": 0.5, "denoise_s": latency_s - 1}
    timed["step_s"] = [(latency_s - 1) / 4] * 4
    settings = {
        "arm": arm,
        "prompt_id": prompt["id"],
        "prompt": prompt["text"],
        "category": prompt["category"],
    }
    return Row(**(settings | {"seed": 0} | timed | changes))


def sparse(place: int, latency_s: float, **changes) -> Row:
    counted = {"density": 0.3, "cost": 0.35, "calls": 10, "sparse_calls": 8, "dense_calls": {"first": 2}}
    counted |= {"attention_s": {"plan": 0.25, "attend": 0.5, "dense": 0.25}, "state_bytes": 2**20}
    return row("adacluster", place, latency_s, **(counted | changes))


def summary_of(rows: list[Row], tmp_path) -> dict:
    return summarise(RUN, rows, RunDirectory(tmp_path))


@pytest.fixture
def rows() -> list[Row]:
    dense = [row("dense", place, 10.0) for place in range(4)]
    flash = [row("dense-flash", place, 8.0, psnr_db=50.0, ssim=0.99) for place in range(4)]
    return (
        dense
        + flash
        + [sparse(place, 4.0, psnr_db=20.0 + place, ssim=0.9, motion_ratio=1.0) for place in range(4)]
    )


def test_speedup_is_over_the_strongest_dense_arm(rows, tmp_path):
    found = summary_of(rows, tmp_path)
    assert found["strongest_dense"] == "dense-flash"
    assert found["arms"]["adacluster"]["speedup"] == 2
    assert found["arms"]["adacluster"]["speedup_interval"] == pytest.approx((2, 2))
    assert found["arms"]["dense"]["speedup"] == 0.8


def test_latency_percentiles_are_over_warm_calls_alone(tmp_path):
    rows = [sparse(0, 99.0, first_call=True), *(sparse(place, float(place)) for place in (1, 2, 3))]
    arm = summary_of(rows, tmp_path)["arms"]["adacluster"]
    assert (arm["latency_p50_s"], arm["warm_calls"], arm["only_first_calls"]) == (2, 3, False)
    assert arm["latency_p99_s"] == pytest.approx(2.98)


def test_first_calls_stand_in_with_a_mark_where_there_are_no_others(tmp_path):
    rows = [row("dense", 0, 7.0, first_call=True)]
    found = summary_of(rows, tmp_path)
    assert found["arms"]["dense"]["latency_p50_s"] == 7
    assert found["arms"]["dense"]["only_first_calls"]
    assert any("only first calls" in warning for warning in warnings(found, rows))


def test_the_first_call_is_compared_with_a_warm_one_of_its_length(rows, tmp_path):
    arm = summary_of(rows, tmp_path)["arms"]["adacluster"]
    assert arm["first_call_s"] == 9
    assert arm["first_call_extra_s"] == pytest.approx(9 - (1 + 3 * 0.75))


def test_stages_add_up_to_the_latency(rows, tmp_path):
    arms = summary_of(rows, tmp_path)["arms"]
    for arm in arms.values():
        assert sum(arm["stages_s"].values()) == pytest.approx(arm["latency_p50_s"])
    assert arms["dense"]["stages_s"]["dense"] == pytest.approx(0.5 * 9)


def test_quality_is_averaged_and_the_worst_kept(rows, tmp_path):
    rows[-1].psnr_worst_db = 11.0
    arm = summary_of(rows, tmp_path)["arms"]["adacluster"]
    assert (arm["psnr_db"], arm["psnr_worst_db"], arm["ssim"]) == (21.5, 11.0, pytest.approx(0.9))


def test_categories_stand_apart(rows, tmp_path):
    categories = summary_of(rows, tmp_path)["categories"]
    assert list(categories) == ["c0", "c1"]
    assert categories["c0"]["adacluster"]["psnr_db"] == 21
    assert categories["c1"]["adacluster"]["psnr_db"] == 22
    assert categories["c1"]["adacluster"]["speedup"] == 2


def test_the_noise_floor_is_the_dense_arm_that_nobody_asked_for(rows, tmp_path):
    rows.append(row("dense-math", 0, 30.0, psnr_db=44.0, ssim=0.98))
    floor = summary_of(rows, tmp_path)["noise_floor"]
    assert (floor["arm"], floor["psnr_db"], floor["videos"]) == ("dense-math", 44, 1)


def test_the_noise_floors_time_plays_no_part_however_short(rows, tmp_path):
    rows.append(row("dense-math", 0, 1.0, psnr_db=44.0, ssim=0.98, first_call=True))
    found = summary_of(rows, tmp_path)
    assert found["strongest_dense"] == "dense-flash"
    assert found["arms"]["adacluster"]["speedup"] == 2


def terminal(rows: list[Row], tmp_path) -> str:
    found = summary_of(rows, tmp_path)
    page = io.StringIO()
    Console(file=page, width=80).print(arms_table(found))
    return page.getvalue() + "\n".join(lines(found, rows))


def test_of_few_videos_the_terminal_tells_the_largest_and_no_percentile(rows, tmp_path):
    rows[0].latency_s = 17.5
    said = terminal(rows, tmp_path)
    assert "largest s" in said
    assert "17.5" in said
    assert "p95" not in said
    assert "p99" not in said


def test_of_ten_videos_the_terminal_tells_percentiles(tmp_path):
    rows = [row("dense", place % 4, 10.0, seed=place // 4) for place in range(12)]
    said = terminal(rows, tmp_path)
    assert "p99 s" in said
    assert "largest" not in said


def test_a_speedup_of_few_videos_is_said_to_be_unsure(rows, tmp_path):
    few = [each for each in rows if each.prompt_id in ("p0", "p1", "p2")]
    assert "2.00\u00d7 the strongest dense arm's speed (too few videos to tell" in terminal(few, tmp_path)
    assert "too few" not in terminal(rows, tmp_path)


def test_the_terminal_says_why_nothing_was_sparse(tmp_path):
    rows = [row("dense", 0, 10.0), sparse(0, 10.0, sparse_calls=0, dense_calls={"schedule: first": 10})]
    said = terminal(rows, tmp_path)
    assert "adacluster ran dense throughout" in said
    assert "adacluster: no call was sparse: schedule: first (10)." in said


def test_failures_are_counted_with_their_reasons(rows, tmp_path):
    rows[-1] = Row(
        arm="adacluster", prompt_id="p3", prompt="", category="c1", seed=0, status="error", reason="black"
    )
    found = summary_of(rows, tmp_path)
    assert found["arms"]["adacluster"]["reasons"] == {"black": 1}
    assert found["arms"]["adacluster"]["videos"] == 3
    assert any("1 of 4 videos failed: black" in warning for warning in warnings(found, rows))


def test_an_arm_that_never_was_sparse_is_called_out(tmp_path):
    rows = [row("dense", 0, 10.0), sparse(0, 10.0, sparse_calls=0, dense_calls={"too few tokens": 10})]
    found = summary_of(rows, tmp_path)
    assert any("no call was sparse: too few tokens (10)" in warning for warning in warnings(found, rows))
    assert "ran dense throughout" in verdict(found)[0]


def test_a_speedup_that_may_be_none_is_said_to_be_unsure(tmp_path):
    rows = [row("dense", place, 10.0) for place in range(4)]
    rows += [sparse(place, seconds) for place, seconds in enumerate((5.0, 9.0, 12.0, 20.0))]
    assert "not to be told from 1" in verdict(summary_of(rows, tmp_path))[0]


def test_an_unfinished_run_says_so(rows, tmp_path):
    found = summary_of(rows[:5], tmp_path)
    assert any("not complete: 5 of 12" in warning for warning in warnings(found, rows[:5]))


def test_without_dense_there_is_no_speedup(tmp_path):
    rows = [sparse(0, 4.0)]
    found = summary_of(rows, tmp_path)
    assert found["arms"]["adacluster"]["speedup"] is None
    assert any("nothing can be compared" in warning for warning in warnings(found, rows))


def test_a_size_that_the_model_rounded_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setitem(RUN["config"], "height", 100)
    rows = [row("dense", 0, 1.0, shape=[5, 96, 160])]
    assert "height: 100 was asked for, the model made 96." in warnings(summary_of(rows, tmp_path), rows)
