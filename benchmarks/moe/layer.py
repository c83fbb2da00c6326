"""One case: a layer by all arms, checked, timed, taken apart, and the rows that come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from adamac.moe import MoE
from adamac.moe.cost import predict
from adamac.moe.timing import Clock, StageClock
from adamac.moe.traffic import flops_per_token, parameters

from . import bytes_sent
from .arms import Arm, dispatchers, make_arms
from .cases import BASELINE, COPY_PER_EXPERT, PRESETS, LayerCase
from .check import problem_at_shape, truth
from .crew import Crew, refused
from .inputs import Inputs, make
from .rivals import RIVALS
from .turns import figures, turns

Row = dict[str, Any]

# Passes that the times of stages are a mean of.
_STAGE_PASSES = 5


@dataclass(frozen=True)
class _Built:
    inputs: Inputs
    arms: list[Arm]


def run(case: LayerCase, crew: Crew) -> None:
    """Measure a case and hand out a row for each arm."""
    measure("moe_layer", case, crew, lambda inputs: make_arms(case, inputs.router, crew, crew.dtype))


def measure(benchmark: str, case: LayerCase, crew: Crew, make_all: Callable[[Inputs], list[Arm]]) -> None:
    """Measure arms on the inputs of a case and hand out a row for each.

    Args:
        benchmark: Its name in rows.
        case: The layer.
        crew: The ranks.
        make_all: Builds the arms, the first of them plain.
    """
    common = _common(benchmark, case, crew)
    built, problem = crew.attempt(lambda: _build(case, crew, make_all))
    if problem is not None:
        crew.row(common | {"arm": "all", "status": "error", "reason": problem})
        return
    inputs, arms = built.inputs, built.arms
    rows: dict[str, Row] = {}
    if case.rivals:
        arms, rows = _with_rivals(case, crew, arms)
    common |= _load(arms, inputs, crew)
    arms, left_out = _checked(case, crew, inputs, arms)
    rows |= left_out
    passes = {"forward": _forwards(arms, inputs), "forward_backward": _boths(arms, inputs)}
    for name, steps in passes.items():
        for arm, times in turns(steps, crew, case.budget_s / 2).items():
            rows.setdefault(arm, {"status": "ok"})[name] = figures(times)
    for arm in arms:
        rows[arm.name] |= _anatomy(arm, inputs, crew)
        _foresee(rows[arm.name], arm, inputs, crew)
    _compare(rows)
    order = [arm.name for arm in built.arms] + list(RIVALS)
    for name in (name for name in order if name in rows):
        crew.row(common | {"arm": name} | rows[name])


def _common(benchmark: str, case: LayerCase, crew: Crew) -> Row:
    shape = {name: entry for name, entry in asdict(case).items() if name != "budget_s"}
    return {"benchmark": benchmark, **shape, "dtype": str(crew.dtype).removeprefix("torch.")}


def _build(case: LayerCase, crew: Crew, make_all: Callable[[Inputs], list[Arm]]) -> _Built:
    inputs = make(case, crew.rank, crew.device, crew.dtype)
    inputs.x.requires_grad_()
    return _Built(inputs, make_all(inputs))


def _with_rivals(case: LayerCase, crew: Crew, arms: list[Arm]) -> tuple[list[Arm], dict[str, Row]]:
    baseline = next(arm.layer for arm in arms if arm.preset == BASELINE)
    assert baseline is not None
    arms, rows = list(arms), {}
    for name in case.rivals:
        arm, problem = crew.attempt(lambda make_rival=RIVALS[name]: make_rival(case, baseline, crew))
        if problem is None:
            arms.append(arm)
        else:
            rows[name] = refused(problem)
    return arms, rows


def _load(arms: list[Arm], inputs: Inputs, crew: Crew) -> Row:
    """How uneven the routing is, over the tokens of all ranks."""
    layer = arms[0].layer
    assert layer is not None
    with torch.no_grad():
        routing, _ = layer.router(inputs.x)
    load = sum(torch.tensor(part).double() for part in crew.agree(routing.load().tolist()))
    assert isinstance(load, torch.Tensor)
    by_rank = load.view(crew.ranks, -1).sum(1)
    return {
        "load_max_over_mean": float(load.max() / load.mean()),
        "rank_load_max_over_mean": float(by_rank.max() / by_rank.mean()),
    }


def _checked(
    case: LayerCase, crew: Crew, inputs: Inputs, arms: list[Arm]
) -> tuple[list[Arm], dict[str, Row]]:
    """Leave only arms that are right."""
    good: list[Arm] = []
    rows: dict[str, Row] = {}
    for preset in PRESETS:
        expected, problem = crew.attempt(lambda preset=preset: truth(case, preset, inputs, crew.dtype))
        for arm in (arm for arm in arms if arm.preset == preset):
            found = problem or crew.refused.get(arm.name)
            if found is None:
                wrong, found = crew.attempt(
                    lambda arm=arm, expected=expected: problem_at_shape(arm, inputs, expected)
                )
                found = found or next((word for word in crew.agree(wrong) if word), None)
            if found is None:
                good.append(arm)
            else:
                rows[arm.name] = refused(found)
    return good, rows


def _forwards(arms: list[Arm], inputs: Inputs) -> dict[str, Any]:
    def step(arm: Arm) -> None:
        with torch.no_grad():
            arm.forward(inputs.x)

    return {arm.name: lambda arm=arm: step(arm) for arm in arms}


def _boths(arms: list[Arm], inputs: Inputs) -> dict[str, Any]:
    return {arm.name: lambda arm=arm: arm.both(inputs.x, inputs.gradient) for arm in arms}


def _anatomy(arm: Arm, inputs: Inputs, crew: Crew) -> Row:
    """What is not a time of the whole: memory, and of ours bytes, stages and costs."""
    entries: Row = {"preset": arm.preset, "dispatcher": arm.dispatcher, "note": arm.note}
    if arm.captured:  # a replay counts nothing, marks no stage and allocates nothing
        return entries | {"captured": True, "pool_gib": arm.pool_gib()}
    entries["peak_gib"] = _peak_gib(arm, inputs, crew)
    entries["weights_gib"] = sum(weight.nbytes for weight in arm.parameters) / 2**30
    if arm.layer is None:
        return entries
    layer, itemsize = arm.layer, inputs.x.element_size()
    with torch.no_grad():
        arm.forward(inputs.x)
    sent = {"forward": bytes_sent.entry(layer, arm.dispatcher, crew, itemsize, backward=False)}
    arm.both(inputs.x, inputs.gradient)
    sent["forward_backward"] = bytes_sent.entry(layer, arm.dispatcher, crew, itemsize, backward=True)
    return entries | {
        "bytes": sent,
        "stage_ms": _stages(arm, layer, inputs, crew),
        "parameters": parameters(layer.config),
        "flops_per_token": flops_per_token(layer.config),
    }


def _foresee(row: Row, arm: Arm, inputs: Inputs, crew: Crew) -> None:
    """Put beside the times what the cost model, fitted before, says of them."""
    if crew.machine is None or arm.layer is None or arm.dispatcher not in dispatchers(crew.ranks):
        return
    row["predicted_from_ranks"] = crew.machine.ranks  # None: measured on one rank alone
    for name in ("forward", "forward_backward"):
        said = predict(
            arm.layer.config,
            len(inputs.x),
            crew.ranks,
            arm.dispatcher,
            crew.machine,
            backward=name == "forward_backward",
            itemsize=inputs.x.element_size(),
        )
        row[name]["predicted_ms"] = said.time_ms


def _peak_gib(arm: Arm, inputs: Inputs, crew: Crew) -> float | None:
    """What forward and backward allocate on top of what is there, gradients included; the rank that needs most."""
    if crew.device.type != "cuda":
        return None
    inputs.x.grad = None
    for parameter in arm.parameters:
        parameter.grad = None
    torch.cuda.reset_peak_memory_stats(crew.device)
    before = torch.cuda.memory_allocated(crew.device)
    arm.both(inputs.x, inputs.gradient)
    crew.wait()
    return max(crew.agree((torch.cuda.max_memory_allocated(crew.device) - before) / 2**30))


def _stages(arm: Arm, layer: MoE, inputs: Inputs, crew: Crew) -> dict[str, float]:
    """Milliseconds of each stage of a forward pass on the first rank."""
    clock = StageClock(crew.device)
    layer.clock = clock
    with torch.no_grad():
        crew.together()
        arm.forward(inputs.x)
        clock.reset()
        for _ in range(_STAGE_PASSES):
            arm.forward(inputs.x)
    crew.wait()
    layer.clock = Clock()
    return {stage: time_ms / _STAGE_PASSES for stage, time_ms in clock.time_ms().items()}


def _ours(row: Row) -> bool:
    return "bytes" in row or row.get("captured", False)


def _compare(rows: dict[str, Row]) -> None:
    """Give every row that was timed its ratios to the baseline: above 1 is faster than it."""
    for name in ("forward", "forward_backward"):
        baseline = {
            row["dispatcher"] + ", captured" * row.get("captured", False): row[name]["p50_ms"]
            for row in rows.values()
            if row["status"] == "ok" and row["preset"] == BASELINE and _ours(row)
        }
        for row in (row for row in rows.values() if row["status"] == "ok" and baseline):
            own = row[name]["p50_ms"]
            row[name]["over_best_baseline"] = min(baseline.values()) / own
            copies = baseline.get(COPY_PER_EXPERT, baseline.get("local"))
            row[name]["over_copy_per_expert"] = None if copies is None else copies / own
