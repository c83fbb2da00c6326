"""Time one self-attention call at the shapes of real models: dense by every kernel there is, and sparse with planning.

Contenders take turns on tensors drawn afresh in each round. A sparse call is what a later denoising step does: cluster from
the centroids of the step before (made from the same tensors with a tenth of noise), select, list, attend. Its stages are
timed apart by a profile of the device's kernels, in a call that is not timed otherwise. Other people's kernels, whose time does
not depend on what is in the tensors, keep those of the first round.

On a GPU the time of a call is the device's, with the host ahead of it, as it is within a transformer's step: the device waits
some milliseconds before the clock starts. What the host needs to put the call in the queue is given apart (``host_ms``); a
step whose other work is shorter than that is bound by the host.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any, get_args

import torch
from torch import Tensor

from adamac.attention import AdaCluster, Plan, Tokens, attend
from adamac.attention.attend import with_text
from adamac.attention.cluster import refine
from adamac.bench.rivals import block_contenders, kmeans_contender
from adamac.bench.shapes import Shape, draw, drift
from adamac.ops.cluster_attention import Impl, cluster_attention, resolve
from adamac.ops.dense_attention import Impl as DenseImpl
from adamac.ops.dense_attention import dense_attention
from adamac.ops.dense_attention import resolve as resolve_dense
from adamac.ops.error_budget import over_budget
from adamac.ops.segment import Segments

STAGES = {
    "nearest": ("_nearest",),
    "sort": ("sort", "radix", "Sort", "scan_by_key"),
    "moments": ("_moments",),
    "select": ("_fill", "gemm", "cutlass", "cublas", "Kernel2"),
    "pack": ("pack_kernel",),
    "list": ("list_kernel", "skip_kernel"),
    "attend": ("attend_kernel",),
}
"""Names of kernels by stage; whatever is in none is "other"."""


@dataclass(frozen=True)
class Sparse:
    """One sparse contender.

    Attributes:
        density: Share of the video keys that each row reads exactly.
        compensate: Whether the rest enters through cluster means.
        impl: How the plan is carried out.
        key_roots: Key clusters, as a multiple of the root of the number of video tokens; ``None`` is what the method has.
    """

    density: float
    compensate: bool
    impl: Impl = "auto"
    key_roots: float | None = None

    @property
    def name(self) -> str:
        """A name for rows."""
        keys = "" if self.key_roots is None else f", keys {self.key_roots:g} root N"
        return f"adamac {self.density:.0%}{' compensated' if self.compensate else ''}{keys}"

    def method(self, base: AdaCluster, shape: Shape) -> AdaCluster:
        """The method with this contender's budget and clusters."""
        method = replace(base, budget=Tokens(self.density), compensate=self.compensate)
        if self.key_roots is None:
            return method
        return replace(method, key_clusters=round(self.key_roots * shape.video**0.5))


