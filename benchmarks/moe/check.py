"""Correct first: what an arm must equal before it is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from adamac.moe import MoE
from adamac.ops.error_budget import over_budget

from .arms import Arm, make_arms, make_layer
from .cases import PRESETS, LayerCase
from .crew import Crew
from .inputs import Inputs, make

SMALL = LayerCase(hidden=32, top_k=4, ratio=0.25, tokens=24, num_experts=16, routing="trained_like")
_EQUAL = 1e-12
# In half precision a sum of a few products in another order differs by several roundings of its terms.
_NEAR = 0.05
# Tokens of each rank that are computed in float64 at the real shape.
_SOME = 128

Situation = Literal["usual", "first rank has all tokens", "first rank has all work"]
_SITUATIONS: tuple[Situation, ...] = get_args(Situation)


def equality(crew: Crew) -> dict[str, float | str]:
    """Hold every arm, small and in float64, to one rank that has all tokens and all experts.

    Returns:
        By arm the largest relative error of outputs, input gradients and gradients of experts, or what went wrong.
    """
    return _errors(crew, torch.float64, "usual")


def hard_situations(crew: Crew) -> dict[str, float | str]:
    """The same where ranks have no tokens, or their experts no rows: by arm, dtype and situation."""
    found: dict[str, float | str] = {}
    for dtype in (torch.float64, crew.dtype):
        for situation in _SITUATIONS:
            if (dtype, situation) != (torch.float64, "usual"):
                for arm, error in _errors(crew, dtype, situation).items():
                    found[f"{arm}, {str(dtype).removeprefix('torch.')}, {situation}"] = error
    return found


def problems(errors: dict[str, float | str]) -> dict[str, str]:
    """Those of the hard situations that are too far off, or failed."""

    def bad(name: str, error: float | str) -> bool:
        return isinstance(error, str) or not error <= (_EQUAL if "float64" in name else _NEAR)

    return {name: str(error) for name, error in errors.items() if bad(name, error)}


def _errors(crew: Crew, dtype: torch.dtype, situation: Situation) -> dict[str, float | str]:
    everyones = [_inputs(rank, situation, crew.device, dtype) for rank in range(crew.ranks)]
    inputs, found = everyones[crew.rank], dict[str, float | str]()
    arms = make_arms(SMALL, inputs.router, crew, dtype)
    for preset_name in PRESETS:
        wanted = _one_rank(preset_name, everyones, crew)
        for arm in (arm for arm in arms if arm.preset == preset_name):
            error, problem = crew.attempt(lambda arm=arm, wanted=wanted: _error(arm, inputs, wanted))
            found[arm.name] = problem or max(crew.agree(error))
    return found


def _inputs(rank: int, situation: Situation, device: torch.device, dtype: torch.dtype) -> Inputs:
    inputs = make(SMALL, rank, device, dtype)
    if situation == "first rank has all work":  # the experts of the first quarter are everyone's
        inputs.x[:, : SMALL.num_experts] = -2
        inputs.x[:, : SMALL.num_experts // 4] = 1
    none = situation == "first rank has all tokens" and rank > 0
    return Inputs(inputs.x[:0], inputs.gradient[:0], inputs.router) if none else inputs


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


def _one_rank(preset_name: str, everyones: list[Inputs], crew: Crew) -> list[Tensor]:
    """This rank's part of what one rank computes in float64: outputs, input gradients, gradients of its experts."""
    dtype = everyones[0].x.dtype
    # Drawn in the dtype of the arms, so that the weights are the same numbers.
    layer = make_layer(SMALL, preset_name, everyones[0].router, None, dtype).to(torch.float64)
    x, gradient = (
        torch.cat([getattr(inputs, name) for inputs in everyones]).double() for name in ("x", "gradient")
    )
    first = sum(len(inputs.x) for inputs in everyones[: crew.rank])
    here = slice(first, first + len(everyones[crew.rank].x))
    output, x_gradient = _pass(layer, x, gradient)
    local = SMALL.num_experts // crew.ranks
    own = slice(crew.rank * local, (crew.rank + 1) * local)
    experts = [
        weight.grad[own] for weight in (layer.experts.up, layer.experts.down) if weight.grad is not None
    ]
    return [output[here], x_gradient[here], *experts]


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
    if not found.numel():
        return 0.0
    # Where nothing is wanted, such as gradients of experts without rows, nothing else may be found.
    return float((found - wanted).abs().amax() / wanted.abs().amax().clamp_min(1e-30))
