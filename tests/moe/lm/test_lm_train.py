"""Training: it learns, a kill costs nothing, and what goes wrong is said."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from babble import babble, tiny_recipe
from safetensors import SafetensorError

from adamac.moe.lm import checkpoint
from adamac.moe.lm import corpus as preparing
from adamac.moe.lm import learner as learning
from adamac.moe.lm.checkpoint import latest_checkpoint, load_model, read_tensors
from adamac.moe.lm.corpus import Order, is_corpus, prepare, unigram_bits_per_byte
from adamac.moe.lm.evaluate import bits_per_byte
from adamac.moe.lm.folder import RunFolder
from adamac.moe.lm.learner import Diverged
from adamac.moe.lm.model import GPT
from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.train import train

PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from adamac.moe.lm.checkpoint import read_json
from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.train import train
train(Recipe.from_dict(read_json(Path(sys.argv[1]))), Path(sys.argv[2]), resume=True)
"""


def facts(directory: Path) -> list[dict]:
    """Rows without what a clock says."""
    timed = {"time_s", "tokens_per_s"}
    return [
        {key: value for key, value in row.items() if key not in timed}
        for row in RunFolder(directory).read_rows()
    ]


def weights(directory: Path, *names: str) -> dict[str, torch.Tensor]:
    folder = latest_checkpoint(directory / "checkpoints")
    files = (folder / f"{name}.safetensors" for name in names or ("model", "optimizer"))
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("preset", ["bigmac", "bigmac_stable", "fine_grained"])
def test_it_learns(corpus, tmp_path, preset):
    recipe = tiny_recipe(corpus, preset=preset, steps=60, batch=8, lr=1e-2, eval_every=60, hidden=32)
    result = train(recipe, tmp_path / "run")
    assert result.bits_per_byte < 0.9 * result.unigram_bits_per_byte
    assert result.steps == 60


def test_a_killed_run_equals_one_that_was_not(corpus, tmp_path):
    recipe = tiny_recipe(corpus, preset="bigmac_stable", steps=40, save_every=5, eval_every=10)
    train(recipe, tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "recipe.json"), str(killed)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while (
        process.poll() is None
        and (latest_checkpoint(killed / "checkpoints") or killed).name < "step-00000015"
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was faster than the killer"
    train(recipe, killed, resume=True)
    assert facts(killed) == facts(tmp_path / "whole")
    assert same(weights(killed), weights(tmp_path / "whole"))


def test_a_kill_while_text_is_prepared_costs_nothing(text, corpus, tmp_path, monkeypatch):
    recipe = tiny_recipe(corpus, data=(str(text),), separator="=====", held_out=0.2, vocab=300)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run")
    assert not is_corpus(tmp_path / "run" / "data")
    assert train(recipe, tmp_path / "run", resume=True).steps == recipe.steps


def test_accumulating_changes_nothing_but_rounding(corpus, tmp_path):
    recipe = tiny_recipe(corpus, moe={"balance": "none"})
    for name, micro_batch in (("whole", None), ("pieces", 1)):
        train(replace(recipe, micro_batch=micro_batch), tmp_path / name, dtype=torch.float64)
    whole, pieces = weights(tmp_path / "whole"), weights(tmp_path / "pieces")
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], atol=1e-12, rtol=1e-9)


def test_it_learns_in_bfloat16_too(corpus, tmp_path):
    recipe = tiny_recipe(corpus, preset="k3", ratio=0.5, hidden=28, steps=20, lr=1e-2)
    whole = train(recipe, tmp_path / "whole")
    half = train(recipe, tmp_path / "half", amp=True)
    assert half.bits_per_byte < half.unigram_bits_per_byte * 1.1
    assert half.bits_per_byte != whole.bits_per_byte
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(tmp_path / "half").values())


def test_rows_say_what_happened(recipe, tmp_path):
    train(recipe, tmp_path / "run")
    rows = RunFolder(tmp_path / "run").read_rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in rows] == [64 * step for step in range(1, 7)]
    assert [row["bits_per_byte"] is not None for row in rows] == [False, False, True, False, False, True]
    assert rows[0]["time_s"] < rows[-1]["time_s"]


