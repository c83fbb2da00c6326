"""What a layer costs the host: microseconds, operations and collectives of a pass with next to nothing to compute.

    python -m benchmarks.moe_host --out benchmarks/results/cpu/moe_host.jsonl

Eight tokens of width 64: on a processor, too, such a layer is Python and dispatch alone. An *operation* is one that PyTorch
dispatches and that is no view: on a GPU at least a launch each, on a processor a function call. Ranks talk through gloo, each on a
thread of its own. Rows of former runs stay in the file; ``label`` tells them apart.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from adamac.bakeoff.machine import machine_stamp
from adamac.moe import MoE, preset
from adamac.testing import run_ranks

from .jsonl import short

_ROUNDS, _PASSES = 15, 40
_TOKENS = 8
_SHAPE = {"hidden": 64, "num_experts": 8, "top_k": 2}


class Counted(TorchDispatchMode):
    """Counts what PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.collectives = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.collectives += 1
        elif not function.is_view and function.name() not in ("aten::detach", "aten::_unsafe_view"):
            self.operations += 1
        return function(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--label", default="", help="says what was changed")
    options = parser.parse_args()
    rows = measured(0, ("local",))
    # Ranks of one machine meet at every collective: the slowest decides.
    for of_ranks in zip(*run_ranks(measured, 2, ("all_to_all", "per_rank", "all_gather")), strict=True):
        rows.append(max(of_ranks, key=lambda row: row["host_us"]))
    stamp = machine_stamp("cpu") | {"label": options.label}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(short(row | stamp)) + "\n")
            print(*(f"{name}={row[name]}" for name in row if name != "benchmark"))


def measured(rank: int, dispatchers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of each dispatcher, preset and pass on one rank."""
    torch.set_num_threads(1)
    rows = []
    for dispatcher in dispatchers:
        for name in ("fine_grained", "bigmac"):
            torch.manual_seed(0)
            group = dist.group.WORLD if dist.is_initialized() else None
            layer = MoE(preset(name, **_SHAPE), dispatcher, group)
            x = torch.randn(_TOKENS, _SHAPE["hidden"])
            for both in (False, True):
                entries = {
                    "preset": name,
                    "dispatcher": dispatcher,
                    "pass": "forward_backward" if both else "forward",
                }
                ranks = 1 if group is None else dist.get_world_size(group)
                rows.append({"benchmark": "moe_host", "ranks": ranks} | entries | cost(layer, x, both))
    return rows


def cost(layer: MoE, x: torch.Tensor, both: bool) -> dict[str, Any]:
    """Median microseconds of a pass and their spread, its operations and its collectives."""

    def step() -> None:
        with torch.set_grad_enabled(both):
            output = layer(x)
            if both:
                (output.sum() + layer.auxiliary_loss()).backward()

    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(_PASSES):
            step()
        times.append(1e6 * (time.perf_counter() - start) / _PASSES)
    with Counted() as counted:
        step()
    times.sort()
    return {
        "n": _ROUNDS,
        "host_us": median(times),
        "least_us": times[0],
        "operations": counted.operations,
        "collectives": counted.collectives,
    }


if __name__ == "__main__":
    main()
