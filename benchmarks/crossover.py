"""From how much work on does sparse attention pay on this GPU? Dense and default sparse calls, one after another without a pause.

A call's time here is that of ten in a row, divided by ten: whichever is slower, the device or the host that feeds it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import jsonl
from adamac.attention import AdaCluster, attend, crossover
from adamac.bench.shapes import Shape, draw
from adamac.ops.dense_attention import dense_attention, resolve

HEADS = ((128, 24), (128, 12), (64, 30), (64, 4))
TOKENS = (2048, 4096, 8192, 12288, 16384, 24576, 32768, 49152)
CALLS, REPEATS = 10, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "h100" / "crossover.jsonl"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [
        measure(Shape(tokens, heads, head_dim), device, dtype)
        for head_dim, heads in HEADS
        for tokens in options.tokens
    ]
    jsonl.write(options.out, rows)


def measure(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One row."""
    query, key, value = draw(shape, device, dtype, seed=0)
    method, layout, scale = AdaCluster(), shape.layout(), shape.head_dim**-0.5
    former = method(query, key, layout=layout).carried()

    def sparse() -> torch.Tensor:
        return attend(query, key, value, method(query, key, layout=layout, previous=former))

    return {
        "benchmark": "crossover",
        "tokens": shape.tokens,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "work_tflop": crossover.work(shape.tokens, shape.heads, shape.head_dim) / 1e12,
        "dense": resolve(query, key, value),
        "dense_ms": in_a_row(lambda: dense_attention(query, key, value, scale=scale), device),
        "sparse_ms": in_a_row(sparse, device),
        "plan_ms": in_a_row(lambda: method(query, key, layout=layout, previous=former), device),
    }


def in_a_row(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call among ten without a pause, the median of three such series."""
    call()
    series = []
    for _ in range(REPEATS):
        _wait(device)
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        _wait(device)
        series.append(1e3 * (time.perf_counter() - begin) / CALLS)
    return median(series)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
