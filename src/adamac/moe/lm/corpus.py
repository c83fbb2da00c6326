"""A prepared corpus: token ids on the disk, mapped into memory, and the order in which training reads them.

A corpus is a folder that is made once and never changed: ``tokenizer.json``, the two streams ``train.tokens`` and
``held_out.tokens`` (little-endian integers, documents one after another with the end token after each), and
``corpus.json`` that says what they are. It is made in a folder beside and renamed when whole.

Which tokens a step reads is a function of the seed and the step alone (:class:`Order`): a run that goes on after a kill,
and ranks that share a batch, need no other state.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adamac.moe.lm.text import documents, is_held_out
from adamac.moe.lm.tokenizer import Tokenizer

TOKENIZER_SAMPLE = 20_000_000
"""Characters of training documents that a tokenizer is learnt from; more changes little and takes long."""

ENCODED_AT_ONCE = 256
"""Documents."""


@dataclass(frozen=True)
class Stream:
    """How much one side of a corpus holds: documents, bytes of text and tokens (ends of documents included)."""

    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class Corpus:
    """Token ids of documents, split into training and held-out ones.

    Attributes:
        folder: Where the files are.
        sources: What it was made from, in words.
        vocab: Size of the vocabulary.
        train: Size of the training side.
        held_out: Size of the held-out side.
    """

    folder: Path
    sources: list[str]
    vocab: int
    train: Stream
    held_out: Stream

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Open a prepared corpus.

        Raises:
            ValueError: If the folder holds none, or its files are not whole.
        """
        try:
            facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
            sides = {side: Stream(**facts.pop(side)) for side in ("train", "held_out")}
            corpus = cls(folder=folder, **facts, **sides)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds no prepared corpus: {error}") from None
        for side, stream in sides.items():
            file = folder / f"{side}.tokens"
            expected = stream.tokens * _dtype(corpus.vocab).itemsize
            if not file.exists() or file.stat().st_size != expected:
                raise ValueError(f"{file} is damaged: expected {expected} bytes; prepare the corpus again")
        return corpus

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What the ids mean."""
        return Tokenizer.load(self.folder / "tokenizer.json")

    @cached_property
    def train_tokens(self) -> np.ndarray:
        """Ids of the training documents, mapped."""
        return self._map("train")

    @cached_property
    def held_out_tokens(self) -> np.ndarray:
        """Ids of the held-out documents, mapped."""
        return self._map("held_out")

    def _map(self, side: str) -> np.ndarray:
        return np.memmap(self.folder / f"{side}.tokens", dtype=_dtype(self.vocab), mode="r")


def is_corpus(folder: Path) -> bool:
    """Whether a folder is a prepared corpus."""
    return (folder / "corpus.json").is_file()


def prepare(
    folder: Path,
    data: Iterable[Path] = (),
    *,
    vocab: int = 4096,
    separator: str | None = None,
    held_out: float = 0.02,
) -> Corpus:
    """Read texts, learn a tokenizer from the training documents, and write a corpus.

    Args:
        folder: The folder to make; it must not exist.
        data: Text files and directories; none means the built-in corpus.
        vocab: Size of the vocabulary; 257 means plain bytes.
        separator: What stands between documents; ``None`` gathers paragraphs (:func:`adamac.moe.lm.text.cut`).
        held_out: Share of documents that is held out.

    Raises:
        ValueError: If there is no text, or too little to hold some out.
    """
    data = list(data)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # what a kill left
    part.mkdir(parents=True)
    texts = list(documents(data, separator))
    kept = [text for text in texts if not is_held_out(text, held_out)]
    tokenizer = Tokenizer.train(_sample(kept, TOKENIZER_SAMPLE), vocab)
    (part / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    train = _write(part / "train.tokens", kept, tokenizer)
    rest = _write(
        part / "held_out.tokens", (text for text in texts if is_held_out(text, held_out)), tokenizer
    )
    if not train.documents or not rest.documents:
        raise ValueError(
            f"too little text: {len(texts)} documents give {train.documents} for training and {rest.documents} held out"
            "; give more text or a larger share held out, or line breaks or a separator to text that has none"
        )
    sources = [str(path) for path in data] or ["documentation of Python, its standard library and torch"]
    corpus = Corpus(folder, sources, tokenizer.vocab, train, rest)
    facts = {name: value for name, value in asdict(corpus).items() if name != "folder"}
    (part / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    part.rename(folder)
    return corpus


def unigram_bits_per_byte(corpus: Corpus, tokens: np.ndarray) -> float:
    """Bits per byte of some tokens by a model that knows how often each occurs in training text, and nothing else."""
    counts = np.bincount(corpus.train_tokens, minlength=corpus.vocab) + 1.0
    bits = -np.log2(counts / counts.sum())
    return float(bits[tokens].sum() / corpus.tokenizer.bytes_per_token().numpy()[tokens].sum())


@dataclass(frozen=True)
class Order:
    """Which windows of the training stream each step reads.

    An epoch cuts the stream into windows of ``context`` tokens, from a start that differs between epochs, and reads them in
    an order of its own.

    Attributes:
        tokens: The stream.
        context: Tokens that a window predicts.
        seed: Of the order.
    """

    tokens: np.ndarray
    context: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that there is a window."""
        if self.windows < 1:
            raise ValueError(
                f"too little text: {len(self.tokens)} training tokens do not fill a context of {self.context}; "
                "give more text or a smaller context"
            )

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return (len(self.tokens) - self.context) // self.context

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Read windows number ``first`` to ``first + count`` of the whole training.

        Returns:
            Inputs and targets, each ``[count, context]`` int64.
        """
        rows = np.stack([self._window(number) for number in range(first, first + count)]).astype(np.int64)
        ids = torch.from_numpy(rows)
        return ids[:, :-1], ids[:, 1:]

    def _window(self, number: int) -> np.ndarray:
        epoch, at = divmod(number, self.windows)
        offset, order = self._epoch(epoch)
        start = offset + int(order[at]) * self.context
        return self.tokens[start : start + self.context + 1]

    def _epoch(self, epoch: int) -> tuple[int, Tensor]:
        if epoch not in self._epochs:
            self._epochs.clear()  # a batch spans two epochs at most once
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = int(torch.randint(self.context, (1,), generator=generator))
            self._epochs[epoch] = offset, torch.randperm(self.windows, generator=generator)
        return self._epochs[epoch]

    @cached_property
    def _epochs(self) -> dict[int, tuple[int, Tensor]]:
        return {}


def _dtype(vocab: int) -> np.dtype:
    return np.dtype("<u2" if vocab <= 1 << 16 else "<u4")


def _sample(texts: list[str], most: int) -> Iterator[str]:
    """Every so many-th document, so that together they have about as many characters as asked."""
    return iter(texts[:: max(1, -(-sum(map(len, texts)) // most))])


def _write(file: Path, texts: Iterable[str], tokenizer: Tokenizer) -> Stream:
    count = size = tokens = 0
    texts = iter(texts)
    with file.open("wb") as out:
        while some := list(itertools.islice(texts, ENCODED_AT_ONCE)):
            for text, ids in zip(some, tokenizer.encode_all(some), strict=True):
                ids.append(tokenizer.end)
                out.write(np.asarray(ids, dtype=_dtype(tokenizer.vocab)).tobytes())
                count, size, tokens = count + 1, size + len(text.encode()), tokens + len(ids)
    return Stream(count, size, tokens)
