"""What a prompt says reaches the pipeline, or is refused before a video is made: negative prompts and images."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import CogVideoXPipeline, HunyuanVideoPipeline, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from play import config_of, save_tiny_wan_from_image

from adamac import cli
from adamac.bakeoff.call import parse
from adamac.bakeoff.config import Config
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.picture import Picture
from adamac.bakeoff.pipelines import call_arguments, check_prompts
from adamac.bakeoff.prompts import Prompt
from adamac.bakeoff.report import draw
from adamac.bakeoff.run import run_bakeoff

SIZE = {"steps": 2, "height": 64, "width": 64, "frames": 7}
FOG = Prompt("p1", "any", "a ball", negative="fog")


@pytest.fixture(scope="module")
def from_image(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-wan-i2v")
    save_tiny_wan_from_image(folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> list[Picture]:
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (80, 60), color).save(tmp_path / f"{name}.png")
    return [Picture.find(tmp_path / f"{name}.png") for name in ("red", "blue")]


def test_videos_begin_with_their_images_in_every_arm(from_image, pictures, directory, progress):
    prompts = tuple(Prompt(f"p{n}", "any", "a red ball", image=image) for n, image in enumerate(pictures))
    config = Config(
        model=str(from_image), prompts=prompts, arms=("dense", "adacluster"), **SIZE | {"frames": 9}
    )
    rows = {(row.prompt_id, row.arm): row for row in run_bakeoff(config, directory, progress)}
    assert all(row.ok for row in rows.values()), [row.reason for row in rows.values()]
    red, blue = ((directory.path / rows[name, "dense"].video).read_bytes() for name in ("p0", "p1"))
    assert red != blue
    assert rows["p0", "adacluster"].sparse_calls > 0
    assert run_bakeoff(config, directory, progress, resume=True) == list(rows.values())
    draw(directory)
    assert "from red.png" in directory.report.read_text(encoding="utf-8")


def test_a_run_whose_image_was_changed_is_another_run(play, pictures, directory, progress):
    class Shown(type(play)):
        def __call__(self, *given, image=None, **more):
            return super().__call__(*given, **more)

    play.__class__ = Shown
    config = config_of("a ball", "a fox")
    config = replace(config, prompts=tuple(replace(p, image=pictures[0]) for p in config.prompts))
    run_bakeoff(config, directory, progress)
    other = replace(config, prompts=(config.prompts[0], replace(config.prompts[1], image=pictures[1])))
    with pytest.raises(BadInput, match="prompts: 1 of 2 prompts are not the same, the first is 'p1' here"):
        run_bakeoff(other, directory, progress, resume=True)


def test_a_run_from_before_prompts_had_them_goes_on(play, directory, progress):
    rows = run_bakeoff(config_of("a ball"), directory, progress)
    run = json.loads(directory.run.read_text())
    for prompt in run["config"]["prompts"]:
        del prompt["negative"], prompt["image"]
    directory.run.write_text(json.dumps(run))
    assert run_bakeoff(config_of("a ball"), directory, progress, resume=True) == rows


def test_a_negative_prompt_changes_the_video(tiny_model, tmp_path, progress):
    from adamac.bakeoff.config import RunDirectory

    made = []
    for name, negative in (("without", None), ("with", "red moves")):
        prompt = Prompt("p0", "any", "a red ball", negative=negative)
        config = Config(model=str(tiny_model), prompts=(prompt,), arms=("dense",), guidance=5.0, **SIZE)
        directory = RunDirectory(tmp_path / name)
        rows = run_bakeoff(config, directory, progress)
        made.append((directory.path / rows[0].video).read_bytes())
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("kind", "prompt", "arguments", "problem"),
    [
        (WanPipeline, FOG, {}, ""),
        (CogVideoXPipeline, FOG, {}, ""),
        (WanPipeline, FOG, {"guidance_scale": 1.0}, "WanPipeline reads it at guidance_scale above 1 alone, which is 1 here"),
        (HunyuanVideoPipeline, FOG, {}, "HunyuanVideoPipeline reads it at true_cfg_scale above 1 alone, which is 1 here"),
        (WanPipeline, replace(FOG, negative=""), {"guidance_scale": 1.0}, ""),
        (WanPipeline, Prompt("p1", "any", "a", image=Picture("a.png", "", b"")), {}, "image: WanPipeline takes none"),
        (WanImageToVideoPipeline, Prompt("p1", "any", "a"), {}, "needs one, and prompt 'p1' has none"),
        (WanImageToVideoPipeline, Prompt("p1", "any", "a", image=Picture("a.png", "", b"")), {}, ""),
    ],
)  # fmt: skip
def test_what_would_be_passed_over_or_is_missing_is_refused(kind, prompt, arguments, problem):
    pipe = kind.__new__(kind)
    if not problem:
        check_prompts(pipe, (prompt,), arguments)
        return
    with pytest.raises(BadInput, match=problem) as error:
        check_prompts(pipe, (prompt,), arguments)
    assert "\n" not in str(error.value)


def test_the_command_refuses_an_image_model_without_images_and_writes_nothing(from_image, tmp_path, capsys):
    prompts, out = tmp_path / "mine.txt", tmp_path / "out"
    prompts.write_text("a red ball\n")
    asked = ["bakeoff", "--model", str(from_image), "--prompts", str(prompts), "--out", str(out)]
    assert cli.main(asked) == 2
    message = capsys.readouterr().err
    assert "image: WanImageToVideoPipeline needs one" in message
    assert message.count("\n") == 1
    assert not out.exists()


def test_the_command_gives_a_negative_prompt_to_all(play, tmp_path, capsys):
    asked = ["bakeoff", "--model", "play", "--negative-prompt", "fog", "--out", str(tmp_path / "out")]
    assert cli.main(asked) == 2
    assert (
        "negative_prompt: PlayPipeline has no negative prompt; remove it from prompt"
        in capsys.readouterr().err
    )


class Scaled:
    """A pipeline whose call has an argument of its own."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompt, true_cfg_scale=1.0, num_inference_steps=50):
        """Only its signature is looked at."""


