"""How a run sends rows to experts: by what it was told, the same in every layer and rank, and the same when it goes on."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from babble import tiny_recipe
from test_lm_ranks import free_port, started
from test_lm_train import facts, same, weights

from adamac import cli
from adamac.moe.cost import Machine, fastest_dispatcher, machine_of
from adamac.moe.cost.machine import COLLECTIVES
from adamac.moe.dispatch import DISPATCHERS, TOKENS, cheapest
from adamac.moe.lm import learner as learning
from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.sending import Sending, choose_sending
from adamac.moe.lm.train import Silent, train
from adamac.moe.lm.world import Left, World
from adamac.moe.traffic import SENDING
from adamac.testing import run_ranks

CLASSES = {name: made.__name__ for name, made in DISPATCHERS.items()}


def liking(fastest: str, link_bytes_per_s: float = 1e12) -> Machine:
    """A machine on which a small layer takes what its host needs, least with one of the dispatchers."""
    asked = {name: 60.0 - 10 * (name == fastest) for name in SENDING}
    machine = machine_of(link_bytes_per_s=link_bytes_per_s)
    return replace(machine, name=f"likes {fastest}", least_both_ms=asked)


def measured_on(ranks: int) -> Machine:
    machine = machine_of()
    costs = {kind: replace(machine.cost(kind), source="measured") for kind in COLLECTIVES}
    return replace(machine.changed(**costs), name="a node", ranks=ranks)


def alone() -> Machine:
    machine = machine_of()
    costs = {kind: cost for kind, cost in machine.costs.items() if kind not in COLLECTIVES}
    return replace(machine, name="one card", costs=costs)


class Hearing(Silent):
    """A watcher that keeps what it was told of sending."""

    def __init__(self) -> None:
        self.heard: list[Sending | None] = []

    def begins(self, recipe, corpus, parameters, done, sending) -> None:
        self.heard.append(sending)


def trained(
    rank: int,
    expert_ranks: int,
    recipe: Recipe,
    directory: Path,
    machines: list[Machine | None],
    layout: str = "replicated",
) -> tuple[list[tuple[str, str, int]], list[Sending | None]] | str:
    """Of each layer of this rank its dispatcher, the reason and the tokens of a pass, and what was told; or the refusal."""
    layers, hearing, own = [], Hearing(), learning.Learner.update

    def update(learner, *arguments):
        result = own(learner, *arguments)
        layers[:] = [
            (type(moe.dispatcher).__name__, moe.dispatcher_reason, moe.routing.tokens)
            for moe in learner.model.moes
        ]
        return result

    options = {"machine": machines[rank % len(machines)], "layout": layout, "resume": True}
    with mock.patch.object(learning.Learner, "update", update):
        try:
            train(recipe, directory, world=World.join("cpu", expert_ranks), watcher=hearing, **options)
        except (ValueError, Left) as error:
            return str(error)
    return layers, hearing.heard


def kept(directory: Path) -> list[dict]:
    return json.loads((directory / "run.json").read_text())["dispatchers"]


def drop_last_checkpoint(directory: Path) -> None:
    shutil.rmtree(directory / "checkpoints" / "step-00000006")


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_every_layer_is_chosen_by_the_machine_with_the_tokens_that_a_rank_routes_at_once(
    corpus, tmp_path, layout
):
    recipe = tiny_recipe(corpus, micro_batch=1)
    layer, machine = recipe.model(corpus.vocab).moe, liking("per_rank", link_bytes_per_s=1e6)
    chosen = fastest_dispatcher(layer, 16, 2, machine)
    assert chosen not in (fastest_dispatcher(layer, TOKENS, 2, machine), cheapest(layer, 2, 16))
    for layers, _ in run_ranks(trained, 2, 2, recipe, tmp_path / "run", [machine], layout):
        assert [(name, tokens) for name, _, tokens in layers] == [(CLASSES[chosen], 16)] * recipe.layers
        assert all("fastest on likes per_rank: ms" in reason for _, reason, _ in layers)
        assert all("16 tokens a rank" in reason for _, reason, _ in layers)


def test_the_choice_is_the_first_ranks_told_once_and_written_down(corpus, tmp_path):
    recipe = tiny_recipe(corpus)
    machines = [liking("per_rank"), liking("all_gather"), liking("all_gather"), None]
    assert cheapest(recipe.model(corpus.vocab).moe, 2, 16) not in ("per_rank", "all_gather")
    first, *others = run_ranks(trained, 4, 2, recipe, tmp_path / "run", machines)
    layers, (told,) = first
    assert (told.dispatcher, told.ranks, told.tokens) == ("per_rank", 2, 16)
    assert layers == [("PerRank", told.reason, 16)] * recipe.layers
    assert others == [(layers, [])] * 3
    assert kept(tmp_path / "run") == [asdict(told)]


def test_without_a_machine_it_is_by_bytes_and_kept_too(corpus, tmp_path):
    recipe = tiny_recipe(corpus)
    layer = recipe.model(corpus.vocab).moe
    (layers, (told,)), _ = run_ranks(trained, 2, 2, recipe, tmp_path / "run", [None])
    assert told.dispatcher == cheapest(layer, 2, 32)
    assert "no machine was given" in told.reason
    assert "32 tokens a rank" in told.reason
    assert {name for name, _, _ in layers} == {CLASSES[told.dispatcher]}
    assert kept(tmp_path / "run") == [asdict(told)]


def test_where_nothing_is_sent_nothing_is_chosen(corpus, tmp_path):
    assert run_ranks(trained, 2, 1, tiny_recipe(corpus), tmp_path / "run", [None])[0][1] == [None]
    assert kept(tmp_path / "run") == []


@pytest.mark.parametrize("again", [None, "per_rank"])
def test_a_run_goes_on_as_it_began_with_the_machine_or_without(corpus, tmp_path, again):
    recipe = tiny_recipe(corpus, preset="bigmac_stable")
    assert cheapest(recipe.model(corpus.vocab).moe, 2, 32) != "per_rank"
    (_, told), _ = run_ranks(trained, 2, 2, recipe, tmp_path / "whole", [liking("per_rank")])
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    drop_last_checkpoint(tmp_path / "run")
    machine = None if again is None else liking(again)
    (layers, heard), _ = run_ranks(trained, 2, 2, recipe, tmp_path / "run", [machine])
    assert heard == told
    assert {name for name, _, _ in layers} == {"PerRank"}
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert kept(tmp_path / "run") == [asdict(told[0])]


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_machine_that_would_change_the_dispatcher_of_a_run_is_refused(corpus, tmp_path):
    recipe = tiny_recipe(corpus)
    run_ranks(trained, 2, 2, recipe, tmp_path / "run", [liking("per_rank")])
    before = files(tmp_path)
    first, second = run_ranks(trained, 2, 2, recipe, tmp_path / "run", [liking("all_gather")])
    assert first.startswith("the run sends rows to experts by per_rank, and all_gather is predicted to be")
    assert "leave --machine out to go on as before, or begin another run" in first
    assert second == f"rank 0 stopped: {first}"
    assert files(tmp_path) == before


def test_on_other_ranks_it_is_chosen_anew_and_back_on_the_former_it_is_the_former(corpus, tmp_path):
    recipe, run = tiny_recipe(corpus, moe={"balance": "none"}), tmp_path / "run"
    (_, (began,)), _ = run_ranks(trained, 2, 2, recipe, run, [liking("per_rank")])
    drop_last_checkpoint(run)
    (_, (elsewhere,)), *_ = run_ranks(trained, 4, 4, recipe, run, [liking("all_gather")])
    assert (elsewhere.dispatcher, elsewhere.ranks, elsewhere.tokens) == ("all_gather", 4, 16)
    assert "chosen anew, as the run had per_rank on 2 ranks with 32 tokens each" in elsewhere.reason
    assert kept(run) == [asdict(began), asdict(elsewhere)]
    train(recipe, run, resume=True)  # one rank sends nothing, and forgets nothing
    drop_last_checkpoint(run)
    (layers, heard), _ = run_ranks(trained, 2, 2, recipe, run, [None])
    assert heard == [began]
    assert {name for name, _, _ in layers} == {"PerRank"}
    assert kept(run) == [asdict(began), asdict(elsewhere)]


def test_a_run_of_before_there_was_a_choice_to_keep_makes_one(corpus, tmp_path):
    recipe, run = tiny_recipe(corpus), tmp_path / "run"
    train(recipe, run)
    about = json.loads((run / "run.json").read_text())
    del about["dispatchers"]
    (run / "run.json").write_text(json.dumps(about))
    drop_last_checkpoint(run)
    (_, (told,)), _ = run_ranks(trained, 2, 2, recipe, run, [liking("all_gather")])
    assert told.dispatcher == "all_gather"
    assert json.loads((run / "run.json").read_text()) == about | {"dispatchers": [asdict(told)]}


@pytest.mark.parametrize(
    ("machine", "ranks", "problem"),
    [
        (liking("all_gather"), 1, "--machine is for experts that are divided among ranks"),
        (alone(), 2, "one card was measured on one rank, and 2 divide the experts here"),
        (measured_on(8), 4, "a node was measured on 8 ranks, and 4 divide the experts here"),
        (measured_on(8), 4, "torchrun --nproc-per-node 4 -m adamac.cli advise moe --measure --out FILE"),
        ("node.json", 2, "machine must be a Machine, as Machine.load reads it from a file; got 'node.json'"),
    ],
)
def test_a_machine_that_has_nothing_to_say_here_is_refused(recipe, machine, ranks, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        choose_sending(recipe, ranks, 16, machine)
    assert "\n" not in str(caught.value)


def test_who_captures_takes_the_dispatcher_that_reads_nothing_unless_a_run_has_another(recipe):
    chosen = choose_sending(recipe, 2, 16, capture=True)
    assert chosen.dispatcher == "static_gather"
    assert "asked for by --capture" in chosen.reason
    assert Sending.from_dict(asdict(chosen)) == chosen
    former = choose_sending(recipe, 2, 16)
    assert choose_sending(recipe, 2, 16, kept=[former], capture=True) == former
    assert choose_sending(recipe, 2, 16, kept=[chosen]) == chosen
    elsewhere = choose_sending(recipe, 4, 16, kept=[former], capture=True)
    assert elsewhere.dispatcher == "static_gather"
    assert "chosen anew, as the run had" in elsewhere.reason
    assert choose_sending(recipe, 1, 16, capture=True) is None
    with pytest.raises(ValueError, match=r"--capture takes static_gather, .* leave one of them out"):
        choose_sending(recipe, 2, 16, machine_of(), capture=True)


@pytest.mark.parametrize("machine", [measured_on(2), machine_of()])
def test_one_that_was_measured_on_as_many_or_given_for_any_is_taken(recipe, machine):
    assert choose_sending(recipe, 2, 16, machine).ranks == 2


@pytest.mark.parametrize(
    "content", ["3", "[3]", '[{"dispatcher": "mail", "ranks": 2, "tokens": 3, "reason": ""}]', "[{}]"]
)
def test_a_damaged_choice_is_refused(recipe, tmp_path, content):
    train(recipe, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dispatchers": json.loads(content)}))
    with pytest.raises(ValueError, match=r"run\.json is damaged: "):
        train(recipe, tmp_path / "run", resume=True)


def said_by_the_program(rank: int, arguments: list[str]) -> tuple[int, str]:
    with redirect_stdout(io.StringIO()) as written, mock.patch.object(World, "leave"):
        code = cli.main(["moe", "train", "--device", "cpu", *arguments])
    torch.set_num_threads(1)
    return code, written.getvalue()


def test_the_program_reads_the_file_and_says_the_choice_once(corpus, tmp_path):
    liking("per_rank").save(tmp_path / "node.json")
    arguments = ["--data", str(corpus.folder), "--hidden", "16", "--context", "16", "--steps", "2"]
    arguments += [
        "--machine",
        str(tmp_path / "node.json"),
        "--out",
        str(tmp_path / "run"),
        "--expert-ranks",
        "2",
    ]
    (code, said), other = run_ranks(said_by_the_program, 2, arguments)
    assert code == 0
    assert (
        said.count("rows are sent to experts on 2 ranks by per_rank: predicted to be fastest on likes") == 1
    )
    assert other == (0, "")
    assert [each["dispatcher"] for each in kept(tmp_path / "run")] == ["per_rank"]


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("nowhere.json", "cannot read nowhere.json: no such file or directory; expected what adamac advise"),
        (
            "few.json",
            "few.json is no machine file: it has no costs; expected what adamac advise moe --measure",
        ),
        ("eight.json", "a node was measured on 8 ranks, and 2 divide the experts here; measure on so many"),
    ],
)
def test_a_machine_that_does_not_fit_is_a_line_on_each_rank_and_nothing_is_written(
    corpus, tmp_path, file, problem
):
    (tmp_path / "few.json").write_text("{}")
    measured_on(8).save(tmp_path / "eight.json")
    port, before = free_port(), files(tmp_path)
    arguments = ("--data", str(corpus.folder), "--expert-ranks", "2", "--machine", file)
    ranks = [started(rank, port, tmp_path, *arguments) for rank in range(2)]
    said = [process.communicate(timeout=60)[1].strip().splitlines() for process in ranks]
    assert [len(lines) for lines in said] == [1, 1], said
    assert said[0][0].startswith(f"adamac: {problem}")
    assert said[1][0].startswith(f"adamac: rank 1: rank 0 stopped: {problem}")
    assert all(process.returncode for process in ranks)
    assert files(tmp_path) == before
