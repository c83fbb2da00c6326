"""A model in shares learns what a whole one does, and either can go on where the other stopped."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from babble import tiny_recipe
from test_lm_ranks import assert_same, facts
from test_lm_train import same, weights

from adamac.moe.lm import learner as learning
from adamac.moe.lm.checkpoint import load_model
from adamac.moe.lm.corpus import Corpus, Order
from adamac.moe.lm.layout import LayoutName
from adamac.moe.lm.learner import Diverged, Learner
from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.train import train
from adamac.moe.lm.world import World
from adamac.testing import run_ranks

# Five experts on four ranks, and six on two pairs of two, are shares of different lengths, and one of none.
GRIDS = [(2, 1, 6), (2, 2, 6), (4, 1, 5), (4, 2, 6)]


def train_on(
    rank: int,
    expert_ranks: int,
    layout: LayoutName,
    recipe: Recipe,
    directory: Path,
    dtype: torch.dtype = torch.float64,
    amp: bool = False,
) -> float:
    world = World.join("cpu", expert_ranks)
    options = {"dtype": dtype, "amp": amp, "layout": layout}
    return train(recipe, directory, world=world, resume=True, **options).bits_per_byte


def drop_last_checkpoint(directory: Path) -> None:
    shutil.rmtree(directory / "checkpoints" / "step-00000006")


@pytest.mark.parametrize(("ranks", "expert_ranks", "experts"), GRIDS)
def test_shares_equal_one_rank_that_accumulates(corpus, tmp_path, ranks, expert_ranks, experts):
    """Losses, norms of gradients, evaluations, weights and moments: of a balance loss, and of two pieces of a batch a rank."""
    recipe = tiny_recipe(corpus, batch=8, micro_batch=8 // ranks // 2, num_experts=experts, clip=0.1)
    alone = train(recipe, tmp_path / "one", dtype=torch.float64)
    reached = run_ranks(train_on, ranks, expert_ranks, "sharded", recipe, tmp_path / "shares")
    assert reached == pytest.approx([alone.bits_per_byte] * ranks, rel=1e-9)
    assert_same(tmp_path / "one", tmp_path / "shares")
    assert all(row["gradient_norm"] > recipe.clip for row in facts(tmp_path / "shares"))


@pytest.mark.parametrize("expert_ranks", [1, 2])
def test_shares_compute_in_bfloat16_what_replicas_do(corpus, tmp_path, expert_ranks):
    recipe = tiny_recipe(corpus, preset="bigmac_stable", micro_batch=1, clip=0.1)
    for layout in ("replicated", "sharded"):
        run_ranks(train_on, 2, expert_ranks, layout, recipe, tmp_path / layout, torch.float32, True)
    whole, shares = weights(tmp_path / "replicated"), weights(tmp_path / "sharded")
    for name, value in whole.items():
        assert shares[name].dtype == value.dtype != torch.bfloat16
        torch.testing.assert_close(shares[name], value, atol=1e-6, rtol=1e-4)


def test_shares_that_were_broken_off_go_on_bit_for_bit(corpus, tmp_path):
    recipe = tiny_recipe(corpus, preset="bigmac_stable", num_experts=6, batch=8, micro_batch=1)
    run_ranks(train_on, 4, 2, "sharded", recipe, tmp_path / "run", torch.float32)
    before, rows = weights(tmp_path / "run"), facts(tmp_path / "run")
    drop_last_checkpoint(tmp_path / "run")
    run_ranks(train_on, 4, 2, "sharded", recipe, tmp_path / "run", torch.float32)
    assert facts(tmp_path / "run") == rows
    assert same(weights(tmp_path / "run"), before)


def test_a_run_may_go_on_with_other_ranks_and_another_layout(corpus, tmp_path):
    recipe = tiny_recipe(corpus, preset="bigmac_stable", num_experts=6, clip=0.1)
    train(recipe, tmp_path / "one", dtype=torch.float64)
    whole = load_model(tmp_path / "one", dtype=torch.float64)
    run_ranks(train_on, 4, 2, "sharded", recipe, tmp_path / "run")
    for ranks, expert_ranks, layout in (
        (2, 1, "sharded"),
        (2, 2, "replicated"),
        (1, 1, "replicated"),
        (4, 1, "sharded"),
    ):
        drop_last_checkpoint(tmp_path / "run")
        run_ranks(train_on, ranks, expert_ranks, layout, recipe, tmp_path / "run")
        assert_same(tmp_path / "one", tmp_path / "run")
        found = load_model(tmp_path / "run", dtype=torch.float64)
        ids = torch.arange(8)[None]
        torch.testing.assert_close(found(ids), whole(ids), rtol=1e-5, atol=1e-6)


def test_one_rank_has_nothing_to_divide(recipe, tmp_path):
    train(recipe, tmp_path / "plain")
    train(recipe, tmp_path / "shares", layout="sharded")
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "shares"))


def numbers_held(rank: int, expert_ranks: int, recipe: Recipe, vocab: int) -> dict[str, int]:
    learner = Learner(recipe, recipe.model(vocab), World.join("cpu", expert_ranks), layout="sharded")
    learner.update(0, Order(torch.arange(999).numpy() % vocab, recipe.context, recipe.seed))
    states = [learner.optimizer.state[value] for value in learner.held.values()]
    return {
        "model": learner.parameters,
        "parameters": sum(value.numel() for value in learner.held.values()),
        "gradients": sum(value.grad.numel() for value in learner.held.values()),
        "moments": sum(state["exp_avg"].numel() for state in states),
        "of a checkpoint": len(learner.weights()) + len(learner.moments()),
    }


@pytest.mark.parametrize("expert_ranks", [1, 2, 4])
def test_a_rank_holds_a_quarter_of_parameters_gradients_and_moments(recipe, corpus, expert_ranks):
    held = run_ranks(numbers_held, 4, expert_ranks, recipe, corpus.vocab)
    for kind in ("parameters", "gradients", "moments"):
        assert [found[kind] for found in held] == [held[0]["model"] // 4] * 4, kind
    assert [found["of a checkpoint"] > 0 for found in held] == [True, False, False, False]


def after_two_updates(
    rank: int, expert_ranks: int, layout: LayoutName, recipe: Recipe, corpus: Corpus
) -> dict[str, torch.Tensor]:
    learner = Learner(
        recipe, recipe.model(corpus.vocab), World.join("cpu", expert_ranks), torch.float64, layout=layout
    )
    for moe in learner.model.moes:
        moe.router.bias[:2] = 100.0  # every token chooses these two
    for step in range(2):
        learner.update(step, Order(corpus.train_tokens, recipe.context, recipe.seed))
    return learner.weights()


@pytest.mark.parametrize("expert_ranks", [1, 2])
def test_experts_without_tokens_keep_no_rank_waiting(corpus, expert_ranks):
    recipe = tiny_recipe(corpus, preset="bigmac_stable", micro_batch=1)
    found = {
        layout: run_ranks(after_two_updates, 4, expert_ranks, layout, recipe, corpus, time_limit_s=60)[0]
        for layout in ("replicated", "sharded")
    }
    for name, value in found["replicated"].items():
        torch.testing.assert_close(found["sharded"][name], value, atol=1e-12, rtol=1e-7)


def meet_nan(rank: int, expert_ranks: int, recipe: Recipe, directory: Path) -> str:
    def poisoned(learner, step, order, own=learning.Learner._backward):
        if step == 1 and rank == 1:
            learner.model.embedding.register_forward_hook(lambda *call: call[-1] * math.nan)
        return own(learner, step, order)

    world = World.join("cpu", expert_ranks)
    with mock.patch.object(learning.Learner, "_backward", poisoned), pytest.raises(Diverged) as caught:
        train(recipe, directory, world=world, layout="sharded")
    return str(caught.value)


@pytest.mark.parametrize("expert_ranks", [1, 2, 4])  # rows of the grid: four, two and one
def test_nan_on_one_rank_stops_all_that_wait_for_its_shares(corpus, tmp_path, expert_ranks):
    said = run_ranks(meet_nan, 4, expert_ranks, tiny_recipe(corpus), tmp_path / "run", time_limit_s=30)
    assert len(set(said)) == 1
    assert said[0].startswith("step 2: the router's logits on rank 1 are NaN")


def test_a_layout_that_does_not_exist_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="layout must be replicated or sharded, got 'scattered'"):
        train(recipe, tmp_path / "run", layout="scattered")
    assert not (tmp_path / "run").exists()
