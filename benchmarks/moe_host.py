"""What a layer costs the host: microseconds, operations and collectives of a pass with next to nothing to compute.

    python -m benchmarks.moe_host --out benchmarks/results/cpu/moe_host.jsonl

Eight tokens of width 64: on a processor, too, such a layer is Python and dispatch alone. An *operation* is one that PyTorch
dispatches and that is neither a view nor memory alone: on a GPU at least a launch each, on a processor a function call. Ranks talk through gloo, each on a
thread of its own. Rows of former runs stay in the file; ``label`` tells them apart.

With ``--kernels`` (and ``TRITON_INTERPRET=1``) what a GPU does by kernels is done by them here too, interpreted, and a launch
counts as an operation; times would be the interpreter's and are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from adamac.bakeoff.machine import machine_stamp
from adamac.moe import MoE, preset
from adamac.testing import run_ranks

from .jsonl import short

# Views that are not marked as such, and memory that is not written.
_NO_LAUNCH = re.compile(r"aten::(detach|_unsafe_view|(new_)?empty\w*)(\.|$)")
_ROUNDS, _PASSES = 15, 40
_TOKENS = 8
_SHAPE = {"hidden": 64, "num_experts": 8, "top_k": 2}


class Counted(TorchDispatchMode):
    """Counts what PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.collectives = 0
        self._inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:
            pass
        elif function.namespace == "c10d":
            self.collectives += 1
        elif not function.is_view and not _NO_LAUNCH.match(function.name()):
            self.operations += 1
        return function(*args, **(kwargs or {}))

    def launches(self) -> AbstractContextManager[Any]:
        """Counts kernels that are interpreted, and not what the interpreter does."""
        launch = GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.operations += 1
            self._inside = True
            launch(executor, *args, **kwargs)
            self._inside = False

        return patch.object(GridExecutor, "__call__", counted)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--label", default="", help="says what was changed")
    parser.add_argument("--kernels", action="store_true", help="count launches of kernels, time nothing")
    options = parser.parse_args()
    rows = measured(0, ("local",), options.kernels)
    several = run_ranks(measured, 2, ("all_to_all", "per_rank", "all_gather"), options.kernels)
    # Ranks of one machine meet at every collective: the slowest decides.
    rows += [max(of_ranks, key=lambda row: row.get("host_us", 0)) for of_ranks in zip(*several, strict=True)]
    stamp = machine_stamp("cpu") | {"label": options.label}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(short(row | stamp)) + "\n")
            print(*(f"{name}={row[name]}" for name in row if name != "benchmark"))


def measured(rank: int, dispatchers: tuple[str, ...], kernels: bool) -> list[dict[str, Any]]:
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
                rows.append(
                    {"benchmark": "moe_host", "ranks": ranks} | entries | cost(layer, x, both, kernels)
                )
    return rows


def cost(layer: MoE, x: torch.Tensor, both: bool, kernels: bool) -> dict[str, Any]:
    """Operations and collectives of a pass; without kernels its median microseconds and the least too."""

    def step() -> None:
        with torch.set_grad_enabled(both):
            output = layer(x)
            if both:
                (output.sum() + layer.auxiliary_loss()).backward()

    step()
    with ExitStack() as stack:
        counted = stack.enter_context(Counted())
        if kernels:
            stack.enter_context(counted.launches())
            for module in ("adamac.ops.gate", "adamac.ops.activation", "adamac.moe.rows"):
                stack.enter_context(patch(f"{module}.chosen", return_value="triton"))
        step()
    found = {"operations": counted.operations, "collectives": counted.collectives}
    return found if kernels else found | times_us(step)


def times_us(step: Callable[[], None]) -> dict[str, Any]:
    """Of this thread, so that waiting for another rank, or for a core, does not count."""
    times = []
    for _ in range(_ROUNDS):
        start = time.thread_time()
        for _ in range(_PASSES):
            step()
        times.append(1e6 * (time.thread_time() - start) / _PASSES)
    return {"n": _ROUNDS, "host_us": median(times), "least_us": min(times)}


if __name__ == "__main__":
    main()
