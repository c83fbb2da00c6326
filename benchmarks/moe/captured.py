"""Layers replayed from a CUDA graph: what is left of a ratio when neither side waits for the host.

Beside the plain arms are those of ``static_gather``, which reads nothing and can be recorded (on one rank ``local`` can), launched
piece by piece and replayed. What a replay is given and gives lies in fixed memory; an arm is checked like all others before it is timed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from adamac.ops.replay import Replayed

from . import layer
from .arms import Arm, arm_of, dispatchers, make_layer, name_of
from .cases import PRESETS, CapturedCase
from .crew import Crew
from .inputs import Inputs
from .rivals import AbsentError


def run(case: CapturedCase, crew: Crew) -> None:
    """Measure a case and hand out a row for each arm."""
    layer.measure("moe_captured", case, crew, lambda inputs: _arms(case, inputs, crew))


def _arms(case: CapturedCase, inputs: Inputs, crew: Crew) -> list[Arm]:
    found: list[Arm] = []
    for preset_name in PRESETS:
        made = make_layer(case, preset_name, inputs.router, crew.group, crew.dtype, case.experts)
        plain = [arm_of(preset_name, name, made, crew) for name in dispatchers(crew.ranks)]
        if crew.ranks > 1:
            plain.append(arm_of(preset_name, "static_gather", made, crew))
        found += [*plain, _captured(plain[-1], inputs)]
    return found


def _captured(arm: Arm, inputs: Inputs) -> CapturedArm:
    recorded = Recorded(arm, inputs)
    name = f"{name_of(arm.preset, arm.dispatcher)}, captured"
    return CapturedArm(
        name, arm.preset, arm.dispatcher, recorded.forward, arm.parameters, arm.layer, recorded=recorded
    )


@dataclass(frozen=True)
class CapturedArm(Arm):
    """An arm whose passes are replayed.

    Attributes:
        recorded: What replays them.
    """

    captured = True
    recorded: Recorded = field(kw_only=True)

    def both(self, x: Tensor, gradient: Tensor) -> Tensor:
        """See :meth:`Arm.both`."""
        return self.recorded.both(x, gradient)

    def pool_gib(self) -> float:
        """Memory that the recordings keep."""
        return self.recorded.pool_bytes / 2**30


class Recorded:
    """The passes of an arm, each recorded when it is first asked for; reads the inputs where they lie."""

    def __init__(self, arm: Arm, inputs: Inputs) -> None:
        self._arm, self._inputs = arm, inputs
        # What a replay is given is copied first: a number, in place of inputs that it reads where they lie.
        self._token = torch.zeros(1, device=inputs.x.device)
        self._forward, self._both = (
            Replayed(lambda _, step=step: step()) for step in (self._plain, self._plain_both)
        )

    @property
    def pool_bytes(self) -> int:
        """Memory that the recordings keep."""
        return self._forward.held_bytes + self._both.held_bytes

    def forward(self, x: Tensor) -> Tensor:
        """The layer's answer, without gradients."""
        return self._replayed(self._forward, x)[0]

    def both(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The layer's answer; leaves the gradient of ``x`` in it."""
        assert gradient is self._inputs.gradient, "what is recorded reads one gradient"
        output, x.grad = self._replayed(self._both, x)
        return output

    def _plain(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (self._arm.forward(self._inputs.x),)

    def _plain_both(self) -> tuple[Tensor, ...]:
        x = self._inputs.x
        output = self._arm.both(x, self._inputs.gradient)
        assert x.grad is not None
        return output.detach(), x.grad

    def _replayed(self, replay: Replayed, x: Tensor) -> tuple[Tensor, ...]:
        own = self._inputs.x
        if not own.is_cuda:
            raise AbsentError("CUDA graphs are for GPUs")
        if self._arm.layer is not None and (problem := self._arm.layer.waits()):
            raise AbsentError(problem)
        if x is not own:
            with torch.no_grad():
                own.copy_(x)
        outputs = replay(self._token)
        if replay.problem:  # it was called plainly then, and a plain time is none of a replay
            raise RuntimeError(replay.problem)
        return outputs
