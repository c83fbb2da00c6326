"""What happened in every call: sparse or dense and why, how dense, how long each stage took.

Nothing here waits for the device while a video is made: densities stay tensors and times stay events until a report is
asked for.
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from adamac.integrations.diffusers.stopwatch import Stopwatch


@dataclass(frozen=True)
class Call:
    """One self-attention call.

    Attributes:
        step: Index of the denoising step.
        layer: Index of the layer.
        branch: Guidance branch.
        reason: Why the call was dense; ``None`` if it was sparse.
        density: ``[batch, heads]``.
        cost: Density plus centroids, ``[batch, heads]``.
        impl: What carried the call out; ``None`` if it went past us.
    """

    step: int
    layer: int
    branch: str
    reason: str | None
    density: Tensor | None = None
    cost: Tensor | None = None
    impl: str | None = None


@dataclass(frozen=True)
class Report:
    """What sparse attention did since the handle was made or cleared (at most the last 32 videos).

    Attributes:
        calls: Self-attention calls.
        sparse_calls: Of these, how many were sparse.
        dense_calls: Number of dense calls by reason.
        dense_impl: Number of dense calls by the implementation that carried them out, those that went past us left out;
            :func:`adamac.ops.dense_attention.choices` says why it was chosen.
        sparse_impl: Number of sparse calls by the implementation that carried them out, and why it was not a faster one.
        density: Mean share of (query, key) pairs computed exactly; a dense call counts as 1.
        sparse_density: The same over the sparse calls alone; ``None`` if there were none.
        cost: The same with the centroids that compensation reads.
        density_by_step_layer: ``[step][layer]``, mean over branches, samples, heads and videos; ``None`` where no call was.
        density_by_layer_head: ``[layer][head]`` over the sparse calls; ``None`` for a layer that had none.
        seconds: Time by stage: ``plan`` (clustering and selection), ``attend`` (carrying plans out), ``dense``.
        state_bytes: Bytes that plans kept between steps held at most.
        ranks: Over how many ranks the sequences were spread; counts, densities and bytes are those of this rank's heads.
        rank_seconds: Time of all stages on each rank; empty if the ranks were not asked.
    """

    calls: int
    sparse_calls: int
    dense_calls: dict[str, int]
    dense_impl: dict[str, int]
    sparse_impl: dict[str, int]
    density: float
    sparse_density: float | None
    cost: float
    density_by_step_layer: list[list[float | None]]
    density_by_layer_head: list[list[float] | None]
    seconds: dict[str, float]
    state_bytes: int
    ranks: int = 1
    rank_seconds: tuple[float, ...] = ()

    @property
    def imbalance(self) -> float | None:
        """Time of the slowest rank over the mean of all ranks; ``None`` if the ranks were not asked."""
        total = sum(self.rank_seconds)
        return max(self.rank_seconds) * len(self.rank_seconds) / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.calls:
            return "no self-attention call was seen; did the pipeline run, with an attention back end that calls SDPA?"
        share = "" if self.sparse_density is None else f" and read {self.sparse_density:.1%} of the pairs"
        lines = [
            f"{self.sparse_calls} of {self.calls} self-attention calls were sparse{share}; density of all calls {self.density:.1%}"
        ]
        lines += [f"  dense: {reason}: {count}" for reason, count in sorted(self.dense_calls.items())]
        for kind, impl in (("dense", self.dense_impl), ("sparse", self.sparse_impl)):
            lines += [f"  {kind} calls by {name}: {count}" for name, count in sorted(impl.items())]
        lines += [f"  seconds in {stage}: {seconds:.2f}" for stage, seconds in self.seconds.items()]
        lines.append(f"  state kept between steps: {self.state_bytes / 2**20:.1f} MiB")
        if self.ranks > 1:
            balance = "" if self.imbalance is None else f"; slowest rank over mean: {self.imbalance:.3f}"
            lines.append(f"  sequences spread over {self.ranks} ranks{balance}")
        return "\n".join(lines)


# A server makes videos for months and may never ask: older ones are forgotten.
_VIDEOS = 32
# Modules that are called by themselves make no steps; so many calls are folded together then.
_LONGEST_STEP = 4096
STAGES = ("plan", "attend", "dense")


@dataclass(frozen=True)
class _Calls:
    """Calls of one step whose shares have one shape: a row for each.

    Attributes:
        step: Index of the step.
        layers: Of each call.
        counts: Calls by reason (``None`` if sparse) and implementation.
        density: ``[calls, heads]``, means over samples; ``None`` if the calls were dense.
        cost: Likewise.
    """

    step: int
    layers: array[int]
    counts: Counter[tuple[str | None, str | None]]
    density: Tensor | None
    cost: Tensor | None

    @classmethod
    def fold(cls, calls: list[Call]) -> _Calls:
        density, cost = _rows(call.density for call in calls), _rows(call.cost for call in calls)
        counts = Counter((call.reason, call.impl) for call in calls)
        return cls(calls[0].step, array("l", (call.layer for call in calls)), counts, density, cost)


@dataclass
class _Video:
    calls: list[_Calls] = field(default_factory=list)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class Ledger:
    """Takes down calls and stage times of the last videos. Another thread may ask for reports meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._videos: deque[_Video] = deque([_Video()], maxlen=_VIDEOS)
        self._step: list[Call] = []  # calls of the step in progress
        self._stopwatch = Stopwatch()
        self._state_bytes = 0

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._step = []
            self._videos.clear()
            self._videos.append(_Video())
            self._state_bytes = 0

    def begin_video(self) -> None:
        """Open a new page."""
        with self._lock:
            self._close_step()
            self._videos.append(_Video())

    def add(self, call: Call) -> None:
        """Take down one call."""
        with self._lock:
            if self._step and (self._step[0].step != call.step or len(self._step) >= _LONGEST_STEP):
                self._close_step()
            self._step.append(call)

    def held(self, state_bytes: int) -> None:
        """Take down how much the kept plans hold."""
        self._state_bytes = max(self._state_bytes, state_bytes)

    def timed(self, stage: str, device: torch.device, run: Callable[[], Any]) -> Any:
        """Run a stage and take down how long it took, without waiting for the device."""
        return self._stopwatch.time(self._videos[-1].seconds, stage, device, run)

    def report(self) -> Report:
        """Read everything back from the device and add it up."""
        self._stopwatch.read(wait=True)
        with self._lock:
            self._close_step()
            calls = [each for video in self._videos for each in video.calls]
            spent = [dict(video.seconds) for video in self._videos]
            state_bytes = self._state_bytes
        reasons, dense_impl, sparse_impl = _counts(calls)
        read = [share for each in calls if each.density is not None for share in _shares(each, each.density)]
        return Report(
            calls=sum(len(each.layers) for each in calls),
            sparse_calls=sum(len(each.layers) for each in calls) - reasons.total(),
            dense_calls=dict(reasons),
            dense_impl=dict(dense_impl),
            sparse_impl=dict(sparse_impl),
            density=_average([share for each in calls for share in _shares(each, each.density)]),
            sparse_density=_average(read) if read else None,
            cost=_average([share for each in calls for share in _shares(each, each.cost)]),
            density_by_step_layer=_by_step_and_layer(calls),
            density_by_layer_head=_by_layer_and_head(calls),
            seconds={stage: sum(each.get(stage, 0.0) for each in spent) for stage in STAGES},
            state_bytes=state_bytes,
        )

    def _close_step(self) -> None:
        """Keep of the step in progress what a report needs: a few objects instead of several for each call."""
        step, self._step = self._step, []
        alike: dict[Any, list[Call]] = {}
        for call in step:
            share = call.density  # of a layer on another device, or with another number of heads, by itself
            alike.setdefault(None if share is None else (share.device, share.shape), []).append(call)
        self._videos[-1].calls += map(_Calls.fold, alike.values())
        self._stopwatch.read()


