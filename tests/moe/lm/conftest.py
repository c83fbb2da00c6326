"""A small corpus, prepared once."""

from __future__ import annotations

from pathlib import Path

import pytest
from babble import babble, tiny_recipe

from adamac.moe.lm.corpus import Corpus, prepare
from adamac.moe.lm.recipe import Recipe


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "babble.txt"
    file.write_text(babble(60))
    return file


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, text) -> Corpus:
    return prepare(
        tmp_path_factory.mktemp("corpus") / "data", [text], vocab=300, separator="=====", held_out=0.2
    )


@pytest.fixture
def recipe(corpus) -> Recipe:
    return tiny_recipe(corpus)
