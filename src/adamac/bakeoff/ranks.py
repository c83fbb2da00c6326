"""Several GPUs for each video: ranks under ``torchrun``, of which the first leads.

All ranks have to call the pipeline alike, but only one may write files and speak. So the first runs the bake-off and says what to
make next; the others wait for its word and make the same (:class:`adamac.bakeoff.studio.Studio`). Words travel over gloo,
in a group of its own that waits as long as it takes: writing and comparing videos may take longer than NCCL waits for a collective.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from adamac.bakeoff.errors import BadInput, one_line

_PATIENCE = timedelta(days=7)  # a rank that is gone is noticed at once


class RankGoneError(RuntimeError):
    """Another rank ended without a word, so that no video can be made any more."""


@dataclass(frozen=True)
class Ranks:
    """This rank and the others.

    Attributes:
        rank: Number of this one.
        size: How many there are.
        control: All of them, over gloo; ``None`` if there is one.
    """

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Take this process's place: alone, in the process group that there is, or as ``torchrun`` says.

        Args:
            device: Where the pipeline will be; of several GPUs each local rank takes its own.

        Raises:
            BadInput: If the device names one GPU for all ranks, or there are fewer GPUs than ranks.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls()
            if device.type == "cuda":
                torch.cuda.set_device(_own_card(device))
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=_PATIENCE))

    @property
    def lead(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    def say(self, word: Any = None) -> Any:
        """What the first rank says, on all ranks; what others give is passed over.

        Raises:
            RankGoneError: If another rank ended.
        """
        said = [word]
        if self.control is not None:
            with _noticing():
                dist.broadcast_object_list(said, src=0, group=self.control)
        return said[0]

    def all(self, mine: Any) -> list[Any]:
        """What each rank gives, on all ranks.

        Raises:
            RankGoneError: If another rank ended.
        """
        said = [mine] * self.size
        if self.control is not None:
            with _noticing():
                dist.all_gather_object(said, mine, group=self.control)
        return said

    @contextmanager
    def agreed(self) -> Generator[None]:
        """Do something without collectives on all ranks; where one refuses what it was given, all do.

        Raises:
            BadInput: If this rank did, or another.
        """
        problem = None
        try:
            yield
        except BadInput as error:
            problem = error
        said = self.all(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        for rank, word in enumerate(said):
            if word is not None:
                raise BadInput(f"rank {rank}: {word}")

    @contextmanager
    def leading(self) -> Generator[None]:
        """Run something on the first rank that says what to do; in the end, however it ends, let the others go.

        Not when the user broke it off or a rank is gone: then nobody listens.
        """
        try:
            yield
        except RankGoneError:
            raise
        except Exception:
            self.say(None)
            raise
        self.say(None)

    def leave(self) -> None:
        """End the process group, if there is one."""
        if self.control is not None:
            dist.destroy_process_group()


def _own_card(device: torch.device) -> int:
    rank, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise BadInput(
            f"device: under torchrun every rank takes a GPU of its own, got {device} for all; give auto or cuda"
        )
    if rank >= cards:
        raise BadInput(
            f"torchrun: {rank + 1} ranks or more on a machine of {cards} GPUs; start one for each GPU"
        )
    return rank


@contextmanager
def _noticing() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo raises when a connection breaks
        raise RankGoneError(
            f"another rank ended ({one_line(error)}); finished videos are kept, go on with the same command and --resume"
        ) from error
