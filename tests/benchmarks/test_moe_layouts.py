"""Layouts are compared before they are timed."""

from __future__ import annotations

import json
import sys

import pytest

from adamac.testing import run_ranks
from benchmarks import moe_layouts


def rehearse(rank, out):
    """One rank of the command as torchrun would start it."""
    options = [
        "--tiny",
        "--device",
        "cpu",
        "--steps",
        "1",
        "--rounds",
        "1",
        "--pieces",
        "2",
        "--out",
        str(out),
    ]
    sys.argv = ["moe_layouts", *options]
    moe_layouts.World.leave = lambda world: None  # the group is the test's
    moe_layouts.main()


def test_a_rehearsal_writes_a_row_for_each_layout(tmp_path):
    out = tmp_path / "rows.jsonl"
    run_ranks(rehearse, 2, out)
    replicated, sharded = (json.loads(line) for line in out.read_text().splitlines())
    assert [row["layout"] for row in (replicated, sharded)] == ["replicated", "sharded"]
    assert sharded["parameters"] == replicated["parameters"]
    assert sharded["parameters_held"] < 0.6 * replicated["parameters_held"]
    assert all(row["pieces"] == 2 and row["p50_ms"] > 0 and row["torch"] for row in (replicated, sharded))


def test_one_rank_has_nothing_to_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["moe_layouts", "--tiny", "--device", "cpu", "--out", str(tmp_path / "x")]
    )
    with pytest.raises(SystemExit) as refusal:
        moe_layouts.main()
    assert refusal.value.code == 2
    assert "run it under torchrun with two ranks or more" in capsys.readouterr().err


def test_layouts_that_learn_differently_are_not_timed():
    rounds = [
        {"layout": layout, "losses": [2.0, loss], "gradient_norms": [1.0], "times_ms": [1.0]}
        for layout, loss in (("replicated", 1.9), ("sharded", 1.8))
    ]
    with pytest.raises(ValueError, match="losses of the layouts differ"):
        moe_layouts._merged(rounds, "cpu")
