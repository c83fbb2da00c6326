import json
from pathlib import Path

import pytest
from diffusers.utils import load_image
from PIL import Image

from adamac import embedded
from adamac.bakeoff.config import Config
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.picture import Picture
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
        (b'{"prompt": "a", "negative": "b"}', "line 1 has a key 'negative'; did you mean negative_prompt?"),
        (b'{"prompt": "a", "image_path": "b"}', "did you mean image?"),
        (b'{"prompt": "a", "negative_prompt": 3}', "line 1: negative_prompt must be a text, got 3"),
        (
            b'{"prompt": "a", "image": "absent.png"}',
            "line 1: image: .*absent.png is not an image .*No such file",
        ),
        (
            b'{"prompt": "a", "image": "prompts"}',
            "line 1: image: .*prompts is not an image of a kind that is known",
        ),
        (b'{"prompt": "a", "guidance": 3}', "line 1 has a guidance, which is not of a prompt here"),
        (b'{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}', "twice"),
        (b'{"id": "x/y", "prompt": "a"}\n{"id": "x y", "prompt": "b"}', "'x/y' and 'x y', whose files would"),
        (b'{"id": "' + b"x" * 151 + b'", "prompt": "a"}', "too long to name files by"),
        (b'{"id": ["x"], "prompt": "a"}', r'id must be a text, got \["x"\]'),
        (b'[\n  {"prompt": "a"}\n]\n', "one JSON document"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_in_one_line(tmp_path, content, problem):
    path = tmp_path / "prompts"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=problem) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("front", ["\ufeff", "# mine\n", "\n \n"])
def test_json_lines_are_known_behind_what_is_no_prompt(tmp_path, front):
    path = tmp_path / "a.jsonl"
    path.write_text(
        front + '{"prompt": "a ball", "id": null}\n# a remark\n{"prompt": "a fox", "category": 7}\n', "utf-8"
    )
    first, second = read_prompts(path)
    assert (first.text, first.category) == ("a ball", "any")
    assert (second.text, second.category) == ("a fox", "7")
    assert "None" not in first.id


def test_a_mark_in_front_of_the_file_is_no_part_of_a_prompt(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a ball\r\na fox\r\n", "utf-8-sig")
    assert [prompt.text for prompt in read_prompts(path)] == ["a ball", "a fox"]


def test_a_prompt_with_a_line_separator_in_it_is_one_prompt(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a red\u2028ball\u0085moves"}', "utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["a red\u2028ball\u0085moves"]


def test_ids_in_any_script_name_files_of_their_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "id": "猫"}\n{"prompt": "b", "id": "犬"}', "utf-8")
    assert [prompt.slug for prompt in read_prompts(path)] == ["猫", "犬"]


def test_an_id_becomes_a_safe_file_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "id": "../up/../../x"}')
    assert "/" not in read_prompts(path)[0].slug


def test_a_negative_prompt_is_given_to_those_that_have_none_of_their_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "a"}\n{"prompt": "b", "negative_prompt": "fog"}\n{"prompt": "c", "negative_prompt": ""}\n'
    )
    assert [prompt.negative for prompt in choose_prompts(str(path), "m")] == [None, "fog", ""]
    chosen = choose_prompts(str(path), "m", "blur")
    assert [prompt.negative for prompt in chosen] == ["blur", "fog", ""]
    assert chosen[0].arguments() == {"prompt": "a", "negative_prompt": "blur"}
    assert choose_prompts(None, None)[0].arguments().keys() == {"prompt"}


def test_an_image_lies_beside_its_file_and_is_known_by_its_content(tmp_path):
    path, picture = tmp_path / "a.jsonl", tmp_path / "first.png"
    path.write_text('{"prompt": "a", "image": "first.png"}')
    Image.new("L", (4, 3), 200).save(picture)
    (before,) = read_prompts(path)
    image = before.arguments()["image"]
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((4, 3), "RGB", (200, 200, 200))
    Image.new("L", (4, 3), 100).save(picture)
    assert read_prompts(path) != (before,)


def test_what_is_null_is_not_given(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "negative_prompt": null, "image": null}')
    (prompt,) = choose_prompts(str(path), "m", "fog")
    assert (prompt.negative, prompt.image) == ("fog", None)


@pytest.mark.parametrize("kind", ["upright by its EXIF", "transparent", "of a palette", "animated"])
def test_an_image_is_what_diffusers_makes_of_its_file(tmp_path, kind):
    path, image = tmp_path / "first", Image.linear_gradient("L").resize((6, 4))
    if kind == "upright by its EXIF":
        lies = Image.Exif()
        lies[0x0112] = 6
        image.convert("RGB").save(path, "JPEG", exif=lies)
    elif kind == "transparent":
        Image.merge("LA", (image, image.rotate(180))).save(path, "PNG")
    elif kind == "of a palette":
        image.quantize(4).save(path, "PNG", transparency=0)
    else:
        image.save(path, "GIF", save_all=True, append_images=[Image.new("L", (6, 4), 9)])
    ours, theirs = Picture.find(path).load(), load_image(str(path))
    assert (ours.size, ours.mode, ours.tobytes()) == (theirs.size, theirs.mode, theirs.tobytes())


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_an_image_that_would_come_out_white_is_refused(tmp_path, mode):
    Image.new(mode, (4, 3), 300).save(tmp_path / "deep.tif")
    with pytest.raises(BadInput, match=r"image: .*deep.tif has more than 8 bits of grey.*; save it with 8"):
        Picture.find(tmp_path / "deep.tif")


def test_an_image_stays_as_it_was_when_the_run_began(tmp_path):
    path, picture = tmp_path / "a.jsonl", tmp_path / "first.png"
    path.write_text('{"prompt": "a", "image": "first.png"}')
    Image.new("L", (4, 3), 200).save(picture)
    prompts = read_prompts(path)
    picture.unlink()
    assert prompts[0].arguments()["image"].getpixel((0, 0)) == (200, 200, 200)
    asked = Config(model="m", prompts=prompts, arms=("dense",)).to_dict()
    assert asked["prompts"][0]["image"].keys() == {"file", "digest"}
    assert json.dumps(asked)
