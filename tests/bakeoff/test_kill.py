"""A run that is killed keeps what it finished, and is completed exactly once; over the command line, on a real pipeline."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from adamac import cli
from adamac.bakeoff.rows import read_rows

ARMS = ["dense", "dense-math"]
WANTED = len(ARMS) * 3


def arguments(model, folder) -> list[str]:
    prompts = folder / "prompts.txt"
    prompts.write_text("a red ball\na ball moves\nred ball\n")
    size = ["--height", "64", "--width", "64", "--frames", "7", "--steps", "2"]
    # On a GPU there would be a third dense arm, whose kernel rounds differently, and more rows.
    out = ["--device", "cpu", "--out", str(folder / "run")]
    return ["bakeoff", "--model", str(model), "--prompts", str(prompts), "--arms", *ARMS, *size, *out]


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "adamac.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # Tests that a shell runs in the background have SIGINT ignored, and so would their children.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_rows(path, count: int):
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, "the run never got that far"
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_keeps_its_rows_and_is_completed_exactly_once(
    tiny_model, tmp_path, how, capsys
):
    command = arguments(tiny_model, tmp_path)
    rows_file = tmp_path / "run" / "rows.jsonl"
    process = start(command)
    wait_for_rows(rows_file, 2)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    kept = read_rows(rows_file)
    assert 2 <= len(kept) < WANTED
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "--resume" in output.splitlines()[-1]

    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert "not complete" in (tmp_path / "run" / "report" / "index.html").read_text()

    assert cli.main([*command, "--resume"]) == 0
    rows = read_rows(rows_file)
    assert len({row.key for row in rows}) == len(rows) == WANTED
    assert [row.latency_s for row in rows[: len(kept)]] == [row.latency_s for row in kept]
    assert all(row.psnr_db is not None for row in rows if row.arm == "dense-math")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["arms"]["dense"]["videos"] == 3
