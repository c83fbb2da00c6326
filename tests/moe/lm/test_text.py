"""Where documents begin and end, and on which side they are."""

from __future__ import annotations

import lzma

import pytest

from adamac.moe.lm.text import builtin_documents, cut, documents, is_held_out, read_text, text_files


def test_a_separator_gives_the_pieces_as_they_are():
    assert list(cut("one\n--\n two \n--\n\n--\nthree", "--\n")) == ["one\n", " two \n", "three"]


def test_paragraphs_are_gathered_whole_until_a_document_is_long_enough():
    text = "a b\nc d\n\ne f\n \n\ng h\n\ni j"
    assert list(cut(text, least=9)) == ["a b\nc d", "e f\n \n\ng h", "i j"]
    assert list(cut(text, least=100)) == [text]


def test_cutting_loses_nothing_but_white_space():
    text = "\n\n".join(f"paragraph {i}\nof two lines" for i in range(50))
    assert "".join("".join(cut(text, least=100)).split()) == "".join(text.split())


def test_lines_without_blank_lines_become_documents_too():
    pieces = list(cut("".join(f"word {i}: a gloss\n" for i in range(1000)), least=200))
    assert len(pieces) > 50
    assert all(len(piece) < 250 for piece in pieces)


def test_files_are_found_in_the_order_of_their_names_and_may_be_compressed(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b.txt.xz").write_bytes(lzma.compress(b"zwei"))
    (tmp_path / "a.txt").write_text("eins")
    (tmp_path / "c.bin").write_text("no text")
    assert list(documents([tmp_path])) == ["eins", "zwei"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.txt", None, "no such file"),
        ("empty", "folder", "holds no text"),
        ("torn.txt.xz", "bytes", "cannot read"),
        ("weights.bin", "zeros", "has zero bytes and looks binary; remove it"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, problem):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content == "bytes":
        path.write_bytes(lzma.compress(b"text" * 1000)[:40])
    elif content == "zeros":
        path.write_bytes(b"text\0text")
    with pytest.raises(ValueError, match=problem):
        list(map(read_text, text_files([path])))


def test_the_side_of_a_document_depends_on_its_text_alone():
    texts = [f"document {i}" for i in range(2000)]
    held_out = {text for text in texts if is_held_out(text, 0.1)}
    assert held_out == {text for text in reversed(texts) if is_held_out(text, 0.1)}
    assert 150 < len(held_out) < 250
    assert held_out < {text for text in texts if is_held_out(text, 0.2)}


def test_every_machine_has_some_text():
    found = builtin_documents()
    assert "Python" in " ".join(next(found) for _ in range(20))
