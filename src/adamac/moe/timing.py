"""Where the time of a layer goes: gate, descend, permute, send, experts, collect, ascend.

A layer marks its stages always; what a mark does is up to the clock it was given. The default clock does nothing and costs a
function call. A :class:`StageClock` records CUDA events on a GPU, which nobody waits for until the times are read, and reads the
host's clock on a CPU. Times are those of the forward pass, of one rank. Where communication overlaps with computation, ``send`` and
``collect`` are the time spent waiting for it, not the time it took.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch

Stage = Literal["gate", "descend", "permute", "send", "experts", "collect", "ascend", "shared"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_NOTHING = nullcontext()


class Clock:
    """The clock that does nothing."""

    def stage(self, name: Stage) -> AbstractContextManager[None]:
        """Mark the time within as a stage's."""
        return _NOTHING


class StageClock(Clock):
    """Adds up the time of each stage over any number of forward passes."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Take the device that the layer runs on."""
        self.device = torch.device(device)
        self._seconds: dict[Stage, float] = {}
        self._events: list[tuple[Stage, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: Stage) -> Generator[None]:
        """Mark the time within as a stage's; stages do not nest."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        begin_s = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin_s

    def time_ms(self) -> dict[Stage, float]:
        """Milliseconds of each stage that ran, in the order of the layer; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
        total = dict(self._seconds)
        for name, begin, end in self._events:
            total[name] = total.get(name, 0.0) + begin.elapsed_time(end) / 1e3
        return {name: 1e3 * total[name] for name in STAGES if name in total}

    def reset(self) -> None:
        """Forget all times."""
        self._seconds.clear()
        self._events.clear()
