"""Draw the page of MoE results from its rows: `docs/results-moe.md` and two charts. Run it after new rows are in.

    python -m benchmarks.moe_page

Words that judge are in this file too, so that a figure can never be quoted beside an older page.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from adamac.advise import Machine, predict
from adamac.moe import preset

from .gpu_page import ROOT, save, table
from .moe.cases import BASELINE, COPY_PER_EXPERT
from .moe.rows import read
from .moe.summary import (
    anatomy,
    collectives,
    kernels,
    layers,
    models,
    ok,
    predictions,
    problems,
    rivals,
    targets,
)

ROWS = ROOT / "benchmarks" / "results" / "h100" / "moe.jsonl"
FABRICS = ("nvlink", "shm", "sockets", "none")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    rows = read(ROWS)
    (options.out / "results-moe.md").write_text(page(rows), encoding="utf-8")
    (options.out / "assets").mkdir(exist_ok=True)
    draw_ratios(rows, options.out / "assets" / "moe-ratios.svg")
    draw_host(rows, options.out / "assets" / "moe-host.svg")


def page(rows: list[Row]) -> str:
    """The page as Markdown."""
    stamp = rows[-1]
    machine = (
        f"up to {max(row['ranks'] for row in rows)} × {stamp['device']} of one host, torch {stamp['torch']}, "
        f"NCCL {stamp['nccl']}, triton {stamp['triton']}, bfloat16, commit `{stamp['commit']}`"
    )
    parts = [
        "# Results of the mixture of experts",
        f"Drawn by `benchmarks/moe_page.py` from the rows in `benchmarks/results/h100/moe.jsonl`: {machine}. Ratios hold "
        "within one run; times are medians of the slowest rank. Every arm had been held to one rank with all experts in "
        "float64 before it was timed. What is measured, and how: `benchmarks/moe/__init__.py`.",
        "*fine_grained* is the baseline (CDAC), *bigmac* narrows to a quarter before sending (DCCA). Three dispatchers: a "
        "copy of a row for each expert (`all_to_all`), one for each rank (`per_rank`), every row to every rank "
        "(`all_gather`). Ratios are the baseline's time divided by BigMac's: with a copy per expert on both sides, as in the "
        "paper, and between the best dispatchers of both.",
        "## Targets",
        targets(rows),
        "![Ratios by fabric against their targets](assets/moe-ratios.svg)",
        "## The host, not the device",
        host_words(rows),
        "![A forward pass at 1,024 and 16,384 tokens](assets/moe-host.svg)",
        table(
            ["fabric, 16,384 tokens", "pass", "kernels launched", "their time, ms", "measured, ms"],
            launch_rows(rows),
        ),
        "## The layer",
        *(layers(fabric, own) for fabric, own in by_fabric(rows)),
        "## Where a forward pass spends its time",
        "Events on the first rank's stream: a stage in which the device waits for the host is as long as the wait.",
        *(anatomy(fabric, own) for fabric, own in by_fabric(rows)),
        "## Rivals",
        "The same router, experts and tokens in DeepSpeed's layer and in the grouped experts of transformers behind an "
        "all-to-all of their own. DeepSpeed's layer ran at 1,024 tokens alone.",
        rivals(rows),
        "## Pieces of a layer on one GPU",
        *(kernels(fabric, own) for fabric, own in by_fabric(rows)),
        "## Training, prefill and decoding",
        "A model of the XL shape with random weights. A decoded token takes as long as 24 layers need to be launched.",
        *(models(fabric, own) for fabric, own in by_fabric(rows)),
        "## Collectives",
        *(collectives(fabric, own) for fabric, own in by_fabric(rows)),
        "## The cost model",
        table(
            ["what it says", "points", "within 15 %", "median error", "worst"],
            [
                error_line("said in the run, by the model of that commit", said_before(rows)),
                error_line("the present model, after the fact", said_since(rows)),
            ],
        ),
        "The model of that commit multiplied a layer's own work by a factor that it had taken from a layer too small to keep the "
        "device busy: 5 to 9 instead of about 1. The second line has the same constants of single operations and of a layer "
        "with nothing to do, none of them fitted to these layers; but the *form* of the model (the longer of the device's time "
        "and the host's, the latter with what it waits for before it reads) was chosen after these times were known. It has to "
        "stand a new run before anyone trusts it.",
        problems(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def by_fabric(rows: list[Row]) -> Iterable[tuple[str, list[Row]]]:
    """The rows of each fabric that there are any of."""
    for fabric in FABRICS:
        if own := [row for row in rows if row["fabric"] == fabric]:
            yield fabric, own


def host_words(rows: list[Row]) -> str:
    """What the times of small and large layers say about who waits for whom."""
    small, large = (forward_ms(rows, "nvlink", tokens) for tokens in (1024, 16384))
    both = [arm for arm in small if arm in large]

    more = [large[arm] / small[arm] - 1 for arm in both]

    def span(times: dict[str, float]) -> str:
        return f"{min(times[arm] for arm in both):.1f} to {max(times[arm] for arm in both):.1f} ms"

    return (
        f"Over NVLink a forward pass takes {span(small)} at 1,024 tokens and {span(large)} at 16,384, whatever the preset and "
        f"the dispatcher: sixteen times the work in {min(more):.0%} to {max(more):.0%} more time. Among several ranks a layer of this commit is bound by "
        "what the host needs to launch it after it has read how many rows will come, not by products or messages, and the "
        "ratios over NVLink and through shared memory are those of two hosts doing the same. Only sockets are slow enough for "
        "the bytes to show. (A plain torch layer of these shapes took 1.45 ms with BigMac, top-4, and 2.44 ms, top-8, on two "
        "H200.) On one GPU nothing is read, and the device works for most of the time that passes: there BigMac's narrow rows "
        "save what its four times as many inner values cost to activate, and no more."
    )


def forward_ms(rows: list[Row], fabric: str, tokens: int) -> dict[str, float]:
    """Median of a forward pass by arm, at XL top-8 with a balanced routing; of several runs the last."""
    return {
        row["arm"]: row["forward"]["p50_ms"]
        for row in ok(rows, "moe_layer")
        if (row["fabric"], row["hidden"], row["top_k"], row["tokens"]) == (fabric, 2048, 8, tokens)
        and row["routing"] == "balanced"
        and row["experts"] == "auto"
        and "dispatcher" in row
        and row["preset"] in (BASELINE, "bigmac")
        and row["arm"].startswith(row["preset"])
    }


def launch_rows(rows: list[Row]) -> Iterable[list[str]]:
    """Kernels and their time beside the time that passed."""
    for row in ok(rows, "moe_launches"):
        measured = [
            other[row["pass"]]["p50_ms"]
            for other in ok(rows, "moe_layer")
            if all(other.get(name) == row[name] for name in ("fabric", "arm", "experts", "tokens", "top_k"))
        ]
        fused = ", fused" if row["experts"] == "fused" else ""
        cells = [
            f"{row['launches']:.0f}",
            f"{row['device_ms']:.2f}",
            f"{measured[-1]:.2f}" if measured else "-",
        ]
        yield [f"{row['fabric']}: {row['arm']}{fused}", row["pass"].replace("_", " + "), *cells]


def said_before(rows: list[Row]) -> list[float]:
    """Errors of what the cost model said in the run, as shares."""
    return [predicted / measured - 1 for _, _, predicted, measured in predictions(rows)]


def said_since(rows: list[Row]) -> list[float]:
    """Errors of the present model with that run's constants, but for the factor that was taken from too small a layer."""
    machines = {
        row["fabric"]: replace(Machine.from_json(row["machine"]), whole=1.0) for row in ok(rows, "moe_cost")
    }
    errors = []
    for row, name, _, measured in predictions(rows):
        config = preset(row["preset"], row["hidden"], row["num_experts"], row["top_k"])
        machine, both = machines[row["fabric"]], name == "forward_backward"
        said = predict(config, row["tokens"], row["ranks"], row["dispatcher"], machine, backward=both)
        errors.append(said.time_ms / measured - 1)
    return errors


