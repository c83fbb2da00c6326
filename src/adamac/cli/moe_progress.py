"""What ``adamac moe train`` shows while it trains."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from adamac.cli.lines import say

if TYPE_CHECKING:
    from adamac.moe.lm.corpus import Corpus
    from adamac.moe.lm.recipe import Recipe
    from adamac.moe.lm.sending import Sending
    from adamac.moe.lm.train import Row


class Watching:
    """A bar with loss, speed and time left on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, now="preparing text")
        self._steps = self._first = 0
        self._began = time.monotonic()

    def __enter__(self) -> Watching:
        if not self._console.is_terminal:  # no bar to tell it
            self._say("preparing text")
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def begins(
        self, recipe: Recipe, corpus: Corpus, parameters: int, done: int, sending: Sending | None
    ) -> None:
        """Say what will be trained on what."""
        self._steps, self._first, self._began = recipe.steps, done, time.monotonic()
        self._bar.update(self._task, total=recipe.steps, completed=done, now="")
        self._say(f"text: {', '.join(corpus.sources)}")
        self._say(
            f"{corpus.train.bytes / 1e6:.1f} MB to train on, {corpus.held_out.bytes / 1e6:.2f} MB held out, "
            f"{corpus.vocab} tokens in the vocabulary"
        )
        self._say(f"{recipe.preset}: {parameters / 1e6:.1f} million parameters, {recipe.steps} steps")
        if sending is not None:
            self._say(
                f"rows are sent to experts on {sending.ranks} ranks by {sending.dispatcher}: {sending.reason}"
            )
        if done:
            self._say(f"{done} steps were done already")

    def uncaptured(self, reason: str) -> None:
        """Say why steps wait for their host all the same."""
        self._say(f"training is not captured in a CUDA graph: {reason}")

    def stepped(self, row: Row) -> None:
        """Show a step."""
        each = (time.monotonic() - self._began) / max(1, row.step - self._first)
        left = (self._steps - row.step) * each
        now = f"loss {row.loss:.2f}, {row.tokens_per_s:,.0f} tokens/s, {duration(left)} left"
        self._bar.update(self._task, completed=row.step, now=now)
        if row.bits_per_byte is not None:
            self._say(f"step {row.step}: {row.bits_per_byte:.3f} bits per byte of held-out text")
        elif not self._console.is_terminal and row.step % max(1, self._steps // 20) == 0:
            self._say(f"step {row.step}/{self._steps}: {now}")

    def _say(self, line: str) -> None:
        say(self._console, line)


def duration(seconds: float) -> str:
    """Say how long something takes."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
