"""Charts of GPU results. Part of `gpu_page.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from .gpu_targets import Rows

SHAPES = ("cogvideox-2b", "wan-1.3b", "wan-14b", "hunyuan-129f", "hunyuan-193f")
DENSITIES = (15, 8)
STAGES = ("nearest", "sort", "moments", "select", "pack", "list", "attend", "other")


def ours(density: int, compensated: bool = True, *, key_roots: int | None = None) -> str:
    """Name of a sparse arm."""
    keys = "" if key_roots is None else f", keys {key_roots} root N"
    return f"adamac {density}%{' compensated' if compensated else ''}{keys}"


def draw_speedups(attention: Rows, path: Path) -> None:
    """Speed-up over the fastest dense kernel against density, with what would be the limit."""
    figure, axes = plt.subplots(figsize=(8.5, 4.2))
    for shape in SHAPES:
        axes.plot(
            DENSITIES, [attention[shape, ours(d)]["speedup"] for d in DENSITIES], marker="o", label=shape
        )
    blocks = [attention["wan-14b", f"flash4 blocks {d}%"]["speedup"] for d in DENSITIES]
    axes.plot(
        DENSITIES,
        blocks,
        color="0.3",
        linestyle="--",
        label="flash-attn-4, random\nblocks, no plan (wan-14b)",
    )
    axes.plot(DENSITIES, [100 / d for d in DENSITIES], color="0.6", linestyle=":", label="limit, 1 / density")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="keys read exactly, %",
        ylabel="speed-up over the fastest dense kernel",
    )
    axes.set_xticks(DENSITIES, [str(d) for d in DENSITIES])
    axes.set_yticks((1, 2, 3, 5, 8, 13), ("1", "2", "3", "5", "8", "13"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def draw_stages(attention: Rows, path: Path) -> None:
    """Shares of a call's time by stage, relative to the fastest dense kernel."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    left = [0.0] * len(SHAPES)
    for stage in STAGES:
        shares = []
        for shape in SHAPES:
            row = attention[shape, ours(15)]
            dense = attention[shape, f"dense {row['fastest_dense']}"]["time_ms"]
            shares.append(100 * row["stages_ms"][stage] / dense)
        axes.barh(SHAPES, shares, left=left, label=stage)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set(xlabel="time at 15 %, compensated, % of the fastest dense kernel")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a chart that is the same for the same rows."""
    plt.rcParams["svg.hashsalt"] = "adamac"
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
