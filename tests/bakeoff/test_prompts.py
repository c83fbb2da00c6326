from pathlib import Path

import pytest

from adamac import embedded
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.prompts import choose_prompts, read_prompts


def test_a_default_run_has_four_categories():
    for model in (None, "some/model"):
        assert len({prompt.category for prompt in choose_prompts(None, model)}) == 4


def test_all_means_every_prompt_that_ships():
    chosen = choose_prompts(None, "some/model")
    assert set(chosen) < set(choose_prompts("all", "some/model"))


def test_the_prompts_that_ship_can_be_given_as_a_file():
    shipped = read_prompts(Path(embedded.__file__).parent / "prompts.jsonl")
    assert [prompt.text for prompt in shipped] == [entry["prompt"] for entry in embedded.prompts()]


def test_json_lines_and_plain_lines_are_told_apart(tmp_path):
    json_lines = tmp_path / "a.jsonl"
    json_lines.write_text('{"prompt": "a ball", "category": "plain", "id": "ball"}\n\n{"prompt": "a fox"}\n')
    plain = tmp_path / "b.txt"
    plain.write_text("# mine\na ball\n\n  a fox \n")
    first, second = read_prompts(json_lines)
    assert (first.id, first.category, first.text) == ("ball", "plain", "a ball")
    assert (second.id, second.category) == ("p003", "any")
    assert [prompt.text for prompt in read_prompts(plain)] == ["a ball", "a fox"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read"),
        (b"", "holds no prompt"),
        (b"\n# a remark\n", "holds no prompt"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b'{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        (b'{"text": "a"}', 'no "prompt"'),
        (
            b'{"prompt": "a"}\n{"prompt": "b", "categry": "c"}',
            "line 2 has a key 'categry'; did you mean category?",
        ),
        (b'{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}', "twice"),
        (b'{"id": "x/y", "prompt": "a"}\n{"id": "x y", "prompt": "b"}', "twice"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_in_one_line(tmp_path, content, problem):
    path = tmp_path / "prompts"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=problem) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


def test_an_id_becomes_a_safe_file_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "id": "../up/../../x"}')
    assert "/" not in read_prompts(path)[0].slug
