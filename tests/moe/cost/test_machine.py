"""Claims about machines: nothing is lost in a file, and everything says where it comes from."""

from __future__ import annotations

import json

import pytest

from adamac.advise import Cost, Machine, machine_of


def test_a_machine_survives_a_file(tmp_path):
    machine = machine_of(flops_per_s=1e12).changed(sort=Cost(0.1, source="measured", residuals=(0.1, -0.2)))
    whole = Machine(
        "a name", machine.costs, 4, 2, "torch", {"all_to_all": 0.5}, {"all_to_all": 1.5}, 1.2, 0.08, 0.03
    )
    whole.save(tmp_path / "new" / "machine.json")
    assert Machine.load(tmp_path / "new" / "machine.json") == whole


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is no JSON"),
        ("\udcff", "it is no JSON"),
        ("[]", "it has no costs"),
        ("{}", "it has no costs"),
        ('{"costs": {}, "name": "x"}', "this one lacks dense"),
        ('{"costs": {}}', "it has no name"),
        ('{"costs": {"dense": 3}}', "an entry is unknown or of another kind"),
        ('{"costs": {}, "name": "x", "size": 2}', "an entry is unknown or of another kind"),
    ],
)
def test_a_file_that_is_no_machine_is_refused(tmp_path, text, problem):
    path = tmp_path / "machine.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"is no machine file: .*{problem}.*; expected what adamac advise"):
        Machine.load(path)


@pytest.mark.parametrize(
    "wrong",
    [{"itemsize": "two"}, {"itemsize": None}, {"ranks": 0}, {"whole": -1}, {"least_ms": {"local": "x"}}],
)
def test_a_file_whose_numbers_are_none_is_refused(tmp_path, wrong):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(machine_of().to_json() | wrong))
    with pytest.raises(ValueError, match="is no machine file"):
        Machine.load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"cannot read .*nowhere\.json: no such file.*; expected what"
    ):
        Machine.load(tmp_path / "nowhere.json")


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