def test_the_first_row_is_of_the_untrained_model(recipe, corpus, tmp_path):
    train(recipe, tmp_path / "run")
    row = RunFolder(tmp_path / "run").read_rows()[0]
    torch.manual_seed(recipe.seed)
    model = GPT(recipe.model(corpus.vocab))
    inputs, targets = Order(corpus.train_tokens, recipe.context, recipe.seed).batch(0, recipe.batch)
    loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loads = torch.stack([moe.routing.load() for moe in model.moes]).double()
    assert row["loss"] == pytest.approx(loss.item())
    assert row["imbalance"] == pytest.approx((loads.amax(1) / loads.mean(1)).mean().item())
    balance = torch.stack([moe.losses["balance"] for moe in model.moes]).mean()
    assert row["losses"] == {"balance": pytest.approx(balance.item())}


def test_it_is_evaluated_without_capacity_and_trained_with_it(corpus, tmp_path):
    recipe = tiny_recipe(corpus, moe={"capacity": 0.5})
    result = train(recipe, tmp_path / "run", dtype=torch.float64)
    model = GPT(recipe.model(corpus.vocab).dropless()).double()
    checkpoint.load_weights(model, weights(tmp_path / "run", "model"), tmp_path)
    alone = bits_per_byte(model, corpus, tokens=recipe.eval_tokens, batch=1)
    assert result.bits_per_byte == pytest.approx(alone, rel=1e-12)
    train(replace(recipe, moe={}), tmp_path / "all", dtype=torch.float64)
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "all"))


def test_the_unigram_figure_is_of_the_text_that_the_model_was_measured_on(corpus, tmp_path):
    result = train(tiny_recipe(corpus, eval_tokens=40), tmp_path / "run")
    read = corpus.held_out_tokens[1 : 2 * 16 + 1]  # two windows of 16
    assert result.unigram_bits_per_byte == pytest.approx(unigram_bits_per_byte(corpus, read), rel=1e-12)


def test_a_run_may_go_on_with_another_rhythm_and_another_spelling_of_its_data(
    text, tmp_path, corpus, monkeypatch
):
    monkeypatch.chdir(text.parent)
    recipe = tiny_recipe(corpus, data=(text.name,), separator="=====", held_out=0.2, vocab=300)
    train(recipe, tmp_path / "run")
    other = replace(recipe, data=(f"./{text.name}",), save_every=1, log_every=2, eval_every=5)
    assert train(other, tmp_path / "run", resume=True).steps == recipe.steps


@pytest.mark.parametrize("content", ["{}", "[]", '{"recipe": []}'])
def test_a_damaged_run_is_refused(recipe, tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"run\.json is damaged: expected an object with recipe|not a recipe"
    ):
        train(recipe, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("content", "problem"), [("[]", "an object with step"), ('{"step": "a", "time_s": 0}', "numbers")]
)
def test_a_damaged_state_is_refused(recipe, tmp_path, content, problem):
    train(recipe, tmp_path / "run")
    (latest_checkpoint(tmp_path / "run" / "checkpoints") / "state.json").write_text(content)
    with pytest.raises(ValueError, match=rf"state\.json is damaged: expected {problem}"):
        train(recipe, tmp_path / "run", resume=True)


