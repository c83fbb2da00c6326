"""How the parameters of a model lie on the ranks of a run: whole on each of them, or in shares.

- *Replicated*: every rank has everything but routed experts, and its share of those. Gradients are averaged once an update.
- *Sharded*: FSDP2 gathers a block for its forward and its backward pass and leaves each rank its share of parameters, gradients
  and Adam's moments. Gradients are averaged, and left in shares, after each piece of a batch.

Both compute the same. In both a rank holds a range of the rows of each tensor, so that a checkpoint, whose tensors are whole, is
written and read by rows, whoever reads it. What is held is offered as plain tensors in the memory of the parameters: Adam treats
numbers one by one and need not know of shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adamac.moe.dispatch.common import refuse_not_finite
from adamac.moe.lm.model import GPT, Block
from adamac.moe.lm.world import World
from adamac.moe.parallel import average_gradients, shard
from adamac.moe.routing import Router, Routing

LayoutName = Literal["replicated", "sharded"]
EXPERTS = ".moe.experts."
"""Part of the names of parameters that ranks divide, however the others lie."""


class Layout(Protocol):
    """What a learner knows of where parameters are.

    Attributes:
        parameters: Of the model by name, as they are between two updates.
        lengths: Rows of each in the whole model.
    """

    parameters: dict[str, nn.Parameter]
    lengths: dict[str, int]

    def average(self) -> None:
        """Leave in every gradient the mean over all ranks, after the last backward pass of an update."""
        ...

    def rows(self, name: str, length: int) -> slice:
        """Which rows of a tensor of the whole model this rank holds, of so many; none if they cannot be divided."""
        ...

    def gather(self, name: str, held: Tensor) -> Tensor | None:
        """Put the rows that ranks hold of a parameter, or of what belongs to it, together; called on all ranks.

        Returns:
            The whole tensor, in the first rank's main memory; ``None`` on other ranks.
        """
        ...


def lay_out(name: LayoutName, model: GPT, world: World, *, amp: bool) -> Layout:
    """Lay a model out on the ranks, in place; one rank has it all under either name.

    Args:
        name: The layout.
        model: As it was built, on each rank alike.
        world: The ranks.
        amp: Whether it computes in bfloat16.

    Raises:
        ValueError: If there is no such layout.
    """
    if name not in get_args(LayoutName):
        raise ValueError(f"layout must be {' or '.join(get_args(LayoutName))}, got {name!r}")
    return Sharded(model, world, amp) if name == "sharded" and world.size > 1 else Replicated(model, world)


class Replicated:
    """Everything but routed experts is on every rank. A :class:`Layout`."""

    def __init__(self, model: GPT, world: World) -> None:
        """Take a model as it was built."""
        self.model, self.world = model, world
        self.parameters = dict(model.named_parameters())
        self.lengths = _lengths(self.parameters, world)

    def average(self) -> None:
        """See :meth:`Layout.average`."""
        if self.world.mesh is not None:
            average_gradients(self.model, self.world.mesh)

    def rows(self, name: str, length: int) -> slice:
        """See :meth:`Layout.rows`."""
        return self._rows_of(self.world.rank, name, length)

    def gather(self, name: str, held: Tensor) -> Tensor | None:
        """See :meth:`Layout.gather`."""
        ranks = self.world.expert_ranks
        if ranks == 1 or EXPERTS not in name:
            return held.cpu() if self.world.first else None
        if self.world.rank >= ranks:  # these hold copies
            return None
        rows = [self._rows_of(rank, name, self.lengths[name]) for rank in range(ranks)]
        return _gather(held, rows, self.world.experts)

    def _rows_of(self, rank: int, name: str, length: int) -> slice:
        return _experts(rank, length, self.world) if EXPERTS in name else slice(0, length)


class Sharded:
    """Every parameter is divided among all ranks: experts first by their grid, then by FSDP2. A :class:`Layout`."""

    def __init__(self, model: GPT, world: World, amp: bool) -> None:
        """Shard a model in place.

        Args:
            model: As it was built, on each rank alike.
            world: Of several ranks.
            amp: Whether the model computes in bfloat16: experts then travel in it, as their matrices are cast whole anyway. All
                else is cast, or not, where autocast says, and travels as it is.
        """
        assert world.mesh is not None, "one rank has nothing to divide"
        self.world = world
        self.lengths = _lengths(dict(model.named_parameters()), world)
        shard(model, world.mesh, blocks=(Block,), expert_dtype=torch.bfloat16 if amp else None)
        self.parameters = dict(model.named_parameters())
        if world.expert_ranks < world.size and (world.experts is not None or world.device.type == "cpu"):
            for moe in model.moes:
                moe.router.register_forward_hook(_agreement(world))

    def average(self) -> None:
        """See :meth:`Layout.average`: FSDP2 did, but for a gradient that no rank has."""

    def rows(self, name: str, length: int) -> slice:
        """See :meth:`Layout.rows`."""
        return self._rows_of(self.world.rank, name, length)

    def gather(self, name: str, held: Tensor) -> Tensor | None:
        """See :meth:`Layout.gather`."""
        if name not in self.lengths:  # a buffer
            return held.cpu() if self.world.first else None
        rows = [self._rows_of(rank, name, self.lengths[name]) for rank in range(self.world.size)]
        return _gather(held, rows, None)

    def _rows_of(self, rank: int, name: str, length: int) -> slice:
        if name not in self.lengths:
            return slice(0, length)
        if EXPERTS not in name:
            return _chunk(rank, length, self.world.size)
        own = _experts(rank, length, self.world)
        ranks = self.world.expert_ranks
        share = _chunk(rank // ranks, own.stop - own.start, self.world.size // ranks)
        return slice(own.start + share.start, own.start + share.stop)


def _lengths(built: dict[str, nn.Parameter], world: World) -> dict[str, int]:
    """Rows of each parameter in the whole model, of a model as it was built on a rank."""
    return {
        name: len(value) * (world.expert_ranks if EXPERTS in name else 1) for name, value in built.items()
    }


def _experts(rank: int, number: int, world: World) -> slice:
    """A rank's experts of so many; none if they cannot be divided."""
    own, remainder = divmod(number, world.expert_ranks)
    first = rank % world.expert_ranks * own
    return slice(first, first + own) if remainder == 0 else slice(0, 0)


