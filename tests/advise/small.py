"""What the tests measure on each rank: as little as there can be."""

from __future__ import annotations

import torch.distributed as dist

from adamac.advise.bench import Sizes
from adamac.advise.check import Check, check
from adamac.advise.measure import measure
from adamac.moe.cost.machine import Machine

SIZES = Sizes(
    tokens=(16, 64),
    hidden=(32, 64),
    experts=(4,),
    message_bytes=(1024, 65536),
    layer=(32, 4, 2, 32),
    checked=((32, 4, 2, 32), (64, 8, 2, 64)),
    rounds=2,
)


def measured_and_checked(rank: int) -> tuple[Machine, list[Check]]:
    group = dist.group.WORLD
    machine = measure("cpu", group=group, sizes=SIZES)
    return machine, check(machine, group=group, sizes=SIZES)
