"""Where the time of one `attend` and of one plan goes on a processor: torch's operations by their own time.

The tensors and the method are those of `attend_cpu.py`; the plan is a later step's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import jsonl
from adamac.attention import AdaCluster, Tokens, attend
from adamac.testing import attention_like
from attend_cpu import HEADS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.15)
    results = Path(__file__).parent / "results" / "cpu" / "attend_profile.jsonl"
    parser.add_argument("--out", type=Path, default=results)
    options = parser.parse_args()
    query, key, value = attention_like(1, HEADS, options.tokens, options.head_dim, topics=64)
    method = AdaCluster(budget=Tokens(options.density))
    plan = method(query, key)
    stages = {
        "plan": lambda: method(query, key, previous=plan),
        "attend": lambda: attend(query, key, value, plan),
    }
    rows = []
    for stage, call in stages.items():
        call()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            call()
        times = {entry.key: entry.self_cpu_time_total / 1e3 for entry in profiler.key_averages()}
        total = sum(times.values())
        for operation, time_ms in sorted(times.items(), key=lambda item: -item[1])[:8]:
            rows.append(
                {
                    "benchmark": "attend_profile",
                    "stage": stage,
                    "tokens": options.tokens,
                    "heads": HEADS,
                    "head_dim": options.head_dim,
                    "density": options.density,
                    "operation": operation,
                    "time_ms": time_ms,
                    "share": time_ms / total,
                    "total_ms": total,
                    "threads": torch.get_num_threads(),
                }
            )
            print(f"{stage:<8} {operation:<50} {time_ms:8.1f} ms {time_ms / total:6.1%}")
    jsonl.write(options.out, rows)


if __name__ == "__main__":
    main()
