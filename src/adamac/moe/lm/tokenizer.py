"""Tokens: text to numbers and back, with a byte-pair encoding learnt from the training documents.

Every byte is a token and the rest of the vocabulary are pairs of tokens, so that the encoding is lossless on any text, and the
smallest vocabulary is plain bytes. How many bytes each token stands for is known: losses per token become bits per
byte, which can be compared between vocabularies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BYTES = 256
END = "<|end|>"
"""How the end of a document is written where a token must have a name; text that reads so is text."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        pairs: The encoding, a ``tokenizers.Tokenizer``.
        vocab: Number of different ids.
        end: The id that stands between documents.
    """

    def __init__(self, pairs: Any) -> None:
        """Wrap a byte-level encoding."""
        self.pairs = pairs
        # The end of a document is no token of the encoding but the id after its last: no text can become it.
        self.end: int = pairs.get_vocab_size()
        self.vocab: int = self.end + 1

    @classmethod
    def train(cls, documents: Iterable[str], vocab: int) -> Tokenizer:
        """Learn an encoding.

        Args:
            documents: What to learn from.
            vocab: Most ids, at least 257: every byte and the end of a document.

        Raises:
            ValueError: If the vocabulary cannot hold every byte.
        """
        if vocab < BYTES + 1:
            raise ValueError(
                f"vocab must be at least {BYTES + 1} (every byte and the end of a document), got {vocab}"
            )
        from tokenizers import Tokenizer as Pairs
        from tokenizers import decoders, models, pre_tokenizers, trainers

        pairs = Pairs(models.BPE())
        pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pairs.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=vocab - 1, initial_alphabet=alphabet, show_progress=False)
        pairs.train_from_iterator(documents, trainer)
        return cls(pairs)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: If the file is no tokenizer.
        """
        from tokenizers import Tokenizer as Pairs

        try:
            return cls(Pairs.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path} holds no tokenizer: {error}") from None

    def to_json(self) -> str:
        """Everything about the tokenizer in the format of ``tokenizers``."""
        return self.pairs.to_str()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts."""
        return [encoding.ids for encoding in self.pairs.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; ends of documents are left out, bytes that are no text become replacement characters."""
        return self.pairs.decode([i for i in ids if i != self.end])

    def bytes_per_token(self) -> Tensor:
        """How many bytes each token stands for, ``[vocab]`` int64; 0 for the end of a document."""
        # The byte-level alphabet has one character for each byte.
        return torch.tensor([len(self.pairs.id_to_token(i)) for i in range(self.end)] + [0])
