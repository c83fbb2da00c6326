"""A bake-off whose videos are spread over several ranks: what one rank makes, or a line that says what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from led import PROMPTS, bake, config_of, refused
from play import Silence, save_tiny_wan
from play import config_of as play_config

from adamac import cli
from adamac.bakeoff.config import RunDirectory
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.ranks import RankGoneError, Ranks, _own_card
from adamac.bakeoff.report import draw
from adamac.bakeoff.rows import read_rows
from adamac.bakeoff.run import run_bakeoff
from adamac.bakeoff.setup import Setup
from adamac.bakeoff.studio import _check_card, _ready
from adamac.cli import commands
from adamac.testing import run_ranks


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-wan-of-two-heads")
    save_tiny_wan(folder, heads=2)
    return folder


@pytest.fixture(scope="module")
def spread(two_heads, tmp_path_factory) -> RunDirectory:
    """A run on two ranks."""
    directory = RunDirectory(tmp_path_factory.mktemp("spread") / "run")
    rows, nothing = run_ranks(bake, 2, two_heads, directory.path)
    assert nothing == []
    assert rows == read_rows(directory.rows)
    return directory


def test_videos_on_two_ranks_are_those_of_one(spread, two_heads, directory, progress):
    alone = {row.key: row for row in run_bakeoff(config_of(two_heads, 1), directory, progress)}
    together = {row.key: row for row in read_rows(spread.rows)}
    assert together.keys() == alone.keys()
    for key, row in together.items():
        assert row.ok, row.reason
        assert (row.density, row.sparse_calls, row.dense_calls) == (
            alone[key].density,
            alone[key].sparse_calls,
            alone[key].dense_calls,
        )
        if row.psnr_db is not None:
            assert row.psnr_db == pytest.approx(alone[key].psnr_db, abs=0.1)


def test_the_first_rank_alone_writes_and_says_how_many_there_are(spread):
    assert [row.prompt_id for row in read_rows(spread.rows)] == ["p0", "p0", "p0", "p1", "p1"]
    run = spread.read_run()
    assert run["config"]["ranks"] == 2
    assert run["machine"]["device"].startswith("2 x ")
    draw(spread)
    assert "2 x " in spread.report.read_text(encoding="utf-8")


def test_a_run_on_another_number_of_ranks_is_another_run(spread, two_heads):
    with pytest.raises(BadInput, match="ranks: 2 there, 1 here"):
        run_bakeoff(config_of(two_heads, 1), spread, Silence(), resume=True)


def test_what_fails_on_another_rank_is_an_error_row_and_the_others_go_on(two_heads, tmp_path):
    rows, _ = run_ranks(bake, 2, two_heads, tmp_path / "run", ("adacluster", PROMPTS[1].id))
    found = {(row.arm, row.prompt_id): row for row in rows}
    broken = found.pop(("adacluster", "p1"))
    assert (broken.status, broken.reason) == (
        "error",
        "RuntimeError: rank 1: BrokenVideo: frames are not what they should be",
    )
    assert all(row.ok for row in found.values())


def test_what_is_refused_or_fails_to_load_lets_the_other_ranks_go(tiny_model, two_heads, tmp_path):
    out = tmp_path / "run"
    (heads, memory), followed = run_ranks(refused, 2, tiny_model, two_heads, out)
    assert heads.startswith("torchrun: ")
    assert "heads" in heads
    assert memory == "rank 1: RuntimeError: no room"
    assert followed == [[], []]
    assert not out.exists()


def test_every_rank_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _own_card(torch.device("cuda")) == 1
    with pytest.raises(
        BadInput, match="every rank takes a GPU of its own, got cuda:0 for all; give auto or cuda"
    ):
        _own_card(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in "01":  # all of them, not only those without
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(BadInput, match="2 ranks on a machine of 1 GPUs; start one for each GPU"):
            _own_card(torch.device("cuda"))


def test_a_pipeline_on_another_ranks_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for place in ("cpu", "cuda", "cuda:1"):
        _check_card(SimpleNamespace(_execution_device=torch.device(place)))
    with pytest.raises(BadInput, match="setup: the pipeline was put on cuda:0, expected cuda:1 on this rank"):
        _check_card(SimpleNamespace(_execution_device=torch.device("cuda:0")))


def test_offloading_that_names_no_gpu_takes_the_ranks_own(play, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    setup = tmp_path / "mine.py"
    setup.write_text("def ready(pipe):\n    assert pipe._offload_gpu_id == 1\n")
    config = config_of(tmp_path, 2)
    assert _ready(replace(config, device="cuda", setup=Setup.parse(f"{setup}:ready"))) is play


def test_the_environment_of_another_program_is_no_torchrun(monkeypatch, capsys, tmp_path):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    asked = ["bakeoff", "--prompts", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("RANK", "1")
    assert cli.main(asked) == 2  # and not in silence, as another rank than the first
    assert "absent" in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(asked) == 2
    assert "WORLD_SIZE is 2, but RANK is not set" in capsys.readouterr().err


def test_among_ranks_the_program_ends_at_once_with_what_nobody_foresaw(monkeypatch, capsys):
    def broken() -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(commands, "main", broken)
    monkeypatch.setattr(commands, "_among_ranks", lambda: True)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        commands.entry()
    assert ended.value.code == 1
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_of_several_ranks_the_first_speaks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert Ranks.speaks() is speaks


def test_a_rank_that_is_gone_ends_the_run_and_is_no_error_row(play, directory, progress):
    said = []

    class LeftBehind(Ranks):
        def say(self, word=None):
            said.append(word)
            return word

        def all(self, mine):
            if len(progress.rows) == 2:
                raise RankGoneError("another rank ended")
            return super().all(mine)

    with pytest.raises(RankGoneError):
        run_bakeoff(play_config("a ball", "a fox"), directory, progress, ranks=LeftBehind())
    assert [row.status for row in read_rows(directory.rows)] == ["ok", "ok"]
    assert said[-1] is not None  # nobody listens any more


def test_a_rank_by_itself_hears_itself():
    ranks = Ranks()
    assert (ranks.lead, ranks.say("word"), ranks.all(3)) == (True, "word", [3])
    with pytest.raises(BadInput, match=r"^mine$"), ranks.agreed():
        raise BadInput("mine")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_the_command_under_torchrun_says_once_what_is_wrong(two_heads, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "adamac.cli",
    ]
    given = ["bakeoff", "--model", str(two_heads), "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, *given], capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode != 0
    (line,) = re.findall(r"^adamac: .*$", ended.stderr, re.MULTILINE)
    assert "torchrun: context parallelism needs GPUs" in line
    assert not (tmp_path / "out").exists()
