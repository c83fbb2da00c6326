"""Training: a loop that a kill does not harm.

What a step computes is a function of the recipe, the step's number, and the weights and Adam moments before it: windows of
text, random seeds and the learning rate follow from the number. A run that goes on from a checkpoint therefore equals one that
was never broken off, bit for bit where the device computes deterministically, as a CPU does.

A step reads the same windows however many ranks share them. Up to rounding, its result is the same for any number of ranks where
nothing is measured on a part of a batch: balancing by a bias or not at all, and no capacity. A balance loss and a capacity are of
the tokens that a rank computes at once; with these it is the same for the same ``micro_batch``, if that divides every rank's share.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from adamac.moe.cost.machine import Machine
from adamac.moe.lm import checkpoint
from adamac.moe.lm.corpus import Corpus, Order, is_corpus, prepare, unigram_bits_per_byte
from adamac.moe.lm.evaluate import bits_per_byte, predicted
from adamac.moe.lm.folder import RunFolder, field
from adamac.moe.lm.layout import LayoutName
from adamac.moe.lm.learner import Diverged, Learner, Update, shares
from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.sending import Sending, choose_sending
from adamac.moe.lm.text import text_files
from adamac.moe.lm.world import Left, World


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

    def begins(
        self, recipe: Recipe, corpus: Corpus, parameters: int, done: int, sending: Sending | None
    ) -> None:
        """Training begins; some steps may be done already. ``sending`` is how rows get to experts, ``None`` if all are here."""

    def uncaptured(self, reason: str) -> None:
        """Steps are not captured in a CUDA graph although that was asked for; known, on all ranks alike, after the first."""

    def stepped(self, row: Row) -> None:
        """A step is done."""


class Silent:
    """A watcher that says nothing."""

    def begins(
        self, recipe: Recipe, corpus: Corpus, parameters: int, done: int, sending: Sending | None
    ) -> None:
        """Say nothing."""

    def uncaptured(self, reason: str) -> None:
        """Say nothing."""

    def stepped(self, row: Row) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Result:
    """What a run reached.

    Attributes:
        steps: Updates done.
        bits_per_byte: Of held-out text, its first ``eval_tokens``.
        unigram_bits_per_byte: Of the same text, by a model that knows only how often each token occurs.
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
    layout: LayoutName = "replicated",
    machine: Machine | None = None,
    capture: bool = False,
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
        layout: Whether every rank has all of what is no expert's, "replicated", or a share of everything, "sharded". A run
            may go on with the other.
        machine: Constants that the dispatcher is chosen by, the same for every layer, where experts are divided among ranks;
            the first rank's count. ``None``: the one that a resumed run had on as many ranks or, if there is none, the
            simplest of those that send the fewest bytes.
        capture: Record a micro-batch in a CUDA graph and replay it; where that cannot be, the watcher is told why, and the run
            goes on uncaptured. A run may go on with the other. Where experts are divided, a run that begins with it sends rows
            by ``static_gather``.

    Returns:
        What was reached; the same on all ranks.

    Raises:
        ValueError: If the recipe cannot be computed, the directory holds something else, the corpus is another than a run
            that goes on had, or the machine does not fit the ranks or would change the dispatcher of such a run.
        OSError: If something cannot be written.
        Diverged: If a loss is not finite. The last checkpoint is still there.
        Left: If another rank raised one of these, or is gone.
    """
    world = world or World()
    with world.listening():
        amp = world.device.type == "cuda" if amp is None else amp
        learns = partial(Learner, recipe, world=world, dtype=dtype, amp=amp, layout=layout, capture=capture)
        run = _begin(recipe, directory, resume, machine, capture, world, learns)
        return run.finish(watcher if watcher is not None and world.first else Silent())


def _begin(
    recipe: Recipe,
    directory: Path,
    resume: bool,
    machine: Machine | None,
    capture: bool,
    world: World,
    learns: Callable[..., Learner],
) -> _Run:
    """Make everything ready, from the newest checkpoint if there is one."""
    folder, tokens = RunFolder(directory), shares(recipe, world.size)[0] * recipe.context
    with world.together():  # all have looked before the first writes
        _look(recipe)
        absent = [place for place in (directory, *directory.parents) if not place.exists()]
        begun = folder.is_begun(recipe, resume)
    sending = world.from_first(
        lambda: choose_sending(
            recipe,
            world.expert_ranks,
            tokens,
            machine,
            folder.sendings() if begun else (),
            capture=capture,
        )
    )
    try:
        corpus = _corpus(recipe, folder, begun, sending, world)
        with world.together():
            order = Order(corpus.train_tokens, recipe.context, recipe.seed)
            # Too little to be evaluated is refused now rather than after many steps.
            predicted(corpus, recipe.context, recipe.eval_tokens)
            learner = learns(recipe.model(corpus.vocab), sending=sending)
    except (ValueError, OSError, Left):
        if world.first and not begun:  # what could not begin leaves nothing behind
            shutil.rmtree(absent[-1] if absent else directory, ignore_errors=True)
        raise
    run = _Run(recipe, folder, corpus, order, learner)
    with world.together():
        if world.first:
            folder.keep(sending)
    return run


class _Run:
    """A run that goes on from where it is."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, corpus: Corpus, order: Order, learner: Learner
    ) -> None:
        self.recipe, self.folder, self.corpus, self.order = recipe, folder, corpus, order
        self.learner, self.world = learner, learner.world
        self.step, self.time_s = 0, 0.0
        self._restore()

    def finish(self, watcher: Watcher) -> Result:
        """Take all steps that are left."""
        recipe = self.recipe
        watcher.begins(recipe, self.corpus, self.learner.parameters, self.step, self.learner.sending)
        began = time.monotonic() - self.time_s
        reached, told = None, False
        while self.step < recipe.steps:
            update, seconds = self._update()
            if not told and self.learner.uncaptured:
                watcher.uncaptured(self.learner.uncaptured)
                told = True
            last = self.step == recipe.steps
            reached = self._evaluate() if last or self.step % recipe.eval_every == 0 else None
            self.time_s = time.monotonic() - began
            row = self._row(update, seconds, reached)
            if self.world.first and (reached is not None or self.step % recipe.log_every == 0):
                self.folder.append(asdict(row))
            if last or self.step % recipe.save_every == 0:
                self._save()
            watcher.stepped(row)
        reached = self._evaluate() if reached is None else reached  # it was finished before
        read = predicted(self.corpus, recipe.context, recipe.eval_tokens)
        unigram = unigram_bits_per_byte(self.corpus, read)
        return Result(self.step, reached, unigram, self.time_s, self.learner.parameters)

    def _update(self) -> tuple[Update, float]:
        began = time.monotonic()
        try:
            update = self.learner.update(self.step, self.order)
        except Diverged as error:
            raise self._with_advice(error) from None
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
            reached = bits_per_byte(
                learner.model,
                self.corpus,
                tokens=recipe.eval_tokens,
                batch=learner.micro_batch,
                world=self.world,
            )
        if not math.isfinite(reached):
            raise self._with_advice(Diverged(f"step {self.step} left a model whose numbers are not finite"))
        return reached

    def _with_advice(self, error: Diverged) -> Diverged:
        kept = checkpoint.latest_checkpoint(self.folder.checkpoints)
        remains = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return Diverged(f"{error}; {remains}; try a lower learning rate or a longer warm-up")

    def _save(self) -> None:
        weights, moments = self.learner.weights(), self.learner.moments()
        with self.world.together():
            if self.world.first:
                config, state = self.learner.model.config, {"time_s": self.time_s}
                self.folder.force_rows()
                checkpoint.write_checkpoint(
                    self.folder.checkpoints, self.step, config, weights, moments, state
                )

    def _restore(self) -> None:
        """Go back to the newest checkpoint, if there is one, and forget the rows after it."""
        with self.world.together():
            folder = checkpoint.latest_checkpoint(self.folder.checkpoints)
            if folder is not None:
                weights, moments = (
                    checkpoint.read_parts(folder / f"{name}.safetensors", self.learner.part)
                    for name in ("model", "optimizer")
                )
                self.learner.restore(weights, moments, folder)
                self.step, self.time_s = _state(folder / "state.json")
        with self.world.together():
            if self.world.first:
                self.folder.forget(self.step)


