"""Claims about the folder of a training run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adamac.moe.lm.checkpoint import load_model, load_tokenizer
from adamac.moe.lm.folder import RunFolder, field
from adamac.moe.lm.recipe import Recipe


@pytest.fixture
def begun(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.claim(Recipe(), None)
    for step in (1, 2, 3):
        folder.append({"step": step})
    return folder


def test_a_line_that_a_kill_tore_is_no_row_and_goes_with_the_rows_after_a_step(begun):
    with begun.rows.open("a", encoding="utf-8") as file:
        file.write('{"step": 4')
    assert [row["step"] for row in begun.read_rows()] == [1, 2, 3]
    begun.forget(2)
    assert begun.rows.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'


def test_a_folder_is_the_run_s_that_claimed_it_and_no_other_s(begun, tmp_path):
    assert begun.is_begun(Recipe(), resume=True)
    with pytest.raises(ValueError, match="holds a run already; go on with it by --resume"):
        begun.is_begun(Recipe(), resume=False)
    with pytest.raises(ValueError, match=r"was begun with .*lr.*; resume it with the same"):
        begun.is_begun(Recipe(lr=1.0), resume=True)
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        RunFolder(tmp_path).is_begun(Recipe(), resume=False)
    assert not RunFolder(tmp_path / "new").is_begun(Recipe(), resume=True)


def test_a_row_that_is_no_number_is_not_written(begun):
    with pytest.raises(ValueError, match="not JSON compliant"):
        begun.append({"step": 4, "loss": float("nan")})
    assert len(begun.read_rows()) == 3


def test_what_is_something_else_is_said_to_be_that(tmp_path):
    (tmp_path / "run.json").write_text('{"config": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds a bake-off, not a training run; choose another"):
        RunFolder(tmp_path).is_begun(Recipe(), resume=True)
    with pytest.raises(ValueError, match="holds a bake-off; expected a directory given to adamac moe train"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"expected a directory for the run, got the file .*run\.json"):
        RunFolder(tmp_path / "run.json").is_begun(Recipe(), resume=False)
    for path, found in ((tmp_path / "none", "does not exist"), (tmp_path / "run.json", "is a file")):
        with pytest.raises(ValueError, match=f"{found}: expected a directory given to adamac moe train"):
            load_tokenizer(path)


def test_a_run_that_lost_its_checkpoints_is_to_be_resumed(begun):
    with pytest.raises(ValueError, match=r"holds no checkpoint; train one with .* --resume"):
        load_model(begun.path)


def test_what_is_damaged_is_named(begun):
    file = begun.path / "run.json"
    file.write_text(json.dumps({"recipe": {}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.json is damaged: expected an object with step"):
        field(file, "step")
    with pytest.raises(ValueError, match="holds no rows"):
        RunFolder(begun.path / "none").read_rows()
