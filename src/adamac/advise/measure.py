"""Measure a machine in seconds: each operation of a layer at a few shapes, with the functions that the layer itself calls.

Medians of several runs, on all ranks at the same time as they would be in a layer, averaged over ranks so that all come to the same
machine. On a GPU an operation's time is the device's, with the host ahead of it; that the host is the slower one in a
small layer is measured apart, by a layer that has next to nothing to do. Values are random, loads are even up to chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from adamac.advise.bench import CPU, GPU, Bench, Sizes
from adamac.advise.trials import TRIALS
from adamac.moe.cost.constants import Cost, Kind
from adamac.moe.cost.machine import COLLECTIVES, Machine


def measure(
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    sizes: Sizes | None = None,
    told: Callable[[str], None] = lambda what: None,
) -> Machine:
    """Measure this machine; every rank of the group calls it alike.

    Args:
        device: Where.
        dtype: Of values; bfloat16 on a GPU and float32 on a CPU if not given.
        group: Ranks that collectives are measured among; ``None`` or one rank leaves them out.
        sizes: What is tried; by the kind of device if not given.
        told: Is told what is measured next.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if cuda else torch.float32)
    bench = Bench(device, dtype, group, sizes or (GPU if cuda else CPU))
    costs: dict[Kind, Cost] = {}
    with torch.no_grad():
        for kind, trials in TRIALS.items():
            if bench.ranks > 1 or kind not in COLLECTIVES:
                told(kind)
                costs[kind] = bench.fitted(trials(bench))
    told("layers")
    least, both = bench.least_ms(both=False), bench.least_ms(both=True)
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    machine = Machine(
        f"{name}, {bench.ranks} rank{'s' * (bench.ranks > 1)}, {str(dtype).removeprefix('torch.')}",
        costs,
        dtype.itemsize,
        bench.ranks if bench.ranks > 1 else None,
        bench.impl,
        least,
        both,
    )
    return replace(machine, whole=bench.whole(machine))
