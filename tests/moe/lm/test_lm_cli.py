"""``adamac moe``: what is typed and what is said."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest

from adamac import cli
from adamac.cli.moe import MoeTrain, _recipe
from adamac.moe.cost import machine_of
from adamac.moe.lm.recipe import Recipe

TINY = [
    "--layers",
    "1",
    "--heads",
    "2",
    "--hidden",
    "16",
    "--context",
    "16",
    "--experts",
    "4",
    "--top-k",
    "2",
]
TINY += ["--batch", "4", "--steps", "4", "--eval-every", "2", "--vocab", "300", "--held-out", "0.2"]


@pytest.fixture
def trained(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    arguments = ["moe", "train", "--data", str(text), "--separator", "=====", *TINY]
    assert cli.main(arguments) == 0
    return arguments


def test_train_generate_export(capsys, trained, tmp_path):
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "bits per byte of held-out text",
        "knowing only how often each token occurs",
        "a sample:",
    ):
        assert part in said
    assert "adamac moe generate out/moe" in said
    assert cli.main(["moe", "generate", "out/moe", "--prompt", "[the] owl", "fish", "--tokens", "5"]) == 0
    said = capsys.readouterr().out
    assert "1 of 2\n[the] owl" in said
    assert "2 of 2\nfish" in said
    assert cli.main(["moe", "export", "out/moe", "--to", "hf"]) == 0
    assert "AutoModelForCausalLM.from_pretrained('hf')" in capsys.readouterr().out
    assert (tmp_path / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize("written", [r"\[/b] owl", r"\[red]owl", "owl\\", ":owl: [owl]"])
def test_text_that_reads_like_markup_is_shown_as_it_is(trained, monkeypatch, capsys, written):
    monkeypatch.setattr("adamac.cli.moe._continue", lambda options, prompts: [written] * len(prompts))
    assert cli.main(["moe", "generate", "out/moe", "--prompt", written]) == 0
    assert f"{written}{written}\n" in capsys.readouterr().out
    assert cli.main([*trained, "--resume"]) == 0
    assert f"a sample:\n{written}\n" in capsys.readouterr().out


def test_decoding_that_a_gpu_could_not_capture_says_why_in_a_line(trained, monkeypatch, capsys):
    def generate(model, prompts, *, watcher, **more):
        watcher(SimpleNamespace(captured=False, reason="it waits [always]"))
        return [[] for _ in prompts]

    monkeypatch.setattr("adamac.moe.lm.generate.generate", generate)
    monkeypatch.setattr("adamac.moe.lm.checkpoint.load_model", lambda *given: None)
    line = "decoding was not captured in a CUDA graph: it waits [always]\n"
    monkeypatch.setattr("adamac.moe.lm.world.find_device", lambda name: SimpleNamespace(type="cpu"))
    assert cli.main(["moe", "generate", "out/moe"]) == 0
    assert line not in capsys.readouterr().err
    monkeypatch.setattr("adamac.moe.lm.world.find_device", lambda name: SimpleNamespace(type="cuda"))
    assert cli.main(["moe", "generate", "out/moe"]) == 0
    assert capsys.readouterr().err.count(line) == 1
    assert cli.main(["moe", "generate", "out/moe", "--tokens", "5"]) == 0
    assert line not in capsys.readouterr().err


def test_training_that_cannot_be_captured_says_why_in_a_line_and_goes_on(trained, capsys):
    line = "training is not captured in a CUDA graph: the model is on cpu, and CUDA graphs are for GPUs\n"
    assert line not in capsys.readouterr().out
    assert cli.main([*trained, "--out", "out/other", "--device", "cpu", "--capture"]) == 0
    said = capsys.readouterr().out
    assert said.count(line) == 1
    assert "bits per byte of held-out text" in said


@pytest.mark.parametrize("command", [["generate", "out/moe"], ["export", "out/moe", "--to", "hf"]])
def test_what_one_process_does_is_refused_on_ranks(trained, monkeypatch, capsys, tmp_path, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["moe", *command]) == 2
    assert f"{command[0]} is one process, got 2 ranks; run it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_run_is_resumed_or_left_alone(trained, capsys):
    assert cli.main(trained) == 2
    assert "out/moe holds a run already; go on with it by --resume" in capsys.readouterr().err
    assert cli.main([*trained, "--resume"]) == 0
    assert "4 steps were done already" in capsys.readouterr().out
    assert cli.main([*trained, "--resume", "--lr", "0.1"]) == 2
    assert "was begun with lr 0.006 (now 0.1)" in " ".join(capsys.readouterr().err.split())


def test_changes_mean_what_they_say():
    texts = (
        "gated=false",
        "normalise=no",
        "sound_init=True",
        "capacity=1",
        "latent=none",
        "activation=silu",
        "top_k=3",
    )
    recipe = _recipe(MoeTrain(preset="k3", hidden=56, change=(*texts, "latent_norm=false")))
    experts = recipe.model(300).moe
    assert (experts.gated, experts.normalise, experts.sound_init) == (False, False, True)
    assert (experts.capacity, experts.latent, experts.activation, experts.top_k) == (1.0, None, "silu", 3)


def test_options_are_the_recipes_with_the_same_defaults():
    default = Recipe()
    for option in fields(MoeTrain):
        name = {"experts": "num_experts"}.get(option.name, option.name)
        if name in Recipe.__dataclass_fields__:
            assert getattr(default, name) == option.default, name


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["train", "--preset", "dense"], "preset must be one of vanilla, "),
        (["train", "--data", "nowhere"], "cannot read nowhere: no such file"),
        (["train", "--data", "empty"], "empty holds no text"),
        (["train", "--data", "torn.txt.xz"], "cannot read torn.txt.xz"),
        (["train", "--data", "few.txt"], "too little text"),
        (["train", "--out", "full"], "full is not empty and holds no run"),
        (["train", "--change", "capacity"], "change must be name=value"),
        (["train", "--change", "capacty=1"], "no field capacty"),
        (["train", "--change", "capacity=0"], "capacity must be above 0"),
        (["train", "--change", "capacity=abc"], "capacity must be a number or none, got 'abc'"),
        (["train", "--change", "ffn=20.5"], "ffn must be a whole number, got '20.5'"),
        (["train", "--change", "gated=perhaps"], "gated must be true or false, got 'perhaps'"),
        (["train", "--change", "balance_weight=nan"], "balance_weight must be"),
        (["train", "--change", "score=tanh"], "score must be one of softmax, sigmoid"),
        (["train", "--change", "hidden=32"], "the experts are for hidden 32, the model has 128"),
        (["train", "--top-k", "99"], "top_k is 99"),
        (["train", "--experts", "5", "--expert-ranks", "2"], "expert_ranks must divide the 1 ranks"),
        (["train", "--machine", "nowhere.json"], "cannot read nowhere.json: no such file or directory"),
        (["train", "--machine", "full"], "cannot read full: is a directory; expected what adamac advise moe"),
        (
            ["train", "--machine", "few.txt"],
            "few.txt is no machine file: it is no JSON; expected what adamac",
        ),
        (["train", "--machine", "node.json"], "--machine is for experts that are divided among ranks"),
        (["train", "--threads", "0"], "threads must be at least 1"),
        (["train", "--steps", "0"], "steps must be at least 1"),
        (["train", "--vocab", "9", "--data", "few.txt"], "vocab must be at least 257"),
        (["train", "--device", "abacus"], "no device 'abacus'"),
        (["generate", "full"], "holds no tokenizer"),
        (["generate", "full", "--samples", "0"], "samples must be at least 1"),
        (["generate", "full", "--top-k", "-1"], "top_k must be at least 1, or 0 for all tokens, got -1"),
        (["export", "full", "--to", "hf"], "holds no checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_changes_nothing(
    tmp_path, monkeypatch, capsys, arguments, problem
):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "thesis.md").write_text("years of work")
    machine_of().save(tmp_path / "node.json")
    (tmp_path / "few.txt").write_text("one document")
    (tmp_path / "torn.txt.xz").write_bytes(b"\xfd7zXZ")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["moe", *arguments]) == 2
    said = capsys.readouterr()
    assert problem in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
