"""Several ranks compute what one does, whether they divide the experts or not."""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from babble import tiny_recipe
from test_lm_train import facts, weights

from adamac.moe.lm import learner as learning
from adamac.moe.lm import train as training
from adamac.moe.lm.learner import Diverged
from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.train import train
from adamac.moe.lm.world import Left, World
from adamac.testing import run_ranks


def train_on(rank: int, expert_ranks: int, recipe: Recipe, directory: Path) -> float:
    world = World.join("cpu", expert_ranks)
    assert world.rank == rank
    return train(recipe, directory, world=world, resume=True, dtype=torch.float64).bits_per_byte


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


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


def test_ranks_equal_one_whatever_they_compute_at_once_where_nothing_is_measured_on_a_part(corpus, tmp_path):
    recipe = tiny_recipe(corpus, preset="bigmac_stable", clip=0.1)
    train(recipe, tmp_path / "one", dtype=torch.float64)
    run_ranks(train_on, 2, 2, recipe, tmp_path / "two")
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("experts", [{"balance_weight": 1.0}, {"balance": "none", "capacity": 1.0}])
def test_a_balance_loss_and_a_capacity_are_of_what_a_rank_computes_at_once(corpus, tmp_path, experts):
    recipe = tiny_recipe(corpus, moe=experts)
    train(recipe, tmp_path / "one", dtype=torch.float64)
    run_ranks(train_on, 2, 1, recipe, tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert any((one[name] - two[name]).abs().max() > 1e-6 for name in one)


def test_a_run_of_one_rank_may_go_on_with_two_that_divide_the_experts(corpus, tmp_path):
    recipe = tiny_recipe(corpus, preset="bigmac_stable", clip=0.1)
    train(recipe, tmp_path / "one", dtype=torch.float64)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000006")
    run_ranks(train_on, 2, 2, recipe, tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-12, rtol=1e-7)


def tensors_held(rank: int, recipe: Recipe, vocab: int) -> tuple[int, int]:
    learner = learning.Learner(recipe, recipe.model(vocab), World.join("cpu", 2))
    return len(learner.weights()), len(learner.model.state_dict())


def test_only_the_first_rank_holds_the_whole_model_for_a_checkpoint(recipe, corpus):
    held = run_ranks(tensors_held, 4, recipe, corpus.vocab)
    assert [found == every for found, every in held] == [True, False, False, False]
    assert [found for found, _ in held[1:]] == [0, 0, 0]


def meet_nan(rank: int, recipe: Recipe, directory: Path) -> str:
    world = World.join("cpu", 2)

    def poisoned(learner, step, order, own=learning.Learner._backward):
        if step == 1 and rank == 1:
            with torch.no_grad():
                learner.model.embedding.weight[:] = math.nan
        return own(learner, step, order)

    with mock.patch.object(learning.Learner, "_backward", poisoned), pytest.raises(Diverged) as caught:
        train(recipe, directory, world=world)
    return str(caught.value)


def test_nan_on_one_rank_of_a_grid_stops_all(corpus, tmp_path):
    said = run_ranks(meet_nan, 4, tiny_recipe(corpus), tmp_path / "run", time_limit_s=30)
    assert ["the router's logits on rank 1" in word for word in said] == [True, True, False, False]
    assert all("step 2" in word for word in said)


def prepare_slowly(rank: int, recipe: Recipe, directory: Path) -> int:
    dist.destroy_process_group()
    store = dist.FileStore(str(directory.with_name("store")), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=1))

    def slow(*arguments, own=training.prepare, **options):
        time.sleep(2.5)
        return own(*arguments, **options)

    with mock.patch.object(training, "prepare", slow):
        return train(recipe, directory, world=World.join("cpu")).steps


def test_text_may_take_longer_to_prepare_than_a_collective_may_take(text, corpus, tmp_path):
    recipe = tiny_recipe(corpus, data=(str(text),), separator="=====", held_out=0.2, vocab=300)
    assert run_ranks(prepare_slowly, 2, recipe, tmp_path / "run") == [6, 6]


def fail_to_save(rank: int, recipe: Recipe, directory: Path) -> str:
    world = World.join("cpu")

    def full(*arguments):
        raise OSError("No space left on device")

    with (
        mock.patch.object(training.checkpoint, "write_checkpoint", full),
        pytest.raises((OSError, Left)) as caught,
    ):
        train(recipe, directory, world=world)
    return str(caught.value)


def test_what_the_first_rank_could_not_write_stops_all(recipe, tmp_path):
    said = run_ranks(fail_to_save, 2, recipe, tmp_path / "run", time_limit_s=30)
    assert said == ["No space left on device", "rank 0 stopped: No space left on device"]


def started(rank: int, port: int, folder: Path, *arguments: str) -> subprocess.Popen:
    """One of two ranks of the program."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "adamac.cli", "moe", "train", "--device", "cpu", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | place | meeting,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_too_little_text_is_a_line_on_each_rank(tmp_path):
    (tmp_path / "few.txt").write_text("one document")
    port = free_port()
    ranks = [started(rank, port, tmp_path, "--data", "few.txt") for rank in range(2)]
    said = [process.communicate(timeout=60)[1].strip().splitlines() for process in ranks]
    assert [len(lines) for lines in said] == [1, 1], said
    assert said[0][0].startswith("adamac: too little text")
    assert said[1][0].startswith("adamac: rank 1: rank 0 stopped: too little text")
    assert all(process.returncode for process in ranks)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_rank_that_is_killed_stops_the_other_in_one_line(corpus, tmp_path, layout):
    port, rows = free_port(), tmp_path / "out" / "moe" / "rows.jsonl"
    arguments = ("--data", str(corpus.folder), "--hidden", "16", "--context", "16", "--steps", "100000")
    arguments = (*arguments, "--layout", layout)
    ranks = [started(rank, port, tmp_path, *arguments) for rank in range(2)]
    while not rows.exists() and all(process.poll() is None for process in ranks):
        time.sleep(0.01)
    ranks[1].kill()
    said = [process.communicate(timeout=60)[1].strip().splitlines() for process in ranks]
    assert said == [["adamac: another rank left"], []]
    assert ranks[0].returncode == 1


def test_a_batch_that_ranks_cannot_share_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="batch must be a multiple of the 3 ranks"):
        train(recipe, tmp_path / "run", world=World(size=3))
    with pytest.raises(ValueError, match="expert_ranks must divide the 1 ranks"):
        World.join("cpu", 2)
    with pytest.raises(ValueError, match="no device 'abacus'"):
        World.join("abacus")
    assert not (tmp_path / "run").exists()
