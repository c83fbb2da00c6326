"""Draw the page of MoE results from its rows: `docs/results-moe.md` and three charts. Run it after new rows are in.

    python -m benchmarks.moe_page

Words that judge are here too, so that a figure can never be quoted beside an older page: by fabric in `moe_fabrics`, of kernels in
`moe_profile`, of whole models in `moe_steps`, of what is replayed in `moe_captured`, of other shapes in `moe_grid`, of the cost model in `moe_foreseen` and `moe_grid_cost`,
of quality in `moe_quality_page`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from . import moe_captured, moe_foreseen, moe_grid, moe_grid_cost, moe_quality_page, moe_ranks, moe_serving
from .gpu_charts import save
from .gpu_page import ROOT, table
from .moe.rows import read
from .moe.summary import (
    TARGETS_HEADER,
    anatomy,
    collectives,
    kernels,
    layers,
    models,
    ok,
    problems,
    rivals,
    target_lines,
)
from .moe_fabrics import (
    floor_table,
    host_words,
    nvlink_words,
    projected,
    ratios,
    shm_words,
    timed_with_rivals,
    verdict_words,
)
from .moe_foreseen import WORDS, machines_of
from .moe_profile import cost_table, cost_words, kind_table, launch_table, one_gpu_words, one_name_words
from .moe_steps import layout_table, layout_words, step_table, training_words

RESULTS = ROOT / "benchmarks" / "results"
FABRICS = ("nvlink", "shm", "sockets", "none")
AIMS = {"nvlink": (1.8, 1.4), "shm": (3.0, 2.0), "sockets": (3.8, 2.5), "none": (None, 1.2)}
Row = dict[str, Any]


@dataclass(frozen=True)
class Later:
    """Rows of runs after the one that the page begins with, each in a file of its own.

    Attributes:
        grid: Layers of other shapes.
        uneven: Those of them that were routed unevenly in a run of its own.
        ranks: Layers and training steps on two ranks and on four.
        captured: Layers that are replayed from a CUDA graph, kernels and profiles of the same commit.
        training: Training steps whose micro-batches are.
        rivals: Other packages through shared memory.
        models: Whole models; of these rows the page has the training steps.
        serving: Prefill and decoding.
        layouts: Training steps of a model that lies whole on every rank, or in shares.
        launching: What the host pays for a launch.
    """

    grid: list[Row]
    uneven: list[Row]
    ranks: list[Row]
    captured: list[Row]
    training: list[Row]
    rivals: list[Row]
    models: list[Row]
    serving: list[Row]
    layouts: list[Row]
    launching: list[Row]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    rows, former = runs()
    (options.out / "results-moe.md").write_text(drawn(), encoding="utf-8")
    (options.out / "assets").mkdir(exist_ok=True)
    draw_ratios(rows, former, later().captured, options.out / "assets" / "moe-ratios.svg")
    draw_host(rows, options.out / "assets" / "moe-host.svg")
    moe_quality_page.draw_loss(quality(), options.out / "assets" / "moe-quality.svg")


def runs() -> tuple[list[Row], list[Row]]:
    """Rows of the last run, and of the one before."""
    return read(RESULTS / "h200" / "moe.jsonl"), read(RESULTS / "h100" / "moe.jsonl")


def quality() -> list[Row]:
    """Rows of the runs that learned."""
    return read(RESULTS / "h200" / "moe_quality.jsonl")


def later() -> Later:
    """Rows of the runs after the last whole one."""
    names = ("grid", "grid_uneven", "ranks", "captured", "training", "rivals", "models", "serving", "layouts")
    files = [*(f"moe_{name}" for name in names), "launch_cost"]
    return Later(*(read(RESULTS / "h200" / f"{name}.jsonl") for name in files))


def drawn() -> str:
    """The page from the rows that there are."""
    return page(*runs(), quality(), later())


def page(rows: list[Row], former: list[Row], learned: list[Row], new: Later) -> str:
    """The page as Markdown."""
    parts = [
        *parts_of_targets(rows, former, new),
        *parts_of_layers(rows, former, new),
        *parts_of_models(rows, new),
        "## The cost model",
        moe_foreseen.section(rows, former),
        moe_ranks.cost_section(new.ranks),
        moe_grid_cost.section(new.grid, new.uneven),
        "## Quality",
        moe_quality_page.section(learned),
        *parts_of_everything(rows, new),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def parts_of_targets(rows: list[Row], former: list[Row], new: Later) -> list[str]:
    """What was asked for, and whether it pays."""
    stamp, then = rows[-1], former[-1]
    machine = (
        f"up to {max(row['ranks'] for row in rows)} × {stamp['device']} of one host, torch {stamp['torch']}, "
        f"NCCL {stamp['nccl']}, triton {stamp['triton']}, bfloat16, commit `{stamp['commit']}`"
    )
    return [
        "# Results of the mixture of experts",
        f"Drawn by `benchmarks/moe_page.py` from the rows in `benchmarks/results/h200/moe.jsonl`: {machine}. *Before* is the run on "
        f"{max(row['ranks'] for row in former)} × {then['device']} of another host at commit `{then['commit']}` (`h100/moe.jsonl`), when a layer was "
        "launched in twice as many pieces or more. Ratios hold "
        "within one run; times are medians of the slowest rank. Every arm had been held to one rank with all experts in "
        "float64 before it was timed. Later runs have files of their own, which are named with their commits where they are used. What is "
        "measured, and how: `benchmarks/moe/__init__.py`.",
        "*fine_grained* is the baseline (CDAC), *bigmac* narrows to a quarter before sending (DCCA). Three dispatchers: a "
        "copy of a row for each expert (`all_to_all`), one for each rank (`per_rank`), every row to every rank "
        "(`all_gather`). Ratios are the baseline's time divided by BigMac's: with a copy per expert on both sides, as in the "
        "paper, and between the best dispatchers of both.",
        "## Targets",
        table([*TARGETS_HEADER, "before"], compared(rows, former, new)),
        "![Ratios by fabric against their targets](assets/moe-ratios.svg)",
        verdict_words(rows),
        moe_grid.verdict_words(new.grid),
        moe_ranks.verdict_words(new.ranks),
        moe_captured.verdict_words(new.captured, new.training),
    ]


def parts_of_layers(rows: list[Row], former: list[Row], new: Later) -> list[str]:
    """Where a layer's time goes, on other shapes and more ranks too."""
    return [
        "## Where a forward pass's time goes on the device",
        "Kernels of one pass by what they are for, XL top-8, 16,384 tokens on each rank. A kernel that sends also waits for the "
        f"other rank, and is counted with the wait. By a later run at commit `{new.captured[-1]['commit']}` (`h200/moe_captured.jsonl`)."
        f"{one_name_words([*rows, *new.captured])}",
        kind_table([*rows, *new.captured]),
        one_gpu_words([*rows, *new.captured], rows),
        nvlink_words(rows),
        shm_words(rows),
        "## The host",
        host_words(rows, former),
        floor_table(rows, former),
        "![A forward pass with nothing to do, at 1,024 and at 16,384 tokens](assets/moe-host.svg)",
        "*Before*, on two H100, another host set the pace too, so what fell is not owed to fewer launches alone.",
        launch_table(rows, former),
        "### What a launch costs the host",
        cost_words(new.launching),
        cost_table(new.launching),
        "## Replayed from a CUDA graph",
        moe_captured.section(new.captured, new.grid),
        "## Other widths, ratios and numbers of experts a token",
        moe_grid.section(new.grid, new.uneven, rows),
        "## Four ranks",
        moe_ranks.section(new.ranks, rows),
        "## More ranks: a projection",
        "Not measured but for [four ranks over NVLink](#four-ranks), where it was too good: the cost model with this run's constants of NVLink, "
        "which were taken among two ranks, or with all collectives at a slower rate. XL top-8, 16,384 tokens on each rank, forward, baseline ÷ BigMac; *no host*: as if the host were never waited for.",
        projected(rows),
        "With more ranks a token's experts lie on more of them, so that every way of sending sends more for the same products, and "
        "a quarter of it counts for more.",
    ]


