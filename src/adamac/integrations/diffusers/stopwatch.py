"""Time by stage on the device's own clock, read without waiting for the device while a video is made.

A stage of a GPU is two events, and a video has some ten thousand stages. Those that are over are read and their events used
again, so that what is held does not grow with the video: hundreds of live objects more a step would also bring on Python's
full garbage collection, which stops a step for a quarter of a second where half a million objects are alive.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch


class Stopwatch:
    """Takes the time of stages and adds it to the seconds it is given. Another thread may read meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: deque[tuple[defaultdict[str, float], str, torch.device, Any, Any]] = deque()
        # By device, which an event is bound to when it is first recorded.
        self._spare: defaultdict[torch.device, list[Any]] = defaultdict(list)

    def time(
        self, seconds: defaultdict[str, float], stage: str, device: torch.device, run: Callable[[], Any]
    ) -> Any:
        """Run a stage and return what it returns; ``seconds[stage]`` grows by its time once that is known."""
        if device.type != "cuda":
            started = time.perf_counter()
            result = run()
            seconds[stage] += time.perf_counter() - started
            return result
        if torch.cuda.is_current_stream_capturing():  # a graph's events say nothing of when it runs
            return run()
        begin, end = self._event(device), self._event(device)
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        result = run()
        end.record(stream)
        with self._lock:
            self._running.append((seconds, stage, device, begin, end))
        return result

    def read(self, *, wait: bool = False) -> None:
        """Add up the stages that are over; all of them if ``wait``, which waits for the device."""
        with self._lock:
            if self._running and torch.cuda.is_current_stream_capturing():  # to ask would break the capture
                return
            while self._running:
                seconds, stage, device, begin, end = self._running[0]
                if wait:
                    end.synchronize()
                elif not end.query():
                    return
                self._running.popleft()
                seconds[stage] += begin.elapsed_time(end) / 1e3
                self._spare[device] += [begin, end]

    def _event(self, device: torch.device) -> Any:
        with self._lock:
            spare = self._spare[device]
            return spare.pop() if spare else torch.cuda.Event(enable_timing=True)
