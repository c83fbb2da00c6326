"""Claims about the end-to-end benchmark, on tiny models of the real classes."""

from __future__ import annotations

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from benchmarks.end_to_end import arms as arms_module
from benchmarks.end_to_end import turn as turn_module
from benchmarks.end_to_end.arms import Arm
from benchmarks.end_to_end.build import arguments, build
from benchmarks.end_to_end.models import MODELS, tiny
from benchmarks.end_to_end.rows import read
from benchmarks.end_to_end.run import Run, run
from benchmarks.end_to_end.summary import table

FAMILIES = ("wan-1.3b", "hunyuan-129f", "cogvideox-2b")
# Self-attention calls of a step: layers, twice where guidance is a forward of its own.
CALLS = {"wan-1.3b": 4, "hunyuan-129f": 2, "cogvideox-2b": 2}
# From the model cards, in billions.
PARAMETERS = {"cogvideox-2b": 1.69, "wan-1.3b": 1.42, "wan-14b": 14.29, "hunyuan-129f": 12.82}
TOKENS = {
    "cogvideox-2b": 17_550,
    "wan-1.3b": 32_760,
    "wan-14b": 75_600,
    "hunyuan-129f": 118_800,
    "hunyuan-193f": 176_400,
}


@pytest.fixture
def options(tmp_path) -> Run:
    return Run(
        models=("wan-1.3b",),
        arms=("stock", "default_15"),
        out=tmp_path / "rows.jsonl",
        rounds=2,
        dense_steps=2,
        first_steps=1,
        sparse_steps=3,
        device="cpu",
        tiny=True,
    )


def silent(line: str) -> None:
    pass


@pytest.mark.parametrize("name", FAMILIES)
def test_every_step_is_timed_and_named_by_its_kind(options, name):
    stock, sparse = run(replace(options, models=(name,)), say=silent)
    assert [stock["status"], sparse["status"]] == ["ok", "ok"]
    assert stock["random_weights"]
    assert stock["layers"] == stock["layers_of_model"] == 2
    assert (stock["dense"]["steps"], stock["first_sparse"], stock["sparse"]) == (4, None, None)
    assert [sparse[kind]["steps"] for kind in ("dense", "first_sparse", "sparse")] == [2, 2, 6]
    assert sparse["dense"]["dense_calls"] == {"schedule: first steps": 2 * CALLS[name]}
    assert sparse["sparse"]["calls"] == sparse["sparse"]["sparse_calls"] == 6 * CALLS[name]
    assert sparse["sparse"]["density"] < sparse["sparse"]["cost"] < 1 == sparse["dense"]["density"]
    assert sparse["sparse"]["p50_ms"] <= sparse["sparse"]["p99_ms"] <= sparse["sparse"]["max_ms"]
    assert sparse["sparse"]["stage_ms_per_step"]["plan"] > 0
    assert sparse["state_bytes"] > 0
    assert "Tokens(keep=0.15)" in sparse["settings"]


def test_a_whole_video_is_projected_from_the_medians_of_all_its_steps(options):
    stock, sparse = run(options, say=silent)
    assert stock["video_s_projected"] == pytest.approx(10 * stock["dense"]["p50_ms"] / 1e3, rel=1e-4)
    parts = [
        sparse[kind]["p50_ms"] * count for kind, count in (("dense", 1), ("first_sparse", 1), ("sparse", 8))
    ]
    assert sparse["video_s_projected"] == pytest.approx(sum(parts) / 1e3, rel=1e-4)


def test_a_shortened_transformer_says_so_and_projects_no_video(options):
    short = MODELS["hunyuan-129f"].shortened(15)  # two lists of blocks, each gets its share
    assert short.depth == (5, 10)
    assert short.config == {"num_layers": 5, "num_single_layers": 10}
    (row,) = run(replace(options, arms=("stock",), layers=1), say=silent)
    assert (row["layers"], row["layers_of_model"], row["video_s_projected"]) == (1, 2, None)


def test_guidance_can_be_left_out_and_is_named(options):
    guided, free = (
        run(replace(options, arms=("best_dense",), guidance=on), say=silent)[0] for on in (True, False)
    )
    assert (guided["guidance"], free["guidance"]) == ("separate", "off")
    assert guided["dense"]["calls"] == 2 * free["dense"]["calls"]


def test_nothing_is_begun_after_the_time_limit(options):
    rows = run(replace(options, minutes=0), say=silent)
    assert [row["status"] for row in rows] == ["stopped", "stopped"]
    assert "time limit of 0 minutes before turn 1" in rows[0]["reason"]
    assert "stopped" in table(read(options.out))


def test_the_time_limit_stops_within_a_turn_and_keeps_the_steps_made(options, monkeypatch):
    class Impatient(turn_module.Deadline):
        def allows(self, seconds: float = 0) -> bool:
            self.asked = getattr(self, "asked", 0) + 1
            # Asked before the turn, at the end of the warm-up's three steps but the last, and after each step of the turn.
            return self.asked <= 1 + 2 + 3

    monkeypatch.setattr("benchmarks.end_to_end.run.Deadline", Impatient)
    (row,) = run(replace(options, arms=("default_15",), minutes=1), say=silent)
    assert row["status"] == "stopped"
    assert "within a turn" in row["reason"]
    assert [row[kind] and row[kind]["steps"] for kind in ("dense", "first_sparse", "sparse")] == [1, 1, 2]
    assert row["sparse"]["calls"] == 2 * CALLS["wan-1.3b"]


