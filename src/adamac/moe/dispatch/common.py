"""What all dispatchers have in common: their two protocols, and the checks that come with the first message."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from adamac.moe.routing import Routing
from adamac.moe.timing import Clock
from adamac.moe.traffic import Traffic


@dataclass(frozen=True)
class Meter:
    """What is counted and timed on the way."""

    traffic: Traffic = field(default_factory=Traffic)
    clock: Clock = field(default_factory=Clock)


class Sent(Protocol):
    """Rows on their way; its methods are called once each, in this order."""

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Wait for the rows: ``[n, width]`` sorted by local expert, and ``[local_experts]`` rows of each."""
        ...

    def reply(self, rows: Tensor) -> None:
        """Start to send the experts' answers back: ``[n, width]`` in the order of arrival."""
        ...

    def collect(self) -> Tensor:
        """Wait for the answers: ``[tokens, width]``, weighted and summed."""
        ...


class Dispatcher(Protocol):
    """Moves rows to experts that are spread over ``ranks`` in consecutive ranges of equal size.

    Attributes:
        reads: Whether the host reads from the device how many rows come, which waits for it once a layer.
    """

    ranks: int
    rank: int
    reads: bool

    def send(
        self, rows: Tensor, routing: Routing, meter: Meter | None = None, *, chunks: int = 1
    ) -> list[Sent]:
        """Start to send rows to their experts.

        Args:
            rows: ``[tokens, width]``.
            routing: Of these tokens.
            meter: What is counted and timed; ``None`` means that nobody will look.
            chunks: Parts that the tokens are sent in, one after another; they are announced together.

        Returns:
            Each chunk, in the order of the tokens.

        Raises:
            ValueError: If the router of a rank of the group gave NaN or infinity. Every rank of the group raises it, so that
                none of them is left waiting; ranks beyond it, the other rows of a grid, learn nothing of it.
        """
        ...


class OverRanks:
    """What a dispatcher that sends knows of its ranks."""

    reads = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Take the ranks that hold the experts."""
        self.group = group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)


def divided(rows: Tensor, routing: Routing, chunks: int) -> list[tuple[Tensor, Routing]]:
    """Divide tokens into chunks of equal size; the last may be shorter, or empty."""
    if chunks == 1:
        return [(rows, routing)]
    size = -(-len(rows) // chunks)
    places = [min(chunk * size, len(rows)) for chunk in range(chunks + 1)]
    return [(rows[a:b], routing.part(a, b)) for a, b in pairwise(places)]


class NotFiniteError(ValueError):
    """A router's logits are NaN or infinite: numbers went astray, the input does fit."""


def refuse_not_finite(finite: list[int]) -> None:
    """Raise :class:`NotFiniteError` if any rank's logits were not finite (0 in the list)."""
    sick = [str(rank) for rank, fine in enumerate(finite) if not fine]
    if sick:
        raise NotFiniteError(
            f"the router's logits on rank {', '.join(sick)} are NaN or infinite; look at the layer's input and its weights "
            "(a learning rate that is too high is the usual cause)"
        )
