"""The tokenizer: one token for each word of the captions, one for each character to be written.

Lower-case words are whole tokens, so "ball" is one symbol; capitals and digits are always single
tokens, so the text to be written in a frame is spelled. A word that no caption uses falls apart into
letters instead of becoming unknown.
"""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adamac.embedded.training import film, scenes

MAX_TOKENS = 64
"""Length to which prompts are padded, in training and in use."""

SPECIAL = ("<pad>", "</s>", "<unk>")
PUNCTUATION = "\"',.:;!?-()"
FIRST_WORDS = ("a", "an", "the", "in", "one", "two", "three", "four", "five")
"""Words that begin a caption; written with a capital they would be read as letters to be drawn."""

_CAPTIONS_READ = 1500
"""Captions of each category from which the words are collected; every word comes up often."""


def vocabulary() -> list[str]:
    """All tokens in a fixed order."""
    captions = [
        scenes.caption(category, seed) for category in scenes.CATEGORIES for seed in range(_CAPTIONS_READ)
    ]
    captions += [f"an animated film, {text}, little some much motion" for _, text in film.shot_captions()]
    words = {word for text in captions for word in _lower_words(text)}
    letters = string.ascii_lowercase
    return list(
        dict.fromkeys(
            [*SPECIAL, *PUNCTUATION, *scenes.LETTERS, *letters, *(f"##{c}" for c in letters), *sorted(words)]
        )
    )


def _lower_words(text: str) -> list[str]:
    kept = "".join(c if c in string.ascii_lowercase else " " for c in text)
    return kept.split()


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, ready to be saved with the pipeline."""
    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>", max_input_chars_per_word=40))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(f"^{word.capitalize()} "), f"{word} ") for word in FIRST_WORDS]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[a-z]+|[A-Z0-9]|[^\sa-zA-Z0-9]"), behavior="removed", invert=True
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )
