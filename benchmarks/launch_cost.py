"""What the host pays for one launch, by kind, and for a layer of 8 tokens, which is launches and Python alone.

    python -m benchmarks.launch_cost --out benchmarks/results/h200/launch_cost.jsonl

Calls follow each other without a wait and leave the device next to nothing to do, so that the host's time is all there is: the
clock runs until the last call has returned, not until the device is done. ``thread_us`` is what this thread worked of it, in Python and
in the driver; the rest it slept. With ``--profile`` what Python did in the layer is printed, function by function.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from adamac.moe import MoE, preset
from adamac.moe.rows import by_label, gathered
from adamac.ops.gate import gate
from adamac.ops.grouped_mm import grouped_mm

from .jsonl import write

# The driver takes some thousand launches before it makes the host wait; a round stays below.
_ROUNDS, _PASSES = 15, 20
_TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for name, launches, step in calls(options.device, options.hidden):
            row = {"benchmark": "launch_cost", "call": name, "launches": launches} | host_us(
                step, options.device
            )
            rows.append(row)
            print(*(f"{key}={row[key]}" for key in row if key != "benchmark"), flush=True)
        if options.profile:
            _print_profile(step)
    write(options.out, rows)


def calls(device: str, hidden: int) -> Iterable[tuple[str, int, Callable[[], Any]]]:
    """What is timed: a name, launches where they are known by reading (0 where not), and the call."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(_TOKENS, hidden, device=device, dtype=dtype)
    square = torch.randn(hidden, hidden, device=device, dtype=dtype)
    yield "add in place", 1, lambda: x.add_(0)
    yield "empty", 0, lambda: torch.empty(8, device=device)
    yield "product", 1, lambda: torch.mm(x, square)
    experts = square.view(8, hidden // 8, hidden)
    counts = torch.ones(8, device=device, dtype=torch.int64)
    rows = x[:, : hidden // 8].contiguous()
    yield "grouped product", 0, lambda: grouped_mm(rows, experts, counts)
    logits = torch.randn(_TOKENS, 64, device=device)
    yield "gate", 0, lambda: gate(logits, 8, "softmax")
    labels = logits.topk(8).indices
    yield "rows in order", 0, lambda: by_label(labels, 64, full=True)
    order, _ = by_label(labels, 64, full=True)
    sorted_rows = x.repeat(8, 1)
    yield "rows added up, one kernel of ours", 1, lambda: gathered(sorted_rows, order)
    for name in ("fine_grained", "bigmac"):
        layer = MoE(preset(name, hidden, 64, 8), device=device, dtype=dtype).eval()
        yield f"layer, {name}", 0, lambda layer=layer: layer(x)


def host_us(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """Microseconds of a call until it returns, and of those that this thread worked: medians over rounds."""
    for _ in range(3):
        step()
    wall, computed = [], []
    for _ in range(_ROUNDS):
        if device == "cuda":
            torch.cuda.synchronize()
        began, worked = time.perf_counter(), time.thread_time()
        for _ in range(_PASSES):
            step()
        wall.append(1e6 * (time.perf_counter() - began) / _PASSES)
        computed.append(1e6 * (time.thread_time() - worked) / _PASSES)
    return {
        "n": _ROUNDS,
        "host_us": round(median(wall), 1),
        "least_us": round(min(wall), 1),
        "thread_us": round(median(computed), 1),
    }


def _print_profile(step: Callable[[], Any]) -> None:
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(200):
        step()
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()