def parts_of_models(rows: list[Row], new: Later) -> list[str]:
    """Whole models: training, prefill, decoding."""
    return [
        "## Training",
        f"Models of the XL and Medium shapes with random weights at commit `{new.models[-1]['commit']}` (`h200/moe_models.jsonl`). The training steps through "
        "shared memory had the machine to themselves; what ran on one GPU shared the host with other work on the machine's other card and on its cores.",
        *(
            models(fabric, [row for row in own if row.get("work") == "train"])
            for fabric, own in by_fabric(new.models)
        ),
        training_words(new.models, rows),
        step_table(new.models, rows),
        "### Replayed micro-batches",
        moe_captured.training_section(new.training),
        "### A model whole on every rank, or in shares",
        layout_words(new.layouts),
        layout_table(new.layouts),
        "## Prefill and decoding",
        moe_serving.section(new.serving, new.models),
    ]


def parts_of_everything(rows: list[Row], new: Later) -> list[str]:
    """All rows of the run of the layers, and what could not be measured."""
    return [
        "## The layer",
        *(layers(fabric, own) for fabric, own in by_fabric(rows)),
        "## Stages of a forward pass",
        "Events on the first rank's stream: a stage in which the device waits for the host is as long as the wait.",
        *(anatomy(fabric, own) for fabric, own in by_fabric(rows)),
        "## Rivals",
        "The same router, experts and tokens in DeepSpeed's layer and in the grouped experts of transformers behind an "
        "all-to-all of their own. DeepSpeed's layer ran at 1,024 tokens alone. Through shared memory they ran later "
        f"(`{new.rivals[-1]['commit']}`, `h200/moe_rivals.jsonl`), beside other work on the machine's other cards.",
        rivals([*rows, *new.rivals]),
        "## Pieces of a layer on one GPU",
        *(kernels(fabric, own) for fabric, own in by_fabric(rows)),
        "## Collectives",
        *(collectives(fabric, own) for fabric, own in by_fabric(rows)),
        problems([*rows, *new.models, *new.serving, *moe_captured.unmeasured(new.captured), *new.training]),
        "Not part of these runs: the fused activation ([measured before](decisions/activation-stays-apart.md)), other numbers of experts than 64, "
        "widths above 4,096, more than four ranks.",
    ]


