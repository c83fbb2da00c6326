"""What the doctor says of a tiny Wan."""

from adamac import cli
from adamac.bakeoff.config import Config
from adamac.bakeoff.doctor import examine


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
