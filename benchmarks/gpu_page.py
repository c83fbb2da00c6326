"""Draw the page of GPU results from its rows: `docs/results-gpu.md` and two charts. Run it after new rows are in.

    python -m benchmarks.gpu_page

Words that judge (targets, what fell short) are in `gpu_words.py`; go over them when rows are new.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import gpu_words as words
from .gpu_charts import DENSITIES, SHAPES, STAGES, draw_speedups, draw_stages, ours
from .gpu_scaling import scaling_rows, verdict_rows
from .gpu_steps import Row, Runs, by_run, latest_step_rows, profile_rows, step_rows, tail_rows, video_rows
from .gpu_targets import Rows, target_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NEW, FORMER = "h200", "h100"  # folders of rows: today's machine, and the one before
SHOWN_RUNS = 4  # of each kind of steps; older ones are in the rows
STEP_HEAD = [
    "model",
    "arm",
    "step p50, ms",
    "p99 / p50",
    "× stock",
    "× best dense",
    "first sparse, ms",
    "peak, GiB",
    "steps",
]
RIVALS = {"plain": "adamac {}%", "flex": "flex blocks {}%", "flash-attn-4": "flash4 blocks {}%"}
VARIANTS = {
    "committed": "the kernel before: keys and values by themselves, two blocks in flight",
    "order": "the same, with a branch between softmax and values",
    "pairs": "**pairs in one ring, three in flight** (five at head_dim 64); what runs now",
    "eager": "the same, the output scaled down a step later",
    "twice": "blocks of 64, two programs a multiprocessor",
}
LIMITS = {
    "eager": "rows as they are listed",
    "plain_rows": "rows one after another instead of listed",
    "hot": "the same two blocks over and over, which stay in the cache",
}


@dataclass(frozen=True)
class Found:
    """All rows that the page is drawn from.

    Attributes:
        calls: Single calls, by shape and arm.
        former: The same on the card before, with the defaults of then.
        others: Single calls at other densities.
        steps: Denoising steps by run, nothing compiled.
        compiled: The same with compiled blocks.
        scaling: Steps of one video on one and on several GPUs.
        probes: Variants of the attention kernel.
        meeting: Calls by their work, to see where dense and sparse meet.
    """

    calls: Rows
    former: Rows
    others: Rows
    steps: Runs
    compiled: Runs
    scaling: list[Row]
    probes: list[Row]
    meeting: list[Row]

    @classmethod
    def read(cls) -> Found:
        scaling = read(NEW, "scaling.jsonl")
        single = [row for row in scaling if row["ranks"] == 1]
        return cls(
            calls=by_arm(read(NEW, "attention.jsonl")),
            former=by_arm(read(FORMER, "attention.jsonl")),
            others=by_arm(read(NEW, "attention_densities.jsonl")),
            steps=by_run([*read(FORMER, "end_to_end.jsonl"), *read(NEW, "end_to_end.jsonl"), *single]),
            compiled=by_run([*read(FORMER, "compiled.jsonl"), *read(NEW, "compiled.jsonl")]),
            scaling=scaling,
            probes=read(FORMER, "kernel_probes.jsonl"),
            meeting=read(NEW, "crossover.jsonl"),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    found = Found.read()
    (options.out / "results-gpu.md").write_text(page(found), encoding="utf-8")
    (options.out / "assets").mkdir(exist_ok=True)
    draw_speedups(found.calls, options.out / "assets" / "speedup.svg")
    draw_stages(found.calls, options.out / "assets" / "stages.svg")


def read(folder: str, name: str) -> list[Row]:
    """The rows of one file."""
    lines = (RESULTS / folder / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def by_arm(rows: Iterable[Row]) -> Rows:
    """Rows of single calls, by shape and arm."""
    return {(row["shape"], row["arm"]): row for row in rows}


def page(found: Found) -> str:
    """The page as Markdown."""
    stamp = next(iter(found.calls.values()))
    machine = f"{stamp['device']}, torch {stamp['torch']}, triton {stamp['triton']}"
    parts = [
        "# Results on a GPU",
        f"Drawn by `benchmarks/gpu_page.py` from the rows in `benchmarks/results/{NEW}/` and `{FORMER}/`: {machine}, "
        f"flash-attn-4 4.0.0b36, calls at commit {stamp['commit']}. Ratios hold within one run. Times are the device's, with "
        "the host ahead of it as in a transformer's step; a step whose other work is shorter than the host's share is bound "
        "by the host.",
        words.CARDS,
        "## Targets",
        table(
            ["what", "where", "target", "measured", "blocks compiled", "met"],
            [*target_rows(found.calls, found.steps, found.compiled), *verdict_rows(found.scaling)],
        ),
        words.TARGETS,
        *parts_of_a_call(found),
        *parts_of_the_kernel(found.probes),
        *parts_of_steps(found),
        "## One video on several GPUs",
        words.SCALING_BEFORE,
        table(
            [
                "model",
                "arm",
                "GPUs",
                "step, ms",
                "p99, ms",
                "attention, ms",
                "the rest, ms",
                "efficiency",
                "slowest rank / mean, attention",
                "peak a GPU, GiB",
            ],
            scaling_rows(found.scaling),
        ),
        words.SCALING,
        "## Checks on the same cards",
        words.CHECKS,
        "## From how much work on sparse attention pays",
        words.CROSSOVER,
        table(
            ["work, TFLOP", "tokens × heads × head_dim", "dense, ms", "sparse (15 %), ms", "faster"],
            meeting_rows(found.meeting),
        ),
        "## Steps by run",
        f"Of each kind the last {SHOWN_RUNS} runs. Compiled:",
        *steps_by_run(found.compiled),
        "Not compiled:",
        *steps_by_run(found.steps),
    ]
    return "\n\n".join(parts) + "\n"


def parts_of_a_call(found: Found) -> Iterable[str]:
    """One attention call: speed-ups, rivals, other settings, stages."""
    attention = found.calls
    yield "## One attention call"
    yield (
        "Tensors that look like attention (clustered, drawn fresh each round; no model), medians of "
        f"{stamp_rounds(attention)} interleaved rounds after one to warm up. *Speed-up* is over the fastest dense kernel, "
        "clustering from the last step's centroids, selection, packing and lists included. Every kernel of attention had been "
        "held to a float64 reference before it was timed."
    )
    head = ["shape", "tokens × heads × head_dim", "fastest dense", "cuDNN", *(f"{d} %" for d in DENSITIES)]
    yield table([*head, *(f"{d} %, H100, by tokens" for d in DENSITIES)], speedups(attention, found.former))
    yield "![Speed-up against density](assets/speedup.svg)"
    yield words.RIVALS
    yield table(["shape", *(f"{d} %, {who}" for d in DENSITIES for who in RIVALS)], rival_rows(attention))
    yield words.KEYS
    yield table(
        ["shape", "key clusters", "15 %, ms", "15 %", "8 %, ms", "8 %", "planning, ms"], key_rows(attention)
    )
    yield words.OTHER_DENSITIES
    yield table(["shape", "30 %", "5 %", "over", "measured"], other_rows(found.others))
    yield "## Where the time of a call goes"
    head = ["shape, 15 %, compensated", *(f"{s}, ms" for s in STAGES)]
    yield table(
        [*head, "planning ÷ dense", "attend / dense, TFLOP/s", "host, ms"],
        stage_rows(attention),
    )
    yield "![Time by stage](assets/stages.svg)"
    yield "*Planning* is all but packing, lists and attending. TFLOP/s count the pairs that are asked for, means included."
    yield words.CALLS
    yield "One iteration of k-means on the keys (assignment and new centroids), against flash-kmeans 0.3.1:"
    yield table(["shape", "adamac, ms", "flash-kmeans, ms"], kmeans_rows(attention))


def parts_of_the_kernel(probes: list[Row]) -> Iterable[str]:
    """What variants of the attention kernel brought, on an H100."""
    yield "## What the kernel could gain"
    yield (
        "Kernel time on an H100, geometric means of the gain over the kernel before, at 15 % with and without compensation and "
        "8 % with it; head_dim 128 is Wan2.1-14B, Wan2.1-1.3B and HunyuanVideo, 64 is CogVideoX-2B:"
    )
    yield table(["kernel", "head_dim 128", "head_dim 64"], variant_rows(probes))
    yield (
        "What it would gain if fetching cost less: the last but one of these at Wan2.1-14B's shape with 8 heads, 15 %, not "
        "compensated, with other rows (wrong on purpose, and only timed):"
    )
    yield table(["fetched are", "ms", "TFLOP/s"], limit_rows(probes))
    yield words.LIMITS


def parts_of_steps(found: Found) -> Iterable[str]:
    """Denoising steps, with and without compiled blocks."""
    yield "## Denoising steps"
    yield (
        "Real transformers at full size in their real pipelines and schedulers, **random weights**, arms in turns. *First "
        "sparse* is the step that clusters from scratch. Wan2.1-14B without guidance: one forward a step. The newest row of each "
        "arm; ratios are of its own run ([all of them](#steps-by-run)). *stock* is diffusers as it comes, *best_dense* our dense "
        "path, *default_15* and *default_8* `AdaCluster()` at 15 and 8 % of the keys, *paper* `AdaCluster.paper()`, *svg2* SVG2's "
        "published settings."
    )
    yield (
        "With the transformer's blocks compiled (`adamac.enable(..., compile=True)` does that), dense and sparse, beside stock "
        "diffusers as it comes:"
    )
    yield table([*STEP_HEAD, "run"], latest_step_rows(found.compiled, SHAPES))
    yield words.VIDEO
    yield table(
        ["model", "arm", "denoising, s", "× best dense", "× stock", "run"],
        video_rows(found.compiled),
    )
    yield words.TAILS
    yield table(
        ["model", "arm", "p50, ms", "p95", "p99", "slowest", "p99 / p50", "steps", "run"],
        tail_rows(found.compiled),
    )
    yield "Nothing compiled:"
    yield table([*STEP_HEAD, "run"], latest_step_rows(found.steps, SHAPES))
    yield "Where the time of a step goes, nothing compiled (the newest row of each arm):"
    yield table(
        ["model", "arm", "planning, ms", "attention, ms", "not attention, ms", "share of it", "run"],
        profile_rows(found.steps),
    )
    yield words.STEPS


def steps_by_run(runs: Runs) -> Iterable[str]:
    """A table of steps for each run."""
    for name, run in list(runs.items())[:SHOWN_RUNS]:
        yield f"Commit {name}:"
        yield table(STEP_HEAD, step_rows(run))


def stamp_rounds(attention: Rows) -> int:
    """Timed rounds, which are the same for all."""
    return next(row["rounds"] for row in attention.values() if "rounds" in row)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(attention: Rows, shape: str, arm: str) -> str:
    """A speed-up, or a dash if there is none."""
    row = attention.get((shape, arm), {})
    return f"{row['speedup']:.2f}×" if "speedup" in row else "-"


def speedups(attention: Rows, former: Rows) -> Iterable[list[str]]:
    """Rows of the main table."""
    for shape in SHAPES:
        row = attention[shape, ours(15)]
        dense = attention[shape, f"dense {row['fastest_dense']}"]
        size = f"{row['video_tokens']:,} × {row['heads']} × {row['head_dim']}"
        fastest = f"{dense['time_ms']:.3g} ms ({row['fastest_dense']})"
        cudnn = f"{attention[shape, 'dense cudnn']['time_ms']:.3g} ms"
        ratios = [times(rows, shape, ours(d)) for rows in (attention, former) for d in DENSITIES]
        yield [shape, size, fastest, cudnn, *ratios]


def key_rows(attention: Rows) -> Iterable[list[str]]:
    """Rows of the table of key clusters: the default, and half as many again."""
    for shape in SHAPES:
        for roots in (None, 6):
            arms = [ours(density, key_roots=roots) for density in DENSITIES]
            calls = [attention[shape, arm] for arm in arms]
            cells = [text for call in calls for text in (f"{call['time_ms']:.2f}", f"{call['speedup']:.2f}×")]
            planning = attention[shape, f"{arms[0]}, plan"]["time_ms"]
            yield [shape, f"{calls[0]['k_clusters']:,}", *cells, f"{planning:.2f}"]


def other_rows(others: Rows) -> Iterable[list[str]]:
    """Rows of the table of other densities."""
    for shape in SHAPES:
        row = others[shape, ours(30)]
        where = f"{row['commit']}, {row['device']}"
        yield [shape, *(times(others, shape, ours(d)) for d in (30, 5)), row["fastest_dense"], where]


def rival_rows(attention: Rows) -> Iterable[list[str]]:
    """Rows of the table of what else there is."""
    for shape in SHAPES:
        arms = (name.format(density) for density in DENSITIES for name in RIVALS.values())
        yield [shape, *(times(attention, shape, arm) for arm in arms)]


def stage_rows(attention: Rows) -> Iterable[list[str]]:
    """Rows of the table of stages."""
    for shape in SHAPES:
        row = attention[shape, ours(15)]
        dense = attention[shape, f"dense {row['fastest_dense']}"]["time_ms"]
        planning = attention[shape, f"{ours(15)}, plan"]["time_ms"] / dense
        stages = [f"{row['stages_ms'][stage]:.2f}" for stage in STAGES]
        yield [shape, *stages, f"{planning:.1%}", rates(row, dense), f"{row['host_ms']:.1f}"]


def rates(row: Row, dense_ms: float) -> str:
    """TFLOP/s of our attention kernel and of the fastest dense one."""
    work = 4e-9 * (row["video_tokens"] + row["text_tokens"]) ** 2 * row["head_dim"] * row["heads"]
    return f"{work * row['cost'] / row['stages_ms']['attend']:.0f} / {work / dense_ms:.0f}"


def kmeans_rows(attention: Rows) -> Iterable[list[str]]:
    """Rows of the table of k-means."""
    for shape in SHAPES:
        pair = (attention.get((shape, f"k-means of keys, {who}"), {}) for who in ("adamac", "flash-kmeans"))
        yield [
            shape,
            *(f"{row['time_ms']:.2f}" if "time_ms" in row else row.get("refused", "-") for row in pair),
        ]


def variant_rows(probes: list[Row]) -> Iterable[list[str]]:
    """Kernels that were held to the reference and timed together."""
    timed = [row for row in probes if row["benchmark"] == "kernel_probe" and row.get("kernel") in VARIANTS]
    case = ("shape", "density", "compensate")
    base = {
        tuple(row[key] for key in case): row["kernel_ms"] for row in timed if row["kernel"] == "committed"
    }
    for kernel, what in VARIANTS.items():
        gains: dict[bool, list[float]] = {False: [], True: []}
        for row in timed:
            if row["kernel"] == kernel:
                narrow = row["shape"] == "cogvideox-2b"
                gains[narrow].append(base[tuple(row[key] for key in case)] / row["kernel_ms"])
        yield [
            what,
            *(f"{statistics.geometric_mean(gain):.3f}×" if gain else "-" for gain in gains.values()),
        ]


def limit_rows(probes: list[Row]) -> Iterable[list[str]]:
    """What it would be worth if a part cost nothing."""
    found = {row["kernel"]: row for row in probes if row["benchmark"] == "kernel_limits"}
    for kernel, what in LIMITS.items():
        yield [what, f"{found[kernel]['kernel_ms']:.2f}", f"{found[kernel]['tflops']:.0f}"]


def meeting_rows(meeting: list[Row]) -> Iterable[list[str]]:
    """Calls by their work."""
    for row in sorted(meeting, key=lambda row: row["work_tflop"]):
        if row["work_tflop"] < 0.25:
            continue
        size = f"{row['tokens']:,} × {row['heads']} × {row['head_dim']}"
        faster = "sparse" if row["sparse_ms"] < row["dense_ms"] else "dense"
        yield [f"{row['work_tflop']:.2f}", size, f"{row['dense_ms']:.2f}", f"{row['sparse_ms']:.2f}", faster]


if __name__ == "__main__":
    main()
