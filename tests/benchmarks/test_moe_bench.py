"""Claims about the benchmark of mixtures of experts: rehearsals on the processor, and what it refuses to time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from benchmarks.moe import arms as arms_module
from benchmarks.moe import bytes_sent, check, layer, model, rivals
from benchmarks.moe.cases import FABRICS, PARTS, Fabric, LayerCase, ModelCase, cases
from benchmarks.moe.crew import Crew, LeftBehindError
from benchmarks.moe.inputs import make
from benchmarks.moe.launch import Order, _verdict, carry_out
from benchmarks.moe.rows import read
from benchmarks.moe.run import Run, run
from benchmarks.moe.summary import predictions, tables

from adamac.moe import Router, Routing, preset
from adamac.moe.cost import machine_of, predict
from adamac.moe.lm import micro_batch

TINY = LayerCase(hidden=64, top_k=2, num_experts=8, tokens=64, budget_s=0.0)
OURS = [
    f"{name}/{way}" for name in ("fine_grained", "bigmac") for way in ("all_gather", "all_to_all", "per_rank")
]


def silent(line: str) -> None:
    pass


@pytest.fixture
def alone() -> Crew:
    """One rank, and the rows that it hands out in ``common``."""
    rows: list[dict] = []
    crew = Crew(0, 1, torch.device("cpu"), torch.float32, None, time.time() + 600, {}, rows.append)
    crew.common["rows"] = rows
    return crew


def handed_out(crew: Crew) -> dict[str, dict]:
    return {row["arm"]: row for row in crew.common["rows"]}


def test_a_rehearsal_on_two_ranks_measures_every_arm_and_counts_every_byte(tmp_path):
    options = Run(plan="tiny", out=tmp_path / "rows.jsonl", fabrics=("gloo",), parts=("collectives", "layer"))
    rows = run(options, say=silent)
    assert len(read(options.out)) == len(rows)
    assert {row["status"] for row in rows} == {"ok"}
    (checked,) = [row for row in rows if row["benchmark"] == "moe_check"]
    assert sorted(checked["relative_error"]) == sorted(OURS)
    for routing in ("balanced", "trained_like"):
        found = [row for row in rows if row.get("routing") == routing]
        assert [row["arm"] for row in found] == OURS
        assert all(entry["equal"] for row in found for entry in row["bytes"].values())
        assert all(row[name]["n"] >= 8 for row in found for name in ("forward", "forward_backward"))
        assert (found[0]["load_max_over_mean"] == 1) == (routing == "balanced")
        base = {row["dispatcher"]: row["forward"]["p50_ms"] for row in found[:3]}
        bigmac = found[4]
        assert bigmac["forward"]["over_copy_per_expert"] == pytest.approx(
            base["all_to_all"] / bigmac["forward"]["p50_ms"]
        )
        assert bigmac["forward"]["over_best_baseline"] == pytest.approx(
            min(base.values()) / bigmac["forward"]["p50_ms"]
        )
    collectives = [row for row in rows if row["benchmark"] == "moe_collectives"]
    assert {row["collective"] for row in collectives} == {"all_to_all", "all_gather", "reduce_scatter"}
    text = tables(read(options.out))
    assert "Layer on gloo, 2 ranks" in text
    assert "| bytes counted = formula | exactly | 24 of 24 passes |  | met |" in text


def test_a_rehearsal_of_whole_models_on_one_rank(tmp_path):
    options = Run(
        plan="tiny",
        out=tmp_path / "rows.jsonl",
        fabrics=("none",),
        parts=("cost", "kernels", "launches", "train", "serve"),
    )
    found = [row for row in run(options, say=silent) if not row.get("arm", "").endswith(", captured")]
    assert {row["status"] for row in found} == {"ok"}
    pieces = [(row["preset"], row["kernel"]) for row in found if row["benchmark"] == "moe_kernels"]
    experts = ("experts", "up", "activation", "down", "spread", "gathered")
    assert pieces == [
        *(("fine_grained", kernel) for kernel in experts),
        *(("bigmac", kernel) for kernel in (*experts, "project")),
    ]
    launches = [row for row in found if row["benchmark"] == "moe_launches"]
    assert [(row["preset"], row["pass"]) for row in launches] == [
        (name, way) for name in ("fine_grained", "bigmac") for way in ("forward", "forward_backward")
    ]
    assert all(row["launches"] >= len(row["kernels"]) > 10 for row in launches)
    rows = [row for row in found if row["benchmark"] == "moe_model"]
    assert [(row["work"], row.get("batch")) for row in rows[::2]] == [
        ("train", None),
        *((work, batch) for batch in (1, 16) for work in ("prefill", "decode", "decode")),
    ]
    assert {row["arm"] for row in rows} == {"fine_grained/local", "bigmac/local"}
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert all(row["n"] >= 32 for row in rows if row["work"] == "decode")
    steps = [(row["step"], row["captured"]) for row in rows if row["work"] == "decode"]
    assert steps[::2] == [("growing", False), ("static", False)] * 2
    assert "| decode, batch 16, prompt 32 |" in tables(rows)
    assert (
        "| decode, static, not captured (the model is on cpu, and CUDA graphs are for GPUs), batch 16"
        in tables(rows)
    )


@pytest.mark.parametrize(
    ("fabric", "unread", "others"),
    [("none", "local", {"local"}), ("gloo", "static_gather", {"all_to_all", "per_rank", "all_gather"})],
)
def test_training_that_could_not_be_captured_is_a_row_with_the_reason_and_not_timed(
    tmp_path, fabric, unread, others
):
    options = Run(plan="tiny", out=tmp_path / "rows.jsonl", fabrics=(fabric,), parts=("train",))
    rows = run(options, say=silent)
    for side in ("fine_grained", "bigmac"):
        own = [row for row in rows if row.get("preset") == side]
        *plain, captured = own
        assert {row["dispatcher"] for row in plain} == others
        assert all(row["status"] == "ok" and not row["captured"] and row["loss"] > 0 for row in plain)
        assert captured["arm"] == f"{side}/{unread}, captured"
        assert (captured["status"], captured["captured"]) == ("absent", False)
        assert captured["reason"] == "AbsentError: the model is on cpu, and CUDA graphs are for GPUs"
        assert "p50_ms" not in captured
    assert f"{unread}, captured absent: AbsentError: the model is on cpu" in tables(read(options.out))


def test_what_is_captured_is_compared_with_the_best_of_both(alone, monkeypatch):
    """As on a GPU, but unrecorded."""
    monkeypatch.setattr(micro_batch, "obstacle", lambda *given, **more: "")
    monkeypatch.setattr(micro_batch.MicroBatches, "captured", property(lambda own: own._replayed is not None))
    model.run(ModelCase("tiny", 2, budget_s=0.1), alone)
    found = handed_out(alone)
    assert [row["captured"] for row in found.values()] == [False, True] * 2
    assert {row["status"] for row in found.values()} == {"ok"}
    sides = [found[f"fine_grained/local{way}"]["p50_ms"] for way in ("", ", captured")]
    own = found["bigmac/local, captured"]
    assert own["over_best_baseline"] == pytest.approx(min(sides) / own["p50_ms"])
    assert own["over_copy_per_expert"] == pytest.approx(sides[0] / own["p50_ms"])
    assert own["peak_gib"] is None
    assert own["held_gib"] == 0
    # Steps of arms of a side change the same weights, whichever of them takes them.
    assert found["bigmac/local, captured"]["loss"] < found["bigmac/local"]["loss"]


def test_what_the_cost_model_says_stands_beside_what_was_measured(tmp_path):
    options = Run(plan="tiny", out=tmp_path / "rows.jsonl", fabrics=("none",), parts=("cost", "layer"))
    rows = run(options, say=silent)
    assert {row["status"] for row in rows} == {"ok"}
    fitted, *said = [row for row in rows if row["benchmark"] in ("moe_cost", "moe_prediction")]
    assert fitted["machine"]["costs"]["grouped"]["overhead_ms"] > 0
    assert [(row["preset"], row["pass"]) for row in said] == [
        (name, way) for name in ("fine_grained", "bigmac") for way in ("forward", "forward_backward")
    ]
    layers = [row for row in rows if row["benchmark"] == "moe_layer"]
    assert all(row[way]["predicted_ms"] > 0 for row in layers for way in ("forward", "forward_backward"))
    points = predictions(read(options.out))
    assert len(points) == len(said) + 2 * len(layers)
    assert f"of {len(points)} points" in tables(rows)


def test_constants_of_two_ranks_say_beforehand_what_four_take(tmp_path):
    machine = replace(machine_of(), ranks=2)
    machine.save(tmp_path / "machine.json")
    options = Run(
        plan="tiny",
        out=tmp_path / "rows.jsonl",
        fabrics=("gloo",),
        parts=("cost", "layer"),
        routing=("balanced",),
        ranks=4,
        machine=tmp_path / "machine.json",
    )
    rows = run(options, say=silent)
    assert not [row for row in rows if row["benchmark"] == "moe_cost"]
    layers = [row for row in rows if row["benchmark"] == "moe_layer"]
    assert [row["arm"] for row in layers] == OURS
    for row in layers:
        config = preset(row["preset"], 64, 8, 2)
        said = predict(config, 256, 4, row["dispatcher"], machine, itemsize=4)
        assert (row["ranks"], row["predicted_from_ranks"]) == (4, 2)
        assert row["forward"]["predicted_ms"] == pytest.approx(said.time_ms)
    text = tables(rows)
    assert "| cost model by constants of other ranks, against measurement | within 15 % |" in text
    assert "| cost model against measurement | within 15 % |  |  | not measured |" in text


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"fabrics": ("none", "gloo")}, 2, "those of one fabric; got --machine and 2 fabrics"),
        ({}, None, "measured on one rank and has no constants of gloo"),
        ({"parts": ("cost",)}, 2, "predicts layers; got none in --parts"),
    ],
)
def test_constants_that_cannot_predict_are_refused_before_anything_is_measured(
    tmp_path, changes, ranks, message
):
    replace(machine_of(), ranks=ranks).save(tmp_path / "machine.json")
    asked = {"fabrics": ("gloo",), "parts": ("layer",)} | changes
    with pytest.raises(ValueError, match=message):
        run(Run(plan="tiny", out=tmp_path / "rows", machine=tmp_path / "machine.json", **asked), say=silent)
    assert not (tmp_path / "rows").exists()


def test_ranks_without_tokens_and_experts_without_rows_are_checked(tmp_path):
    options = Run(plan="tiny", out=tmp_path / "rows.jsonl", fabrics=("gloo",), parts=("collectives",))
    (hard,) = [row for row in run(options, say=silent) if row["benchmark"] == "moe_check_hard"]
    assert hard["status"] == "ok"
    # All arms: in float64 where it is hard, in the dtype of the benchmark everywhere.
    assert len(hard["relative_error"]) == len(OURS) * (2 + 3)
    found = {"a, float64, usual": 1e-9, "a, bfloat16, usual": 1e-3, "b, bfloat16, usual": float("nan")}
    assert list(check.problems(found)) == ["a, float64, usual", "b, bfloat16, usual"]


def test_processes_that_cannot_meet_are_a_row_with_the_reason():
    rows = order_rows(replace(FABRICS["gloo"], environment={"GLOO_SOCKET_IFNAME": "none_such"}), limit_s=60)
    (row,) = rows
    assert (row["status"], row["arm"], row["hidden"], row["fabric"]) == ("error", "all", 64, "gloo")
    assert "none_such" in row["reason"]


def test_processes_that_hang_are_ended():
    (row,) = order_rows(FABRICS["gloo"], limit_s=0.2)
    assert row["reason"].startswith("rank 0, 1 was silent for 0.2 s")


def order_rows(fabric: Fabric, limit_s: float) -> list[dict]:
    rows: list[dict] = []
    carry_out(Order(fabric, (TINY,), 2, "cpu", "float32", time.time() + 60, limit_s, {}), rows.append, silent)
    return rows


@pytest.mark.parametrize("others_fail", [True, False])
def test_what_fails_on_all_ranks_is_agreed_on_and_what_fails_on_some_ends_them(monkeypatch, others_fail):
    monkeypatch.setattr("benchmarks.moe.crew._FAILED_WAIT_S", 0.2)
    store = torch.distributed.HashStore()
    first, second = (
        Crew(rank, 2, torch.device("cpu"), torch.float32, store, time.time() + 60, {}, silent, limit_s=5)
        for rank in (0, 1)
    )

    def fail() -> None:
        raise ValueError("on purpose")

    left = threading.Event()  # the other is at work all the while, however busy this machine is

    @contextmanager
    def at_work_until_left():
        try:
            yield
        finally:
            left.set()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second.attempt, fail if others_fail else lambda: left.wait(60))
        if others_fail:
            assert first.attempt(fail) == (None, "ValueError: on purpose")
            assert other.result() == (None, "ValueError: on purpose")
        else:
            with at_work_until_left(), pytest.raises(LeftBehindError, match="on purpose"):
                first.attempt(fail)


def test_nothing_begins_after_the_time_limit(tmp_path):
    options = Run(plan="tiny", out=tmp_path / "rows.jsonl", fabrics=("none",), parts=("layer",), minutes=0)
    check_row, *rows = run(options, say=silent)
    assert check_row["status"] == "ok"
    assert [row["status"] for row in rows] == ["stopped", "stopped"]
    assert "stopped: time limit" in tables(rows)


def test_an_arm_that_is_wrong_is_not_timed(alone, monkeypatch):
    def spoilt(*args, **kwargs):
        fine, off = made(*args, **kwargs)
        return [fine, replace(off, forward=lambda x: 1.05 * off.forward(x))]

    made = layer.make_arms
    monkeypatch.setattr(layer, "make_arms", spoilt)
    layer.run(TINY, alone)
    rows = handed_out(alone)
    assert rows["fine_grained/local"]["forward"]["n"] == 8
    assert rows["bigmac/local"]["status"] == "wrong"
    assert "outputs: root mean square error" in rows["bigmac/local"]["reason"]
    assert "forward" not in rows["bigmac/local"]


def test_what_differs_from_one_rank_in_float64_is_refused(alone):
    errors = check.equality(alone)
    assert check.refusals(errors) == {}
    refused = check.refusals({"a": 1e-11, "b": float("nan"), "c": "ValueError: no", "d": 1e-13})
    assert list(refused) == ["a", "b", "c"]
    alone.refused["bigmac/local"] = refused["a"]
    layer.run(TINY, alone)
    assert handed_out(alone)["bigmac/local"]["reason"] == "wrong: differs from one rank by 1e-11 in float64"


def test_an_arm_that_fails_is_a_row_with_the_reason(alone, monkeypatch):
    def broken(case, router, crew, dtype):
        def fail(x):
            raise torch.OutOfMemoryError("out of memory\nand a long story")

        fine, other = arms_module.make_arms(case, router, crew, dtype)
        return [fine, replace(other, forward=fail)]

    monkeypatch.setattr(layer, "make_arms", broken)
    layer.run(TINY, alone)
    rows = handed_out(alone)
    assert (rows["bigmac/local"]["status"], rows["bigmac/local"]["reason"]) == (
        "error",
        "OutOfMemoryError: out of memory",
    )
    assert rows["fine_grained/local"]["status"] == "ok"


def test_a_rival_that_is_not_installed_is_a_row(alone, monkeypatch):
    def absent(package):
        raise rivals.AbsentError(f"{package} is not installed")

    monkeypatch.setattr(rivals, "_version", absent)
    layer.run(replace(TINY, rivals=tuple(rivals.RIVALS)), alone)
    rows = handed_out(alone)
    assert {name: rows[name]["status"] for name in rivals.RIVALS} == dict.fromkeys(rivals.RIVALS, "absent")
    assert rows["deepspeed"]["reason"] == "AbsentError: deepspeed is not installed"
    assert rows["bigmac/local"]["forward"]["over_best_baseline"] > 0


def test_balanced_routing_gives_every_expert_the_same_and_the_router_finds_it():
    case = LayerCase(hidden=128, tokens=32)
    for dtype in (torch.bfloat16, torch.float64):
        assert routed(case, dtype).load().tolist() == [32 * 8 // 64] * 64


def test_skewed_routing_is_skewed_and_alike_on_all_ranks():
    case = LayerCase(hidden=128, tokens=2048, routing="trained_like")
    first, second = (routed(case, torch.float32, rank).load() for rank in (0, 1))
    assert not torch.equal(first, second)
    assert first.max() > 1.5 * first.double().mean()
    assert torch.corrcoef(torch.stack([first, second]).double())[0, 1] > 0.9
    assert torch.equal(routed(case, torch.bfloat16).experts, routed(case, torch.float32).experts)


def routed(case: LayerCase, dtype: torch.dtype, rank: int = 0) -> Routing:
    inputs = make(case, rank, torch.device("cpu"), dtype)
    router = Router(preset("bigmac", case.hidden, case.num_experts, case.top_k), dtype=dtype)
    with torch.no_grad():
        router.weight.copy_(inputs.router)
    routing, _ = router(inputs.x)
    return replace(routing, experts=routing.experts.sort(1).values)


def test_bytes_that_are_not_the_formulas_are_said_to_differ(alone):
    inputs = make(TINY, 0, alone.device, torch.float32)
    made = arms_module.make_layer(TINY, "bigmac", inputs.router, None, torch.float32)
    made(inputs.x)
    assert bytes_sent.entry(made, "local", alone, 4, backward=False)["equal"]
    made.traffic.add("all_to_all", "payload", "forward", 2)
    assert not bytes_sent.entry(made, "local", alone, 4, backward=False)["equal"]


@pytest.mark.parametrize("fabric", ["nvlink", "shm", "sockets", "none"])
def test_quick_has_what_the_targets_speak_of_first_and_full_has_every_shape(fabric):
    quick, full = (
        [case for case in cases(plan, FABRICS[fabric], PARTS) if isinstance(case, LayerCase)]
        for plan in ("quick", "full")
    )
    assert (quick[0].hidden, quick[0].top_k, quick[0].ratio, quick[0].routing) == (2048, 8, 0.25, "balanced")
    shapes = {(case.hidden, case.top_k, case.ratio, case.routing) for case in full}
    assert len(shapes) == 3 * 3 * 3 * 2
    few = cases("full", FABRICS[fabric], ("layer",), hidden=(1024,), top_k=(4,), routing=("balanced",))
    assert [(case.hidden, case.top_k) for case in few if isinstance(case, LayerCase)] == [(1024, 4)] * 3


def test_targets_are_judged_by_the_latest_run():
    def row(run: str, arm: str, ratio: float) -> dict:
        name, way = arm.split("/")
        times = {"p50_ms": 1.0, "over_best_baseline": ratio / 2, "over_copy_per_expert": ratio, "n": 8}
        return vars(LayerCase(tokens=16384)) | {
            "benchmark": "moe_layer",
            "run": run,
            "status": "ok",
            "device": "GPU",
            "fabric": "nvlink",
            "ranks": 2,
            "transports": [],
            "arm": arm,
            "preset": name,
            "dispatcher": way,
            "forward": times,
            "forward_backward": times,
        }

    rows = [row(run, arm, ratio) for run, ratio in (("one", 1.2), ("two", 2.0)) for arm in OURS]
    lines = tables(rows).splitlines()
    assert "| layer, XL top-8, copy per expert, nvlink | ≥ 1.8 × | 2.00 | 2.00 | met |" in lines
    assert "| layer, XL top-8, best dispatcher, nvlink | ≥ 1.4 × | 1.00 | 1.00 | missed |" in lines
    assert "| layer, XL top-8, copy per expert, shm | ≥ 3 × | - | - | not measured |" in lines


def test_a_fabric_that_is_not_what_it_is_called_is_said_so():
    shm = FABRICS["shm"]
    assert _verdict({}, ["SHM/direct/direct"], shm) == {"status": "ok"}
    verdict = _verdict({}, ["P2P/CUMEM", "SHM/direct/direct"], shm)
    assert verdict == {"status": "error", "reason": "NCCL sends through P2P/CUMEM, not SHM alone"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"plan": "long"}, "unknown plan 'long'"),
        ({"fabrics": ("tin",)}, "unknown fabric 'tin'"),
        ({"parts": ("all",)}, "unknown part 'all'"),
        ({"fabrics": ("shm",), "device": "cpu"}, "fabric 'shm' needs GPUs"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        run(replace(Run(out=tmp_path / "rows.jsonl"), **wrong), say=silent)


def test_the_grid_has_every_shape_once_and_that_of_the_targets_first():
    found = cases("grid", FABRICS["shm"], ("layer",))
    shapes = {(case.hidden, case.top_k, case.ratio, case.routing) for case in found}
    assert len(found) == len(shapes) == 3 * 3 * 3 * 2
    assert (found[0].hidden, found[0].top_k, found[0].ratio) == (2048, 8, 0.25)
    assert not any(case.rivals for case in found)
