"""A corpus on the disk, and the order in which it is read."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from adamac.moe.lm.corpus import Corpus, Order, prepare, unigram_bits_per_byte
from adamac.moe.lm.text import documents, is_held_out


def test_every_document_is_on_its_side_whole_and_in_order(corpus, text):
    tokenizer = corpus.tokenizer
    for tokens, side in ((corpus.train_tokens, False), (corpus.held_out_tokens, True)):
        ends = np.flatnonzero(tokens == tokenizer.end)
        found = [
            tokenizer.decode(part[part != tokenizer.end].tolist()) for part in np.split(tokens, ends + 1)[:-1]
        ]
        assert found == [text for text in documents([text], "=====") if is_held_out(text, 0.2) == side]


def test_sizes_are_those_of_the_texts(corpus, text):
    texts = list(documents([text], "====="))
    assert corpus.train.documents + corpus.held_out.documents == len(texts)
    assert corpus.train.bytes + corpus.held_out.bytes == sum(len(text.encode()) for text in texts)
    assert Corpus.load(corpus.folder) == corpus


def test_unigram_bits_are_those_of_counting(corpus):
    counts = Counter(corpus.train_tokens.tolist())
    total = len(corpus.train_tokens) + corpus.vocab
    bits = -sum(math.log2((counts[token] + 1) / total) for token in corpus.held_out_tokens.tolist())
    reached = unigram_bits_per_byte(corpus, corpus.held_out_tokens)
    assert reached == pytest.approx(bits / corpus.held_out.bytes, rel=1e-12)


def test_what_is_torn_or_too_little_is_refused(tmp_path, text):
    corpus = prepare(tmp_path / "data", [text], vocab=300, separator="=====", held_out=0.2)
    file = corpus.folder / "train.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train\.tokens is damaged"):
        Corpus.load(corpus.folder)
    with pytest.raises(ValueError, match="holds no prepared corpus"):
        Corpus.load(tmp_path)
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(ValueError, match="too little text: 1 documents"):
        prepare(tmp_path / "other", [tmp_path / "one.txt"], vocab=257)
    with pytest.raises(ValueError, match="do not fill a context of 999"):
        Order(np.arange(100), 999)
    assert not (tmp_path / "other").exists()


def test_an_epoch_reads_every_window_once():
    order = Order(np.arange(1000), context=10, seed=3)
    inputs, targets = order.batch(0, order.windows)
    assert inputs.flatten().unique().numel() == order.windows * 10
    assert (targets == inputs + 1).all()
    following, _ = order.batch(order.windows, order.windows)
    assert not (following == inputs).all()


def test_a_batch_depends_on_its_number_alone():
    order = Order(np.arange(1000), context=10, seed=3)
    far, _ = order.batch(3 * order.windows - 2, 4)  # across two epochs
    again = Order(np.arange(1000), context=10, seed=3)
    for row, number in enumerate(range(3 * order.windows - 2, 3 * order.windows + 2)):
        assert (again.batch(number, 1)[0] == far[row]).all()
    assert not (Order(np.arange(1000), context=10, seed=4).batch(0, 4)[0] == again.batch(0, 4)[0]).all()
