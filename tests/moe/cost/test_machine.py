"""Claims about machines: nothing is lost in a file, and everything says where it comes from."""

from __future__ import annotations

import pytest

from adamac.advise import Cost, Machine, machine_of


def test_a_machine_survives_a_file(tmp_path):
    machine = machine_of(flops_per_s=1e12).changed(sort=Cost(0.1, source="measured", residuals=(0.1, -0.2)))
    whole = Machine(
        "a name", machine.costs, 4, 2, "torch", {"all_to_all": 0.5}, {"all_to_all": 1.5}, 1.2, 0.08, 0.03
    )
    whole.save(tmp_path / "new" / "machine.json")
    assert Machine.load(tmp_path / "new" / "machine.json") == whole


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"costs": {}, "name": "x"}', '{"costs": {"dense": 3}}'])
def test_a_file_that_is_no_machine_is_refused(tmp_path, text):
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no machine file"):
        Machine.load(path)


def test_what_nobody_gave_is_assumed_and_said_to_be():
    assert set(machine_of().assumed()) == set(machine_of().costs)
    given = machine_of(flops_per_s=1e15, link_bytes_per_s=45e9)
    assert set(given.assumed()) == {"elementwise", "sort", "spread", "gather", "gather_partial"}
    sources = {row[0]: row[4] for row in given.describe()}
    assert sources["dense"] == sources["all_to_all"] == "given"


def test_another_fabric_changes_collectives_alone():
    machine = machine_of()
    linked = machine.linked(45e9, 0.1)
    for kind, cost in linked.costs.items():
        if kind in ("all_to_all", "all_gather", "reduce_scatter"):
            assert (cost.bytes_per_s, cost.overhead_ms, cost.source) == (45e9, 0.1, "given")
        else:
            assert cost == machine.costs[kind]
    assert linked.slowed(3).cost("all_gather").bytes_per_s == pytest.approx(15e9)


def test_a_machine_measured_on_one_rank_says_that_it_knows_no_fabric():
    costs = {
        kind: cost for kind, cost in machine_of().costs.items() if not kind.startswith(("all", "reduce"))
    }
    with pytest.raises(ValueError, match="measured on one rank"):
        Machine("alone", costs).cost("all_to_all")
    with pytest.raises(ValueError, match="lacks sort"):
        Machine("less", {kind: cost for kind, cost in costs.items() if kind != "sort"})
