"""What the doctor says of a tiny Wan."""

from dataclasses import replace

from adamac import cli
from adamac.attention import crossover
from adamac.bakeoff.config import Config
from adamac.bakeoff.doctor import examine
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
