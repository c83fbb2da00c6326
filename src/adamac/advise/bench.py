"""A clock for operations and whole layers, on one rank or several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adamac.moe.cost.constants import Cost, Sample, Work, fit
from adamac.moe.cost.machine import Machine
from adamac.moe.cost.predict import Prediction, predict
from adamac.moe.dispatch import DISPATCHERS, SENDERS
from adamac.moe.layer import MoE
from adamac.moe.presets import MoEConfig, preset
from adamac.ops.launch import chosen

Call = Callable[[], Any]

# Clock cycles of a GPU for which it waits before a call, some milliseconds, so that the host can get ahead.
_AHEAD = 4_000_000
# Rounds in which a whole layer is timed.
_LAYER_ROUNDS = 5
# A layer is hardly faster than its parts; if it seems so, collectives were slower when they were timed.
_LEAST_WHOLE = 0.5
# A layer that takes so many times what one with nothing to do takes is bound by the device.
_BUSY = 1.5


@dataclass(frozen=True)
class Sizes:
    """What is tried on a kind of device.

    Attributes:
        tokens: Numbers of rows; with four copies of each where experts are meant.
        hidden: Widths; a quarter of each is the narrow one.
        experts: Numbers of experts.
        message_bytes: Of a collective, what a rank sends to others.
        layer: Hidden width, experts, top-k and tokens of a layer that is timed as a whole.
        checked: The same of layers that predictions are compared with.
        rounds: Timed runs.
    """

    tokens: tuple[int, ...]
    hidden: tuple[int, ...]
    experts: tuple[int, ...]
    message_bytes: tuple[int, ...]
    layer: tuple[int, int, int, int]
    checked: tuple[tuple[int, int, int, int], ...]
    rounds: int


@dataclass(frozen=True)
class Case:
    """A layer to be timed as a whole.

    Attributes:
        name: Of its shape.
        config: Its shape.
        tokens: On each rank.
        dispatcher: What moves its rows.
        backward: Both passes, or the forward pass alone.
    """

    name: str
    config: MoEConfig
    tokens: int
    dispatcher: str
    backward: bool


CPU = Sizes(
    tokens=(128, 512, 2048),
    hidden=(128, 256, 512),
    experts=(4, 16),
    message_bytes=tuple(2**power for power in (10, 14, 18, 20, 22, 23)),
    layer=(256, 8, 2, 1024),
    checked=((256, 16, 4, 512), (512, 16, 4, 1024)),
    rounds=9,
)
GPU = Sizes(
    tokens=(1024, 4096, 16384),
    hidden=(1024, 2048, 4096),
    experts=(16, 64),
    message_bytes=tuple(2**power for power in (12, 18, 20, 22, 24, 26, 28)),
    layer=(4096, 64, 8, 16384),
    checked=((1024, 64, 8, 8192), (2048, 64, 4, 16384), (2048, 64, 8, 4096)),
    rounds=15,
)


class Bench:
    """A device, a group of ranks, and a clock."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, group: dist.ProcessGroup | None, sizes: Sizes
    ) -> None:
        self.device, self.dtype, self.group, self.sizes = device, dtype, group, sizes
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.impl: Any = chosen("auto", torch.empty(1, 1, device=device, dtype=dtype))

    def fitted(self, trials: Iterator[tuple[Work, Call]]) -> Cost:
        """Time all trials, and fit what they cost."""
        works, calls = zip(*trials, strict=True)
        times = self.times_ms(calls, self._device_ms, self.sizes.rounds)
        return fit([Sample(*pair) for pair in zip(works, times, strict=True)])

    def times_ms(self, calls: Sequence[Call], clock: Callable[[Call], float], rounds: int) -> list[float]:
        """Median milliseconds of each call on average over ranks, after one round that does not count.

        The calls take turns, so that what else the machine does meets all of them alike; ranks begin each together.
        """
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds + 1):
            for call, series in zip(calls, times, strict=True):
                self.wait()
                series.append(clock(call))
        return self.mean([median(series[1:]) for series in times])

    def _device_ms(self, call: Call) -> float:
        if self.device.type != "cuda":
            return self._wall_ms(call, 1)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def _wall_ms(self, call: Call, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * (time.perf_counter() - begin) / calls

    def wait(self) -> None:
        """Wait for the device and for all ranks, so that they work at the same time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.ranks > 1:
            token = torch.zeros(1, device=self.device)
            dist.all_reduce(token, group=self.group)
            token.item()

    def mean(self, times: list[float]) -> list[float]:
        """Average over ranks."""
        if self.ranks == 1:
            return times
        total = torch.tensor(times, device=self.device, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return (total / self.ranks).tolist()

    def random(self, *shape: int) -> Tensor:
        """Random values."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def dispatchers(self) -> tuple[str, ...]:
        """Those that run on so many ranks and take whatever they are given."""
        return tuple(DISPATCHERS) if self.ranks > 1 else ("local",)

    def senders(self) -> tuple[str, ...]:
        """Those that run on so many ranks which all have equally many tokens, as here."""
        return tuple(SENDERS) if self.ranks > 1 else ("local",)

    def least_ms(self, both: bool) -> dict[str, float]:
        """Milliseconds of a layer that has next to nothing to do, by dispatcher, forward or both passes."""
        config = preset("bigmac", 64, num_experts=2 * self.ranks, top_k=2)
        cases = [Case("smallest", config, 8, dispatcher, both) for dispatcher in self.dispatchers()]
        times = self.layer_times_ms(cases, calls=10)
        return {case.dispatcher: time for case, time in zip(cases, times, strict=True)}

    def layer_times_ms(self, cases: Sequence[Case], *, calls: int = 2) -> list[float]:
        """Milliseconds of whole layers, each called several times in a row as in a model."""
        steps = [self._step(case) for case in cases]
        return self.times_ms(steps, lambda step: self._wall_ms(step, calls), _LAYER_ROUNDS)

    def _step(self, case: Case) -> Call:
        layer = MoE(case.config, case.dispatcher, self.group, device=self.device, dtype=self.dtype)
        rows = self.random(case.tokens, case.config.hidden).requires_grad_(case.backward)
        gradient = self.random(case.tokens, case.config.hidden)

        def forward() -> None:
            with torch.no_grad():
                layer(rows)

        def both() -> None:
            layer.zero_grad()
            layer(rows).backward(gradient)

        return both if case.backward else forward

    def predicted(self, case: Case, machine: Machine) -> Prediction:
        """What a machine says of a case."""
        return predict(
            case.config,
            case.tokens,
            self.ranks,
            case.dispatcher,
            machine,
            backward=case.backward,
            itemsize=self.dtype.itemsize,
        )

    def whole(self, machine: Machine) -> float:
        """What a layer's own work takes, divided by the sum of its parts, which were timed alone and with warm caches.

        A layer whose time is the host's says nothing about its parts, and is left out.
        """
        factors = []
        cases = self.cases(*self.sizes.layer)
        for case, measured_ms in zip(cases, self.layer_times_ms(cases), strict=True):
            said = self.predicted(case, machine)
            least = machine.least_both_ms if case.backward else machine.least_ms
            if measured_ms < _BUSY * least[case.dispatcher]:
                continue
            own_ms = sum(said.stages_ms.values()) - said.sending_ms
            factors.append((measured_ms - said.sending_ms) / own_ms)
        return max(_LEAST_WHOLE, median(factors)) if factors else 1.0

    def cases(self, hidden: int, experts: int, top_k: int, tokens: int) -> list[Case]:
        """Both sides of a shape, by each dispatcher and pass; experts are rounded up to as many on each rank."""
        experts = -(-experts // self.ranks) * self.ranks
        return [
            Case(name, preset(name, hidden, experts, top_k), tokens, dispatcher, backward)
            for name in ("fine_grained", "bigmac")
            for dispatcher in self.dispatchers()
            for backward in (False, True)
        ]
