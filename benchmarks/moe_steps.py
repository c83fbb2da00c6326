"""Whole models: what a training step and a decoded token are made of. Part of `moe_page.py`."""

from __future__ import annotations

from typing import Any

from .gpu_page import table
from .moe.cases import BASELINE, COPY_PER_EXPERT, FABRICS
from .moe.summary import ok
from .moe_fabrics import case
from .moe_foreseen import machines_of

Row = dict[str, Any]


def trained(rows: list[Row]) -> dict[str, Row]:
    """Training steps through shared memory, by arm."""
    found = [row for row in ok(rows, "moe_model") if row["work"] == "train"]
    return {row["arm"]: row for row in found if row["fabric"] == "shm"}


def step_table(rows: list[Row]) -> str:
    """Training steps, and what their layers of experts take of them by the layer's own measurement."""
    steps = trained(rows)
    first = next(iter(steps.values()))
    # Micro-batches are as long as the layer that was timed alone.
    passes = first["layers"] * first["tokens"] // FABRICS["shm"].tokens
    lines = []
    for arm, step in steps.items():
        inside = passes * case(rows, "shm")[arm]["forward_backward"]["p50_ms"]
        lines.append([arm, *(f"{ms:.0f}" for ms in (step["p50_ms"], inside, step["p50_ms"] - inside))])
    return table(["step, ms", "whole", f"its layers, {passes} times both passes", "the rest"], lines)


def training_words(rows: list[Row]) -> str:
    """Why a training step through shared memory misses its target."""
    steps = trained(rows)
    copied = steps[f"{BASELINE}/{COPY_PER_EXPERT}"]["p50_ms"]
    best = min(row["p50_ms"] for row in steps.values() if row["preset"] != BASELINE)
    return (
        f"**A training step** (target 2.5) would have to take {copied / 2.5:.0f} ms; BigMac's best takes {best:.0f}. Layers are not all of it: "
        "attention, the loss, gradients over the ranks and the optimiser are the same on both sides. The gather, the fastest dispatcher "
        "of the layer, was not run in training. Next: it, then the host. Roughly, since the host's pace changes:"
    )


def decode_words(rows: list[Row]) -> str:
    """What a decoded token waits for."""
    decoded = {(row["batch"], row["preset"]): row for row in ok(rows, "moe_model") if row["work"] == "decode"}
    times = {key: f"{row['p50_ms']:.0f} ms (p95 {row['p95_ms']:.0f})" for key, row in decoded.items()}
    layers = next(iter(decoded.values()))["layers"]
    floor = layers * machines_of(rows)["none"].least_ms["local"]
    longer = all(decoded[16, side]["p50_ms"] > decoded[1, side]["p50_ms"] for side in (BASELINE, "bigmac"))
    return (
        f"**A decoded token** takes {times[1, BASELINE]} with the baseline and {times[1, 'bigmac']} with BigMac; sixteen texts at once take "
        f"{'longer' if longer else 'no longer'}, {times[16, BASELINE]} and {times[16, 'bigmac']}. So it is the host again: {layers} layers of experts at their "
        f"floor are {floor:.0f} ms, and attention comes on top. One arm differs between batches by as much as the arms differ; the ratios are "
        "the host's pace, no gain of a shape."
    )
