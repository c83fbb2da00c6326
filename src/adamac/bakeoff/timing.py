"""Clocks and memory.

A device works on after a call returns, so the clock waits for it. Memory on a GPU is the allocator's peak; on a CPU it is the
peak of the process's resident memory, libraries and weights included, reset before each video where the system allows that
(Linux) and else the peak since the process started. The row says which.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

_GIB = 2**30
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Clock:
    """Seconds since it was made, after the device has caught up."""

    def __init__(self, device: str) -> None:
        """Start now."""
        self._cuda = device.startswith("cuda")
        self._start = self._now()

    def read(self) -> float:
        """Seconds since the start."""
        return self._now() - self._start

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class MemoryPeak:
    """Peak memory since it was made."""

    def __init__(self, device: str) -> None:
        """Forget earlier peaks where that is possible."""
        self._cuda = device.startswith("cuda")
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self.kind = "cuda allocated"
        else:
            self.kind = "process resident" if _reset_resident_peak() else "process resident since start"

    def read_gib(self) -> float | None:
        """Peak in GiB, or ``None`` where it cannot be known."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else _resident_peak_bytes()
        return None if peak is None else peak / _GIB


def _reset_resident_peak() -> bool:
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident_peak_bytes() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return _resident_peak_since_start()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def _resident_peak_since_start() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss  # bytes on macOS, the one system that comes here
