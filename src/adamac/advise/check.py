"""Predictions against the layer itself: the same shapes, timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median

import torch
import torch.distributed as dist

from adamac.advise.bench import CPU, GPU, Bench, Case, Sizes
from adamac.moe.cost.machine import Machine
from adamac.moe.cost.predict import Prediction
from adamac.moe.layer import MoE
from adamac.moe.timing import Stage, StageClock

# Forward passes that stages are averaged over.
_PASSES = 5


@dataclass(frozen=True)
class Check:
    """One layer, predicted and measured.

    Attributes:
        case: Which.
        predicted: What the model says.
        measured_ms: What the layer took.
        stages_ms: By stage, of the forward pass on this rank; empty where both passes were timed.
    """

    case: Case
    predicted: Prediction
    measured_ms: float
    stages_ms: dict[Stage, float]

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted.time_ms / self.measured_ms - 1


def check(
    machine: Machine,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    sizes: Sizes | None = None,
    told: Callable[[str], None] = lambda what: None,
) -> list[Check]:
    """Time the real layer at a few shapes, by every dispatcher; every rank of the group calls it alike.

    Args:
        machine: What predicts, measured on this device and group.
        device: Where.
        dtype: Of values, as in :func:`adamac.advise.measure.measure`.
        group: Ranks that the experts are spread over.
        sizes: Which shapes.
        told: Is told what is timed next.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if cuda else torch.float32)
    bench = Bench(device, dtype, group, sizes or (GPU if cuda else CPU))
    found = []
    for shape in bench.sizes.checked:
        told(f"layers of hidden {shape[0]}")
        cases = bench.cases(*shape)
        for case, measured_ms in zip(cases, bench.layer_times_ms(cases), strict=True):
            stages = {} if case.backward else _stages(bench, case)
            found.append(Check(case, bench.predicted(case, machine), measured_ms, stages))
    return found


def checked(machine: Machine, checks: Sequence[Check]) -> Machine:
    """The machine, with what its predictions were off by: of times, and of ratios between the two sides."""

    def pair(each: Check) -> tuple[int, int, str, bool]:
        return each.case.config.hidden, each.case.config.top_k, each.case.dispatcher, each.case.backward

    ratios = []
    for _, sides in groupby(sorted(checks, key=pair), pair):
        baseline, candidate = sides
        ratios.append((1 + baseline.error) / (1 + candidate.error) - 1)
    return replace(
        machine,
        layer_error=median(abs(each.error) for each in checks),
        ratio_error=median(abs(error) for error in ratios),
    )


def _stages(bench: Bench, case: Case) -> dict[Stage, float]:
    layer = MoE(case.config, case.dispatcher, bench.group, device=bench.device, dtype=bench.dtype)
    clock = StageClock(bench.device)
    rows = bench.random(case.tokens, case.config.hidden)
    with torch.no_grad():
        layer(rows)
        layer.clock = clock
        for _ in range(_PASSES):
            bench.wait()
            layer(rows)
    return {stage: ms / _PASSES for stage, ms in clock.time_ms().items()}