def by_fabric(rows: list[Row]) -> Iterable[tuple[str, list[Row]]]:
    """The rows of each fabric that there are any of."""
    for fabric in FABRICS:
        if own := [row for row in rows if row["fabric"] == fabric]:
            yield fabric, own


def compared(rows: list[Row], former: list[Row], new: Later) -> Iterable[list[str]]:
    """The targets, and what the former run had found for each: forward / both passes.

    A training step is judged by the newest run, and what the run of the layers had found of it stands behind the former.
    """
    then, first = ({line[0]: line for line in target_lines(each)} for each in (former, rows))
    against = {line[0]: line for line in target_lines(new.rivals) if line[0].startswith("baseline")}
    for found in target_lines([*rows, *new.models]):
        line = found if found[-1] != "not measured" else against.get(found[0], found)
        before = [_found(run[line[0]]) for run in (then, first) if line[0] in run and run[line[0]] != line]
        yield [*line, ", then ".join(text for text in before if text) or "-"]
    for line in moe_captured.target_lines(new.captured, new.training):
        yield [*line, "-"]
    for line in moe_ranks.target_lines(new.ranks):
        yield [*line, "-"]
    for what, line in zip(("bytes", "cost model"), target_lines(ok(new.grid, "moe_layer"))[-2:], strict=True):
        yield [f"{what}: the same of the grid's layers", *line[1:], "-"]


def _found(line: list[str]) -> str:
    return " / ".join(cell for cell in line[2:4] if cell not in ("", "-"))


def draw_ratios(rows: list[Row], former: list[Row], captured: list[Row], path: Path) -> None:
    """BigMac over the baseline by fabric: by copies, between the best dispatchers, and replaying too, with the targets and the former run."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    colors = "tab:blue", "tab:orange", "tab:green"
    replaying = moe_captured.xl_ratios(captured)
    for place, (fabric, (copies, best)) in enumerate(AIMS.items()):
        found = (*ratios(rows, fabric), replaying.get(fabric))
        before = (*ratios(former, fabric), None)
        for side, (value, old, aim) in enumerate(zip(found, before, (copies, best, best), strict=True)):
            if value is None:
                continue
            at = place + (side - 1) * 0.27
            axes.bar(at, value, 0.25, color=colors[side])
            axes.hlines(aim, at - 0.125, at + 0.125, color="0.2", linestyle=":")
            if old is not None:
                axes.plot(at, old, "D", color="white", markeredgecolor="0.2", markersize=5)
    axes.set_xticks(range(len(AIMS)), [WORDS[fabric] for fabric in AIMS])
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(ylabel="baseline ÷ BigMac, forward, XL top-8")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors]
    handles.append(plt.Line2D([], [], color="0.2", linestyle=":"))
    handles.append(plt.Line2D([], [], color="white", marker="D", markeredgecolor="0.2", linestyle=""))
    names = [
        "copy per expert",
        "best dispatchers",
        "fastest way, replaying too",
        "target",
        "before (two H100)",
    ]
    axes.legend(handles, names, frameon=False, fontsize=8, loc="upper left")
    save(figure, path)


def draw_host(rows: list[Row], path: Path) -> None:
    """A forward pass over NVLink with nothing to do, few tokens and many."""
    figure, axes = plt.subplots(figsize=(7, 3.8))
    small, large = (timed_with_rivals(rows, tokens) for tokens in (1024, 16384))
    least = machines_of(rows)["nvlink"].least_ms
    idle = {arm: least[arm.split("/")[1]] for arm in small}
    series = ((idle, "nothing to do", "0.75"), (small, "1,024 tokens", "tab:blue"), (large, "16,384 tokens", "tab:orange"))  # fmt: skip
    for side, (times, label, color) in enumerate(series):
        places = [n + (side - 1) * 0.27 for n in range(len(small))]
        axes.barh(places, [times[arm] for arm in small], 0.25, label=label, color=color)
    axes.set_yticks(range(len(small)), list(small))
    axes.invert_yaxis()
    axes.set(xlabel="forward pass over NVLink, ms")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


if __name__ == "__main__":
    main()
