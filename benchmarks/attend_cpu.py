"""How much faster than dense attention is `attend` on a processor, planning included?

Dense is torch's own kernel on the same tensors. "first" is the first call of a video, which clusters from scratch; "next" is
a call of a later step, which starts from the plan of a step before; "next, uncompensated" drops what is skipped; "next, 200
rows a query cluster" has fewer query clusters than the default, which suits torch's kernel. Arms take turns, on tensors drawn afresh each round, and what is reported are medians with the 20th and 80th percentile.

The tensors look like attention: tokens are about topics, neighbours about the same one, keys and values vary about their
topic and queries look for it (`adamac.testing.attention_like`). The plan of the step before is made from the same tensors
with a tenth of noise added.

On a busy machine wall time says little; `--threads 1` and processor time (`cpu_ms`) then still compare arms fairly.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

import jsonl
from adamac.attention import AdaCluster, Tokens, attend
from adamac.testing import attention_like

HEADS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "attend.jsonl"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    method = AdaCluster(budget=Tokens(options.density))
    rows = []
    print(
        f"{'tokens':>6} {'dim':>4}  {'arm':<30} {'wall ms (p20-p80)':>22} {'x dense':>8} {'cpu ms':>8} {'x dense':>8}"
    )
    for tokens in options.tokens:
        for head_dim in options.head_dims:
            for row in compare(method, tokens, head_dim, options.rounds):
                rows.append(row)
                spread = f"{row['wall_ms']:.0f} ({row['wall_ms_p20']:.0f}-{row['wall_ms_p80']:.0f})"
                print(
                    f"{tokens:>6} {head_dim:>4}  {row['arm']:<30} {spread:>22} {row['wall_ratio']:>8.2f} "
                    f"{row['cpu_ms']:>8.0f} {row['cpu_ratio']:>8.2f}"
                )
    jsonl.write(options.out, rows)


def compare(method: AdaCluster, tokens: int, head_dim: int, rounds: int) -> list[dict[str, Any]]:
    """Time all arms in turns at one shape; the first round is warm-up."""
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for arm, call in arms(method, tokens, head_dim, seed=number).items():
            started, worked = time.perf_counter(), time.process_time()
            call()
            if number:
                wall.setdefault(arm, []).append(1e3 * (time.perf_counter() - started))
                cpu.setdefault(arm, []).append(1e3 * (time.process_time() - worked))
    query, key, _ = attention_like(1, HEADS, tokens, head_dim, topics=64)
    plan = method(query, key)
    shape = {
        "benchmark": "attend_cpu",
        "heads": HEADS,
        "tokens": tokens,
        "head_dim": head_dim,
        "density": float(plan.density().mean()),
        "cost": float(plan.cost().mean()),
        "rounds": rounds,
        "load": os.getloadavg()[0],
    }
    return [shape | {"arm": arm} | summary(wall, cpu, arm) for arm in wall]


def arms(method: AdaCluster, tokens: int, head_dim: int, seed: int) -> dict[str, Callable[[], Tensor]]:
    """Bind every arm to one draw of tensors."""
    query, key, value = attention_like(1, HEADS, tokens, head_dim, topics=64, seed=seed)
    former = method(query + 0.1 * torch.randn_like(query), key + 0.1 * torch.randn_like(key))
    drop = replace(method, compensate=False)
    large = replace(method, query_clusters=tokens // 200)
    large_former = large(query + 0.1 * torch.randn_like(query), key + 0.1 * torch.randn_like(key))
    return {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value),
        "first": lambda: attend(query, key, value, method(query, key)),
        "next": lambda: attend(query, key, value, method(query, key, previous=former)),
        "next, 200 rows a query cluster": lambda: attend(
            query, key, value, large(query, key, previous=large_former)
        ),
        "next, uncompensated": lambda: attend(query, key, value, drop(query, key, previous=former)),
    }


def summary(wall: dict[str, list[float]], cpu: dict[str, list[float]], arm: str) -> dict[str, float]:
    """Condense the rounds of one arm; ratios are medians of the ratios within a round."""
    low, *_, high = quantiles(wall[arm], n=5)
    return {
        "wall_ms": median(wall[arm]),
        "wall_ms_p20": low,
        "wall_ms_p80": high,
        "cpu_ms": median(cpu[arm]),
        "wall_ratio": median(dense / ours for dense, ours in zip(wall["dense"], wall[arm], strict=True)),
        "cpu_ratio": median(dense / ours for dense, ours in zip(cpu["dense"], cpu[arm], strict=True)),
    }


if __name__ == "__main__":
    main()
