"""One turn of one arm: a pipeline call that is interrupted after the wanted steps, each of them timed."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

import adamac
from adamac.attention import Schedule
from adamac.bakeoff.timing import MemoryPeak
from adamac.integrations.diffusers import Report

from .arms import Arm
from .build import Pipeline, compiled_blocks, few_layers
from .models import Model
from .ranks import Ranks

Kind = Literal["dense", "first_sparse", "sparse"]
KINDS: tuple[Kind, ...] = ("dense", "first_sparse", "sparse")


@dataclass(frozen=True)
class Bench:
    """What all turns on one model share.

    Attributes:
        model: The model.
        pipe: Its pipeline, with nothing installed.
        arguments: Of the pipeline call.
        device: Torch's name of it.
        deadline: When to stop.
        min_tokens: See :class:`adamac.Schedule`; ``None`` means its default.
        warmup_layers: Layers of each list of blocks in a warm-up.
        ranks: Those that the pipeline is spread over.
    """

    model: Model
    pipe: Pipeline
    arguments: dict[str, Any]
    device: str
    deadline: Deadline
    min_tokens: int | None = None
    warmup_layers: int = 1
    ranks: Ranks = field(default_factory=Ranks)


class Deadline:
    """The end of the time that a run may take."""

    def __init__(self, minutes: float | None, ranks: Ranks | None = None) -> None:
        """Start now; ``None`` never ends. Of several ranks, which all have to ask, the first decides."""
        self.minutes = minutes
        self._ranks = ranks or Ranks()
        self._end = None if minutes is None else time.perf_counter() + 60 * minutes

    def allows(self, seconds: float = 0) -> bool:
        """Whether something that takes so long would still be done in time."""
        return self._end is None or self._ranks.say(time.perf_counter() + seconds < self._end)


@dataclass
class Tally:
    """What the steps of one kind took and did, over all turns of an arm.

    Attributes:
        step_ms: Time of each step.
        calls: Self-attention calls; 0 where nothing was installed.
        sparse_calls: Of these, how many were sparse.
        dense_calls: Number of dense calls by reason.
        density: Sum over the calls.
        cost: Likewise.
        seconds: Time by stage.
        rank_seconds: Time of all stages by rank; empty where there is one.
    """

    step_ms: list[float] = field(default_factory=list)
    calls: int = 0
    sparse_calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)
    density: float = 0.0
    cost: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)
    rank_seconds: Counter[int] = field(default_factory=Counter)

    def add(self, step_ms: list[float], report: Report | None) -> None:
        """Add steps of a turn and what the handle reported of them."""
        self.step_ms += step_ms
        if report is None:
            return
        self.calls += report.calls
        self.sparse_calls += report.sparse_calls
        self.dense_calls.update(report.dense_calls)
        self.density += report.density * report.calls
        self.cost += report.cost * report.calls
        self.seconds.update(report.seconds)
        self.rank_seconds.update(dict(enumerate(report.rank_seconds)))


@dataclass(frozen=True)
class Turn:
    """What a turn gave.

    Attributes:
        steps: Kind and time in milliseconds of each step.
        reports: What the handle reported of each kind; empty where nothing was installed.
        peak_gib: Peak memory of the call, weights included.
        peak_kind: Of what.
        in_time: Whether all wanted steps were made.
        impl: How plans were carried out; ``None`` where nothing was installed.
    """

    steps: list[tuple[Kind, float]]
    reports: dict[Kind, Report]
    peak_gib: float | None
    peak_kind: str
    in_time: bool
    impl: str | None

    def of_all(self, ranks: Ranks) -> Turn:
        """The turn of all ranks together: times of the slowest, memory of the one that needs most."""
        times = ranks.slowest([time_ms for _, time_ms in self.steps])
        steps = [(kind, time_ms) for (kind, _), time_ms in zip(self.steps, times, strict=True)]
        return replace(self, steps=steps, peak_gib=ranks.most(self.peak_gib))


def kinds_of_turn(arm: Arm, *, dense: int, first: int, sparse: int) -> tuple[Kind, ...]:
    """Kinds of the steps of a turn, in order.

    Args:
        arm: A dense arm makes dense steps only.
        dense: Steps of a dense arm.
        first: Dense steps at the start of a sparse arm.
        sparse: Steps of a sparse arm after its first sparse step.
    """
    if arm.is_dense:
        return ("dense",) * dense
    return ("dense",) * first + ("first_sparse",) + ("sparse",) * sparse


def warm_up(bench: Bench, arm: Arm) -> None:
    """Compile and tune the arm's kernels at the shapes to come, on a transformer of few layers."""
    kinds = kinds_of_turn(arm, dense=1, first=1, sparse=1)
    with ExitStack() as stack:
        stack.enter_context(few_layers(bench.pipe, bench.model, bench.warmup_layers))
        handle = _install(stack, bench, arm, kinds)
        _run(bench, _Watch(kinds, handle, bench))


