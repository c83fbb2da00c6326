"""The ranks of a training run, and the two ways in which a parameter is spread over them.

Everything but routed experts is on every rank; its gradients are added over all ranks. With expert parallelism a rank holds some
of the experts, whose gradients the layer's own backward already adds over the ranks that sent them tokens; they are added only
over the ranks that hold the same experts (*replicas*). Losses are divided by the number of ranks before the backward, so every
addition is a plain sum.

What one rank does for all, or each does alone and may fail at, is done *together*: no rank goes on before all are done, and where
one fails, all do. Word of it travels over gloo, in a group of its own that waits as long as it takes: preparing text or writing a
checkpoint may take longer than NCCL waits for a collective.

Gradients travel in flat buckets after the backward rather than in hooks: it works alike for parameters that got no
gradient, on gloo and NCCL, and gives the same bits whatever the order in which gradients became ready.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from adamac.moe.parallel import expert_mesh

BUCKET_BYTES = 64 * 2**20
PATIENCE = timedelta(days=7)
"""How long a rank waits for what others do together with it; one that is gone is noticed at once."""


class Left(RuntimeError):
    """Another rank failed or was ended, so that this one cannot go on."""


@dataclass(frozen=True)
class World:
    """This rank and the others.

    Attributes:
        rank: Number of this rank.
        size: How many there are.
        device: Where this one computes.
        experts: The ranks among which the experts are divided; ``None`` if every rank has all.
        replicas: The ranks that hold the same experts; ``None`` if ``experts`` is.
        control: All ranks, over gloo; ``None`` if there is one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  a device is a value
    experts: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

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
        experts, replicas = _divide(expert_ranks) if expert_ranks > 1 else (None, None)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), size, place, experts, replicas, control)

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
        said: list[str | None] = [None] * self.size
        if self.control is not None:
            dist.all_gather_object(said, None if problem is None else str(problem), group=self.control)
        if problem is not None:
            raise problem
        for rank, word in enumerate(said):
            if word is not None:
                raise Left(f"rank {rank} stopped: {word}")

    @contextmanager
    def listening(self) -> Generator[None]:
        """Say in one line that another rank is gone, where a collective fails for it.

        Raises:
            Left: If so.
        """
        try:
            yield
        except RuntimeError as error:
            # Over gloo it is a plain RuntimeError that names the library's file.
            if not isinstance(error, Left) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise Left("another rank left") from error
            raise

    def add(self, value: Tensor) -> Tensor:
        """Add up a small tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def add_gradients(self, shared: Iterable[Tensor], experts: Iterable[Tensor]) -> None:
        """Add up gradients in place: of parameters that every rank has, and of this rank's experts."""
        if self.size == 1:
            return
        for bucket in _buckets(shared):
            _add_flat(bucket, None)
        for bucket in _buckets(experts):
            if self.experts is None:
                _add_flat(bucket, None)
            elif self.replicas is not None and dist.get_world_size(self.replicas) > 1:
                _add_flat(bucket, self.replicas)

    def norm(self, shared: Iterable[Tensor], experts: Iterable[Tensor]) -> Tensor:
        """Euclidean norm of the whole gradient, every expert counted once, as a float64 scalar."""
        own = _square(experts, self.device)
        if self.experts is not None:
            dist.all_reduce(own, group=self.experts)
        return (_square(shared, self.device) + own).sqrt()

    def gather_experts(self, tensor: Tensor) -> Tensor | None:
        """Put the experts of all ranks into one tensor, ``[local_experts, ...]`` to ``[num_experts, ...]``.

        Returns:
            It, in the first rank's main memory; ``None`` on other ranks.
        """
        if self.experts is None:
            return tensor.cpu() if self.first else None
        if 0 not in dist.get_process_group_ranks(self.experts):  # these hold copies
            return None
        parts = None
        if self.first:
            parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.experts))]
        dist.gather(tensor.contiguous(), parts, dst=0, group=self.experts)
        return None if parts is None else torch.cat([part.cpu() for part in parts])

    def own_experts(self, number: int) -> slice:
        """This rank's experts of so many; none if they cannot be divided."""
        if self.experts is None:
            return slice(0, number)
        own, remainder = divmod(number, dist.get_world_size(self.experts))
        first = dist.get_rank(self.experts) * own
        return slice(first, first + own) if remainder == 0 else slice(0)


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


def _divide(expert_ranks: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Groups of this rank: neighbours that divide the experts, and those at the same place in other such groups."""
    mesh = expert_mesh(expert_ranks, "cuda" if dist.get_backend() == "nccl" else "cpu")
    return mesh.get_group("expert"), mesh.get_group("data")


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def _add_flat(bucket: list[Tensor], group: dist.ProcessGroup | None) -> None:
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _square(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), device=device, dtype=torch.float64)
    if gradients := list(gradients):
        total += torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    return total
