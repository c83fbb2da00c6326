"""Does a shape of experts learn as well? Every preset at equal parameters and tokens, several seeds, bits per byte of held-out text.

One process a run, a few at a time on one device, so times are those of a shared device: compare them with each other only, and
use `benchmarks/moe` for speed. The corpus is prepared once and shared; seeds change weights and the order of windows. Runs that
are there already are not repeated; `summary` prints the table of what is in the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonl
from adamac.moe.lm.corpus import is_corpus
from adamac.moe.lm.train import read_rows

PRESETS = ("vanilla", "fine_grained", "bigmac", "bigmac_stable", "latent_eff", "latent_acc")
TINY = ("--hidden", "32", "--layers", "1", "--experts", "16", "--top-k", "4", "--context", "32", "--steps", "6", "--batch", "4",
        "--warmup", "2", "--eval-every", "3", "--eval-tokens", "500", "--save-every", "6", "--vocab", "300")  # fmt: skip
FULL = ("--hidden", "256", "--layers", "6", "--experts", "64", "--top-k", "8", "--context", "256", "--steps", "1500", "--batch", "64",
        "--warmup", "100", "--lr", "3e-3", "--eval-every", "250", "--eval-tokens", "400000", "--save-every", "1500",
        "--vocab", "8192")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run."""

    preset: str
    seed: int
    folder: Path

    def command(self, options: argparse.Namespace, data: list[str]) -> list[str]:
        """The command line that a user would type."""
        sizes = TINY if options.tiny else FULL
        own = (
            "--preset",
            self.preset,
            "--seed",
            str(self.seed),
            "--out",
            str(self.folder),
            "--device",
            options.device,
        )
        change = ("--change", *options.change) if options.change else ()
        return [
            sys.executable,
            "-m",
            "adamac.cli",
            "moe",
            "train",
            *own,
            *sizes,
            *change,
            "--resume",
            "--data",
            *data,
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", help="text files or directories")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    parser.add_argument("--change", nargs="*", default=(), help="fields of every layer, as sound_init=True")
    parser.add_argument("--at-once", type=int, default=6, help="runs that share the device")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="no run begins after this; those under way are ended"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "h100" / "moe_quality.jsonl"
    )
    options = parser.parse_args()
    # Seed by seed, so that time that runs out costs the last seed of all and not one preset its rows.
    jobs = [
        Job(preset, seed, options.work / f"{preset}-{seed}")
        for seed in options.seeds
        for preset in options.presets
    ]
    run_all(jobs, options)
    rows = [row for job in jobs for row in rows_of(job)]
    jsonl.write(options.out, rows)
    print(table(rows))


def run_all(jobs: list[Job], options: argparse.Namespace) -> None:
    """Run all jobs, the first alone until its corpus is there for the others."""
    deadline = time.monotonic() + 60 * options.minutes
    waiting, under_way = list(jobs), list[tuple[Job, subprocess.Popen]]()
    shared = jobs[0].folder / "data"
    while waiting or under_way:
        under_way = [(job, process) for job, process in under_way if not finished(job, process)]
        if time.monotonic() > deadline:
            for _, process in under_way:
                process.terminate()
            return
        ready = is_corpus(shared)
        if waiting and len(under_way) < (options.at_once if ready else 1):
            job = waiting.pop(0)
            data = [str(shared)] if ready and job is not jobs[0] else options.data
            job.folder.mkdir(parents=True, exist_ok=True)
            log = job.folder.with_suffix(".log").open("w")
            under_way.append((job, subprocess.Popen(job.command(options, data), stdout=log, stderr=log)))
        time.sleep(0.5)


def finished(job: Job, process: subprocess.Popen) -> bool:
    """Whether a run has ended; says how if it failed."""
    if process.poll() is None:
        return False
    if process.returncode:
        print(
            f"{job.folder.name} failed: {job.folder.with_suffix('.log').read_text()[-500:]}", file=sys.stderr
        )
    return True


def rows_of(job: Job) -> list[dict[str, Any]]:
    """One row for each evaluation of a run, and what tells it apart."""
    try:
        steps = read_rows(job.folder)
    except ValueError:
        return []
    recipe = json.loads((job.folder / "run.json").read_text(encoding="utf-8"))["recipe"]
    model = {
        name: recipe[name]
        for name in ("hidden", "layers", "num_experts", "top_k", "ratio", "context", "steps", "batch")
    }
    about = {
        "benchmark": "moe_quality",
        "preset": job.preset,
        "seed": job.seed,
        **model,
        "changes": recipe["moe"],
    }
    return [
        about
        | {name: row[name] for name in ("step", "tokens", "loss", "imbalance", "time_s", "bits_per_byte")}
        | {"parameters": parameters(recipe)}
        for row in steps
        if row["bits_per_byte"] is not None
    ]


def parameters(recipe: dict[str, Any]) -> int:
    """Parameters of all mixture-of-experts layers; the rest of the model is the same for all."""
    from adamac.moe import traffic
    from adamac.moe.lm.recipe import Recipe

    config = Recipe.from_dict(recipe).model(recipe["vocab"]).moe
    return recipe["layers"] * traffic.parameters(config)


def table(rows: list[dict[str, Any]]) -> str:
    """Final bits per byte by preset, mean and standard deviation over seeds."""
    lines = [
        "| preset | expert parameters | bits per byte | sd | seeds | time, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for preset in dict.fromkeys(row["preset"] for row in rows):
        last = [row for row in rows if row["preset"] == preset and row["step"] == row["steps"]]
        if not last:
            lines.append(f"| {preset} | - | not finished | - | 0 | - |")
            continue
        values = [row["bits_per_byte"] for row in last]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        seconds = statistics.mean(row["time_s"] for row in last)
        lines.append(
            f"| {preset} | {last[0]['parameters']:,} | {statistics.mean(values):.4f} | {spread} | {len(values)} | {seconds:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
