"""A model and its optimizer on the ranks of a run: one update, and the state that must outlive the process.

AdamW with weight decay on matrices only, gradients accumulated over pieces of a batch, averaged over ranks and clipped by
their norm. An update is refused before it touches a weight if loss or gradient is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamac.moe.dispatch import NotFiniteError
from adamac.moe.lm.checkpoint import load_weights
from adamac.moe.lm.corpus import Order
from adamac.moe.lm.layout import LayoutName, lay_out
from adamac.moe.lm.micro_batch import MicroBatches
from adamac.moe.lm.model import GPT, GPTConfig
from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.sending import Sending
from adamac.moe.lm.world import World
from adamac.moe.parallel import clip_gradients, local

MOMENTS = ("exp_avg", "exp_avg_sq")


class Diverged(ArithmeticError):
    """A loss or a gradient was not finite: the run stopped before the weights were touched."""


@dataclass(frozen=True)
class Update:
    """What one update found.

    Attributes:
        loss: Mean cross-entropy of its tokens in nats.
        losses: Auxiliary losses before their weights, mean over layers.
        lr: Learning rate.
        gradient_norm: Before clipping.
        imbalance: Tokens of the busiest expert over the mean, mean over layers; 1 is even.
        bytes_sent: What all ranks sent each other for the sake of experts, forward and backward.
    """

    loss: float
    losses: dict[str, float]
    lr: float
    gradient_norm: float
    imbalance: float
    bytes_sent: int


class Learner:
    """A model that is being trained, on this rank."""

    def __init__(
        self,
        recipe: Recipe,
        config: GPTConfig,
        world: World,
        dtype: torch.dtype = torch.float32,
        amp: bool = False,
        layout: LayoutName = "replicated",
        sending: Sending | None = None,
        capture: bool = False,
    ) -> None:
        """Build and initialise model and optimizer.

        Args:
            recipe: How to train.
            config: What to train.
            world: The ranks.
            dtype: Of weights and moments.
            amp: Compute in bfloat16 where that is safe.
            layout: How parameters lie on the ranks; one rank has them all.
            sending: What sends rows to experts, the same in every layer; ``None``: what each layer takes by itself.
            capture: Replay micro-batches from a CUDA graph, if nothing is in the way; see :attr:`uncaptured`.

        Raises:
            ValueError: If the batch cannot be shared by the ranks, or there is no such layout.
        """
        self.recipe, self.world, self.amp = recipe, world, amp
        self.micro_batch, self.pieces = shares(recipe, world.size)
        torch.manual_seed(recipe.seed)
        self.sending = sending
        self.model = _model(config, sending, world).to(world.device, dtype)
        self.layout = lay_out(layout, self.model, world, amp=amp)
        self.held = {name: local(value.detach()) for name, value in self.layout.parameters.items()}
        self.optimizer = _adamw(self.held.values(), recipe, world.device)
        self._micro_batches = MicroBatches(
            self.model,
            self.layout.parameters.values(),
            pieces=self.pieces,
            amp=amp,
            capture=capture,
            agree=world.agreed,
        )

    @property
    def uncaptured(self) -> str:
        """Why micro-batches are not replayed although that was asked for, in words; the first update may find a reason."""
        return self._micro_batches.reason

    @property
    def parameters(self) -> int:
        """How many numbers the whole model has, all ranks' experts together."""
        rows = self.layout.lengths
        return sum(rows[name] * math.prod(value.shape[1:]) for name, value in self.held.items())

    def autocast(self) -> torch.autocast:
        """The context that the model computes in."""
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self.amp)

    def update(self, step: int, order: Order) -> Update:
        """Update the weights with batch number ``step``.

        Raises:
            Diverged: If the loss or the gradient of any rank is not finite, on all of them; the weights are then as before.
        """
        recipe = self.recipe
        # Nothing draws random numbers in a step today; what will, must not depend on the steps before.
        torch.manual_seed((recipe.seed * 1_000_003 + step) * self.world.size + self.world.rank)
        self.model.train()
        for value in self.held.values():
            value.grad = None
        refusal = None
        try:
            names, sums, loads = self._backward(step, order)
        except Diverged as error:  # ranks that have other copies of the experts learn of it by the sums
            refusal, (names, sums, loads) = error, self._not_finite()
        reduced = self.world.add(torch.cat((sums, loads.flatten())))
        sums, loads = reduced[: len(sums)], reduced[len(sums) :].view_as(loads)
        norm = self._reduce()
        imbalance = (loads.amax(1) / loads.mean(1).clamp_min(1)).mean()
        # Read at once: each reading waits for the device.
        read = torch.cat((sums, norm[None], imbalance[None])).tolist()
        loss, *losses, bytes_sent, gradient_norm, imbalance_read = read
        if refusal is not None:
            raise refusal
        if not math.isfinite(loss) or not math.isfinite(gradient_norm):
            raise Diverged(f"step {step + 1} has loss {loss} and gradient norm {gradient_norm}")
        lr = recipe.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for moe in self.model.moes:
            moe.rebalance()
        named = dict(zip(names, losses, strict=True))
        return Update(loss, named, lr, gradient_norm, imbalance_read, int(bytes_sent))

    def _backward(self, step: int, order: Order) -> tuple[list[str], Tensor, Tensor]:
        """Compute gradients of this rank's share.

        Returns:
            Names of the auxiliary losses; ``[1 + losses + 1]`` float64, the loss and those, this rank's part of the mean,
            and the bytes that it sent; and ``[layers, num_experts]`` float64, its tokens by expert.

        Raises:
            Diverged: If a router gave NaN or infinity, where that is looked at.
        """
        world = self.world
        places = [piece * world.size + world.rank for piece in range(self.pieces)]
        firsts = [step * self.recipe.batch + place * self.micro_batch for place in places]
        try:
            found = self._micro_batches.add_up([self._windows(order, first) for first in firsts])
        except NotFiniteError as error:
            raise Diverged(f"step {step + 1}: {error}") from error
        sent = torch.tensor([found.bytes_sent], device=world.device, dtype=torch.float64)
        return found.names, torch.cat((found.losses / world.size, sent)), found.loads.double()

    def _windows(self, order: Order, first: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a micro-batch that begins with a window."""
        inputs, targets = order.batch(first, self.micro_batch)
        return inputs.to(self.world.device), targets.to(self.world.device)

    def _not_finite(self) -> tuple[list[str], Tensor, Tensor]:
        """What :meth:`_backward` gives, of a rank whose router refused its input."""
        moes, device = self.model.moes, self.world.device
        names = list(moes[0].losses)
        sums = torch.full((1 + len(names) + 1,), math.nan, device=device, dtype=torch.float64)
        loads = torch.zeros(len(moes), moes[0].config.num_experts, device=device, dtype=torch.float64)
        return names, sums, loads

    def _reduce(self) -> Tensor:
        """Average gradients over ranks, clip them, give them to the optimizer, and return their norm before that."""
        self.layout.average()
        norm = clip_gradients(self.model, self.world.mesh, self.recipe.clip)
        for name, parameter in self.layout.parameters.items():
            held = self.held[name]
            # An expert that got no token on any rank still decays.
            held.grad = torch.zeros_like(held) if parameter.grad is None else local(parameter.grad)
        return norm

    def weights(self) -> dict[str, Tensor]:
        """Every weight and buffer of the whole model by name, in the first rank's main memory; all ranks must call it."""
        named = {name: local(value) for name, value in self.model.state_dict().items()}
        return self._gathered((name, name, value) for name, value in named.items())

    def moments(self) -> dict[str, Tensor]:
        """Adam's state of the whole model by name, in the first rank's main memory; all ranks must call it."""
        states = {name: self.optimizer.state[value] for name, value in self.held.items()}
        found = self._gathered(
            (f"{name}.{moment}", name, state[moment]) for name, state in states.items() for moment in MOMENTS
        )
        if self.world.first:
            found |= {f"{name}.step": state["step"] for name, state in states.items()}
        return found

    def restore(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], source: Any) -> None:
        """Take up the state that :meth:`weights` and :meth:`moments` gave, on as many ranks as there are now.

        Args:
            weights: This rank's :meth:`part` of each.
            moments: Likewise.
            source: What is named in errors.

        Raises:
            ValueError: If it is another model's.
        """
        load_weights(self.model, weights, source)
        for name, value in self.held.items():
            try:
                state = {moment: moments[f"{name}.{moment}"] for moment in MOMENTS}
                state["step"] = moments[f"{name}.step"]
            except KeyError as error:
                raise ValueError(f"{source} lacks {error} of the optimizer") from None
            place = self.world.device if self.optimizer.defaults["fused"] else "cpu"
            self.optimizer.state[value] = {
                key: tensor.to(place if key == "step" else self.world.device).clone()
                for key, tensor in state.items()
            }

    def part(self, name: str, length: int) -> slice:
        """What this rank holds of a tensor of a checkpoint, of so many rows."""
        of, _, last = name.rpartition(".")
        return self.layout.rows(of if last in MOMENTS else name, length)

    def _gathered(self, named: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors on the first rank, one after another; nothing on the others.

        Args:
            named: Each one's name, that of the weight it belongs to, and what this rank holds of it.
        """
        gathered = ((name, self.layout.gather(of, held)) for name, of, held in named)
        return {name: whole for name, whole in gathered if whole is not None}


def shares(recipe: Recipe, ranks: int) -> tuple[int, int]:
    """Divide a batch.

    Returns:
        Windows that a rank computes at once, and how many times it does.

    Raises:
        ValueError: If it cannot be divided evenly.
    """
    if recipe.batch % ranks:
        raise ValueError(f"batch must be a multiple of the {ranks} ranks, got {recipe.batch}")
    share = recipe.batch // ranks
    micro_batch = min(recipe.micro_batch or share, share)
    if share % micro_batch:
        raise ValueError(f"micro_batch must divide a rank's {share} windows of a batch, got {micro_batch}")
    return micro_batch, share // micro_batch


def _model(config: GPTConfig, sending: Sending | None, world: World) -> GPT:
    if sending is None:
        return GPT(config, group=world.experts)
    model = GPT(config, dispatcher=sending.dispatcher, group=world.experts)
    for moe in model.moes:  # which know the name alone
        moe.dispatcher_reason = sending.reason
    return model


def _adamw(parameters: Any, recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    parameters = list(parameters)
    groups = [
        {"params": [value for value in parameters if value.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [value for value in parameters if value.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device.type == "cuda"
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=fused)