def _chunk(rank: int, length: int, ranks: int) -> slice:
    """A rank's rows of so many as FSDP2 divides them: equal chunks, of which the last may be shorter, or empty."""
    size = math.ceil(length / ranks)
    return slice(min(rank * size, length), min((rank + 1) * size, length))


def _gather(held: Tensor, rows: list[slice], group: dist.ProcessGroup | None) -> Tensor | None:
    """Put rows together on the first rank of a group, each rank of which holds some of them."""
    longest = max(own.stop - own.start for own in rows)
    missing = held.new_zeros(longest - len(held), *held.shape[1:])
    padded = torch.cat((held, missing)) if len(missing) else held.contiguous()
    first = dist.get_rank(group) == 0
    parts = [torch.empty_like(padded) for _ in rows] if first else None
    dist.gather(padded, parts, dst=0, group=group)
    if parts is None:
        return None
    whole = torch.empty(max(own.stop for own in rows), *held.shape[1:], dtype=held.dtype)
    for part, own in zip(parts, rows, strict=True):
        whole[own] = part[: own.stop - own.start].cpu()
    return whole


def _agreement(world: World) -> Callable[[Router, Any, tuple[Routing, Any]], None]:
    """What a router's ranks do behind it where all ranks wait for each other in every block: refuse NaN on all, or none.

    A dispatcher says it to its row of the grid alone, as other rows could go on without it.
    """

    def agree(router: Router, given: Any, found: tuple[Routing, Any]) -> None:
        finite = found[0].finite
        if finite is not None:
            told = list(torch.empty(world.size, 1, dtype=torch.int32, device=world.device))
            dist.all_gather(told, finite.to(torch.int32).view(1))
            refuse_not_finite(torch.cat(told).tolist())

    return agree
