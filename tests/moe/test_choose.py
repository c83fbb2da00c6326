"""Claims about how a layer's dispatcher is chosen: by what, the same on all ranks, and said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from on_ranks import chosen_dispatchers

from adamac.moe import MoE, preset
from adamac.moe.cost import Machine, fastest_dispatcher, machine_of
from adamac.moe.cost.machine import COLLECTIVES
from adamac.moe.dispatch import DISPATCHERS, SENDERS, cheapest
from adamac.moe.traffic import SENDING
from adamac.testing import run_ranks

LAYER = preset("bigmac", 256, 8, 4, 0.25)
CLASSES = {name: made.__name__ for name, made in DISPATCHERS.items()}


def host_bound(fastest: str) -> Machine:
    """A machine on which a layer takes what its host needs, least with one of the dispatchers."""
    asked = {name: 60.0 - 10 * (name == fastest) for name in SENDING}
    return replace(machine_of(), name=f"likes {fastest}", least_both_ms=asked)


def test_every_dispatcher_that_sends_can_be_priced_and_made():
    assert tuple(DISPATCHERS) == SENDING
    assert [name for name, made in SENDERS.items() if not made.reads] == ["static_gather"]


def test_on_one_rank_nothing_is_sent_whatever_the_machine():
    layer = MoE(LAYER, machine=machine_of())
    assert type(layer.dispatcher).__name__ == "Local"
    assert layer.dispatcher_reason == "all experts are on this rank"
    assert layer.dispatcher_reason in repr(layer)


def test_without_a_machine_it_is_by_bytes_and_says_so():
    for chosen, reason, printed in run_ranks(chosen_dispatchers, 2, LAYER, [None, None], 100):
        assert chosen == CLASSES[cheapest(LAYER, 2, 100)]
        assert reason in printed
        assert all(part in reason for part in ("no machine was given", "MiB forward of 100 tokens", *SENDING))


@pytest.mark.parametrize("fastest", ["all_to_all", "per_rank"])
def test_with_a_machine_it_is_what_the_cost_model_finds_fastest(fastest):
    machine = host_bound(fastest)
    assert fastest_dispatcher(LAYER, 100, 2, machine) == fastest != cheapest(LAYER, 2, 100)
    for chosen, reason, printed in run_ranks(chosen_dispatchers, 2, LAYER, [machine, machine], 100):
        assert chosen == CLASSES[fastest]
        assert reason in printed
        assert f"predicted to be fastest on likes {fastest}" in reason
        assert f"{fastest} 50" in reason
        assert "100 tokens" in reason
        assert "assumed, not measured: dense" in reason


def test_it_depends_on_how_many_tokens_there_will_be():
    # Many launches cost time, many bytes too: few tokens want the former few, many the latter.
    machine = replace(machine_of(link_bytes_per_s=1e9), least_both_ms=host_bound("all_to_all").least_both_ms)
    found = [
        run_ranks(chosen_dispatchers, 2, LAYER, [machine, machine], tokens)[0][0] for tokens in (16, 10**6)
    ]
    assert found == ["AllToAll", "PerRank"]


def test_ranks_whose_machines_differ_agree_on_what_the_first_one_chose():
    machines = [host_bound("per_rank"), host_bound("all_to_all")]
    first, second = run_ranks(chosen_dispatchers, 2, LAYER, machines, 100)
    assert first == second
    assert first[0] == "PerRank"


def test_a_machine_that_was_measured_on_fewer_ranks_says_so():
    machine = machine_of(link_bytes_per_s=1e9)
    measured = {kind: replace(machine.cost(kind), source="measured") for kind in COLLECTIVES}
    machine = replace(machine.changed(**measured), ranks=8)
    for _, reason, _ in run_ranks(chosen_dispatchers, 2, LAYER, [machine, machine], 100):
        assert "measured on 8 ranks and are taken to be the same on 2" in reason


def test_a_machine_that_knows_nothing_of_the_fabric_is_refused_on_every_rank():
    alone = machine_of()
    alone = replace(
        alone, costs={kind: cost for kind, cost in alone.costs.items() if kind not in COLLECTIVES}
    )
    for said in run_ranks(chosen_dispatchers, 2, LAYER, [alone, machine_of()], 100):
        assert said[0] == "refused"
        assert "was measured on one rank" in said[1]
