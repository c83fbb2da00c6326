"""Training: a loop that a kill does not harm.

What a step computes is a function of the recipe, the step's number, and the weights and Adam moments before it: windows of
text, random seeds and the learning rate follow from the number. A run that goes on from a checkpoint therefore equals one that
was never broken off, bit for bit where the device computes deterministically, as a CPU does. The same holds for the number of
ranks up to rounding: a step reads the same windows however many share them.

A run is a folder: ``run.json`` (the recipe), ``tokenizer.json``, ``data/`` (the prepared corpus, unless a prepared one was
given), ``rows.jsonl`` (a JSON object a step) and ``checkpoints/``.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from adamac.moe.lm import checkpoint
from adamac.moe.lm.corpus import Corpus, Order, is_corpus, prepare, unigram_bits_per_byte
from adamac.moe.lm.evaluate import bits_per_byte
from adamac.moe.lm.learner import Diverged, Learner, Update, shares
from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.text import text_files
from adamac.moe.lm.world import World


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known after a step; the first six as in :class:`adamac.moe.lm.learner.Update`.

    Attributes:
        step: Updates done.
        tokens: Tokens trained on.
        tokens_per_s: Of this step, evaluation and checkpoint left out.
        time_s: Of the run, with evaluations and checkpoints, over all its pieces.
        bits_per_byte: Of held-out text, where it was measured after this step.
    """

    loss: float
    losses: dict[str, float]
    lr: float
    gradient_norm: float
    imbalance: float
    bytes_sent: int
    step: int
    tokens: int
    tokens_per_s: float
    time_s: float
    bits_per_byte: float | None


class Watcher(Protocol):
    """Is told how a run goes on."""

    def begins(self, recipe: Recipe, corpus: Corpus, parameters: int, done: int) -> None:
        """Training begins; some steps may be done already."""

    def stepped(self, row: Row) -> None:
        """A step is done."""


class Silent:
    """A watcher that says nothing."""

    def begins(self, recipe: Recipe, corpus: Corpus, parameters: int, done: int) -> None:
        """Say nothing."""

    def stepped(self, row: Row) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Result:
    """What a run reached.

    Attributes:
        steps: Updates done.
        bits_per_byte: Of held-out text.
        unigram_bits_per_byte: Of a model that knows only how often each token occurs.
        time_s: Seconds, over all pieces of the run.
        parameters: Of the whole model.
    """

    steps: int
    bits_per_byte: float
    unigram_bits_per_byte: float
    time_s: float
    parameters: int


def train(
    recipe: Recipe,
    directory: Path,
    *,
    resume: bool = False,
    world: World | None = None,
    watcher: Watcher | None = None,
    dtype: torch.dtype = torch.float32,
    amp: bool | None = None,
) -> Result:
    """Train a model, or go on training it.

    Args:
        recipe: What to compute.
        directory: Where the run is kept; empty or absent, unless it is resumed.
        resume: Go on with the run that is in the directory; where there is none, begin it.
        world: This rank and the others.
        watcher: Is told of every step, on the first rank.
        dtype: Of weights and moments.
        amp: Compute in bfloat16 where that is safe; ``None``: on a GPU.

    Returns:
        What was reached; the same on all ranks.

    Raises:
        ValueError: If the recipe cannot be computed, or the directory holds something else.
        Diverged: If a loss is not finite. The last checkpoint is still there.
    """
    world = world or World()
    shares(recipe, world.size)
    _look(recipe)
    absent = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    begun = _claim(directory, recipe, resume, world)
    try:
        corpus = _corpus(recipe, directory, world)
        order = Order(corpus.train_tokens, recipe.context, recipe.seed)
        amp = world.device.type == "cuda" if amp is None else amp
        learner = Learner(recipe, recipe.model(corpus.vocab), world, dtype, amp)
    except ValueError:
        if world.first and not begun:  # what could not begin leaves nothing behind
            shutil.rmtree(absent[-1] if absent else directory)
        raise
    listening = watcher if watcher is not None and world.first else Silent()
    return _Run(recipe, directory, corpus, order, learner).finish(listening)


