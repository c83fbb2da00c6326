"""What runs on the device, kernel by kernel: where time goes that no stage explains, and how often the host is asked.

A profiled pass is slower than a timed one, above all for the host; only the device's own times are kept of it, a mean of several
passes. Passes before it that nobody profiles say when the host is done with one and when the device is: if these are nearly
the same, the device waits for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .arms import make_arms
from .cases import LaunchesCase, LayerCase
from .crew import Crew
from .inputs import make

_PASSES = 3
# Passes that are timed without it.
_TIMED = 9
# Kernels in a row, those that take longest.
_MOST = 40


def run(case: LaunchesCase, crew: Crew) -> None:
    """Profile each arm, and hand out a row for each pass."""
    common = {"benchmark": "moe_launches", **asdict(case), "dtype": str(crew.dtype).removeprefix("torch.")}
    layer_case = LayerCase(**asdict(case))
    inputs = make(layer_case, crew.rank, crew.device, crew.dtype)
    inputs.x.requires_grad_()
    arms, problem = crew.attempt(lambda: make_arms(layer_case, inputs.router, crew, crew.dtype))
    if problem is not None:
        crew.row(common | {"arm": "all", "status": "error", "reason": problem})
        return
    for arm in arms:

        def forward(arm: Any = arm) -> None:
            with torch.no_grad():
                arm.forward(inputs.x)

        def both(arm: Any = arm) -> None:
            arm.both(inputs.x, inputs.gradient)

        for name, step in (("forward", forward), ("forward_backward", both)):
            found, problem = crew.attempt(lambda step=step: _profiled(step, crew))
            entries = {"arm": arm.name, "preset": arm.preset, "dispatcher": arm.dispatcher, "pass": name}
            if problem is None:
                entries |= {"status": "ok", **found}
            else:
                entries |= {"status": "error", "reason": problem}
            crew.row(common | entries)


def _done_ms(step: Callable[[], None], crew: Crew) -> tuple[float, float]:
    """Medians of when the host is done with a pass, and when the device is, on this rank."""
    host, whole = [], []
    for _ in range(_TIMED):
        crew.together()
        begin = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - begin))
        crew.wait()
        whole.append(1e3 * (time.perf_counter() - begin))
    return median(host), median(whole)


def _profiled(step: Callable[[], None], crew: Crew) -> dict[str, Any]:
    """Kernels of a pass: how often each runs and what it takes, the longest first."""
    cuda = crew.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    step()
    host_ms, whole_ms = _done_ms(step, crew)
    with profile(activities=activities) as profiler:
        for _ in range(_PASSES):
            step()
        crew.wait()
    events = [
        (event.key, event.count, event.self_device_time_total if cuda else event.self_cpu_time_total)
        for event in profiler.key_averages()
    ]
    kernels = sorted(((1e-3 * us / _PASSES, name, count) for name, count, us in events if us), reverse=True)
    return {
        "launches": sum(count for _, _, count in kernels) / _PASSES,
        "device_ms": sum(time_ms for time_ms, _, _ in kernels),
        "host_ms": host_ms,
        "whole_ms": whole_ms,
        "kernels": [
            {"name": name[:120], "calls": count / _PASSES, "ms": time_ms}
            for time_ms, name, count in kernels[:_MOST]
        ],
    }