def run_turn(bench: Bench, arm: Arm, kinds: tuple[Kind, ...]) -> Turn:
    """Make one turn, with nothing installed before and after.

    Raises:
        FloatingPointError: If latents are not finite.
        RuntimeError: If the arm cannot be computed, out of memory for instance.
    """
    with ExitStack() as stack:
        handle = _install(stack, bench, arm, kinds)
        if arm.compiled:
            stack.enter_context(compiled_blocks(bench.pipe, bench.model))
            # Compiled code is tied to the hooks of this turn, and perhaps to the layer: all layers warm up, in every turn.
            _run(bench, _Watch(tuple(dict.fromkeys(kinds)), handle, bench))
            if handle is not None:
                handle.clear()
        memory = MemoryPeak(bench.device)
        watch = _Watch(kinds, handle, bench)
        _run(bench, watch)
        step_ms = watch.step_ms()
        peak_gib = memory.read_gib()
    if not bool(torch.isfinite(watch.latents).all()):
        raise FloatingPointError("latents are not finite")
    return Turn(
        steps=list(zip(kinds, step_ms, strict=False)),
        reports=watch.reports,
        peak_gib=peak_gib,
        peak_kind=memory.kind,
        in_time=len(step_ms) == len(kinds),
        impl=None if handle is None else str(handle.impl),
    )


def _install(stack: ExitStack, bench: Bench, arm: Arm, kinds: tuple[Kind, ...]) -> Any:
    if arm.method is None:
        return None
    settings: dict[str, Any] = {} if bench.min_tokens is None else {"min_tokens": bench.min_tokens}
    # A dense arm is dense by its method, so that its steps do not depend on what a schedule makes of them.
    first = 0 if arm.is_dense else kinds.count("dense")
    handle = adamac.enable(bench.pipe, arm.method(), Schedule(first=first, **settings))
    return stack.enter_context(handle)


def _run(bench: Bench, watch: _Watch) -> None:
    hook = bench.pipe.transformer.register_forward_pre_hook(watch.starts)
    try:
        bench.pipe(
            generator=torch.Generator("cpu").manual_seed(0),
            callback_on_step_end=watch.step_ended,
            **bench.arguments,
        )
    finally:
        hook.remove()


class _Watch:
    """Marks where steps begin and end, and interrupts the pipeline after the last wanted one."""

    def __init__(self, kinds: tuple[Kind, ...], handle: Any, bench: Bench) -> None:
        self.latents = torch.empty(0)
        self.reports: dict[Kind, Report] = {}
        self._kinds = kinds
        self._handle = handle
        self._deadline = bench.deadline
        self._clock = _Clock(bench.device)
        self._spans: list[tuple[Any, Any]] = []
        self._begin: Any = None
        self._host_s = 0.0

    def starts(self, transformer: Any, inputs: Any) -> None:
        """Mark the begin of the first step; serves as the transformer's pre-hook."""
        if self._begin is None:
            self._begin = self._clock.mark()
            self._host_s = time.perf_counter()

    def step_ended(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Serve as diffusers' ``callback_on_step_end``; changes nothing but when to stop."""
        begin = self._begin
        self._spans.append((begin, self._clock.mark()))
        self.latents = tensors["latents"]
        # Launches run ahead of the device. Waiting for the step before this one keeps them at most a step ahead, so that the
        # time limit sees a true clock, and never drains the device.
        self._clock.wait(begin)
        done, now_s = len(self._spans), time.perf_counter()
        all_done = done >= len(self._kinds)
        # Up to one step may be under way and another is about to begin.
        if all_done or not self._deadline.allows(2 * (now_s - self._host_s)):
            pipe._interrupt = True
        if pipe._interrupt or self._kinds[done] != self._kinds[done - 1]:
            self._collect(self._kinds[done - 1])
        self._begin, self._host_s = self._clock.mark(), time.perf_counter()
        return {}

    def step_ms(self) -> list[float]:
        """Time of each step that was made; waits for the device."""
        return [self._clock.between_ms(begin, end) for begin, end in self._spans]

    def _collect(self, kind: Kind) -> None:
        """Keep what the handle reports of the kind that ends here. Waits for the device, between steps."""
        if self._handle is not None:
            self.reports[kind] = self._handle.report(all_ranks=True)
            self._handle.clear()


class _Clock:
    """Marks in time: events of a GPU's stream, or readings of the host's clock."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        if self._cuda:
            mark.synchronize()

    def between_ms(self, begin: Any, end: Any) -> float:
        if not self._cuda:
            return 1e3 * (end - begin)
        end.synchronize()
        return begin.elapsed_time(end)
