"""The ranks of a training run, what they do together, and how one learns that another is gone.

The ranks form a grid, see :mod:`adamac.moe.parallel`; how a model's parameters lie on it is a matter of :mod:`adamac.moe.lm.layout`.

What one rank does for all, or each does alone and may fail at, is done *together*: no rank goes on before all are done, and where
one fails, all do. Word of it travels over gloo, in a group of its own that waits as long as it takes: preparing text or writing a
checkpoint may take longer than NCCL waits for a collective.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from adamac.moe.parallel import expert_group, expert_mesh

PATIENCE = timedelta(days=7)
"""How long a rank waits for what others do together with it; one that is gone is noticed at once."""
Found = TypeVar("Found")


class Left(RuntimeError):
    """Another rank failed or was ended, so that this one cannot go on."""


class Gone(Left):
    """A rank is gone without a word: the others' process group is broken and cannot be ended in order."""


@dataclass(frozen=True)
class World:
    """This rank and the others.

    Attributes:
        rank: Number of this rank.
        size: How many there are.
        device: Where this one computes.
        mesh: All ranks as a grid ``("data", "expert")``; ``None`` if there is one.
        control: All ranks, over gloo; ``None`` if there is one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  a device is a value
    mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    @property
    def expert_ranks(self) -> int:
        """Among how many ranks the experts are divided."""
        return 1 if self.mesh is None else self.mesh.size(1)

    @property
    def experts(self) -> dist.ProcessGroup | None:
        """The ranks among which the experts are divided; ``None`` if every rank has all."""
        return None if self.mesh is None or self.expert_ranks == 1 else expert_group(self.mesh)

    @classmethod
    def join(cls, device: str = "auto", expert_ranks: int = 1) -> World:
        """Take this process's place: alone, in the process group that there is, or as ``torchrun`` says.

        Args:
            device: "auto", "cpu", "cuda" or "cuda:1"; under torchrun each local rank takes its own card.
            expert_ranks: Among how many neighbouring ranks the experts are divided.

        Raises:
            ValueError: If the device does not exist or the ranks cannot be divided.
        """
        begun = dist.is_available() and dist.is_initialized()
        size = dist.get_world_size() if begun else int(os.environ.get("WORLD_SIZE", "1"))
        place = find_device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else None)
        if expert_ranks < 1 or size % expert_ranks:
            raise ValueError(f"expert_ranks must divide the {size} ranks, got {expert_ranks}")
        if place.type == "cuda" and place.index is not None:  # what names no card is then on this one
            torch.cuda.set_device(place)
        if size == 1:
            return cls(device=place)
        if not begun:
            card = place if place.type == "cuda" else None
            dist.init_process_group("nccl" if card else "gloo", device_id=card)
        mesh = expert_mesh(expert_ranks, "cuda" if dist.get_backend() == "nccl" else "cpu")
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), size, place, mesh, control)

    def leave(self) -> None:
        """End the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def together(self) -> Generator[None]:
        """Do something without collectives on all ranks; go on when all have done it.

        Raises:
            ValueError: If this rank did.
            OSError: If this rank did.
            Left: If another rank raised one of these.
        """
        problem = None
        try:
            yield
        except (ValueError, OSError) as error:
            problem = error
        said = self._heard(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        for rank, word in enumerate(said):
            if word is not None:
                raise Left(f"rank {rank} stopped: {word}")

    def agreed(self, reason: str) -> str:
        """Let a reason of any rank hold for all: the first one's, with its rank where not all give it; empty if none has any."""
        said = [word or "" for word in self._heard(reason)]
        if len(set(said)) <= 1:
            return reason
        rank = next(rank for rank, word in enumerate(said) if word)
        return f"{said[rank]} (rank {rank})"

    def _heard(self, word: str | None) -> list[str | None]:
        """What each rank says."""
        said = [word] * self.size
        if self.control is not None:
            dist.all_gather_object(said, word, group=self.control)
        return said

    def from_first(self, find: Callable[[], Found]) -> Found:
        """What the first rank finds without collectives, on all ranks.

        Raises:
            ValueError: On the first rank, if finding it did.
            OSError: Likewise.
            Left: Then, on the others.
        """
        said: list[Any] = [None]
        with self.together():
            if self.first:
                said = [find()]
        if self.control is not None:
            dist.broadcast_object_list(said, src=0, group=self.control)
        return said[0]

    @contextmanager
    def listening(self) -> Generator[None]:
        """Say in one line that another rank is gone, where a collective fails for it.

        Raises:
            Gone: If so.
        """
        try:
            yield
        except RuntimeError as error:
            # Over gloo it is a plain RuntimeError that names the library's file.
            if not isinstance(error, Left) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise Gone("another rank left") from error
            raise

    def add(self, value: Tensor) -> Tensor:
        """Add up a small tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value


def find_device(name: str, local_rank: int | None = None) -> torch.device:
    """Find a device by its name.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:1".
        local_rank: Which card this rank takes; ``None`` takes the one that is named.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device {name!r}; expected auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        if local_rank is not None:
            device = torch.device("cuda", local_rank)
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"no device {str(device)!r}: this machine has {torch.cuda.device_count()} GPUs")
    elif device.type != "cpu":
        raise ValueError(f"no device {name!r}; expected auto, cpu, cuda or cuda:1")
    return device
