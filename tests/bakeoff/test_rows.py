import json

import pytest

from adamac.bakeoff.rows import Row, append_row, read_rows, write_rows


def row(arm: str = "dense", **changes) -> Row:
    return Row(arm=arm, prompt_id="p", prompt="a ball", category="plain", seed=0, **changes)


def test_a_row_survives_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        row(latency_s=1.5, step_s=[0.1, 0.2], dense_calls={"why": 2}),
        row("svg2", status="error", reason="no"),
    ]
    for entry in rows:
        append_row(path, entry)
    assert read_rows(path) == rows


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, row())
    with path.open("a") as file:
        file.write(row("svg2").to_json()[:40])
    assert [entry.arm for entry in read_rows(path)] == ["dense"]


def test_a_line_in_the_middle_that_is_no_row_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("not a row\n" + row().to_json() + "\n")
    with pytest.raises(ValueError, match="line 1"):
        read_rows(path)


def test_fields_of_another_version_are_ignored():
    entry = json.loads(row().to_json()) | {"from_the_future": 1}
    assert Row.from_json(json.dumps(entry)) == row()


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        row(latency_s=float("nan")).to_json()


def test_rewriting_leaves_no_part_behind(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [row()])
    write_rows(path, [row(), row("svg2")])
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    assert len(read_rows(path)) == 2
