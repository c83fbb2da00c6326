"""Claims about ``adamac moe bench``: checked, timed in turns, one line for what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from adamac import cli
from adamac.advise import race as racing
from adamac.advise.bench import CPU, Bench, Case
from adamac.cli.moe_bench import MoeBench, _table
from adamac.moe import preset
from adamac.testing import run_ranks

TINY = (
    "--hidden",
    "32",
    "--experts",
    "8",
    "--top-k",
    "2",
    "--tokens",
    "40",
    "--rounds",
    "2",
    "--device",
    "cpu",
)


def test_layers_are_timed_and_their_rows_written(capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert cli.main(["moe", "bench", *TINY, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "fine_grained/local" in printed
    assert "1.00x" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["preset"], row["backward"], row["n"]) for row in rows] == [
        (name, both, 2) for name in ("fine_grained", "bigmac") for both in (False, True)
    ]
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in rows)


def test_a_narrow_terminal_cuts_no_figure():
    cases = [
        Case("bigmac_stable", preset("bigmac", 32, 8, 2), 40, "all_to_all", both) for both in (False, True)
    ]
    timed = [racing.Timed(case, (1234.5671, 1234.5672, 1234.5673), 98765 * 2**20) for case in cases]
    console = Console(width=80, record=True)
    console.print(_table(MoeBench(preset=("bigmac_stable",)), 2, timed))
    printed = console.export_text()
    assert "…" not in printed
    assert printed.count("1234.567") == 6
    assert printed.count("98765.00") == 2


def raced(rank: int) -> list[tuple[str, int, float, str | None]]:
    bench = Bench(torch.device("cpu"), torch.float32, torch.distributed.group.WORLD, CPU)
    config = preset("bigmac", 32, 8, 2)
    cases = [Case("bigmac", config, 40, name, True) for name in bench.senders()]
    return [
        (t.case.dispatcher, len(t.samples_ms), t.bytes_sent, t.problem) for t in racing.race(cases, bench, 2)
    ]


def test_on_several_ranks_every_dispatcher_takes_its_turn_and_all_ranks_agree():
    first, second = run_ranks(raced, 2)
    assert first == second
    assert [(name, number, problem) for name, number, _, problem in first] == [
        (name, 2, None) for name in ("all_gather", "all_to_all", "per_rank", "static_gather")
    ]
    assert all(sent > 0 for _, _, sent, _ in first)


def test_a_layer_that_errs_is_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(racing, "over_budget", lambda *outputs: "largest error 1 is over the budget of 0")
    assert cli.main(["moe", "bench", *TINY]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "bigmac/local is wrong and was not timed: largest error 1 is over the budget of 0" in printed
    assert "x │" not in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--rounds", "1"), "rounds must be at least 2, got 1"),
        (("--tokens", "0"), "tokens must be at least 1, got 0"),
        (("--dtype", "int8"), "dtype must be auto, bfloat16, float16, float32, got 'int8'"),
        (("--dispatcher", "per_rank"), "dispatcher: expected local on one rank, got 'per_rank'"),
        (("--dispatcher", "mail"), "expected local on one rank, got 'mail', which does not exist"),
        (("--preset", "biggermac"), "biggermac"),
        (("--top-k", "9"), "top_k"),
        (("--ratio", "1.5"), "ratio must lie in (0, 1]; got 1.5"),
        (
            ("--out", "."),
            "out: rows cannot be appended to . (it is a directory); expected a file, choose another path",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, arguments, line):
    assert cli.main(["moe", "bench", *TINY, *arguments]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
