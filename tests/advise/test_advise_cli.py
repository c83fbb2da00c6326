"""Claims about ``adamac advise moe``: a table, a verdict, and one line for what is wrong."""

from __future__ import annotations

import pytest
from small import SIZES

from adamac import cli
from adamac.advise import Machine, machine_of
from adamac.advise import check as checking
from adamac.advise import measure as measuring


def said(capsys, *arguments: str) -> str:
    assert cli.main(["advise", "moe", *arguments]) == 0
    return capsys.readouterr().out


def test_given_and_assumed_constants_are_told_apart(capsys):
    out = said(
        capsys, "--hidden", "2048", "--latent", "512", "--ranks", "8", "--bandwidth", "45", "--flops", "650"
    )
    assert "BigMac pays here: CDAC (per_rank)" in out
    for word in (
        "gate",
        "descend",
        "permute",
        "send",
        "experts",
        "collect",
        "ascend",
        "rho",
        "copy per expert",
    ):
        assert word in out
    assert "assumed, not measured: elementwise, sort, spread, gather, gather_partial;" in out
    assert "Replayed from a CUDA graph (static_gather), where nobody waits for the host" in out


def test_nodes_make_it_a_projection(capsys):
    out = said(capsys, "--ranks", "32", "--nodes", "4", "--node-bandwidth", "45", "--backward")
    assert "Projection: BigMac pays here" in out
    assert "projection: forward and backward" in out


def test_one_rank_sends_nothing(capsys):
    out = said(capsys, "--ranks", "1", "--preset", "latent_eff", "--gated", "--shared-ffn", "1024")
    assert "latent_eff" in out
    assert "(local)" in out
    assert "all_to_all" not in out


def test_measuring_writes_a_machine_that_can_be_asked_later(capsys, tmp_path, monkeypatch):
    for module in (measuring, checking):
        monkeypatch.setattr(module, "CPU", SIZES)
    path = tmp_path / "machine.json"
    shape = ("--hidden", "64", "--latent", "16", "--experts", "8", "--top-k", "2", "--tokens", "64")
    out = said(capsys, *shape, "--measure", "--device", "cpu", "--out", str(path))
    assert "the model against the layer itself" in out
    assert "off in the median: times" in out
    machine = Machine.load(path)
    assert machine.layer_error is not None
    # A layer this small may be all host: then nothing is known of its own work, and nothing said.
    assert (f"{machine.whole:.2f} times the sum of its parts" in out) == (machine.whole != 1)
    assert "all_to_all" not in machine.costs  # one rank has no fabric to measure
    out = said(capsys, *shape, "--machine", str(path))
    assert "ranks: 1, as the file has it" in out
    assert "(local)" in out
    assert "assumed" not in out
    assert cli.main(["advise", "moe", *shape, "--machine", str(path), "--bandwidth", "1"]) == 2
    assert "--bandwidth needs --ranks: " in capsys.readouterr().err
    nodes = ["--nodes", "2", "--node-bandwidth", "25"]
    assert cli.main(["advise", "moe", *shape, "--machine", str(path), *nodes]) == 2
    assert "--nodes needs --ranks: " in capsys.readouterr().err
    out = said(capsys, *shape, "--machine", str(path), "--ranks", "4")
    assert "assumed, not measured: all_to_all, all_gather, reduce_scatter" in out
    out = said(capsys, *shape, "--machine", str(path), "--ranks", "4", "--bandwidth", "1")
    assert "assumed" not in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--bandwidth", "0"], "--bandwidth must be a number above 0, got 0"),
        (["--memory-bandwidth", "nan"], "--memory-bandwidth must be a number above 0, got nan"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--ranks", "5"], "num_experts must be divisible"),
        (["--top-k", "65"], "top_k is 65 but there are only 64 experts"),
        (["--latent", "4096"], "--latent must be at most hidden (2048), got 4096"),
        (["--latent", "500", "--ffn", "333"], "ffn x hidden / latent must be a whole number"),
        (["--nodes", "2"], "--nodes needs --node-bandwidth"),
        (["--node-bandwidth", "45"], "--node-bandwidth needs --nodes"),
        (["--nodes", "3", "--node-bandwidth", "45"], "equally many of the 8 ranks"),
        (["--machine", "nowhere.json"], "nowhere.json"),
        (["--machine", "pyproject.toml"], "is no machine file"),
        (["--machine", "x.json", "--measure"], "exclude each other"),
        (["--machine", "x.json", "--flops", "3"], "--flops is known from the machine"),
        (["--out", "x.json"], "add --measure"),
        (["--measure", "--ranks", "8", "--nodes", "3", "--node-bandwidth", "45"], "equally many of the 8"),
        (["--measure", "--ranks", "5"], "num_experts must be divisible"),
        (["--measure", "--device", "abacus"], "no device 'abacus'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path, arguments, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    assert cli.main(["advise", "moe", *arguments]) == 2
    told = capsys.readouterr()
    assert problem in told.err
    assert len(told.err.strip().splitlines()) == 1


def test_a_measured_machine_says_where_its_collectives_hold(capsys, tmp_path):
    costs = {
        kind: type(cost)(cost.overhead_ms, cost.flops_per_s, cost.bytes_per_s, "measured", (0.01,))
        for kind, cost in machine_of().costs.items()
    }
    Machine("two cards", costs, ranks=2).save(tmp_path / "machine.json")
    out = said(capsys, "--machine", str(tmp_path / "machine.json"), "--ranks", "4")
    assert "collectives were measured on 2 ranks and are taken to be the same on 4" in out
    assert "with an error of about 1%" in out
    own = said(capsys, "--machine", str(tmp_path / "machine.json"))
    assert "ranks: 2, as the file has it" in own
    assert own.partition("\n")[2] == said(capsys, "--machine", str(tmp_path / "machine.json"), "--ranks", "2")
