"""The arms: each preset with each dispatcher. Dispatchers of a preset share one layer, and so its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adamac.moe import MoE, preset
from adamac.moe.dispatch import DISPATCHERS, choose
from adamac.ops.grouped_mlp import MlpImpl

from .cases import PRESETS, LayerCase
from .crew import Crew


@dataclass(frozen=True)
class Arm:
    """One way to compute a layer.

    Attributes:
        name: In rows.
        preset: Whose function it computes.
        dispatcher: How rows travel; of a rival, its own word for it.
        forward: ``[tokens, hidden]`` to the same.
        parameters: That a backward pass gives gradients to.
        layer: Ours, if it is.
        note: What it is, where the name does not say.
    """

    name: str
    preset: str
    dispatcher: str
    forward: Callable[[Tensor], Tensor]
    parameters: Sequence[nn.Parameter]
    layer: MoE | None = None
    note: str = ""
    captured = False

    def both(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Forward and backward; leaves the gradient of ``x`` in it."""
        x.grad = None
        for parameter in self.parameters:
            parameter.grad = None
        output = self.forward(x)
        output.backward(gradient)
        return output


def dispatchers(ranks: int) -> tuple[str, ...]:
    """The dispatchers there are on so many ranks."""
    return ("local",) if ranks == 1 else tuple(DISPATCHERS)


def name_of(preset_name: str, dispatcher: str) -> str:
    """The name of one of our arms."""
    return f"{preset_name}/{dispatcher}"


def make_layer(
    case: LayerCase,
    preset_name: str,
    router: Tensor,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype,
    impl: MlpImpl = "auto",
) -> MoE:
    """Build a layer; whichever ranks it is spread over, it has the same weights."""
    config = preset(preset_name, case.hidden, case.num_experts, case.top_k, case.ratio)
    torch.manual_seed(0)
    layer = MoE(config, group=group, impl=impl, device=router.device, dtype=dtype)
    with torch.no_grad():
        layer.router.weight.copy_(router)
    return layer


def make_arms(case: LayerCase, router: Tensor, crew: Crew, dtype: torch.dtype) -> list[Arm]:
    """Build all of our arms."""
    found = []
    for preset_name in PRESETS:
        layer = make_layer(case, preset_name, router, crew.group, dtype, case.experts)
        found += [arm_of(preset_name, name, layer, crew) for name in dispatchers(crew.ranks)]
    return found


def arm_of(preset_name: str, dispatcher: str, layer: MoE, crew: Crew) -> Arm:
    """A layer by one of its dispatchers."""
    made = choose(dispatcher, layer.config, crew.group).dispatcher

    def forward(x: Tensor) -> Tensor:
        layer.dispatcher = made
        return layer(x)

    parameters = list(layer.parameters())
    return Arm(name_of(preset_name, dispatcher), preset_name, dispatcher, forward, parameters, layer)
