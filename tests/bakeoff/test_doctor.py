"""What the doctor says of a tiny Wan."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from diffusers import CogVideoXPipeline, HunyuanVideoPipeline, WanImageToVideoPipeline, WanVACEPipeline

from adamac import cli
from adamac.attention import crossover
from adamac.bakeoff.config import Config
from adamac.bakeoff.doctor import _check_sides, examine
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.pipelines import load_pipeline
from adamac.integrations.diffusers.families import FAMILIES


def config(model, **size) -> Config:
    return Config(model=str(model), prompts=(), arms=(), **size)


def test_self_attention_will_be_sparse_and_cross_attention_will_not(tiny_model):
    findings = {finding.module: finding.sparse for finding in examine(config(tiny_model)).findings}
    assert findings == {
        "transformer.blocks.0.attn1": True,
        "transformer.blocks.0.attn2": False,
        "transformer.blocks.1.attn1": True,
        "transformer.blocks.1.attn2": False,
    }


def test_the_size_decides_whether_there_are_enough_tokens(tiny_model):
    enough = examine(config(tiny_model, frames=7, height=64, width=64))
    assert enough.tokens == 1024
    assert "1,024 tokens: enough" in enough.remark()
    assert (
        "fewer than 1,024 video tokens" in examine(config(tiny_model, frames=3, height=64, width=64)).remark()
    )


def test_the_command_says_it_in_a_table(tiny_model, capsys):
    assert cli.main(["doctor", str(tiny_model)]) == 0
    assert "cross-attention" in capsys.readouterr().out


def test_a_pipeline_of_the_second_transformer_alone_is_looked_at(tiny_model, monkeypatch):
    pipe = load_pipeline(str(tiny_model), "cpu")
    pipe.transformer_2, pipe.transformer = pipe.transformer, None
    monkeypatch.setattr("adamac.bakeoff.doctor.load_pipeline", lambda *asked: pipe)
    found = examine(config(tiny_model, frames=7, height=64, width=64))
    assert found.tokens == 1024
    assert [item.module for item in found.findings if item.sparse] == [
        "transformer_2.blocks.0.attn1",
        "transformer_2.blocks.1.attn1",
    ]


def test_where_there_is_no_gpu_it_says_what_a_hopper_would_do(tiny_model):
    remark = examine(config(tiny_model, frames=7, height=64, width=64)).remark()
    assert "enough to be sparse. On an H100 or H200 all of it stays dense (too small: " in remark


def test_guidance_in_one_batch_counts_twice(monkeypatch, tiny_model):
    asked = []
    monkeypatch.setattr(
        crossover, "too_little_work", lambda tokens, heads, head_dim, capability: asked.append(heads)
    )
    for batched in (False, True):
        family = replace(FAMILIES[0], guidance_in_batch=batched)
        monkeypatch.setattr("adamac.integrations.diffusers.families.FAMILIES", (family,))
        examine(config(tiny_model, frames=7, height=64, width=64))
    assert asked[1] == 2 * asked[0]


def test_cogvideox_computes_both_branches_in_one_batch_and_the_others_do_not():
    assert [family.name for family in FAMILIES if family.guidance_in_batch] == ["CogVideoX"]


def test_sides_that_a_run_refuses_are_refused_in_the_same_words(tiny_model):
    with pytest.raises(BadInput, match=r"refuses these settings .*divisible by 16 but are 65 and 64"):
        examine(config(tiny_model, frames=7, height=65, width=64))


@pytest.mark.parametrize(
    "pipeline", [CogVideoXPipeline, HunyuanVideoPipeline, WanImageToVideoPipeline, WanVACEPipeline]
)
def test_sides_are_checked_by_every_family_and_what_else_a_call_wants_is_not(pipeline):
    transformer = SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2)))
    parts = {"transformer": transformer, "vae_scale_factor_spatial": 8, "_callback_tensor_inputs": []}
    pipe = pipeline.__new__(pipeline)
    vars(pipe).update(parts)
    _check_sides(pipe, 64, 64)
    with pytest.raises(BadInput, match="65"):
        _check_sides(pipe, 65, 64)


@pytest.mark.parametrize(("asked", "made"), [(7, 7), (8, 9), (6, 7)])
def test_frames_are_those_that_a_run_makes(tiny_model, asked, made):
    found = examine(config(tiny_model, frames=asked, height=64, width=64))
    assert (found.size[0], found.tokens) == (made, (made // 2 + 1) * 256)
    assert (f"{made} frames ({asked} are rounded to that)" in found.remark()) == (asked != made)
