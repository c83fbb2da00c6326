"""Several GPUs for each video: what the ranks of one run do together.

Under ``torchrun`` every rank runs the whole benchmark on its own GPU; the transformer is spread over all of them by
:func:`adamac.integrations.diffusers.parallelize`, for dense arms too. A step takes as long as on the slowest rank, memory is
that of the rank that needs most, and the first rank decides when time is over, says so and writes the rows. Ranks talk over gloo,
so that nothing of the benchmark's own is on the devices.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from adamac.integrations.diffusers import parallelize

# A rank that failed by itself leaves the others waiting for no longer than this; the longest step is far below.
_PATIENCE = timedelta(minutes=3)


@dataclass(frozen=True)
class Ranks:
    """This rank and the others.

    Attributes:
        rank: Number of this one.
        size: How many there are.
        talk: All of them, over gloo; ``None`` if there is one.
    """

    rank: int = 0
    size: int = 1
    talk: Any = None

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Take this process's place: alone, in the process group that there is, or as ``torchrun`` says.

        Args:
            device: "cpu" or "cuda", where each local rank takes its own card.
        """
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls()
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=_PATIENCE))

    @property
    def first(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

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

    def first_says(self, flag: bool) -> bool:
        """What the first rank says to a question that all ask themselves."""
        return self._all(flag)[0]

    def slowest(self, times: list[float]) -> list[float]:
        """The time of the slowest rank, of every one of some times."""
        return [max(each) for each in zip(*self._all(times), strict=True)]

    def most(self, amount: float | None) -> float | None:
        """The largest of the ranks' amounts; ``None`` if none is known."""
        return max((each for each in self._all(amount) if each is not None), default=None)

    def problem(self, mine: str | None) -> str | None:
        """What went wrong on this rank, or else on another."""
        others = [f"rank {rank}: {word}" for rank, word in enumerate(self._all(mine)) if word is not None]
        return mine or (others[0] if others else None)

    def leave(self) -> None:
        """End the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _all(self, mine: Any) -> list[Any]:
        said = [mine] * self.size
        if self.talk is not None:
            dist.all_gather_object(said, mine, group=self.talk)
        return said
