"""Layouts are compared before they are timed."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import moe_layouts


def test_a_rehearsal_writes_a_row_for_each_layout(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
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
    monkeypatch.setattr(sys, "argv", ["moe_layouts", *options])
    moe_layouts.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["layout"] for row in rows] == ["replicated", "sharded"]
    assert all(row["pieces"] == 2 and row["p50_ms"] > 0 and row["torch"] for row in rows)
    assert "layout sharded" in capsys.readouterr().out


def test_layouts_that_learn_differently_are_not_timed():
    rounds = [
        {"layout": layout, "losses": [2.0, loss], "gradient_norms": [1.0], "times_ms": [1.0]}
        for layout, loss in (("replicated", 1.9), ("sharded", 1.8))
    ]
    with pytest.raises(ValueError, match="losses of the layouts differ"):
        moe_layouts._merged(rounds, "cpu")