def compare(
    shape: Shape,
    contenders: list[Sparse],
    *,
    method: AdaCluster,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Time all contenders in turns.

    Args:
        shape: The call.
        contenders: Sparse ones; dense ones are all that run on this device.
        method: What plans; each contender has its own budget.
        device: Where.
        dtype: Of query, key and value.
        rounds: Timed rounds, after one that is not.

    Yields:
        A row for each contender, with times in milliseconds; the sparse ones also with their stages.
    """
    times = Times(Timer(device))
    facts: dict[str, dict[str, Any]] = {}
    for number in range(rounds + 1):
        query, key, value = draw(shape, device, dtype, seed=number)
        if number == 0:
            dense = dense_names(query, key, value)
        for name in dense:
            times.take(name, _dense(query, key, value, name))
        before = drift(query, 0.1, number), drift(key, 0.1, number + 1)
        kept = {
            roots: Sparse(0.15, True, key_roots=roots)
            .method(method, shape)(*before, layout=shape.layout())
            .carried()
            for roots in {None, *(each.key_roots for each in contenders)}
        }
        for each in contenders:
            former = kept[each.key_roots]
            plan_call = _plan(each.method(method, shape), query, key, shape, former)
            plan = times.take(f"{each.name}, plan", plan_call)
            if number == 0:
                check(query, key, value, plan, shape, each.impl)
            times.take(f"{each.name}, attend", _attend(query, key, value, plan, each.impl))
            whole = _whole(plan_call, query, key, value, each.impl)
            times.take(each.name, whole)
            if number == 0:
                facts[each.name] = facts_of(each, plan, query, whole)
        if number == 0:
            others = rivals(shape, query, key, value, kept[None], {each.density for each in contenders})
            yield from (
                {"arm": name, "refused": call} for name, call in others.items() if isinstance(call, str)
            )
        for name, call in others.items():
            if not isinstance(call, str):
                times.take(name, call)
    fastest = min(dense, key=times.median_ms)
    for name in times.names():
        yield {"arm": name} | times.row(name, fastest) | facts.get(name, {})


class Times:
    """What each contender took, call by call; its first call warms up and is not counted."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._warm: set[str] = set()
        self._device: dict[str, list[float]] = defaultdict(list)
        self._host: dict[str, list[float]] = defaultdict(list)

    def take(self, name: str, call: Callable[[], Any]) -> Any:
        """Run a contender once and return what it gave."""
        elapsed, host, result = self._timer.time(call)
        if name in self._warm:
            self._device[name].append(elapsed)
            self._host[name].append(host)
        self._warm.add(name)
        return result

    def names(self) -> list[str]:
        """Who was timed, in order."""
        return list(self._device)

    def median_ms(self, name: str) -> float:
        """Milliseconds on the device."""
        return median(self._device[name])

    def row(self, name: str, fastest: str) -> dict[str, Any]:
        """A contender's times, and its speed-up over the fastest dense one, round by round."""
        series = self._device[name]
        spread = quantiles(series, n=5, method="inclusive") if len(series) > 1 else series
        ratios = [base / own for base, own in zip(self._device[fastest], series, strict=True)]
        return {
            "time_ms": median(series),
            "time_ms_p20": spread[0],
            "time_ms_p80": spread[-1],
            "host_ms": median(self._host[name]),
            "rounds": len(series),
            "fastest_dense": fastest.removeprefix("dense "),
            "speedup": median(ratios),
        }


def rivals(
    shape: Shape, query: Tensor, key: Tensor, value: Tensor, former: Plan | None, densities: set[float]
) -> dict[str, Callable[[], Any] | str]:
    """Other people's kernels at the same work, and ours where there is no row of it yet; or why one cannot run."""
    found: dict[str, Callable[[], Any] | str] = {}
    for density in sorted(densities, reverse=True):
        found |= block_contenders(query, key, value, density)
    if former is not None:
        layout = shape.layout()
        centroids = former.centroids()[1]
        keys = layout.video(key)
        found["k-means of keys, adamac"] = lambda: (
            refine(keys, centroids, layout, iterations=1, metric="euclidean").members.order
        )
        found["k-means of keys, flash-kmeans"] = kmeans_contender(key, centroids, layout)
    return found


def dense_names(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Dense kernels that run here and agree with the reference."""
    names = []
    for impl in get_args(DenseImpl):
        if impl == "auto":
            continue
        try:
            resolve_dense(query, key, value, impl)
        except ValueError:
            continue
        names.append(f"dense {impl}")
    return names


def facts_of(contender: Sparse, plan: Plan, query: Tensor, call: Callable[[], Tensor]) -> dict[str, Any]:
    """What is no time: density, cost, memory, the implementation; and the stages of one profiled call."""
    facts: dict[str, Any] = {
        "density": float(plan.density().mean()),
        "cost": float(plan.cost().mean()),
        "impl": resolve(contender.impl, query),
        "q_clusters": plan.parts()[0].num_clusters,
        "k_clusters": plan.parts()[1].num_clusters,
    }
    kept = plan.carried()
    facts["state_mib"] = 0.0 if kept is None else kept.state_bytes() / 2**20
    if query.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        facts["extra_peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        facts["stages_ms"] = stages(call)
    return facts


def check(query: Tensor, key: Tensor, value: Tensor, plan: Plan, shape: Shape, impl: Impl) -> None:
    """Hold what is about to be timed to the meaning of the plan, on rows of its first head.

    Raises:
        RuntimeError: If it errs more than its dtype explains; nothing wrong is timed.
    """
    rows = torch.linspace(0, shape.tokens - 1, min(shape.tokens, 512), device=query.device).long()
    output = attend(query, key, value, plan, impl=impl)[:, :1, rows]
    queries, keys, reads = (part_of_head(part) for part in with_text(plan))
    sampled = Segments(queries.labels[:, :, rows], queries.number)
    scale = query.shape[-1] ** -0.5
    parts = (query[:, :1, rows], key[:, :1], value[:, :1])
    options: dict[str, Any] = {"compensate": plan.compensate, "scale": scale, "impl": "gather"}
    oracle, _ = cluster_attention(*(part.double() for part in parts), sampled, keys, reads, **options)
    rounded, _ = cluster_attention(*parts, sampled, keys, reads, **options)
    wrong = over_budget(output, oracle, rounded)
    if wrong is not None:
        raise RuntimeError(f"{impl} disagrees with the plan's meaning: {wrong}; nothing was timed")


def part_of_head(part: Any) -> Any:
    """The first head's part of clusters or of a tensor."""
    if isinstance(part, Tensor):
        return part[:, :1]
    return Segments.listed(part.order[:, :1], part.starts[:, :1])


def stages(call: Callable[[], Tensor]) -> dict[str, float]:
    """Milliseconds that the device spends in each stage of a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spent = dict.fromkeys([*STAGES, "other"], 0.0)
    for event in profiler.key_averages():
        stage = next((s for s, names in STAGES.items() if any(name in event.key for name in names)), "other")
        spent[stage] += event.self_device_time_total / 1e3
    return {stage: round(ms, 4) for stage, ms in spent.items()}


class Timer:
    """Milliseconds of a call, by the device's own clock where it has one."""

    # Clock cycles of a GPU for which it waits before a call, some 10 ms, so that the host can get ahead.
    _AHEAD = 16_000_000

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._device = device.type == "cuda", device

    def time(self, call: Callable[[], Any]) -> tuple[float, float, Any]:
        """Run the call once: milliseconds on the device, milliseconds until the host was free again, and the result."""
        if not self._cuda:
            begin = time.perf_counter()
            result = call()
            elapsed = 1e3 * (time.perf_counter() - begin)
            return elapsed, elapsed, result
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        stream.synchronize()
        torch.cuda._sleep(self._AHEAD)
        start.record(stream)
        begin = time.perf_counter()
        result = call()
        host = 1e3 * (time.perf_counter() - begin)
        stop.record(stream)
        stop.synchronize()
        return start.elapsed_time(stop), host, result


def _dense(query: Tensor, key: Tensor, value: Tensor, name: str) -> Callable[[], Tensor]:
    impl: Any = name.removeprefix("dense ")
    return lambda: dense_attention(query, key, value, scale=query.shape[-1] ** -0.5, impl=impl)


def _plan(
    method: AdaCluster, query: Tensor, key: Tensor, shape: Shape, former: Plan | None
) -> Callable[[], Plan]:
    return lambda: method(query, key, layout=shape.layout(), previous=former)


def _attend(query: Tensor, key: Tensor, value: Tensor, plan: Plan, impl: Impl) -> Callable[[], Tensor]:
    return lambda: attend(query, key, value, plan, impl=impl)


def _whole(
    plan: Callable[[], Plan], query: Tensor, key: Tensor, value: Tensor, impl: Impl
) -> Callable[[], Tensor]:
    return lambda: attend(query, key, value, plan(), impl=impl)