def _state(file: Path) -> tuple[int, float]:
    """Steps and seconds of a checkpoint."""
    step, time_s = field(file, "step"), field(file, "time_s")
    if not isinstance(step, int) or not isinstance(time_s, int | float):
        raise ValueError(f"{file} is damaged: expected numbers, got step {step!r} and time_s {time_s!r}")
    return step, time_s


def _look(recipe: Recipe) -> None:
    """Refuse data that is not there, before anything is written."""
    given = [Path(path) for path in recipe.data]
    if len(given) != 1 or not is_corpus(given[0]):
        text_files(given)


def _corpus(recipe: Recipe, folder: RunFolder, begun: bool, sending: Sending | None, world: World) -> Corpus:
    """Make the folder a run's, and open the prepared corpus that was given or made before, or make it; on the first rank."""
    given = [Path(path) for path in recipe.data]
    data = given[0] if len(given) == 1 and is_corpus(given[0]) else folder.data
    with world.together():
        if world.first and not begun:
            folder.claim(recipe, sending)
        if world.first and data == folder.data and not is_corpus(data):
            prepare(data, given, vocab=recipe.vocab, separator=recipe.separator, held_out=recipe.held_out)
    with world.together():
        corpus = Corpus.load(data)
        if world.first:
            folder.keep_corpus(corpus)
    return corpus
