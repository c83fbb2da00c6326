"""Correct first: what an arm must equal before it is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from adamac.moe import MoE
from adamac.ops.error_budget import over_budget

from .arms import Arm, make_arms, make_layer
from .cases import PRESETS, LayerCase
from .crew import Crew
from .inputs import Inputs, make

SMALL = LayerCase(hidden=32, top_k=4, ratio=0.25, tokens=24, num_experts=16, routing="trained_like")
_EQUAL = 1e-12
# Tokens of each rank that are computed in float64 at the real shape.
_SOME = 128


def equality(crew: Crew) -> dict[str, float | str]:
    """Hold every arm, small and in float64, to one rank that has all tokens and all experts.

    Returns:
        By arm the largest relative error of outputs, input gradients and gradients of experts, or what went wrong.
    """
    inputs = make(SMALL, crew.rank, crew.device, torch.float64)
    found: dict[str, float | str] = {}
    arms = make_arms(SMALL, inputs.router, crew, torch.float64)
    for preset_name in PRESETS:
        wanted = _one_rank(preset_name, inputs, crew)
        for arm in (arm for arm in arms if arm.preset == preset_name):
            error, problem = crew.attempt(lambda arm=arm, wanted=wanted: _error(arm, inputs, wanted))
            found[arm.name] = problem or max(crew.agree(error))
    return found


def refusals(errors: dict[str, float | str]) -> dict[str, str]:
    """The arms that must not be timed, and why."""
    return {
        name: error if isinstance(error, str) else f"wrong: differs from one rank by {error:.3g} in float64"
        for name, error in errors.items()
        if isinstance(error, str) or not error <= _EQUAL
    }


@dataclass(frozen=True)
class Truth:
    """Outputs and input gradients of some tokens: in float64, and computed eagerly in the dtype of the benchmark."""

    oracle64: tuple[Tensor, Tensor]
    eager: tuple[Tensor, Tensor]


def truth(case: LayerCase, preset_name: str, inputs: Inputs, dtype: torch.dtype) -> Truth:
    """Compute some tokens on this rank alone, with a loop over all experts."""

    def computed(compute: torch.dtype) -> tuple[Tensor, Tensor]:
        # Drawn in the dtype of the benchmark, so that the weights are the same numbers.
        layer = make_layer(case, preset_name, inputs.router, None, dtype, impl="reference").to(compute)
        return _pass(layer, inputs.x[:_SOME].to(compute), inputs.gradient[:_SOME].to(compute))

    return Truth(computed(torch.float64), computed(dtype))


def problem_at_shape(arm: Arm, inputs: Inputs, expected: Truth) -> str | None:
    """Hold an arm to the error budget, on the tokens that the truth has.

    Returns:
        What is wrong, or ``None``.
    """
    x = inputs.x.detach().clone().requires_grad_()
    output = arm.both(x, inputs.gradient)
    for what, found, oracle64, eager in zip(
        ("outputs", "input gradients"), (output, x.grad), expected.oracle64, expected.eager, strict=True
    ):
        if found is None or not found.isfinite().all():
            return f"wrong: {what} are not finite"
        if problem := over_budget(found[:_SOME].detach(), oracle64, eager):
            return f"wrong: {what}: {problem}"
    return None


def _pass(layer: MoE, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    output = layer(x)
    output.backward(gradient)
    assert x.grad is not None
    return output.detach(), x.grad


def _one_rank(preset_name: str, inputs: Inputs, crew: Crew) -> list[Tensor]:
    """This rank's part of what one rank computes: outputs, input gradients, gradients of its experts."""
    layer = make_layer(SMALL, preset_name, inputs.router, None, torch.float64)
    here = slice(crew.rank * SMALL.tokens, (crew.rank + 1) * SMALL.tokens)
    output, x_gradient = _pass(layer, _of_all(inputs.x, crew), _of_all(inputs.gradient, crew))
    local = SMALL.num_experts // crew.ranks
    own = slice(crew.rank * local, (crew.rank + 1) * local)
    experts = [
        weight.grad[own] for weight in (layer.experts.up, layer.experts.down) if weight.grad is not None
    ]
    return [output[here], x_gradient[here], *experts]


def _of_all(rows: Tensor, crew: Crew) -> Tensor:
    if crew.ranks == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(crew.ranks)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _error(arm: Arm, inputs: Inputs, wanted: list[Tensor]) -> float:
    assert arm.layer is not None
    x = inputs.x.detach().clone().requires_grad_()
    output = arm.both(x, inputs.gradient)
    experts = arm.layer.experts
    found = [output.detach(), x.grad, experts.up.grad, experts.down.grad]
    return max(_relative(a, b) for a, b in zip(found, wanted, strict=True))


def _relative(found: Tensor | None, wanted: Tensor) -> float:
    if found is None:
        return float("inf")
    return float((found - wanted).abs().amax() / wanted.abs().amax())