class _Run:
    """A run that goes on from where it is."""

    def __init__(
        self, recipe: Recipe, directory: Path, corpus: Corpus, order: Order, learner: Learner
    ) -> None:
        self.recipe, self.corpus, self.order = recipe, corpus, order
        self.learner, self.world = learner, learner.world
        self.checkpoints, self.rows = directory / "checkpoints", directory / "rows.jsonl"
        self.step, self.time_s = 0, 0.0
        self._restore()

    def finish(self, watcher: Watcher) -> Result:
        """Take all steps that are left."""
        recipe = self.recipe
        watcher.begins(recipe, self.corpus, self.learner.parameters, self.step)
        began = time.monotonic() - self.time_s
        reached = None
        while self.step < recipe.steps:
            update, seconds = self._update()
            last = self.step == recipe.steps
            reached = self._evaluate() if last or self.step % recipe.eval_every == 0 else None
            self.time_s = time.monotonic() - began
            row = self._row(update, seconds, reached)
            if reached is not None or self.step % recipe.log_every == 0:
                self._append(row)
            if last or self.step % recipe.save_every == 0:
                self._save()
            watcher.stepped(row)
        reached = self._evaluate() if reached is None else reached  # it was finished before
        unigram = unigram_bits_per_byte(self.corpus)
        return Result(self.step, reached, unigram, self.time_s, self.learner.parameters)

    def _update(self) -> tuple[Update, float]:
        began = time.monotonic()
        try:
            update = self.learner.update(self.step, self.order)
        except Diverged as error:
            kept = checkpoint.latest_checkpoint(self.checkpoints)
            remains = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
            raise Diverged(f"{error}; {remains}; try a lower learning rate or a longer warm-up") from None
        self.step += 1
        return update, time.monotonic() - began

    def _row(self, update: Update, seconds: float, reached: float | None) -> Row:
        tokens = self.recipe.batch * self.recipe.context
        return Row(
            **asdict(update),
            step=self.step,
            tokens=self.step * tokens,
            tokens_per_s=round(tokens / seconds, 1),
            time_s=round(self.time_s, 3),
            bits_per_byte=reached,
        )

    def _evaluate(self) -> float:
        learner, recipe = self.learner, self.recipe
        with learner.autocast():
            return bits_per_byte(
                learner.model,
                self.corpus,
                tokens=recipe.eval_tokens,
                batch=learner.micro_batch,
                world=self.world,
            )

    def _append(self, row: Row) -> None:
        if self.world.first:
            with self.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row), allow_nan=False) + "\n")

    def _save(self) -> None:
        weights, moments = self.learner.weights(), self.learner.moments()
        if self.world.first:
            config, state = self.learner.model.config, {"time_s": self.time_s}
            _force(self.rows)
            checkpoint.write_checkpoint(self.checkpoints, self.step, config, weights, moments, state)
        self.world.wait()

    def _restore(self) -> None:
        """Go back to the newest checkpoint, if there is one, and forget the rows after it."""
        folder = checkpoint.latest_checkpoint(self.checkpoints)
        if folder is not None:
            read = checkpoint.read_tensors
            self.learner.restore(
                read(folder / "model.safetensors"), read(folder / "optimizer.safetensors"), folder
            )
            state = checkpoint.read_json(folder / "state.json")
            self.step, self.time_s = state["step"], state["time_s"]
        self.world.wait()
        if self.world.first:
            _forget(self.rows, self.step)


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """Read the rows of a run; a last line that a kill tore is left out.

    Raises:
        ValueError: If there are none.
    """
    try:
        lines = (directory / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise ValueError(f"{directory} holds no rows: {error}") from None
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _claim(directory: Path, recipe: Recipe, resume: bool, world: World) -> bool:
    """Make a directory this run's, and say whether it was already."""
    file = directory / "run.json"
    begun = file.is_file()
    if begun:
        if not resume:
            raise ValueError(
                f"{directory} holds a run already; go on with it by --resume or choose another directory"
            )
        former = Recipe.from_dict(checkpoint.read_json(file)["recipe"])
        if differences := recipe.differences(former):
            raise ValueError(
                f"the run in {directory} was begun with {', '.join(differences)}; resume it with the same"
            )
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is not empty and holds no run; choose another directory")
    world.wait()  # all have looked before the first writes
    if world.first and not begun:
        directory.mkdir(parents=True, exist_ok=True)
        about = {"adamac": version("adamac"), "torch": torch.__version__, "recipe": recipe.to_dict()}
        _write_text(file, json.dumps(about, indent=2) + "\n")
    return begun


def _look(recipe: Recipe) -> None:
    """Refuse data that is not there, before anything is written."""
    given = [Path(path) for path in recipe.data]
    if len(given) != 1 or not is_corpus(given[0]):
        text_files(given)


def _corpus(recipe: Recipe, directory: Path, world: World) -> Corpus:
    """Open the prepared corpus that was given or made before, or make it on the first rank."""
    folder = directory / "data"
    given = [Path(path) for path in recipe.data]
    if len(given) == 1 and is_corpus(given[0]):
        folder = given[0]
    elif world.first and not is_corpus(folder):
        prepare(folder, given, vocab=recipe.vocab, separator=recipe.separator, held_out=recipe.held_out)
    world.wait()
    corpus = Corpus.load(folder)
    if world.first:
        _write_text(directory / "tokenizer.json", corpus.tokenizer.to_json())
    return corpus


def _forget(rows: Path, step: int) -> None:
    """Drop rows after a step, and a torn last line."""
    if rows.exists():
        lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = (line for line in lines if line.endswith("\n"))
        _write_text(rows, "".join(line for line in whole if json.loads(line)["step"] <= step))


def _write_text(file: Path, text: str) -> None:
    """Replace a file at once."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    _force(part)
    part.replace(file)


def _force(file: Path) -> None:
    """Return once what was written is on the disk."""
    if file.exists():
        with file.open("rb") as open_file:
            os.fsync(open_file.fileno())
