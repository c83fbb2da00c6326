"""What the ranks of one set of processes share: where they are, how they agree, and how rows leave."""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from adamac.moe.cost.machine import Machine

# A rank whose step failed waits this long for word that the others' failed too. They may be stuck in what it left.
_FAILED_WAIT_S = 20.0


class LeftBehindError(RuntimeError):
    """A step failed on some ranks only; the others wait for them in vain."""


@dataclass
class Crew:
    """One rank, and its way to the others.

    Words are exchanged through a store of their own, never through the fabric that is measured.

    Attributes:
        rank: This one.
        ranks: How many there are.
        device: Of this rank.
        dtype: That layers are timed in.
        store: ``None`` for one rank alone.
        deadline_s: Of all work, on the clock of ``time.time``.
        common: Entries of all rows.
        emit: Takes a row; called on the first rank only.
        pulse: Called now and then while work goes on.
        limit_s: How long a rank waits for the others' words.
        refused: What is not timed, and why, found out before.
        machine: What predicts, once a cost model has been fitted here, or from the start if one was given.
    """

    rank: int
    ranks: int
    device: torch.device
    dtype: torch.dtype
    store: dist.Store | None
    deadline_s: float
    common: dict[str, Any]
    emit: Callable[[dict[str, Any]], None]
    pulse: Callable[[], None] = lambda: None
    limit_s: float = 300.0
    refused: dict[str, str] = field(default_factory=dict)
    machine: Machine | None = None
    _words: int = 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks as a layer takes them."""
        return dist.group.WORLD if self.ranks > 1 else None

    def row(self, entries: dict[str, Any]) -> None:
        """Hand out a row."""
        if self.rank == 0:
            self.emit(self.common | entries)

    def agree(self, word: Any, wait_s: float | None = None) -> list[Any]:
        """Exchange a word with all ranks.

        Returns:
            Each rank's word.
        """
        self.pulse()
        if self.store is None:
            return [word]
        self._words += 1
        self.store.set(f"{self._words}/{self.rank}", pickle.dumps(word))
        keys = [f"{self._words}/{rank}" for rank in range(self.ranks)]
        self.store.wait(keys, timedelta(seconds=wait_s or self.limit_s))
        return [pickle.loads(self.store.get(key)) for key in keys]

    def attempt(self, function: Callable[[], Any]) -> tuple[Any, str | None]:
        """Do what may fail, on all ranks.

        Returns:
            Its result, and what went wrong on the first rank where something did.

        Raises:
            LeftBehindError: If it failed here and other ranks do not answer.
        """
        result, problem = None, None
        try:
            result = function()
            self.wait()
        except Exception as error:  # what fails is a row with the reason
            problem = reason(error)
        if problem is not None:
            if "CUDA error" in problem:  # nothing works after it in this process
                raise LeftBehindError(problem)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        try:
            words = self.agree(problem, None if problem is None else _FAILED_WAIT_S)
        except Exception:
            raise LeftBehindError(problem or "the other ranks did not answer") from None
        return result, next((word for word in words if word), None)

    def together(self) -> None:
        """Let all ranks begin at once what comes next: on a GPU on its stream, which the host does not wait for."""
        self.wait()
        if self.ranks > 1:
            dist.all_reduce(torch.zeros(1, device=self.device))

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def in_time(self) -> bool:
        """Whether there is time left, as the first rank sees it."""
        return bool(self.agree(time.time() < self.deadline_s)[0])


def refused(problem: str) -> dict[str, Any]:
    """The row's entries of what was not timed: absent, wrong, or failed."""
    kinds = {"AbsentError": "absent", "wrong": "wrong"}
    return {"status": kinds.get(problem.split(":")[0], "error"), "reason": problem}


def reason(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
