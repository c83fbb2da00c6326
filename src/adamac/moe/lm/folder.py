"""The folder of a training run: what lies where, whose it is, and writing that a kill does not tear.

``run.json`` (the recipe, how rows are sent, and how large the corpus is), ``tokenizer.json``, ``data/`` (the prepared corpus, unless a prepared one was
given), ``rows.jsonl`` (a JSON object a step) and ``checkpoints/``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adamac._version import __version__
from adamac.files import force, write_json, write_text
from adamac.moe.lm import checkpoint
from adamac.moe.lm.corpus import Corpus
from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.sending import Sending


class RunFolder:
    """A run's files by name. What writes is called on one rank alone.

    Attributes:
        path: The folder.
        checkpoints: Folder of checkpoints.
        data: Folder of the corpus that was prepared for this run.
        rows: File of rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.data = path / "checkpoints", path / "data"
        self.rows, self._about = path / "rows.jsonl", path / "run.json"

    def is_begun(self, recipe: Recipe, resume: bool) -> bool:
        """Whether it is this run's already; if not, it may become this run's.

        Raises:
            ValueError: If it is something else's.
        """
        path, begun = self.path, self._about.is_file()
        if path.is_file():
            raise ValueError(f"expected a directory for the run, got the file {path}; choose another name")
        if begun and checkpoint.is_bake_off(self._about):
            raise ValueError(f"{path} holds a bake-off, not a training run; choose another directory")
        if begun:
            if not resume:
                raise ValueError(
                    f"{path} holds a run already; go on with it by --resume or choose another directory"
                )
            former = Recipe.from_dict(field(self._about, "recipe"))
            if differences := recipe.differences(former):
                raise ValueError(
                    f"the run in {path} was begun with {', '.join(differences)}; resume it with the same"
                )
        elif path.exists() and any(path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no run; choose another directory")
        return begun

    def claim(self, recipe: Recipe, sending: Sending | None) -> None:
        """Make it this run's."""
        self.path.mkdir(parents=True, exist_ok=True)
        about = {"adamac": __version__, "torch": torch.__version__, "recipe": recipe.to_dict()}
        about["dispatchers"] = [] if sending is None else [asdict(sending)]
        write_json(self._about, about)

    def sendings(self) -> list[Sending]:
        """How the run sent rows to experts so far, on each number of ranks and tokens; nothing of a run that never did."""
        kept = checkpoint.read_json(self._about).get("dispatchers", [])
        try:
            return [Sending.from_dict(values) for values in kept]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._about} is damaged: {error}") from None

    def keep(self, sending: Sending | None) -> None:
        """Add how the run sends rows now, if it never did so before."""
        kept = self.sendings()
        if sending is not None and sending not in kept:
            about = checkpoint.read_json(self._about)
            about["dispatchers"] = [asdict(each) for each in (*kept, sending)]
            write_json(self._about, about)

    def keep_corpus(self, corpus: Corpus) -> None:
        """Write down how much the run reads, and its tokenizer.

        Raises:
            ValueError: If it was something else before: a corpus that others prepared may have been replaced.
        """
        about = checkpoint.read_json(self._about)
        size = {"vocab": corpus.vocab, "train": asdict(corpus.train), "held_out": asdict(corpus.held_out)}
        former = about.get("corpus", size)
        if former != size:
            raise ValueError(
                f"{corpus.folder} is not the corpus that the run in {self.path} was begun with: {former} then, {size} now; put "
                "the former back or begin another run"
            )
        if "corpus" not in about:
            write_json(self._about, about | {"corpus": size})
        write_text(self.path / "tokenizer.json", corpus.tokenizer.to_json())

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def force_rows(self) -> None:
        """See to it that the rows so far outlive the machine."""
        if self.rows.exists():
            force(self.rows)

    def forget(self, step: int) -> None:
        """Drop rows after a step, and a torn last line."""
        if self.rows.exists():
            rows = (line for line in _whole_lines(self.rows) if json.loads(line)["step"] <= step)
            write_text(self.rows, "".join(rows))

    def read_rows(self) -> list[dict[str, Any]]:
        """Read the rows; a last line that a kill tore is left out.

        Raises:
            ValueError: If there is no such file.
        """
        try:
            return [json.loads(line) for line in _whole_lines(self.rows)]
        except OSError as error:
            raise ValueError(f"{self.path} holds no rows: {error}") from None


def field(file: Path, name: str) -> Any:
    """A field of a file that holds an object.

    Raises:
        ValueError: If it has none.
    """
    values = checkpoint.read_json(file)
    if not isinstance(values, dict) or name not in values:
        raise ValueError(f"{file} is damaged: expected an object with {name}")
    return values[name]


def _whole_lines(file: Path) -> list[str]:
    """Lines of a file that have an end."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]