def test_further_arguments_reach_the_call_and_are_part_of_the_run(play, directory, progress):
    scales = []

    class Scaling(type(play)):
        def __call__(self, *given, true_cfg_scale=1.0, **more):
            scales.append(true_cfg_scale)
            return super().__call__(*given, **more)

    play.__class__ = Scaling
    config = replace(config_of("a ball"), call={"true_cfg_scale": 6})
    rows = run_bakeoff(config, directory, progress)
    assert all(row.ok for row in rows)
    assert set(scales) == {6}
    assert json.loads(directory.run.read_text())["config"]["call"] == {"true_cfg_scale": 6}
    with pytest.raises(BadInput, match="call: other settings there, other settings here"):
        run_bakeoff(replace(config, call={"true_cfg_scale": 7}), directory, progress, resume=True)


def test_a_run_from_before_there_were_further_arguments_goes_on(play, directory, progress):
    rows = run_bakeoff(config_of("a ball"), directory, progress)
    run = json.loads(directory.run.read_text())
    del run["config"]["call"]
    directory.run.write_text(json.dumps(run))
    assert run_bakeoff(config_of("a ball"), directory, progress, resume=True) == rows


def test_with_them_a_negative_prompt_is_read():
    config = Config(model="any", prompts=(FOG,), arms=("dense",), call={"true_cfg_scale": 6})
    assert call_arguments(Scaled(), config) == {"true_cfg_scale": 6}
    check_prompts(HunyuanVideoPipeline.__new__(HunyuanVideoPipeline), (FOG,), {"true_cfg_scale": 6})


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ((), {}),
        (("true_cfg_scale=6", "strength=0.5"), {"true_cfg_scale": 6, "strength": 0.5}),
        (
            ("mode=fast", "loop=true", "sizes=[1, 2]", "note="),
            {"mode": "fast", "loop": True, "sizes": [1, 2], "note": ""},
        ),
    ],
)
def test_values_are_json_or_else_texts(words, found):
    assert parse(words) == found


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("strength",), "expected NAME=VALUE, as true_cfg_scale=6, got 'strength'"),
        (("a-b=1",), "expected NAME=VALUE"),
        (("strength=1", "strength=2"), "strength is given twice"),
        (("guidance_scale=3",), "guidance_scale is set by --guidance"),
        (("latents=1",), "latents is set by the bake-off itself"),
    ],
)
def test_what_is_no_further_argument_is_refused(words, line):
    with pytest.raises(BadInput, match=f"call: {re.escape(line)}"):
        parse(words)


def test_an_argument_that_the_pipeline_lacks_is_refused_with_the_nearest():
    config = Config(model="any", prompts=(FOG,), arms=("dense",), call={"true_cfg_scal": 6})
    with pytest.raises(BadInput, match="call: Scaled has no true_cfg_scal; did you mean true_cfg_scale\\?"):
        call_arguments(Scaled(), config)
