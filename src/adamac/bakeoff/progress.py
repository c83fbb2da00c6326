"""Progress on the command line: a bar with the time left on a terminal, a line a video elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from adamac.bakeoff.rows import Row


class ConsoleProgress:
    """Tells how a run goes on; a context manager."""

    def __init__(self, console: Console) -> None:
        """Write to this console."""
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),  # a prompt's id and category may hold brackets
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._what = ""
        self._videos = self._done = self._made = 0
        self._making_s = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> ConsoleProgress:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self._bar.stop()

    def begins(self, videos: int, done: int) -> None:
        """A run of so many videos, of which some are done already."""
        self._videos, self._done = videos, done
        self._task = self._bar.add_task("", total=videos, completed=done, left="")
        if done:
            self._console.print(f"{done} of {videos} videos were there already")

    def works_on(self, what: str) -> None:
        """The next piece of work."""
        self._what, self._started = what, time.monotonic()
        self._show(what)
        if not self._made and not self._console.is_terminal:  # nothing else would tell that it lives
            self._console.print(what, highlight=False, markup=False)

    def step_done(self, step: int) -> None:
        """So many denoising steps of the current video are done."""
        self._show(f"{self._what}, step {step}")

    def finished(self, row: Row) -> None:
        """One video is done."""
        self._done += 1
        self._made += 1
        self._making_s += time.monotonic() - self._started
        result = f"{row.latency_s:.1f} s" if row.ok else f"failed: {row.reason}"
        line = f"{self._done}/{self._videos} {row.arm}, {row.prompt_id}, seed {row.seed}: {result}"
        if not self._console.is_terminal:  # no bar to tell it
            line += f" ({self._left()})"
        self._console.print(line, highlight=False, markup=False)
        self._show(self._what)

    def _left(self) -> str:
        seconds = (self._videos - self._done) * self._making_s / max(self._made, 1)
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"

    def _show(self, what: str) -> None:
        if self._task is not None:
            left = self._left() if self._made else ""
            self._bar.update(self._task, description=what, completed=self._done, left=left)
