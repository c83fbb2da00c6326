"""Tokens say everything that the text said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamac.moe.lm.tokenizer import END, Tokenizer

TEXTS = ["a ball and an owl", "the owl and the ball"] * 20
PAIRS, BYTES = Tokenizer.train(TEXTS, 300), Tokenizer.train(TEXTS, 257)
BOTH = pytest.mark.parametrize("tokenizer", [PAIRS, BYTES], ids=["pairs", "bytes"])


@BOTH
@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@BOTH
@given(text=st.text())
def test_tokens_know_their_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


@BOTH
def test_no_text_becomes_the_end_of_a_document(tokenizer):
    assert tokenizer.end not in tokenizer.encode(f"{END} says {END}")
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end]) == "a"
    assert tokenizer.bytes_per_token()[tokenizer.end] == 0


def test_the_smallest_vocabulary_is_bytes():
    assert BYTES.vocab == 257
    assert len(BYTES.encode("ball")) == 4
    assert len(PAIRS.encode("ball")) < 4


@BOTH
def test_a_file_holds_all_of_it(tokenizer, tmp_path):
    (tmp_path / "t.json").write_text(tokenizer.to_json())
    other = Tokenizer.load(tmp_path / "t.json")
    assert other.encode("a new ball") == tokenizer.encode("a new ball")
    assert other.vocab == tokenizer.vocab


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path / "t.json")
    with pytest.raises(ValueError, match="vocab must be at least 257"):
        Tokenizer.train(TEXTS, 256)
