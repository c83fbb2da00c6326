"""The cost model on this fabric: its constants are fitted first, then it predicts, then the layers are timed.

What is fitted are single operations (``adamac.advise``); no layer that is predicted takes part in it. Layer cases that the same
processes time later carry its prediction too, so that a result says by itself how far it was foreseen.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from adamac.advise.bench import CPU, GPU, Sizes
from adamac.advise.check import check, checked
from adamac.advise.measure import measure

from .cases import CostCase
from .crew import Crew


def run(case: CostCase, crew: Crew) -> None:
    """Fit, predict, time; hand out a row of constants and one for each prediction."""
    common: dict[str, Any] = {"benchmark": "moe_cost", "dtype": str(crew.dtype).removeprefix("torch.")}
    sizes = _sizes(case, crew)

    def told(what: str) -> None:
        crew.pulse()

    machine, problem = crew.attempt(
        lambda: measure(crew.device, crew.dtype, crew.group, sizes=sizes, told=told)
    )
    if problem is None:
        crew.machine = machine
        checks, problem = crew.attempt(
            lambda: check(machine, crew.device, crew.dtype, crew.group, sizes=sizes, told=told)
        )
    if problem is not None:
        crew.row(common | {"arm": "cost model", "status": "error", "reason": problem})
        return
    machine = checked(machine, checks)
    crew.row(common | {"arm": "cost model", "status": "ok", "machine": machine.to_json()})
    for each in checks:
        config = each.case.config
        entries = {
            "preset": each.case.name,
            "dispatcher": each.case.dispatcher,
            "pass": "forward_backward" if each.case.backward else "forward",
            "tokens": each.case.tokens,
            **{name: value for name, value in asdict(config).items() if name in _SHAPE},
            "predicted_ms": each.predicted.time_ms,
            "measured_ms": each.measured_ms,
            "predicted_stage_ms": each.predicted.stages_ms,
            "stage_ms": each.stages_ms,
        }
        crew.row(common | {"benchmark": "moe_prediction", "status": "ok", **entries})


_SHAPE = ("hidden", "num_experts", "top_k", "ffn", "latent")


def _sizes(case: CostCase, crew: Crew) -> Sizes:
    """What is tried: on slow fabrics smaller messages and layers than usual, on a processor next to nothing."""
    if crew.device.type == "cpu":
        layer = (64, 8, 2, case.tokens)
        return Sizes((64, 256), (64, 128), (4, 8), CPU.message_bytes[:3], layer, (layer,), rounds=2)
    layers = ((1024, 64, 8, case.tokens), (2048, 64, 4, case.tokens), (2048, 64, 8, case.tokens))
    messages = tuple(size for size in GPU.message_bytes if size <= case.largest_mib * 2**20)
    layer = (4096, 64, 8, case.tokens)
    return replace(GPU, message_bytes=messages, layer=layer, checked=layers, rounds=9)
