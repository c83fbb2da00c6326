"""What a micro-batch computes: losses, and gradients added to those of the ones before; on a GPU it can be replayed.

A micro-batch is a hundred launches or more for each layer, forward and backward, from Python; a small one leaves the device
waiting for them. Where it is captured, all of it is recorded once as a CUDA graph, and from then on it costs the host one launch.
What is computed is one function, recorded or not, so that a run may go on with either.

What a recording asks of that function: it waits for nothing, casts weights anew each time, adds gradients to memory that stays
where it is, and says by its value all that Python would have kept in attributes. It runs a few times before it is recorded, so
gradients are zeroed after that. What a router found not finite nobody reads on a GPU: it shows in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from adamac.moe.experts import casts_kept
from adamac.moe.layer import MoE
from adamac.moe.lm.model import GPT
from adamac.moe.lm.recording import unrecordable
from adamac.ops.replay import Replayed

Agree = Callable[[str], str]
"""This rank's reason, or none, to the one that holds for all ranks; called on all of them."""


@dataclass(frozen=True)
class Found:
    """What the micro-batches of an update found on this rank.

    Attributes:
        names: Of the auxiliary losses.
        losses: ``[1 + names]`` float64, cross-entropy in nats and the auxiliary losses before their weights, those a mean over
            layers; mean over micro-batches.
        loads: ``[layers, num_experts]`` int64, tokens by expert.
        bytes_sent: What this rank sent others for the sake of experts, forward and backward.
    """

    names: list[str]
    losses: Tensor
    loads: Tensor
    bytes_sent: int


class MicroBatches:
    """The micro-batches of a model's updates; they leave the mean of their gradients in ``.grad``.

    Attributes:
        reason: Why they are not captured although that was asked for, in words; empty if nothing is in the way, or nobody
            asked. The first update may find one more.
    """

    def __init__(
        self,
        model: GPT,
        parameters: Iterable[nn.Parameter],
        *,
        pieces: int,
        amp: bool = False,
        capture: bool = False,
        agree: Agree = lambda reason: reason,
    ) -> None:
        """Take a model that is trained.

        Args:
            model: Where it is to be trained. Once captured it must neither move nor change its dtype, and its weights change in
                place.
            parameters: The model's, as gradients are given to them.
            pieces: Micro-batches of an update.
            amp: Compute in bfloat16 where that is safe.
            capture: Record a micro-batch in a CUDA graph, if nothing is in the way.
            agree: Where several ranks train: all of them record, or none.
        """
        self._pass = _Pass(model, pieces, amp)
        self._parameters, self._agree = list(parameters), agree
        self._replayed = Replayed(self._pass) if capture else None
        self._gradients: list[Tensor] = []
        self.reason = obstacle(model, amp=amp) if capture else ""

    @property
    def captured(self) -> bool:
        """Whether micro-batches are replayed from a CUDA graph; not before the first update."""
        return self._replayed is not None and self._replayed.recorded

    @property
    def held_bytes(self) -> int:
        """Memory of the device that the recording keeps; gradients, which stay where they are as well, not counted."""
        return 0 if self._replayed is None else self._replayed.held_bytes

    def add_up(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Found:
        """Compute the gradients of an update; those of the one before are gone.

        Args:
            batches: Inputs and targets of each micro-batch, ``[windows, tokens]`` int64 on the model's device, all of one shape.

        Raises:
            NotFiniteError: If a router gave NaN or infinity, where that is looked at.
        """
        self._record(*batches[0])
        self._begin()
        replayed, model = self._replayed, self._pass.model
        step = self._pass if replayed is None else replayed
        # A cast that was kept from outside would be recorded as it was, and not made anew.
        with casts_kept(model) if replayed is None else nullcontext():
            # The next one writes over what a replay returned.
            found = [tuple(value.clone() for value in step(*batch)) for batch in batches]
        losses, loads = (torch.stack(values).sum(0) for values in zip(*found, strict=True))
        _remember(model.moes, loads)
        return Found(
            list(model.moes[0].losses), losses / len(batches), loads, len(batches) * self._pass.bytes_sent
        )

    def _record(self, inputs: Tensor, targets: Tensor) -> None:
        """Before the first micro-batch, if it is to be captured: record it on all ranks, or on none."""
        if self._replayed is None or self._gradients:
            return
        self.reason = self._agree(self.reason)
        if not self.reason:
            self._gradients = [torch.zeros_like(value) for value in self._parameters]
            self._begin()
            self._replayed.record(inputs, targets)
            self.reason = self._agree(self._replayed.problem)
        if self.reason:
            self._replayed, self._gradients = None, []

    def _begin(self) -> None:
        """Let gradients be nothing or, where they are captured, zeros in the memory that was recorded."""
        gradients = self._gradients or [None] * len(self._parameters)
        for value, gradient in zip(self._parameters, gradients, strict=True):
            value.grad = gradient
        if self._gradients:
            torch._foreach_zero_(self._gradients)


def obstacle(model: GPT, *, amp: bool = False) -> str:
    """Say why a micro-batch cannot be captured in a CUDA graph, in words; empty if it can."""
    if any(module._backward_hooks or module._backward_pre_hooks for module in model.modules()):
        return "modules have backward hooks, which a replay would not call"
    return unrecordable(model, torch.bfloat16 if amp else None)


class _Pass:
    """A micro-batch forward and backward: ``(inputs, targets)`` to its losses and loads, its gradients added to ``.grad``.

    Attributes:
        bytes_sent: What this rank sent others in it; a replay sends what was sent while recording.
    """

    def __init__(self, model: GPT, pieces: int, amp: bool) -> None:
        self.model, self.pieces, self.amp = model, pieces, amp
        self.bytes_sent = 0

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        moes = self.model.moes
        for moe in moes:
            moe.losses = {}  # those of another pass would bind gradients to its stream
        loss = self._loss(inputs, targets)
        auxiliary = torch.stack([moe.auxiliary_loss() for moe in moes]).sum()
        ((loss + auxiliary) / self.pieces).backward()
        self.bytes_sent = sum(moe.traffic.bytes_sent() for moe in moes)
        for moe in moes:
            moe.losses = {name: each.detach() for name, each in moe.losses.items()}
            moe.router.load = None  # a replay could not add to it, see _remember
        return torch.stack([loss.detach(), *_mean_losses(moes)]).double(), torch.stack(
            [_load(moe) for moe in moes]
        )

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # Each weight is cast once in a pass: a cache would save nothing, and could hold casts from outside of a recording.
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp, cache_enabled=False):
            logits = self.model(inputs)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(wide.flatten(0, 1), targets.flatten())


def _mean_losses(moes: list[MoE]) -> list[Tensor]:
    """Each auxiliary loss, mean over layers."""
    return [torch.stack([moe.losses[name] for moe in moes]).mean() for name in moes[0].losses]


def _load(moe: MoE) -> Tensor:
    """Tokens by expert of the last forward, ``[num_experts]``."""
    assert moe.routing is not None, "no forward yet"
    return moe.routing.load()


def _remember(moes: list[MoE], loads: Tensor) -> None:
    """Leave in the routers that balance by a bias what they go by."""
    for moe, load in zip(moes, loads, strict=True):
        if moe.router.bias is not None:
            moe.router.load = load.clone()