def test_an_arm_that_fails_is_a_row_with_the_reason_and_the_others_go_on(options, monkeypatch):
    def broken(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory\nand a long story")

    monkeypatch.setitem(arms_module.ARMS, "broken", Arm("broken", "fails", lambda: broken))
    rows = run(replace(options, arms=("broken", "stock")), say=silent)
    assert (rows[0]["status"], rows[0]["reason"]) == ("error", "OutOfMemoryError: out of memory")
    assert rows[0]["dense"] is None
    assert rows[0]["turns"] == 0
    assert rows[1]["status"] == "ok"
    assert rows[1]["turns"] == 2


def test_a_model_that_cannot_be_made_is_rows_with_the_reason(options, monkeypatch):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr("benchmarks.end_to_end.run.build", too_large)
    rows = run(options, say=silent)
    assert [row["status"] for row in rows] == ["error", "error"]
    assert "too large" in rows[0]["reason"]


def test_output_that_is_not_finite_is_an_error(options, monkeypatch):
    def spoilt(model, device, dtype):
        pipe = build(model, device, dtype)
        pipe.transformer.proj_out.weight.fill_(torch.nan)
        return pipe

    monkeypatch.setattr("benchmarks.end_to_end.run.build", spoilt)
    (row,) = run(replace(options, arms=("stock",)), say=silent)
    assert (row["status"], row["reason"]) == ("error", "FloatingPointError: latents are not finite")


def test_a_turn_leaves_what_is_finished_in_the_file(options, monkeypatch):
    def interrupted(bench, arm, kinds):
        if arm.name == "default_15":
            raise KeyboardInterrupt
        return turn_module.run_turn(bench, arm, kinds)

    monkeypatch.setattr("benchmarks.end_to_end.run.run_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(options, say=silent)
    stock, sparse = read(options.out)
    assert stock["dense"]["steps"] == 2
    assert sparse["turns"] == 0


def test_rows_of_former_runs_stay_and_lend_their_dense_arm_with_a_star(options):
    run(replace(options, arms=("stock", "best_dense")), say=silent)
    for row in (lines := options.out.read_text().splitlines()):
        assert json.loads(row)["benchmark"] == "end_to_end"
    former = [json.dumps(json.loads(line) | {"run": "before"}) for line in lines]
    options.out.write_text("\n".join(former) + "\n")
    run(replace(options, arms=("default_15",), first_steps=0), say=silent)
    rows = read(options.out)
    assert [row["arm"] for row in rows] == ["stock", "best_dense", "default_15"]
    assert rows[2]["video_s_projected"] is None  # its dense steps come from best_dense, in the table
    *_, line = table(rows).splitlines()
    cells = [cell.strip() for cell in line.split("|")]
    assert sum(cell.endswith("*") for cell in cells) == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"models": ("wan",)}, "unknown model 'wan'"),
        ({"arms": ("fast",)}, "unknown arm 'fast'"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"sparse_steps": 0}, "sparse_steps must be at least 1"),
        ({"sparse_steps": 9}, "at most the 10 steps"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, wrong, message):
    with pytest.raises(ValueError, match=message):
        run(replace(options, **wrong), say=silent)


@pytest.mark.parametrize("name", MODELS)
def test_facts_agree_with_the_classes_and_the_published_sizes(name):
    model = MODELS[name]
    assert model.video_tokens == TOKENS[name]
    assert model.dense_steps == 5
    with torch.device("meta"):
        transformer = getattr(diffusers, model.transformer)(**model.config)
    parameters = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    assert parameters == pytest.approx(PARAMETERS.get(name, PARAMETERS["hunyuan-129f"]), abs=0.006)
    assert tuple(len(getattr(transformer, blocks)) for blocks in model.layers) == model.depth
    config = transformer.config
    assert (config.num_attention_heads, config.attention_head_dim) == (model.heads, model.head_dim)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_have_the_dtypes_that_diffusers_loads_them_in(name):
    model = tiny(MODELS[name])
    pipe = build(model, "cpu", torch.bfloat16)
    dtypes = {parameter.dtype for parameter in pipe.transformer.parameters()}
    assert dtypes == ({torch.bfloat16, torch.float32} if name == "wan-1.3b" else {torch.bfloat16})
    assert pipe.transformer.dtype == torch.bfloat16
    given = arguments(model, "cpu", torch.bfloat16, guidance=True)
    assert torch.isfinite(pipe(**given | {"num_inference_steps": 2}).frames).all()


def test_hunyuan_s_prompt_is_padded_as_its_template_leaves_it():
    given = arguments(MODELS["hunyuan-129f"], "cpu", torch.bfloat16, guidance=True)
    assert given["prompt_attention_mask"].sum() == 60
    assert given["prompt_embeds"].shape == (1, 256, 4096)
    assert "negative_prompt_embeds" not in given
