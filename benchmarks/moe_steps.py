"""Whole models in training: what a step is made of, and what shares of a model save. Part of `moe_page.py`."""

from __future__ import annotations

from typing import Any

from .gpu_page import table
from .moe.cases import BASELINE, COPY_PER_EXPERT, FABRICS
from .moe.summary import ok
from .moe_fabrics import case

Row = dict[str, Any]


def trained(rows: list[Row], model: str, fabric: str) -> dict[str, Row]:
    """Training steps of a model on a fabric, launched piece by piece, by arm."""
    found = [
        row for row in ok(rows, "moe_model") if row["work"] == "train" and not row.get("captured", False)
    ]
    return {row["arm"]: row for row in found if (row["model"], row["fabric"]) == (model, fabric)}


def best(steps: dict[str, Row], side: str) -> Row:
    """The fastest dispatcher of a side."""
    return min((row for row in steps.values() if row["preset"] == side), key=lambda row: row["p50_ms"])


def step_table(rows: list[Row], layers: list[Row]) -> str:
    """Training steps of the XL shape, and what their layers of experts take of them by the layer's own measurement.

    Args:
        rows: Of models.
        layers: Of the run that timed the layer alone.
    """
    steps = trained(rows, "xl", "shm")
    first = next(iter(steps.values()))
    # Micro-batches are as long as the layer that was timed alone.
    passes = first["layers"] * first["tokens"] // FABRICS["shm"].tokens
    lines = []
    for arm, step in steps.items():
        inside = passes * case(layers, "shm")[arm]["forward_backward"]["p50_ms"]
        lines.append([arm, *(f"{ms:.0f}" for ms in (step["p50_ms"], inside, step["p50_ms"] - inside))])
    return table(["step, ms", "whole", f"its layers, {passes} times both passes", "the rest"], lines)


def training_words(rows: list[Row], earlier: list[Row]) -> str:
    """Why a training step through shared memory misses its target; ``earlier`` are rows of the run before, without the gather."""
    steps, then = trained(rows, "xl", "shm"), trained(earlier, "xl", "shm")
    wide, narrow = best(steps, BASELINE), best(steps, "bigmac")
    copied = steps[f"{BASELINE}/{COPY_PER_EXPERT}"]["p50_ms"]
    return (
        f"**A training step** (target 2.5) through shared memory would have to take {copied / 2.5:.0f} ms; BigMac's best takes {_told(narrow)}, the baseline's "
        f"best {_told(wide)}: {by_copies(steps):.2f} by copies and {by_best(steps):.2f} between the best, of {narrow['n']} steps each. The run of the layers had "
        f"{by_copies(then):.2f} and {by_best(then):.2f}, without the gather, which is the fastest of both sides in training as well. {_others(rows)} Layers are not all of a "
        "step: attention, the loss, gradients over the ranks and the optimiser are the same on both sides. Next: the host. Roughly, since the "
        "host's pace changes and the layers were timed in another run:"
    )


def by_copies(steps: dict[str, Row]) -> float:
    """Baseline over BigMac, a copy for each expert on both sides."""
    wide, narrow = (steps[f"{side}/{COPY_PER_EXPERT}"]["p50_ms"] for side in (BASELINE, "bigmac"))
    return wide / narrow


def by_best(steps: dict[str, Row]) -> float:
    """Baseline over BigMac, each by its best dispatcher."""
    return best(steps, BASELINE)["p50_ms"] / best(steps, "bigmac")["p50_ms"]


def _told(row: Row) -> str:
    return f"{row['p50_ms']:.0f} (p95 {row['p95_ms']:.0f}, {row['dispatcher']})"


def _others(rows: list[Row]) -> str:
    narrower = trained(rows, "medium", "shm")
    alone = [by_best(trained(rows, model, "none")) for model in ("xl", "medium")]
    return (
        f"The narrower Medium shape has {by_copies(narrower):.2f} and {by_best(narrower):.2f}; on one GPU, where nothing is sent, a step of XL has {alone[0]:.2f} "
        f"and one of Medium {alone[1]:.2f}."
    )


def layout_table(rows: list[Row]) -> str:
    """Memory and time of a step by how parameters lie on two ranks."""
    lines = []
    for row in rows:
        whole = next(r for r in rows if r["layout"] == "replicated" and _work(r) == _work(row))
        lines.append(
            [
                str(row["expert_ranks"]),
                str(row["pieces"]),
                row["layout"],
                f"{row['parameters_held'] / 1e6:.0f}",
                f"{row['peak_gib']:.2f}",
                f"{row['p50_ms']:.0f}",
                f"{row['p50_ms'] / whole['p50_ms']:.2f}",
            ]
        )
    head = ["ranks that divide the experts", "micro-batches", "layout", "parameters on a rank, M", "peak, GiB", "step, ms", "× replicated"]  # fmt: skip
    return table(head, lines)


def layout_words(rows: list[Row]) -> str:
    """What shares save and cost."""
    first = rows[0]
    found = {(row["layout"], *_work(row)): row for row in rows}
    dear = max(rows, key=lambda row: row["p50_ms"] / found["replicated", *_work(row)]["p50_ms"])
    plain, divided, shared = (
        found[key] for key in (("replicated", 1, 1), ("replicated", first["ranks"], 1), ("sharded", 1, 1))
    )
    return (
        f"A model of {first['parameters'] / 1e6:.0f} million parameters ({first['recipe']['preset']}, hidden {first['recipe']['hidden']:,}, {first['recipe']['layers']} layers) on "
        f"{first['ranks']} GPUs over NCCL, median of {first['n']} steps at commit `{first['commit']}` (`benchmarks/moe_layouts.py`, rows in `h200/moe_layouts.jsonl`; losses of "
        f"both layouts agreed first). Dividing the experts alone takes {plain['peak_gib'] - divided['peak_gib']:.1f} GiB off a rank for "
        f"{divided['p50_ms'] / plain['p50_ms']:.2f} times the time; shares of everything take {plain['peak_gib'] - shared['peak_gib']:.1f} off for "
        f"{shared['p50_ms'] / plain['p50_ms']:.2f} times, and {dear['p50_ms'] / found['replicated', *_work(dear)]['p50_ms']:.2f} times with {dear['pieces']} "
        "micro-batches, each of which sends the parameters again. So shares are for what does not fit otherwise "
        "([why they are asked for](decisions/shares-are-asked-for.md))."
    )


def _work(row: Row) -> tuple[int, int]:
    return row["expert_ranks"], row["pieces"]
