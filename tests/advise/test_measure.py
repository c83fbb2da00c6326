"""Claims about measuring: it ends with a machine that predicts, the same one on all ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import SIZES, measured_and_checked

from adamac.advise.bench import Bench
from adamac.advise.check import Check, check, checked
from adamac.advise.measure import measure
from adamac.moe.cost.constants import KINDS
from adamac.moe.cost.machine import COLLECTIVES, machine_of
from adamac.testing import run_ranks


def test_one_rank_measures_all_but_collectives():
    heard = []
    machine = measure("cpu", sizes=SIZES, told=heard.append)
    assert set(machine.costs) == set(KINDS) - set(COLLECTIVES)
    assert {cost.source for cost in machine.costs.values()} == {"measured"}
    assert all(cost.residuals for cost in machine.costs.values())
    assert (machine.ranks, machine.itemsize, machine.rows) == (None, 4, "torch")
    assert set(machine.least_ms) == set(machine.least_both_ms) == {"local"}
    assert heard[:2] == ["dense", "grouped"]
    checks = check(machine, sizes=SIZES)
    assert {each.predicted.dispatcher for each in checks} == {"local"}
    assert all(each.measured_ms > 0 and each.predicted.time_ms > 0 for each in checks)
    assert {"gate", "permute", "experts", "collect"} <= set(checks[0].stages_ms)
    errors = [abs(each.error) for each in checks]
    found = checked(machine, checks)
    assert min(errors) <= found.layer_error <= max(errors)
    assert found.ratio_error is not None


def test_an_error_that_both_sides_share_is_none_of_the_ratio():
    machine = machine_of()
    bench = Bench(torch.device("cpu"), torch.float32, None, SIZES)
    said = [(case, bench.predicted(case, machine)) for case in bench.cases(*SIZES.layer)]
    checks = [Check(case, each, 2 * each.time_ms, {}) for case, each in said]
    found = checked(machine, checks)
    assert found.layer_error == pytest.approx(0.5)
    assert found.ratio_error == pytest.approx(0, abs=1e-12)


def test_several_ranks_come_to_the_same_machine():
    (one, checks), (other, _) = run_ranks(measured_and_checked, 2)
    assert one == other
    assert set(one.costs) == set(KINDS)
    assert one.ranks == 2
    assert set(one.least_ms) == {"all_to_all", "per_rank", "all_gather"}
    assert {each.predicted.dispatcher for each in checks} == set(one.least_ms)


@pytest.mark.parametrize(("slower", "expected"), [(0.5, 1.0), (30.0, 3.0)])
def test_a_layer_that_waits_for_its_host_says_nothing_of_its_own_work(monkeypatch, slower, expected):
    """Its time divided by that of its parts had been taken for the parts' slowness, and spoilt every prediction."""
    bench = Bench(torch.device("cpu"), torch.float32, None, SIZES)
    machine = machine_of(itemsize=4)
    own = [sum(bench.predicted(case, machine).stages_ms.values()) for case in bench.cases(*SIZES.layer)]
    times = [3 * ms for ms in own]
    least = {"local": max(times) / slower}
    machine = replace(machine, least_ms=least, least_both_ms=least)
    monkeypatch.setattr(bench, "layer_times_ms", lambda cases: times)
    assert bench.whole(machine) == pytest.approx(expected)
