"""Micro-batches: one computation, captured or not, and what is in the way of capturing has a reason."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from babble import tiny_recipe
from test_decoding import captures, on_a_gpu
from test_lm_ranks import assert_same
from test_lm_train import facts, same, weights
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from adamac.moe import preset
from adamac.moe.dispatch import Local
from adamac.moe.lm import micro_batch
from adamac.moe.lm.corpus import Order
from adamac.moe.lm.learner import Diverged, Learner
from adamac.moe.lm.micro_batch import MicroBatches, obstacle
from adamac.moe.lm.model import GPT, GPTConfig
from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.train import Silent, train
from adamac.moe.lm.world import World
from adamac.moe.timing import StageClock
from adamac.ops.replay import Replayed
from adamac.testing import run_ranks


class Warmed(Replayed):
    """Calls that nothing records, but the function runs several times before the first, as a recording has it."""

    warmups = 0

    def record(self, *inputs):
        if not self.warmups:
            for _ in range(4):
                self._function(*inputs)
        self.warmups += 1

    def __call__(self, *inputs):
        assert self.warmups == 1, "recorded once, beforehand"
        return self._function(*inputs)


@pytest.fixture
def as_captured(monkeypatch):
    """What is asked to be captured runs as it would, but unrecorded."""
    monkeypatch.setattr(micro_batch, "obstacle", lambda *given, **more: "")
    monkeypatch.setattr(micro_batch, "Replayed", Warmed)


class Hearing(Silent):
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def uncaptured(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.mark.usefixtures("as_captured")
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(
    ("name", "micro_batch"),
    [("bigmac_stable", 2), ("bigmac_stable", None), ("bigmac", 1), ("fine_grained", 2)],
)
def test_a_captured_run_equals_one_that_is_not_to_the_bit(corpus, tmp_path, name, micro_batch, amp):
    recipe = tiny_recipe(corpus, preset=name, micro_batch=micro_batch, clip=0.1)
    hearing = Hearing()
    train(recipe, tmp_path / "plain", amp=amp)
    train(recipe, tmp_path / "captured", amp=amp, capture=True, watcher=hearing)
    assert facts(tmp_path / "captured") == facts(tmp_path / "plain")
    assert same(weights(tmp_path / "captured"), weights(tmp_path / "plain"))
    assert hearing.reasons == []


@pytest.mark.usefixtures("as_captured")
@pytest.mark.parametrize("began_captured", [False, True])
def test_a_run_may_go_on_with_the_other(corpus, tmp_path, began_captured):
    recipe = tiny_recipe(corpus, preset="bigmac_stable", micro_batch=2)
    train(recipe, tmp_path / "whole", capture=began_captured)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    train(recipe, tmp_path / "run", capture=not began_captured, resume=True)
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.usefixtures("as_captured")
def test_gradients_stay_where_they_are_whatever_others_do_to_them(recipe, corpus):
    learner = Learner(recipe, recipe.model(corpus.vocab), World(), capture=True)
    order = Order(corpus.train_tokens, recipe.context, recipe.seed)
    learner.update(0, order)
    places = {name: value.grad.data_ptr() for name, value in learner.layout.parameters.items()}
    for value in learner.layout.parameters.values():
        value.grad = None
    learner.update(1, order)
    assert {name: value.grad.data_ptr() for name, value in learner.layout.parameters.items()} == places
    assert {name: value.grad.data_ptr() for name, value in learner.held.items()} == places


@pytest.mark.usefixtures("as_captured")
def test_what_a_pass_leaves_in_its_layers_holds_no_graph_and_no_load_is_counted_twice(corpus):
    recipe = tiny_recipe(corpus, preset="bigmac_stable", moe={"z_weight": 1e-3}, micro_batch=1)
    learner = Learner(recipe, recipe.model(corpus.vocab), World(), capture=True)
    order = Order(corpus.train_tokens, recipe.context, recipe.seed)
    found = learner._micro_batches.add_up([order.batch(first, 1) for first in range(4)])
    for moe, load in zip(learner.model.moes, found.loads, strict=True):
        assert not any(loss.requires_grad for loss in moe.losses.values())
        assert torch.equal(moe.router.load, load)
    assert found.loads.sum(1).tolist() == [4 * recipe.context * recipe.top_k] * recipe.layers
    assert found.names == ["z"]


@pytest.mark.usefixtures("as_captured")
def test_a_loss_that_is_not_finite_stops_a_captured_run_before_the_weights_are_touched(
    recipe, corpus, monkeypatch
):
    learner = Learner(recipe, recipe.model(corpus.vocab), World(), capture=True)
    order = Order(corpus.train_tokens, recipe.context, recipe.seed)
    learner.update(0, order)
    monkeypatch.setattr(Local, "send", sends_as_on_a_gpu)
    with torch.no_grad():
        learner.model.blocks[1].attention.out.weight[0] = math.nan
    before = {name: value.clone() for name, value in learner.held.items()}
    with pytest.raises(Diverged, match="step 2 has loss nan"):
        learner.update(1, order)
    assert all(
        torch.equal(value.nan_to_num(), learner.held[name].nan_to_num()) for name, value in before.items()
    )


def sends_as_on_a_gpu(self, rows, routing, *given, own=Local.send, **more):
    # A processor's logits are looked at, as that costs no wait.
    return own(self, rows, replace(routing, finite=None), *given, **more)


@pytest.mark.parametrize("name", ["fine_grained", "bigmac", "bigmac_stable", "k3"])
def test_a_micro_batch_reads_nothing_back(name, monkeypatch):
    monkeypatch.setattr(Local, "send", sends_as_on_a_gpu)
    gpt = GPT(GPTConfig(vocab=50, layers=2, heads=2, hidden=64, context=24, moe=preset(name, 64, 8, 4)))
    with FakeTensorMode(allow_non_fake_inputs=True):  # has no values: whoever reads one, raises
        ids = torch.zeros(2, 24, dtype=torch.int64)
        found = MicroBatches(gpt, gpt.parameters(), pieces=2, amp=True).add_up([(ids, ids)] * 2)
    assert found.loads.shape == (2, gpt.config.moe.num_experts)


def test_a_capacity_does_read_something_back(monkeypatch):
    monkeypatch.setattr(Local, "send", sends_as_on_a_gpu)
    experts = preset("bigmac", 64, 8, 4, capacity=1.0)
    gpt = GPT(GPTConfig(vocab=50, layers=2, heads=2, hidden=64, context=24, moe=experts))
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(2, 24, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            MicroBatches(gpt, gpt.parameters(), pieces=1).add_up([(ids, ids)])


def test_who_asks_on_a_processor_is_told_once_why_not_and_gets_the_same(recipe, tmp_path):
    hearing = Hearing()
    train(recipe, tmp_path / "plain")
    train(recipe, tmp_path / "run", capture=True, watcher=hearing)
    assert hearing.reasons == ["the model is on cpu, and CUDA graphs are for GPUs"]
    assert facts(tmp_path / "run") == facts(tmp_path / "plain")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))


def test_a_recording_that_fails_is_told_after_the_first_step_and_the_run_is_the_same(
    corpus, tmp_path, monkeypatch
):
    class Failing(Warmed):
        def record(self, *inputs):
            super().record(*inputs)
            self.problem = "recording failed: a kernel waits"

    recipe, hearing, told = tiny_recipe(corpus, micro_batch=1), Hearing(), []
    hearing.stepped = lambda row: told.append(len(hearing.reasons))
    train(recipe, tmp_path / "plain")
    monkeypatch.setattr(micro_batch, "obstacle", lambda *given, **more: "")
    monkeypatch.setattr(micro_batch, "Replayed", Failing)
    train(recipe, tmp_path / "run", capture=True, watcher=hearing)
    assert hearing.reasons == ["recording failed: a kernel waits"]
    assert told == [1] * recipe.steps
    assert facts(tmp_path / "run") == facts(tmp_path / "plain")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("dtype", "amp", "changes", "reason"),
    [
        (torch.bfloat16, False, {}, ""),
        (torch.float32, True, {}, ""),
        (torch.float32, False, {}, "in torch.float32 PyTorch loops over the experts"),
        (torch.float64, False, {}, "run in a loop that waits"),
        (torch.float32, True, {"capacity": 1.0}, "experts have a capacity"),
    ],
)
def test_what_cannot_be_captured_on_a_gpu_has_a_reason(dtype, amp, changes, reason):
    found = obstacle(on_a_gpu(preset("bigmac", 64, 8, 2, **changes), dtype), amp=amp)
    assert reason in found
    assert bool(found) == bool(reason)


def test_hooks_clocks_shares_and_what_reads_are_reasons_too():
    gpt = on_a_gpu(preset("bigmac", 64, 8, 2), torch.bfloat16)
    gpt.moes[1].clock = StageClock()
    assert "stages are timed (StageClock)" in obstacle(gpt)
    gpt.moes[0].dispatcher = SimpleNamespace(reads=True)
    assert "which reads how many there are" in obstacle(gpt)
    hook = gpt.whole.blocks[1].register_forward_hook(lambda *given: None)
    assert "forward hooks" in obstacle(gpt)
    hook.remove()
    gpt.whole.blocks[1].register_full_backward_hook(lambda *given: None)
    assert "backward hooks" in obstacle(gpt)
    gpt.parameters = lambda: [SimpleNamespace(to_local=None)]
    gpt.modules = list
    assert "spread over ranks" in obstacle(gpt)


def on_ranks(
    rank: int, recipe: Recipe, directory: Path, in_the_way: list[str], failing: list[str]
) -> tuple[list[str], list[str]]:
    """Train captured on two ranks that divide the experts, as on a GPU: what was told, and which dispatchers there were."""

    class OfRank(Warmed):
        def record(self, *inputs):
            assert not any(in_the_way), "recorded on all ranks, or on none"
            super().record(*inputs)
            self.problem = failing[rank]

    hearing, layers, own = Hearing(), set(), Learner.update

    def update(learner, *arguments):
        layers.update(type(moe.dispatcher).__name__ for moe in learner.model.moes)
        return own(learner, *arguments)

    with (
        mock.patch.object(micro_batch, "obstacle", return_value=in_the_way[rank]),
        mock.patch.object(micro_batch, "Replayed", OfRank),
        mock.patch.object(Learner, "update", update),
    ):
        world, options = World.join("cpu", 2), {"dtype": torch.float64, "capture": True, "resume": True}
        train(recipe, directory, world=world, watcher=hearing, **options)
    return hearing.reasons, sorted(layers)


@pytest.mark.parametrize("name", ["bigmac", "bigmac_stable"])
def test_captured_ranks_equal_ranks_that_are_not_to_the_bit_and_one_rank(corpus, tmp_path, name):
    recipe = tiny_recipe(corpus, preset=name, micro_batch=1, clip=0.1)
    train(recipe, tmp_path / "one", dtype=torch.float64)
    plain = run_ranks(on_ranks, 2, recipe, tmp_path / "plain", ["no"] * 2, [""] * 2)
    captured = run_ranks(on_ranks, 2, recipe, tmp_path / "captured", [""] * 2, [""] * 2)
    assert plain == [(["no"], ["StaticGather"]), ([], ["StaticGather"])]
    assert captured == [([], ["StaticGather"])] * 2
    assert facts(tmp_path / "captured") == facts(tmp_path / "plain")
    assert same(weights(tmp_path / "captured"), weights(tmp_path / "plain"))
    assert all(row["bytes_sent"] > 0 for row in facts(tmp_path / "captured"))
    assert_same(tmp_path / "one", tmp_path / "captured")


@pytest.mark.parametrize("way", ["obstacle", "recording"])
def test_what_is_in_one_ranks_way_is_in_the_way_of_all(corpus, tmp_path, way):
    reasons = ["", "a clock is on"]
    given = (reasons, [""] * 2) if way == "obstacle" else ([""] * 2, reasons)
    recipe = tiny_recipe(corpus, micro_batch=1)
    run_ranks(on_ranks, 2, recipe, tmp_path / "plain", ["no"] * 2, [""] * 2)
    (told, _), _ = run_ranks(on_ranks, 2, recipe, tmp_path / "run", *given)
    assert told == ["a clock is on (rank 1)"]
    assert facts(tmp_path / "run") == facts(tmp_path / "plain")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))


# On a GPU, where it is a graph that is replayed.


class Plain(Replayed):
    """The same calls, none of them recorded."""

    def record(self, *inputs):
        pass

    def __call__(self, *inputs):
        return self._function(*inputs)


def learner(corpus, name: str = "bigmac_stable", **changes) -> tuple[Learner, Order]:
    """A model whose experts a GPU does not wait for."""
    torch.use_deterministic_algorithms(False)  # other kernels than users have
    sizes = {"hidden": 128, "num_experts": 8, "context": 64, "batch": 8, "micro_batch": 2}
    recipe = tiny_recipe(corpus, preset=name, **sizes, **changes)
    order = Order(corpus.train_tokens, recipe.context, recipe.seed)
    world = World(device=torch.device("cuda"))
    return Learner(recipe, recipe.model(corpus.vocab), world, amp=True, capture=True), order


def gradients(own: Learner, order: Order, first: int) -> dict[str, torch.Tensor]:
    """Of an update that would begin with a window."""
    places = range(first, first + 8, 2)
    found = own._micro_batches.add_up(
        [tuple(part.cuda() for part in order.batch(place, 2)) for place in places]
    )
    assert found.loads.sum(1).tolist() == [8 * 64 * own.model.config.moe.top_k] * 2
    return {name: value.grad.clone() for name, value in own.model.named_parameters()}


def trained(corpus, name: str) -> tuple[Learner, list, dict[str, torch.Tensor]]:
    """Updates, evaluated in between, and at the end gradients."""
    own, order = learner(corpus, name)
    updates = []
    for step in range(3):
        updates.append(own.update(step, order))
        with torch.no_grad(), own.autocast():
            own.model.eval()(order.batch(0, 2)[0].cuda())
    own.model.train()
    return own, updates, gradients(own, order, 24)


@captures
@pytest.mark.parametrize("name", ["bigmac", "bigmac_stable", "fine_grained", "k3"])
def test_replayed_updates_equal_the_same_unrecorded(corpus, name, monkeypatch):
    own, updates, found = trained(corpus, name)
    assert own._micro_batches.captured, own.uncaptured
    with monkeypatch.context() as changed:
        changed.setattr(micro_batch, "Replayed", Plain)
        other, plain_updates, plain = trained(corpus, name)
    assert not other._micro_batches.captured
    # Attention's backward adds up in any order, and Adam's first steps follow signs.
    for update, expected in zip(updates, plain_updates, strict=True):
        assert update.loss == pytest.approx(expected.loss, rel=5e-3)
        assert update.losses == pytest.approx(expected.losses, rel=2e-2)
    assert updates[0].gradient_norm == pytest.approx(plain_updates[0].gradient_norm, rel=1e-2)
    for place, expected in plain.items():
        assert (found[place] - expected).norm() <= 0.1 * expected.norm(), place


@captures
@pytest.mark.parametrize("name", ["bigmac", "bigmac_stable", "fine_grained", "k3"])
def test_replayed_gradients_equal_those_of_the_same_weights_unrecorded(corpus, name, monkeypatch):
    own, order = learner(corpus, name)
    found = [gradients(own, order, first) for first in (0, 8)]
    assert own._micro_batches.captured, own.uncaptured
    monkeypatch.setattr(micro_batch, "Replayed", Plain)
    other, order = learner(corpus, name)
    for first, replayed in zip((0, 8), found, strict=True):
        for place, expected in gradients(other, order, first).items():
            assert (replayed[place] - expected).norm() <= 1e-2 * expected.norm(), place


@captures
def test_replays_of_a_micro_batch_never_wait_for_the_device(corpus):
    own, order = learner(corpus)
    batches = [tuple(part.cuda() for part in order.batch(first, 2)) for first in range(4)]
    own._micro_batches.add_up(batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        own._micro_batches.add_up(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert own._micro_batches.captured, own.uncaptured


@captures
def test_a_captured_loss_that_is_not_finite_stops_the_run(corpus):
    own, order = learner(corpus)
    own.update(0, order)
    with torch.no_grad():
        own.model.blocks[1].attention.out.weight[0] = math.nan
    with pytest.raises(Diverged, match="step 2 has loss nan"):
        own.update(1, order)


@captures
def test_it_can_be_captured_after_others_have_trained_the_same_model(corpus):
    own, order = learner(corpus, "bigmac")
    inputs, _ = (part.cuda() for part in order.batch(0, 2))
    with own.autocast():
        own.model(
            inputs
        ).float().sum().backward()  # its auxiliary losses hold on to what gradients go through
    own.update(0, order)
    assert own._micro_batches.captured, own.uncaptured
