"""Several GPUs for each video: what the ranks of one run do together.

Under ``torchrun`` every rank runs the whole benchmark on its own GPU; the transformer is spread over all of them by
:func:`adamac.integrations.diffusers.parallelize`, for dense arms too. A step takes as long as on the slowest rank, memory is
that of the rank that needs most, and the first rank decides when time is over, says so and writes the rows. Ranks talk over gloo,
so that nothing of the benchmark's own is on the devices.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
from diffusers import ContextParallelConfig

from adamac.bakeoff import ranks
from adamac.integrations.diffusers import parallelize


class Ranks(ranks.Ranks):
    """This rank and the others."""

    # A rank that failed by itself leaves the others waiting for no longer than this; the longest step is far below.
    patience = timedelta(minutes=3)

    def spread(self, pipe: Any) -> None:
        """Spread the pipeline's videos over the ranks."""
        if self.size == 1:
            return
        # diffusers divides by the number of accelerators to number them; a rehearsal has none.
        some: AbstractContextManager[Any] = nullcontext()
        if not torch.accelerator.is_available():
            some = patch.object(torch.accelerator, "device_count", lambda: 1)
        with some:
            parallelize(pipe, ContextParallelConfig(ulysses_degree=self.size))

    def slowest(self, times: list[float]) -> list[float]:
        """The time of the slowest rank, of every one of some times."""
        return [max(each) for each in zip(*self.all(times), strict=True)]

    def most(self, amount: float | None) -> float | None:
        """The largest of the ranks' amounts; ``None`` if none is known."""
        return max((each for each in self.all(amount) if each is not None), default=None)

    def problem(self, mine: str | None) -> str | None:
        """What went wrong on this rank, or else on another."""
        others = [f"rank {rank}: {word}" for rank, word in enumerate(self.all(mine)) if word is not None]
        return mine or (others[0] if others else None)
