"""What the shapes do to quality: the page's section and its chart, from the rows of `benchmarks/moe_quality.py`. Part of `moe_page.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .gpu_charts import save
from .gpu_page import table
from .moe.cases import BASELINE
from .moe_quality import common_step

Row = dict[str, Any]

STABLE, PAPERS = "bigmac_stable", "bigmac,sound_init=False"
# As they are called on the page and in the chart.
NAMES = {PAPERS: "bigmac, the paper's initialisation"}
CORPUS = "47 MB of English: manuals of Python and PostgreSQL, WordNet's glosses, the Jargon File, the Devil's Dictionary, the World English Bible, a commentary on the Psalms"


def section(rows: list[Row]) -> str:
    """All that the page says of quality."""
    first, step = rows[0], common_step(rows)
    tokens = first["batch"] * first["context"] * step
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    seeds = {row["seed"] for row in rows}
    return "\n\n".join(
        [
            f"{len(arms)} arms, {len(seeds)} seeds each, {step} steps of {first['batch']} windows of {first['context']}: {tokens / 1e6:.1f} million "
            f"tokens each, the same for all (`benchmarks/moe_quality.py`, rows in `benchmarks/results/h200/moe_quality.jsonl`). A model "
            f"of width {first['hidden']} with {first['layers']} layers of the baseline's {first['num_experts']} experts, top-{first['top_k']}, "
            f"vocabulary 8,192; text: {CORPUS}. Every matrix is drawn by its fan-in, except in the arm that says so, since the paper's "
            "standard deviation of 0.02 suits a wide model. Parameters and FLOPs are those of all layers of experts. Bits per byte of "
            "held-out text, less is better:",
            table(
                [
                    "arm",
                    "parameters, M",
                    "FLOPs a token, M",
                    "bits per byte",
                    "sd",
                    "over the baseline, by seed",
                    "imbalance",
                ],
                lines(rows, step),
            ),
            "![Bits per byte against measured time](assets/moe-quality.svg)",
            words(rows, step),
        ]
    )


def at_step(rows: list[Row], arm: str, step: int) -> list[Row]:
    """The evaluations of an arm, by seed."""
    found = [row for row in rows if row["arm"] == arm and row["step"] == step]
    return sorted(found, key=lambda row: row["seed"])


def bits(rows: list[Row], arm: str, step: int) -> list[float]:
    """Bits per byte by seed."""
    return [row["bits_per_byte"] for row in at_step(rows, arm, step)]


def over(rows: list[Row], arm: str, other: str, step: int) -> list[float]:
    """By how many bits an arm is worse than another, seed by seed: both read the same windows in the same order."""
    seeds = [[row["seed"] for row in at_step(rows, each, step)] for each in (arm, other)]
    if seeds[0] != seeds[1]:
        raise ValueError(
            f"arms are compared seed by seed, but {arm} has seeds {seeds[0]}, {other} {seeds[1]}; run those that are missing"
        )
    return [a - b for a, b in zip(bits(rows, arm, step), bits(rows, other, step), strict=True)]


def lines(rows: list[Row], step: int) -> Iterable[list[str]]:
    """An arm a line, the best first."""
    arms = dict.fromkeys(row["arm"] for row in rows)
    for arm in sorted(arms, key=lambda arm: statistics.mean(bits(rows, arm, step))):
        found, values = at_step(rows, arm, step), bits(rows, arm, step)
        apart = "-" if arm == BASELINE else signed(over(rows, arm, BASELINE, step))
        yield [
            NAMES.get(arm, arm),
            f"{found[0]['parameters'] / 1e6:.2f}",
            f"{found[0]['flops_per_token'] / 1e6:.2f}",
            f"{statistics.mean(values):.4f}",
            f"{statistics.stdev(values):.4f}",
            apart,
            f"{statistics.mean(row['imbalance'] for row in found):.1f}",
        ]


def signed(values: list[float]) -> str:
    """Numbers by seed."""
    return " / ".join(f"{value:+.3f}" for value in values)


def plain(values: list[float]) -> str:
    """The same where words say which way."""
    return " / ".join(f"{value:.3f}" for value in values)


def words(rows: list[Row], step: int) -> str:
    """What the table shows, and what it does not."""

    def apart(arm: str, other: str) -> float:
        return statistics.mean(over(rows, arm, other, step))

    every = [row["time_s"] for row in rows if row["step"] == step]
    stable = over(rows, STABLE, "bigmac", step)
    latent = over(rows, "latent_eff", "bigmac", step)
    flops = {arm: at_step(rows, arm, step)[0]["flops_per_token"] for arm in ("bigmac", "latent_eff")}
    return "\n".join(
        f"- {line}"
        for line in (
            f"**DCCA costs {apart('bigmac', BASELINE):.3f} bits per byte here**, and costs in every seed: at equal tokens and about equal "
            "parameters BigMac learns less than the baseline. In the paper's comparison at equal tokens (one seed, width 1,024) the two are about equal.",
            f"`{STABLE}` (norm, sigmoid router, balance by a bias) is worse than `bigmac` drawn by its fan-in, by {plain(stable)} in the seeds; over the paper's "
            f"initialisation it gains {-apart(STABLE, PAPERS):.3f}, and drawing alone gains {-apart('bigmac', PAPERS):.3f}. So at this width it is the "
            "initialisation that helps. The bias evens out load where the balance loss of 1e-3 does not, which may be what it pays with: "
            "the parts of the preset were not tried one by one.",
            f"The LatentMoE shapes lose less. `latent_eff` sends as few bytes as BigMac, with {flops['latent_eff'] / flops['bigmac']:.2f} of its FLOPs, and is "
            f"better by {plain([-each for each in latent])}.",
            "**What it does not show.** Three seeds; one small width, where the narrow rows are only 64 wide; less than half an "
            f"epoch; one learning rate ({rows[0]['lr']:g}) for all arms; no downstream task. All {len(every)} runs shared two cards at the same time "
            f"({min(every):.0f} to {max(every):.0f} s each), so that times can be compared with each other only, and say nothing of several ranks.",
        )
    )


def draw_loss(rows: list[Row], path: Path) -> None:
    """Bits per byte against measured time, means over seeds, and how far seeds are apart."""
    figure, axes = plt.subplots(figsize=(7, 4))
    steps = sorted({row["step"] for row in rows})
    for place, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        by_step = [at_step(rows, arm, step) for step in steps]
        times = [statistics.mean(row["time_s"] for row in found) for found in by_step]
        values = [[row["bits_per_byte"] for row in found] for found in by_step]
        means = [statistics.mean(each) for each in values]
        spread = [[m - min(v) for m, v in zip(means, values, strict=True)]]
        spread.append([max(v) - m for m, v in zip(means, values, strict=True)])
        axes.errorbar(
            times, means, spread, marker="o", markersize=3.5, capsize=2, linewidth=1.2, color=f"C{place}", label=NAMES.get(arm, arm)
        )  # fmt: skip
    axes.set(xlabel="measured time, s (runs share devices)", ylabel="bits per byte of held-out text")
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)