def test_what_is_wrong_with_the_code_is_not_called_divergence(recipe, tmp_path, monkeypatch):
    def broken(model, ids, view=None):
        raise ValueError("expected rows of another width")

    monkeypatch.setattr(GPT, "features", broken)
    with pytest.raises(ValueError, match=r"^expected rows of another width$"):
        train(recipe, tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_leaves_the_former(recipe, tmp_path, monkeypatch):
    def full(tensors, file, own=checkpoint.save_file):
        if "step-00000004" in str(file) and file.name == "optimizer.safetensors":
            raise SafetensorError("I/O error: No space left on device")
        own(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*step-00000004: .*No space left"):
        train(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_model_that_a_step_spoilt_ends_the_run_at_its_evaluation(recipe, tmp_path, monkeypatch):
    def spoil(learner, step, order, own=learning.Learner.update):
        update = own(learner, step, order)
        with torch.no_grad():
            learner.model.embedding.weight[:] = math.nan
        return update

    monkeypatch.setattr(learning.Learner, "update", spoil)
    with pytest.raises(Diverged, match="step 1 left a model whose numbers are not finite"):
        train(replace(recipe, eval_every=1), tmp_path / "run")


def test_the_learning_rate_rises_and_falls():
    recipe = Recipe(steps=110, warmup=10, lr=1.0, final_lr=0.1)
    rates = [recipe.learning_rate(step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_another_run_is_not_overwritten(recipe, tmp_path):
    train(recipe, tmp_path / "run")
    before = weights(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already"):
        train(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match=r"was begun with lr 0.006 \(now 0.1\)"):
        train(replace(recipe, lr=0.1), tmp_path / "run", resume=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(recipe, tmp_path / "thesis")
    assert same(before, weights(tmp_path / "run"))


def test_a_corpus_that_was_replaced_is_refused_and_changes_nothing(recipe, tmp_path, corpus):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus.folder, data)
    recipe = replace(recipe, data=(str(data),))
    train(recipe, run)
    before = {file: (run / file).read_bytes() for file in ("run.json", "tokenizer.json", "rows.jsonl")}
    shutil.rmtree(data)
    (tmp_path / "other.txt").write_text(babble(60, seed=1))
    prepare(data, [tmp_path / "other.txt"], vocab=300, separator="=====", held_out=0.2)
    with pytest.raises(
        ValueError, match=r"data is not the corpus that the run in .*run was begun with: .* now; put"
    ):
        train(recipe, run, resume=True)
    assert {file: (run / file).read_bytes() for file in before} == before


def test_a_finished_run_is_only_evaluated_again(recipe, tmp_path):
    first = train(recipe, tmp_path / "run")
    again = train(recipe, tmp_path / "run", resume=True)
    assert (again.bits_per_byte, again.steps) == (first.bits_per_byte, first.steps)


def test_a_run_that_cannot_begin_leaves_nothing_behind(recipe, tmp_path):
    (tmp_path / "few.txt").write_text("one document")
    for data, problem in (
        (str(tmp_path / "nowhere"), "no such file"),
        (str(tmp_path / "few.txt"), "too little text"),
    ):
        with pytest.raises(ValueError, match=problem):
            train(replace(recipe, data=(data,)), tmp_path / "run")
    with pytest.raises(ValueError, match="do not fill a context"):
        train(replace(recipe, context=4096, eval_tokens=4096), tmp_path / "run")
    with pytest.raises(ValueError, match="micro_batch must divide"):
        train(replace(recipe, micro_batch=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(recipe, tmp_path, monkeypatch):
    def poisoned(learner, step, order, own=learning.Learner._backward):
        names, sums, loads = own(learner, step, order)
        return names, sums * (math.nan if step == 4 else 1.0), loads

    with monkeypatch.context() as patch:
        patch.setattr(learning.Learner, "_backward", poisoned)
        with pytest.raises(Diverged, match=r"step 5 has loss nan .*step-00000004; try a lower learning rate"):
            train(recipe, tmp_path / "run")
    assert all(parameter.isfinite().all() for parameter in load_model(tmp_path / "run").parameters())
    assert train(recipe, tmp_path / "run", resume=True).steps == recipe.steps


def test_a_router_that_meets_nan_stops_the_run(recipe, tmp_path, monkeypatch):
    def poison(learner, step, order, own=learning.Learner.update):
        with torch.no_grad():
            learner.model.embedding.weight[:] = math.nan
        return own(learner, step, order)

    monkeypatch.setattr(learning.Learner, "update", poison)
    with pytest.raises(Diverged, match=r"step 1: the router's logits .* there is no checkpoint yet"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": math.nan}, "lr must be over 0"),
        ({"micro_batch": 99}, "micro_batch must be 1 to batch"),
        ({"preset": "dense"}, "preset must be one of"),
        ({"moe": {"capacty": 1}}, "no field capacty"),
        ({"top_k": 99}, "top_k is 99"),
        ({"ratio": 0.3}, "whole number"),
        ({"heads": 3}, "multiple of twice the heads"),
        ({"eval_tokens": 127}, r"eval_tokens must be at least the context \(128\), .* got 127"),
        ({"seed": 2**32}, "seed must lie between .* got 4294967296"),
        ({"separator": ""}, "separator must be some text"),
    ],
)
def test_a_recipe_that_cannot_be_computed_is_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        Recipe(**changes)


def test_the_largest_seed_trains(recipe, tmp_path):
    for sign in (1, -1):
        seed = sign * (2**32 - 1)
        assert train(replace(recipe, seed=seed, steps=1), tmp_path / str(seed)).steps == 1


def test_a_recipe_survives_json(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(ValueError, match="not a recipe"):
        Recipe.from_dict({"data": [], "betas": [], "stpes": 3})
