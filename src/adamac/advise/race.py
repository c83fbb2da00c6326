"""Whole layers timed in turns, on one rank or several: what ``adamac moe bench`` shows.

Correct first: each layer is held to itself in float64 on a few tokens, and one that errs too much is not timed. Then all take
turns, round after round, so that what else the machine does meets all alike; a sample is the slowest rank's, and a turn runs
its layer several times in a row as a model does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles

import torch
import torch.distributed as dist

from adamac.advise.bench import Bench, Case
from adamac.moe.layer import MoE
from adamac.moe.traffic import bytes_sent
from adamac.ops.error_budget import over_budget
from adamac.ops.grouped_mlp import MlpImpl

# Tokens that are computed in float64.
_SOME = 64
# Calls of a layer in a turn, and seeds of its weights.
_CALLS, _SEED = 3, 0


@dataclass(frozen=True)
class Timed:
    """A layer and how long it took.

    Attributes:
        case: Which.
        samples_ms: Of each round, the slowest rank's; none if it was not timed.
        bytes_sent: Rows that this rank sends to others.
        problem: Why it was not timed.
    """

    case: Case
    samples_ms: tuple[float, ...]
    bytes_sent: float
    problem: str | None = None

    def percentile_ms(self, percent: int) -> float:
        """Milliseconds that so many per cent of the rounds stayed below."""
        return quantiles(self.samples_ms, n=100, method="inclusive")[percent - 1]


def race(
    cases: Sequence[Case], bench: Bench, rounds: int, told: Callable[[str], None] = lambda what: None
) -> list[Timed]:
    """Check and time layers; every rank of the bench's group calls it alike.

    Args:
        cases: Which.
        bench: Device, ranks, dtype.
        rounds: Timed turns of each; at least 2.
        told: Is told what is done.

    Raises:
        ValueError: If a layer cannot be made on these ranks, or rounds are too few.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2; got {rounds}")
    told("checking")
    problems = [_problem(case, bench) for case in cases]
    running = [number for number, problem in enumerate(problems) if problem is None]
    steps = {number: _step(cases[number], bench) for number in running}
    samples: dict[int, list[float]] = {number: [] for number in running}
    for turn in range(rounds + 1):
        told(f"round {turn} of {rounds}")
        for number, step in steps.items():
            samples[number].append(_turn_ms(step, bench))
    return [
        Timed(
            case,
            tuple(_slowest(samples[n][1:], bench)) if n in samples else (),
            _sent(case, bench),
            problems[n],
        )
        for n, case in enumerate(cases)
    ]


def _layer(case: Case, bench: Bench, dtype: torch.dtype, impl: MlpImpl = "auto") -> MoE:
    torch.manual_seed(_SEED)  # the same on all ranks
    return MoE(case.config, case.dispatcher, bench.group, impl=impl, device=bench.device, dtype=dtype)


@torch.no_grad()
def _problem(case: Case, bench: Bench) -> str | None:
    """What is wrong with a layer's output on any rank, or ``None``."""
    layer = _layer(case, bench, bench.dtype)
    rows = bench.random(_SOME, case.config.hidden)
    output, routing = layer(rows), layer.routing
    assert routing is not None, "a forward pass leaves its routing"
    wide, eager = _layer(case, bench, torch.float64), _layer(case, bench, bench.dtype, "reference")
    for other in (wide, eager):
        other.load_state_dict(layer.state_dict())
    oracle = wide(rows.double(), replace(routing, weights=routing.weights.double()))
    problem = over_budget(output, oracle, eager(rows, routing))
    wrong = bench.mean([float(problem is not None)])[0] > 0
    return (problem or "the output of another rank is wrong") if wrong else None


def _step(case: Case, bench: Bench) -> Callable[[], None]:
    layer = _layer(case, bench, bench.dtype)
    rows = bench.random(case.tokens, case.config.hidden).requires_grad_(case.backward)
    gradient = bench.random(case.tokens, case.config.hidden)

    def step() -> None:
        with torch.set_grad_enabled(case.backward):
            output = layer(rows)
        if case.backward:
            layer.zero_grad()
            output.backward(gradient)

    return step


def _turn_ms(step: Callable[[], None], bench: Bench) -> float:
    bench.wait()
    begin = time.perf_counter()
    for _ in range(_CALLS):
        step()
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
    return 1e3 * (time.perf_counter() - begin) / _CALLS


def _slowest(samples: list[float], bench: Bench) -> list[float]:
    if bench.ranks == 1:
        return samples
    worst = torch.tensor(samples, device=bench.device)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=bench.group)
    return worst.tolist()


def _sent(case: Case, bench: Bench) -> float:
    return bytes_sent(
        case.config, case.tokens, bench.ranks, case.dispatcher, bench.dtype.itemsize, backward=case.backward
    )
