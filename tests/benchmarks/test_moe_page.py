"""Claims about the page of results of the mixture of experts and what it is drawn from."""

from __future__ import annotations

import pytest
from benchmarks.gpu_page import ROOT
from benchmarks.moe.summary import ok
from benchmarks.moe_fabrics import ratios
from benchmarks.moe_foreseen import Point, error_line, points, twice
from benchmarks.moe_page import compared, drawn, later, quality, runs
from benchmarks.moe_profile import (
    ACTIVATION,
    KINDS,
    REST,
    ROUTER,
    ROWS_MOVED,
    by_kind,
    kind_of,
    one_name_words,
)
from benchmarks.moe_steps import by_best, by_copies, layout_table, trained

from benchmarks import moe_quality_page


def layer(arm: str, ms: float, **changes) -> dict:
    preset, dispatcher = arm.split("/")
    row = {"benchmark": "moe_layer", "status": "ok", "fabric": "nvlink", "hidden": 2048, "top_k": 8}
    row |= {"tokens": 16384, "routing": "balanced", "experts": "auto", "rivals": [], "num_experts": 64}
    return row | {"arm": arm, "preset": preset, "dispatcher": dispatcher, "forward": {"p50_ms": ms}} | changes


def learned(arm: str, seed: int, bits: float, step: int = 20) -> dict:
    return {"arm": arm, "seed": seed, "step": step, "bits_per_byte": bits, "imbalance": 1.0} | {
        "parameters": 1e6,
        "flops_per_token": 2e6,
    }


def test_the_page_in_the_documents_is_what_the_rows_say():
    assert (ROOT / "docs" / "results-moe.md").read_text(encoding="utf-8") == drawn()


def test_the_page_names_every_chart_that_lies_beside_it():
    text = drawn()
    for name in ("moe-ratios", "moe-host", "moe-quality"):
        assert f"(assets/{name}.svg)" in text
        assert (ROOT / "docs" / "assets" / f"{name}.svg").is_file()


def test_every_target_says_what_was_found_before_and_one_that_is_new_says_nothing():
    rows, former = runs()
    lines = {line[0]: line for line in compared(rows, former, later())}
    assert lines["layer, XL top-8, copy per expert, sockets"][2:] == ["4.10", "3.73", "met", "3.82 / 3.66"]
    assert lines["layer, XL top-8, copy per expert, shm"][4] == "missed"
    assert all(line[-1] == "-" for line in compared(rows, [], later()) if line[0].startswith("layer"))


def test_a_training_step_is_judged_by_the_newest_run_and_both_before_stand_behind_it():
    rows, former = runs()
    lines = {line[0]: line for line in compared(rows, former, later())}
    what = "training step, XL-shaped model, shm, "
    assert lines[what + "copy per expert"][2:] == ["1.85", "-", "missed", "1.66, then 1.74"]
    assert lines[what + "best dispatcher"][2:] == ["1.10", "-", "missed", "1.17, then 1.08"]


def step(arm: str, ms: float, model: str = "xl", fabric: str = "shm") -> dict:
    row = {"benchmark": "moe_model", "status": "ok", "work": "train", "model": model, "fabric": fabric}
    return row | {"arm": arm, "preset": arm.split("/")[0], "p50_ms": ms}


def test_steps_are_compared_within_a_model_and_a_fabric():
    arms = "fine_grained/all_to_all", "fine_grained/all_gather", "bigmac/all_to_all", "bigmac/per_rank"
    rows = [step(arm, ms) for arm, ms in zip(arms, (8.0, 3.0, 4.0, 2.0), strict=True)]
    rows += [step(arm, 0.1, model="medium") for arm in arms] + [step(arm, 0.1, fabric="none") for arm in arms]
    steps = trained(rows, "xl", "shm")
    assert (by_copies(steps), by_best(steps)) == (2.0, 1.5)


def test_shares_are_compared_with_the_whole_model_that_does_the_same_work():
    def row(layout: str, expert_ranks: int, ms: float) -> dict:
        return {
            "layout": layout,
            "expert_ranks": expert_ranks,
            "pieces": 1,
            "p50_ms": ms,
            "peak_gib": 1.0,
        } | {"parameters_held": 1e6}

    rows = [
        row("replicated", 1, 10.0),
        row("sharded", 2, 30.0),
        row("replicated", 2, 20.0),
        row("sharded", 1, 40.0),
    ]
    ratios = [line.split(" | ")[-1].rstrip(" |") for line in layout_table(rows).splitlines()[2:]]
    assert ratios == ["1.00", "1.50", "1.00", "4.00"]


