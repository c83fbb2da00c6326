"""Claims about where the video sits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamac.attention import Layout
from adamac.attention.layout import check_attention_inputs
from adamac.ops.segment import Segments


@given(before=st.integers(0, 5), video=st.integers(1, 20), after=st.integers(0, 5), padded=st.booleans())
def test_text_is_one_more_segment_and_padding_is_in_none(before, video, after, padded):
    tokens = before + video + after
    valid = torch.rand(2, tokens) < 0.6 if padded else None
    layout = Layout(tokens, before, before + video, valid=valid)
    labels = (torch.arange(video) * 7 % 5).expand(2, 3, video)
    if padded:
        labels = labels.masked_fill(~layout.video_valid(), -1)
    expected = torch.full((2, 3, tokens), 5)
    expected[:, :, before : before + video] = labels
    if valid is not None:
        expected[~valid.unsqueeze(1).expand_as(expected)] = -1
    whole, sorted_again = layout.with_text(Segments(labels, 5)), Segments(expected, 6)
    assert torch.equal(whole.labels, expected)
    assert torch.equal(whole.starts, sorted_again.starts)
    assert torch.equal(whole.order, sorted_again.order)
    assert layout.video_tokens + layout.text_tokens == tokens


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 3), (-1, 4), (4, 3), (0, 11)])
def test_a_layout_without_video_inside_the_sequence_is_refused(start, stop):
    with pytest.raises(ValueError, match=rf"video tokens {start}\.\.{stop} .* sequence of 10 tokens"):
        Layout(10, start, stop)


def test_a_layout_says_what_is_wrong_with_its_parts():
    with pytest.raises(
        ValueError, match=r"valid must be \[batch, tokens\] for the 10 tokens.*got shape \(1, 9\)"
    ):
        Layout(10, 0, 10, valid=torch.ones(1, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"valid must be \[batch, tokens\].*got shape \(10,\)"):
        Layout(10, 0, 10, valid=torch.ones(10, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"grid \(2, 2, 2\) does not hold 10 video tokens"):
        Layout(10, 0, 10, grid=(2, 2, 2))


GOOD = torch.zeros(2, 3, 10, 8)


@pytest.mark.parametrize(
    ("query", "key", "layout", "message"),
    [
        (GOOD[0], GOOD[0], None, r"query must be \[batch, heads, tokens, head_dim\], got shape \(3, 10, 8\)"),
        (GOOD, GOOD[:, :1], None, r"key has shape \(2, 1, 10, 8\) but query has \(2, 3, 10, 8\)"),
        (GOOD, GOOD[:, :, :9], None, r"key has shape \(2, 3, 9, 8\) but query has \(2, 3, 10, 8\)"),
        (GOOD, GOOD.half(), None, r"key is torch.float16 on cpu but query is torch.float32 on cpu"),
        (GOOD.int(), GOOD.int(), None, r"query must be floating point, got torch.int32"),
        (GOOD[:, :, :0], GOOD[:, :, :0], None, "query has zero tokens"),
        (GOOD, GOOD, Layout.video_only(9), "layout is for 9 tokens but query has 10"),
        (
            GOOD,
            GOOD,
            Layout(10, 0, 10, valid=torch.ones(3, 10, dtype=torch.bool)),
            "layout.valid has batch 3 but query has batch 2",
        ),
        (
            GOOD,
            GOOD,
            Layout(10, 0, 10, valid=torch.ones(2, 10)),
            "layout.valid must be bool, got torch.float32",
        ),
        (
            GOOD,
            GOOD,
            Layout(10, 0, 10, valid=torch.ones(2, 10, dtype=torch.bool, device="meta")),
            "layout.valid is on meta but query is on cpu; move it",
        ),
        (GOOD, GOOD.to("meta"), None, "key is torch.float32 on meta but query is torch.float32 on cpu"),
    ],
)
def test_tensors_that_cannot_be_attended_are_refused_by_name(query, key, layout, message):
    with pytest.raises(ValueError, match=message):
        check_attention_inputs(query, key, layout or Layout.video_only(10))