def _counts(calls: list[_Calls]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Dense calls by reason, dense calls by implementation, sparse calls by implementation."""
    reasons, dense_impl, sparse_impl = Counter[str](), Counter[str](), Counter[str]()
    for each in calls:
        for (reason, impl), count in each.counts.items():
            if reason is not None:
                reasons[reason] += count
            if impl is not None:
                (sparse_impl if reason is None else dense_impl)[impl] += count
    return reasons, dense_impl, sparse_impl


def _rows(shares: Iterable[Tensor | None]) -> Tensor | None:
    known = [share for share in shares if share is not None]
    return torch.stack(known).mean(1) if known else None


def _shares(calls: _Calls, share: Tensor | None) -> list[float]:
    """A share of each call, mean over heads; a dense call's is 1."""
    return [1.0] * len(calls.layers) if share is None else share.mean(1).tolist()


def _by_step_and_layer(calls: list[_Calls]) -> list[list[float | None]]:
    cells: dict[tuple[int, int], list[float]] = {}
    for each in calls:
        for layer, value in zip(each.layers, _shares(each, each.density), strict=True):
            cells.setdefault((each.step, layer), []).append(value)
    steps, layers = (1 + max((cell[axis] for cell in cells), default=-1) for axis in (0, 1))
    return [
        [_average(cells[step, layer]) if (step, layer) in cells else None for layer in range(layers)]
        for step in range(steps)
    ]


def _by_layer_and_head(calls: list[_Calls]) -> list[list[float] | None]:
    shares: dict[int, list[Tensor]] = {}
    for each in calls:
        if each.density is not None:
            for layer, row in zip(each.layers, each.density.cpu(), strict=True):
                shares.setdefault(layer, []).append(row)
    layers = 1 + max((layer for each in calls for layer in each.layers), default=-1)
    return [
        torch.stack(shares[layer]).mean(0).tolist() if layer in shares else None for layer in range(layers)
    ]


def _average(values: list[float]) -> float:
    return fmean(values) if values else 1.0