def test_ratios_are_of_the_case_without_rivals_and_of_the_best_of_either_side():
    rows = [layer("fine_grained/all_to_all", 8.0), layer("fine_grained/all_gather", 3.0)]
    rows += [layer("bigmac/all_to_all", 4.0), layer("bigmac/per_rank", 2.0)]
    rows += [layer(row["arm"], 9.0, rivals=["deepspeed"]) for row in rows]
    rows += [layer("bigmac/all_to_all", 0.1, routing="trained_like")]
    assert ratios(rows, "nvlink") == (2.0, 1.5)
    alone = [
        layer(arm, ms, fabric="none") for arm, ms in (("fine_grained/local", 3.0), ("bigmac/local", 4.0))
    ]
    assert ratios(alone, "none") == (None, 0.75)


def test_kernels_by_kind_add_up_to_the_pass_and_little_is_left_over():
    rows, _ = runs()
    for row in ok([*rows, *later().captured], "moe_launches"):
        found = by_kind(row)
        assert sum(found.values()) == pytest.approx(row["device_ms"])
        assert -1e-9 <= found[REST] <= 0.05 * row["device_ms"], row["arm"]


def test_a_kernel_of_our_own_is_known_by_its_whole_name():
    assert (kind_of("_gradient"), kind_of("_gradients"), kind_of("_sums")) == (ROUTER, ROWS_MOVED, ROWS_MOVED)
    assert kind_of("reduce_sums") == REST
    assert kind_of("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)") == "messages"
    assert next(iter(KINDS)) == kind_of("_ZN7cutlass...GroupProblem")
    assert {kind_of(name) for name in ("_activate", "_activation", "_activation_gradient")} == {ACTIVATION}


def test_what_a_profile_cannot_tell_apart_is_said():
    def profiled(kernel: str) -> list[dict]:
        row = {"benchmark": "moe_launches", "status": "ok", "run": "1", "experts": "auto", "fabric": "none"}
        return [row | {"arm": "bigmac/local", "pass": "forward", "kernels": [{"name": kernel, "ms": 1.0}]}]

    assert "the activation's gradient is under the router" in one_name_words(profiled("_activate"))
    assert one_name_words(profiled("_activation")) == ""


def test_what_was_foreseen_is_told_apart_by_what_set_it():
    rows, _ = runs()
    found = points(rows)
    assert len(found) == 192
    for point in found:
        if point.row["fabric"] == "nvlink":
            # Only copies of wide rows at 16,384 tokens and top-8 keep the device longer than the host needs.
            busy = point.row["preset"] == "fine_grained" and point.row["dispatcher"] == "all_to_all"
            long = point.row["tokens"] == 16384 and point.row["top_k"] == 8
            assert point.host == (not (busy and long))


def test_an_error_of_fifteen_percent_is_within_and_a_larger_one_is_not():
    assert error_line("x", [0.15, -0.15, 0.151, -0.4]) == ["x", "4", "2", "15%", "40%"]
    assert Point({}, "forward", 1.15, 1.0, True).near
    assert not Point({}, "forward", 0.84, 1.0, True).near


def test_only_layers_of_one_shape_dispatcher_and_even_routing_count_as_timed_twice():
    def point(ms: float, **changes) -> Point:
        return Point(layer("bigmac/per_rank", 1.0, **changes), "forward", 1.0, ms, True)

    found = twice([point(2.0), point(3.0, rivals=["deepspeed"]), point(9.0, routing="trained_like")])
    assert found == [(0.5, "NVLink: bigmac/per_rank, forward", [2.0, 3.0])]
    assert twice([point(2.0), point(3.0, tokens=1024)]) == []


def test_seeds_are_compared_with_themselves():
    rows = [learned("fine_grained", seed, 1.5 + seed / 10) for seed in (1, 0, 2)]
    rows += [learned("bigmac", seed, 1.51 + seed / 10) for seed in (2, 1, 0)]
    assert moe_quality_page.over(rows, "bigmac", "fine_grained", 20) == pytest.approx([0.01] * 3)
    best, worst = moe_quality_page.lines(rows, 20)
    assert (best[0], best[5]) == ("fine_grained", "-")
    assert worst[5] == "+0.010 / +0.010 / +0.010"


def test_a_seed_that_is_missing_on_one_side_is_no_comparison():
    rows = [learned("fine_grained", 0, 1.5), learned("bigmac", 1, 1.6)]
    with pytest.raises(ValueError, match=r"bigmac has seeds \[1\], fine_grained \[0\]"):
        moe_quality_page.over(rows, "bigmac", "fine_grained", 20)


def test_what_is_said_of_quality_holds_in_every_seed():
    rows = quality()
    assert min(moe_quality_page.over(rows, "bigmac", "fine_grained", 700)) > 0
    assert min(moe_quality_page.over(rows, "bigmac_stable", "bigmac", 700)) > 0
    assert max(moe_quality_page.over(rows, "latent_eff", "bigmac", 700)) < 0
    assert "**DCCA costs 0.033 bits per byte here**, and costs in every seed" in drawn()
