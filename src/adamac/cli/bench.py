"""``adamac bench``: time one operation at the shapes of real models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from tyro.conf import Positional

from adamac.cli.lines import say


@dataclass(frozen=True)
class Bench:
    """Time one operation at the shapes of real models: dense by every kernel that runs here, and sparse with planning.

    Attributes:
        what: The operation.
        shapes: tiny, cogvideox-2b, wan-1.3b, wan-14b, hunyuan-129f, hunyuan-193f.
        densities: Shares of the keys that each row reads; each is timed with and without compensation.
        key_roots: Further numbers of key clusters, as multiples of the root of the number of tokens; the default has 4.
        heads: Fewer heads than the model has, where memory or time is short.
        rounds: Timed rounds, in which all contenders take turns.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: "auto" (float32 on a CPU, bfloat16 elsewhere), "float32", "bfloat16" or "float16".
        out: File that rows are appended to.
    """

    what: Positional[Literal["attention"]]
    shapes: tuple[str, ...] = ("tiny",)
    densities: tuple[float, ...] = (0.3, 0.15, 0.08, 0.05)
    key_roots: tuple[float, ...] = ()
    heads: int | None = None
    rounds: int = 5
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    out: Path | None = None


def bench(options: Bench, console: Console) -> int:
    """Time one operation."""
    from adamac.bakeoff.device import find_device, find_dtype
    from adamac.bench.run import bench_attention
    from adamac.bench.show import show

    device = find_device(options.device)
    rows = list(
        bench_attention(
            options.shapes,
            options.densities,
            heads=options.heads,
            rounds=options.rounds,
            device=str(device),
            dtype=find_dtype(options.dtype, device),
            out=options.out,
            key_roots=options.key_roots,
            told=partial(say, console),
        )
    )
    show(rows, console)
    return 0
