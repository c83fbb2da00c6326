"""What the procedural world promises: reproducible clips, true boxes, true captions."""

import numpy as np
import pytest

from adamac.embedded import CATEGORIES, prompts
from adamac.embedded.training import scenes, tokens

SMALL = {"frames": 9, "height": 56, "width": 96}


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_the_same_seed_gives_the_same_clip(category):
    first, again = (scenes.scene(category, 7, **SMALL) for _ in range(2))
    assert np.array_equal(first.frames, again.frames)
    assert first.caption == again.caption == scenes.caption(category, 7, SMALL["frames"])


def test_boxes_hold_every_pixel_that_differs_from_the_background():
    for seed in range(12):
        clip = scenes.scene("plain", seed, **SMALL)
        backdrop = scenes.drawing.background(clip.caption.split(" on ")[-1], 56, 96)
        for frame, (left, top, right, bottom) in zip(clip.frames, clip.tracks[0].boxes, strict=True):
            rows, columns = np.nonzero((frame != backdrop).any(axis=-1))
            assert left <= columns.min()
            assert columns.max() < right
            assert top <= rows.min()
            assert rows.max() < bottom


def test_the_written_text_is_the_one_in_the_caption():
    for seed in range(20):
        clip = scenes.scene("text", seed, **SMALL)
        assert clip.caption.split('"')[1] == clip.text == clip.tracks[0].name


def test_the_picture_jumps_at_the_cut_and_nowhere_else():
    for seed in range(8):
        clip = scenes.scene("cut", seed, **SMALL)
        change = np.abs(np.diff(clip.frames.astype(int), axis=0)).mean(axis=(1, 2, 3))
        assert change.argmax() + 1 == clip.cut


def test_held_out_captions_never_come_up_in_training():
    assert scenes.is_held_out(scenes.scene("plain", 0, held_out=True, **SMALL).caption)
    assert not scenes.is_held_out(scenes.scene("plain", 0, held_out=False, **SMALL).caption)


def test_an_unknown_category_is_named():
    with pytest.raises(ValueError, match="category: expected one of"):
        scenes.scene("landscape", 0)


def test_every_caption_and_prompt_is_made_of_known_tokens():
    tokenizer = tokens.build()
    captions = [scenes.caption(c, 10**8 + s) for c in CATEGORIES for s in range(40)]
    captions += [entry["prompt"] for entry in prompts()]
    for ids in tokenizer(captions).input_ids:
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= tokens.MAX_TOKENS


def test_text_to_be_written_is_spelled_and_a_capital_article_is_not():
    assert tokens.build().tokenize('A ball, "A7"') == ["a", "ball", ",", '"', "A", "7", '"']


def test_prompts_cover_every_category_and_are_held_out():
    for category in CATEGORIES:
        entries = prompts(category)
        assert len(entries) >= 3
        assert all(set(e) == {"id", "category", "prompt", "expect"} for e in entries)
        assert all(scenes.is_held_out(e["prompt"]) for e in entries)
    assert CATEGORIES == scenes.CATEGORIES
