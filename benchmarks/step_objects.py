"""How many Python objects does a denoising step leave behind, and does a full garbage collection fall into one?

Python looks at all objects there are once these have grown by a quarter; in a process that has imported torch and diffusers that
takes a quarter of a second, whichever step it falls into. A small Wan with 30 layers on the processor, 40 sparse steps.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import models, turn
from benchmarks.end_to_end.run import Run, run

from benchmarks import jsonl

LAYERS, TURNS, STEPS = 30, 2, 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", help="of the code, where it is not this repository's")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "step_objects.jsonl"
    )
    options = parser.parse_args()
    models._TINY_CONFIG["WanTransformer3DModel"]["num_layers"] = LAYERS
    models._TINY_SIZE["steps"] = STEPS + 1
    rows = [measure(arm) for arm in ("stock", "best_dense", "default_15")]
    commit = {} if options.commit is None else {"of_commit": options.commit}
    jsonl.write(options.out, [row | commit for row in rows])


def measure(arm: str) -> dict[str, Any]:
    """Steps of one arm: objects that each left behind, in the middle of them, and full collections."""
    counts: list[int] = []
    full = _FullCollections()
    step_ended = turn._Watch.step_ended

    def counted(watch: Any, *arguments: Any) -> Any:
        result = step_ended(watch, *arguments)
        if len(watch._spans) in (STEPS // 2, STEPS):
            counts.append(len(gc.get_objects()))
        return result

    turn._Watch.step_ended = counted
    gc.callbacks.append(full)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run(
                Run(
                    models=("wan-1.3b",),
                    arms=(arm,),
                    out=Path(folder) / "rows.jsonl",
                    rounds=TURNS,
                    dense_steps=STEPS + 1,
                    first_steps=0,
                    sparse_steps=STEPS,
                    tiny=True,
                )
            )
    finally:
        turn._Watch.step_ended = step_ended
        gc.callbacks.remove(full)
    first, last = counts[-2:]
    return {
        "benchmark": "step_objects",
        "arm": arm,
        "layers": LAYERS,
        "objects_a_step": (last - first) / (STEPS - STEPS // 2),
        "objects": last,
        "full_collections": len(full.spent_ms),
        "longest_ms": max(full.spent_ms, default=None),
    }


class _FullCollections:
    """Listens to the garbage collector."""

    def __init__(self) -> None:
        self.spent_ms: list[float] = []
        self._began = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] < 2:
            return
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self.spent_ms.append(1e3 * (time.perf_counter() - self._began))


if __name__ == "__main__":
    main()