def error_line(what: str, errors: list[float]) -> list[str]:
    """A row of the table of the cost model's errors."""
    sizes = sorted(abs(error) for error in errors)
    within = sum(size <= 0.15 for size in sizes)
    return [
        what,
        str(len(sizes)),
        f"{within} of {len(sizes)}",
        f"{sizes[len(sizes) // 2]:.0%}",
        f"{sizes[-1]:.0%}",
    ]


def draw_ratios(rows: list[Row], path: Path) -> None:
    """BigMac over the baseline by fabric, with the targets."""
    wanted = {"nvlink": (1.8, 1.4), "shm": (3.0, 2.0), "sockets": (3.8, 2.5)}
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for place, (fabric, aims) in enumerate(wanted.items()):
        tokens = 16384 if fabric == "nvlink" else 4096
        for side, (found, aim) in enumerate(zip(ratios(rows, fabric, tokens), aims, strict=True)):
            at = place + (side - 0.5) * 0.36
            axes.bar(at, found, 0.34, color=("tab:blue", "tab:orange")[side])
            axes.hlines(aim, at - 0.17, at + 0.17, color="0.2", linestyle=":")
    axes.set_xticks(range(len(wanted)), wanted)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(ylabel="baseline ÷ BigMac, forward, XL top-8")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in ("tab:blue", "tab:orange")]
    handles.append(plt.Line2D([], [], color="0.2", linestyle=":"))
    axes.legend(handles, ["copy per expert", "best dispatchers", "target"], frameon=False, fontsize=8)
    save(figure, path)


def ratios(rows: list[Row], fabric: str, tokens: int) -> tuple[float, float]:
    """Of the case without rivals: copies per expert, and the best of both sides."""
    case = {
        row["arm"]: row["forward"]["p50_ms"]
        for row in ok(rows, "moe_layer")
        if (row["fabric"], row["top_k"], row["tokens"], row["routing"], row["experts"])
        == (fabric, 8, tokens, "balanced", "auto")
        and not row["rivals"]
    }
    best = [min(ms for arm, ms in case.items() if arm.startswith(side)) for side in (BASELINE, "bigmac")]
    return case[f"{BASELINE}/{COPY_PER_EXPERT}"] / case[f"bigmac/{COPY_PER_EXPERT}"], best[0] / best[1]


def draw_host(rows: list[Row], path: Path) -> None:
    """A forward pass over NVLink, few tokens and many."""
    figure, axes = plt.subplots(figsize=(7, 3.4))
    small, large = (forward_ms(rows, "nvlink", tokens) for tokens in (1024, 16384))
    arms = [arm for arm in small if arm in large]
    for side, (times, label) in enumerate(((small, "1,024 tokens"), (large, "16,384 tokens"))):
        axes.barh(
            [n + (side - 0.5) * 0.36 for n in range(len(arms))], [times[a] for a in arms], 0.34, label=label
        )
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set(xlabel="forward pass over NVLink, ms")
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
