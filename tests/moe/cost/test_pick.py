"""Claims about picking a dispatcher by the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adamac.advise import fastest_dispatcher, machine_of, predict
from adamac.moe import preset
from adamac.moe.traffic import bytes_sent

LAYER = preset("bigmac", 2048, 64, 8)


def test_one_rank_needs_no_machine_to_be_local():
    assert fastest_dispatcher(LAYER, 4096, 1, machine_of()) == "local"


def test_it_is_the_one_with_the_least_predicted_time():
    for link in (1e9, 20e9, 400e9):
        machine = machine_of(link_bytes_per_s=link)
        times = {
            name: predict(LAYER, 4096, 8, name, machine, backward=True).time_ms
            for name in ("all_to_all", "per_rank", "all_gather")
        }
        assert fastest_dispatcher(LAYER, 4096, 8, machine) == min(times, key=lambda name: times[name])


def test_where_bytes_are_dear_it_is_the_one_that_sends_least():
    sent = {name: bytes_sent(LAYER, 4096, 8, name) for name in ("all_to_all", "per_rank", "all_gather")}
    assert fastest_dispatcher(LAYER, 4096, 8, machine_of(link_bytes_per_s=1e8)) == min(
        sent, key=lambda n: sent[n]
    )


def test_where_the_host_is_the_limit_it_is_the_one_that_asks_least_of_it():
    asked = {"all_to_all": 50.0, "per_rank": 60.0, "all_gather": 70.0}
    machine = replace(machine_of(), least_ms=asked, least_both_ms=asked)
    assert fastest_dispatcher(LAYER, 16, 8, machine) == "all_to_all"


def test_experts_that_cannot_be_spread_are_refused():
    with pytest.raises(ValueError, match="divisible by the ranks"):
        fastest_dispatcher(LAYER, 4096, 7, machine_of())
