"""Several ranks compute what one does, whether they divide the experts or not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from babble import tiny_recipe
from test_lm_train import facts, weights

from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.train import train
from adamac.moe.lm.world import World
from adamac.testing import run_ranks


def train_on(rank: int, expert_ranks: int, recipe: Recipe, directory: Path) -> float:
    world = World.join("cpu", expert_ranks)
    assert world.rank == rank
    return train(recipe, directory, world=world, resume=True, dtype=torch.float64).bits_per_byte


def assert_same(one: Path, other: Path) -> None:
    for row, expected in zip(facts(other), facts(one), strict=True):
        assert row.pop("losses") == pytest.approx(expected.pop("losses"), rel=1e-9)
        assert row.pop("bytes_sent") >= expected.pop("bytes_sent") == 0
        assert (row["bits_per_byte"] is None) == (expected["bits_per_byte"] is None)
        row, expected = ({key: value or 0 for key, value in row.items()} for row in (row, expected))
        assert row == pytest.approx(expected, rel=1e-9)
    expected, found = weights(one), weights(other)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize(("preset", "expert_ranks"), [("bigmac", 1), ("bigmac", 2), ("bigmac_stable", 2)])
def test_two_ranks_equal_one_that_accumulates(corpus, tmp_path, preset, expert_ranks):
    recipe = tiny_recipe(corpus, preset=preset, micro_batch=2, clip=0.1)
    alone = train(recipe, tmp_path / "one", dtype=torch.float64)
    reached = run_ranks(train_on, 2, expert_ranks, recipe, tmp_path / "two")
    assert reached == pytest.approx([alone.bits_per_byte] * 2, rel=1e-9)
    assert_same(tmp_path / "one", tmp_path / "two")
    assert all((row["bytes_sent"] > 0) == (expert_ranks > 1) for row in facts(tmp_path / "two"))


def test_four_ranks_may_be_two_pairs_and_a_run_may_go_on_with_one(corpus, tmp_path):
    recipe = tiny_recipe(corpus, micro_batch=1, clip=0.1)
    train(recipe, tmp_path / "one", dtype=torch.float64)
    run_ranks(train_on, 4, 2, recipe, tmp_path / "four")
    assert_same(tmp_path / "one", tmp_path / "four")
    shutil.rmtree(tmp_path / "four" / "checkpoints" / "step-00000006")
    train(recipe, tmp_path / "four", resume=True, dtype=torch.float64)
    assert_same(tmp_path / "one", tmp_path / "four")


def test_a_batch_that_ranks_cannot_share_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="batch must be a multiple of the 3 ranks"):
        train(recipe, tmp_path / "run", world=World(size=3))
    with pytest.raises(ValueError, match="expert_ranks must divide the 1 ranks"):
        World.join("cpu", 2)
    with pytest.raises(ValueError, match="no device 'abacus'"):
        World.join("abacus")
    assert not (tmp_path / "run").exists()
