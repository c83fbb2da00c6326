"""Claims about pipelines that the user makes ready."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from adamac import cli
from adamac.bakeoff.config import Config, RunDirectory
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.generate import generate
from adamac.bakeoff.pipelines import load_pipeline
from adamac.bakeoff.prompts import Prompt
from adamac.bakeoff.run import run_bakeoff
from adamac.bakeoff.setup import Setup

SCHEDULER = r"""
from diffusers import UniPCMultistepScheduler

def other_scheduler(pipe):
    assert pipe.device.type == "cpu"
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe.to("cpu")

def fails(pipe):
    raise RuntimeError("no such adapter\nin the second line")

def returns_a_number(pipe):
    return 3

not_a_function = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SCHEDULER)
    return path


def config(model: Path, setup: Setup | None) -> Config:
    prompts = (Prompt("p0", "category", "a fox"),)
    size = {"steps": 2, "height": 64, "width": 64, "frames": 5}
    return Config(str(model), prompts, ("dense", "adacluster"), setup=setup, **size)


def test_arms_run_on_the_pipeline_that_was_made_ready_and_another_setup_is_another_run(
    tiny_model, file, tmp_path, progress, monkeypatch
):
    used = []

    def watched(pipe, *rest):
        used.append(type(pipe.scheduler).__name__)
        return generate(pipe, *rest)

    monkeypatch.setattr("adamac.bakeoff.studio.generate", watched)
    directory = RunDirectory(tmp_path / "run")
    rows = run_bakeoff(config(tiny_model, Setup.parse(f"{file}:other_scheduler")), directory, progress)
    assert all(row.ok for row in rows)
    assert set(used) == {"UniPCMultistepScheduler"}
    file.write_text(SCHEDULER + "# changed\n")
    for changed in (Setup.parse(f"{file}:other_scheduler"), None):
        with pytest.raises(BadInput, match="setup"):
            run_bakeoff(config(tiny_model, changed), directory, progress, resume=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine.py", "setup must be FILE.py:FUNCTION, got 'mine.py'"),
        ("mine.py:", "setup must be FILE.py:FUNCTION, got 'mine.py:'"),
        ("nowhere.py:ready", "nowhere.py cannot be read \\(No such file or directory\\)"),
    ],
)
def test_what_names_no_function_is_refused(text, message):
    with pytest.raises(BadInput, match=message):
        Setup.parse(text)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("absent", "has no function absent"),
        ("not_a_function", "has no function not_a_function"),
        ("fails", "fails raised RuntimeError: no such adapter$"),
        ("returns_a_number", "returns_a_number returned int; expected a pipeline, or nothing"),
    ],
)
def test_a_function_that_is_not_there_or_fails_is_one_line(file, function, message):
    with pytest.raises(BadInput, match=message):
        Setup.parse(f"{file}:{function}").make_ready(object)


def test_a_function_that_is_not_there_is_refused_before_the_model_is_loaded(
    tiny_model, file, directory, progress, monkeypatch
):
    monkeypatch.setattr("adamac.bakeoff.studio.load_pipeline", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(BadInput, match="has no function absent"):
        run_bakeoff(config(tiny_model, Setup.parse(f"{file}:absent")), directory, progress)


def test_a_file_that_is_no_python_is_one_line(file):
    file.write_text("def (")
    with pytest.raises(BadInput, match=r"mine\.py raised SyntaxError"):
        Setup.parse(f"{file}:ready").make_ready(object)


def test_the_command_takes_it_and_writes_nothing_when_it_fails(tiny_model, file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["bakeoff", "--model", str(tiny_model), "--setup", f"{file}:fails", "--out", str(out)]
    assert cli.main(arguments) == 2
    assert "no such adapter" in capsys.readouterr().err
    assert not (out / "rows.jsonl").exists()


def test_a_model_that_does_not_fit_is_one_line_that_says_how_it_may(tiny_model, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 GiB\nSee documentation")

    monkeypatch.setattr(WanPipeline, "to", full)
    with pytest.raises(
        BadInput, match=r"does not fit into the memory of cpu \(.*1 GiB\); offload .* --setup"
    ) as error:
        load_pipeline(str(tiny_model), "cpu")
    assert "\n" not in str(error.value)
