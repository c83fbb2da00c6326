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
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist

from adamac.bakeoff.device import find_device
from adamac.bakeoff.errors import BadInput, one_line

_PATIENT = timedelta(days=7)  # a rank that is gone is noticed at once


class RankGoneError(BaseException):
    """Another rank ended without a word, so that no video can be made any more.

    No :class:`Exception`: like the user's interrupt it ends the run, and is no failure of an arm that the others go on after.
    """


@dataclass(frozen=True)
class Ranks:
    """This rank and the others.

    Attributes:
        rank: Number of this one.
        size: How many there are.
        control: All of them, over gloo; ``None`` if there is one.
        patience: How long a rank waits for the others; if ``None``, in a video as long as torch's process groups do, and for a word
            as long as it takes.
    """

    patience: ClassVar[timedelta | None] = None

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, device: str) -> Self:
        """Take this process's place: alone, in the process group that there is, or as ``torchrun`` says.

        Args:
            device: Where the pipeline will be, as :func:`adamac.bakeoff.device.find_device` takes it; of several GPUs each
                local rank takes its own.

        Raises:
            BadInput: On every rank, if what ``torchrun`` says is not there in full, the device is not there or names one GPU
                for all ranks, or there are fewer GPUs than ranks.
        """
        if not dist.is_available():
            return cls()
        if dist.is_initialized():
            return cls._met()
        if not _launched():
            return cls()
        _check_launch()
        # Refused only when all have met: torchrun ends the others as soon as one is gone, before the first could say why.
        backend, problem = "gloo", None
        try:
            if (target := find_device(device)).type == "cuda":
                torch.cuda.set_device(_own_card(target))
                backend = "nccl"
        except BadInput as error:
            problem = error
        dist.init_process_group(backend, timeout=cls.patience)
        ranks = cls._met()
        with ranks.agreed():
            if problem is not None:
                raise problem
        return ranks

    @classmethod
    def _met(cls) -> Self:
        words = dist.new_group(backend="gloo", timeout=cls.patience or _PATIENT)
        return cls(dist.get_rank(), dist.get_world_size(), words)

    @staticmethod
    def speaks() -> bool:
        """Whether this process is to say what is wrong: alone, or the first rank; known before :meth:`join`, too."""
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank() == 0
        return not _launched() or os.environ.get("RANK", "0") == "0"

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
        """Do something without collectives on all ranks; where one fails, all do, since the others must not wait for it.

        Raises:
            BadInput: If another rank refused what it was given.
            RuntimeError: If another failed otherwise; what this one raises is passed on.
        """
        problem = None
        try:
            yield
        except Exception as error:
            problem = error
        refused = isinstance(problem, BadInput)
        said = self.all(
            None if problem is None else (refused, str(problem) if refused else one_line(problem))
        )
        if problem is not None:
            raise problem
        for rank, word in enumerate(said):
            if word is not None:
                raise (BadInput if word[0] else RuntimeError)(f"rank {rank}: {word[1]}")

    @contextmanager
    def leading(self) -> Generator[None]:
        """Run something on the first rank that says what to do; in the end, however it ends, let the others go.

        Not when the user broke it off or a rank is gone: then nobody listens.
        """
        try:
            yield
        except Exception:
            self.say(None)
            raise
        self.say(None)

    def leave(self) -> None:
        """End the process group, if there is one."""
        if self.control is not None:
            dist.destroy_process_group()


def _launched() -> bool:
    """Whether the environment says that there are several ranks."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


def _check_launch() -> None:
    """Refuse what a program that is no launcher of ranks left in the environment."""
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise BadInput(
                f"torchrun: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {name} is not set; start with torchrun, or unset "
                "WORLD_SIZE"
            )


def _own_card(device: torch.device) -> int:
    ranks, cards = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.index is not None:
        raise BadInput(
            f"device: under torchrun every rank takes a GPU of its own, got {device} for all; give auto or cuda"
        )
    if ranks > cards:
        raise BadInput(f"torchrun: {ranks} ranks on a machine of {cards} GPUs; start one for each GPU")
    return int(os.environ["LOCAL_RANK"])


@contextmanager
def _noticing() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo raises when a connection breaks
        raise RankGoneError("another rank ended") from error
