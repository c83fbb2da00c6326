"""What happened in every call: sparse or dense and why, how dense, how long each stage took.

Nothing here waits for the device while a video is made: densities stay tensors and times stay events until a report is
asked for.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


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
        lines = [
            f"{self.sparse_calls} of {self.calls} self-attention calls were sparse; density {self.density:.1%}"
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


@dataclass
class _Video:
    calls: list[Call] = field(default_factory=list)
    times: list[tuple[str, Callable[[], float]]] = field(default_factory=list)


class Ledger:
    """Takes down calls and stage times of the last videos."""

    def __init__(self) -> None:
        self._videos: deque[_Video] = deque([_Video()], maxlen=_VIDEOS)
        self._state_bytes = 0

    def clear(self) -> None:
        """Forget everything."""
        self._videos.clear()
        self._videos.append(_Video())
        self._state_bytes = 0

    def begin_video(self) -> None:
        """Open a new page."""
        self._videos.append(_Video())

    def add(self, call: Call) -> None:
        """Take down one call."""
        self._videos[-1].calls.append(call)

    def held(self, state_bytes: int) -> None:
        """Take down how much the kept plans hold."""
        self._state_bytes = max(self._state_bytes, state_bytes)

    def timed(self, stage: str, device: torch.device, run: Callable[[], Any]) -> Any:
        """Run a stage and take down how long it took, without waiting for the device."""
        times = self._videos[-1].times
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)
            begin.record(stream)
            result = run()
            end.record(stream)
            times.append((stage, lambda: begin.elapsed_time(end) / 1e3))
        else:
            started = time.perf_counter()
            result = run()
            elapsed = time.perf_counter() - started
            times.append((stage, lambda: elapsed))
        return result

    def report(self) -> Report:
        """Read everything back from the device and add it up."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = {"plan": 0.0, "attend": 0.0, "dense": 0.0}
        for video in self._videos:
            for stage, elapsed in video.times:
                seconds[stage] += elapsed()
        calls = [call for video in self._videos for call in video.calls]
        density = [_mean(call.density) for call in calls]
        cost = [_mean(call.cost) for call in calls]
        reasons = Counter(call.reason for call in calls if call.reason is not None)
        impl = Counter((call.reason is None, call.impl) for call in calls if call.impl is not None)
        return Report(
            calls=len(calls),
            sparse_calls=sum(call.reason is None for call in calls),
            dense_calls=dict(reasons),
            dense_impl={name: count for (sparse, name), count in impl.items() if not sparse},
            sparse_impl={name: count for (sparse, name), count in impl.items() if sparse},
            density=_average(density),
            cost=_average(cost),
            density_by_step_layer=_by_step_and_layer(calls, density),
            density_by_layer_head=_by_layer_and_head(calls),
            seconds=seconds,
            state_bytes=self._state_bytes,
        )


def _by_step_and_layer(calls: list[Call], density: list[float]) -> list[list[float | None]]:
    cells: dict[tuple[int, int], list[float]] = {}
    for call, value in zip(calls, density, strict=True):
        cells.setdefault((call.step, call.layer), []).append(value)
    steps = 1 + max((call.step for call in calls), default=-1)
    layers = 1 + max((call.layer for call in calls), default=-1)
    return [
        [_average(cells[step, layer]) if (step, layer) in cells else None for layer in range(layers)]
        for step in range(steps)
    ]


def _by_layer_and_head(calls: list[Call]) -> list[list[float] | None]:
    shares: dict[int, list[Tensor]] = {}
    for call in calls:
        if call.density is not None:
            shares.setdefault(call.layer, []).append(call.density.mean(0))
    layers = 1 + max((call.layer for call in calls), default=-1)
    return [
        torch.stack(shares[layer]).mean(0).tolist() if layer in shares else None for layer in range(layers)
    ]


def _mean(share: Tensor | None) -> float:
    return 1.0 if share is None else float(share.mean())


def _average(values: list[float]) -> float:
    return sum(values) / len(values) if values else 1.0
