"""Does a shape of experts learn as well? Every preset at equal parameters and tokens, several seeds, bits per byte of held-out text.

Several processes share each device, so times are those of a shared device: compare them with each other only, and use
`benchmarks/moe` for speed. The corpus is prepared once and shared; seeds change weights and the order of windows. All runs go
on at the same time, so that time that runs out costs every preset the same: the table then compares them at the last
evaluation that all of them reached, and says so.

Matrices are drawn by their fan-in in all arms (``sound_init``), since the paper's standard deviation of 0.02 suits a wide model and
starves one this narrow; what that costs is an arm of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamac.moe.lm.corpus import is_corpus
from adamac.moe.lm.folder import RunFolder
from benchmarks import jsonl

# A preset, and after commas fields of its layers that differ from all others'.
ARMS = (
    "vanilla",
    "fine_grained",
    "bigmac",
    "bigmac_stable",
    "latent_eff",
    "latent_acc",
    "bigmac,sound_init=False",
)
TINY = {"hidden": 32, "layers": 1, "experts": 16, "top-k": 4, "context": 32, "steps": 6, "batch": 4, "warmup": 2,
        "eval-every": 3, "eval-tokens": 500, "save-every": 6, "vocab": 300}  # fmt: skip
FULL = {"hidden": 256, "layers": 4, "heads": 4, "experts": 64, "top-k": 8, "context": 256, "steps": 1200, "batch": 32, "warmup": 100,
        "lr": 3e-3, "eval-every": 200, "eval-tokens": 200_000, "save-every": 1_000_000, "log-every": 10, "vocab": 8192}  # fmt: skip
# Of a run that is ended, the time that it gets to end.
_END_S = 5


@dataclass(frozen=True)
class Job:
    """One run on one device."""

    arm: str
    seed: int
    folder: Path
    device: str

    def command(self, options: argparse.Namespace, data: list[str]) -> list[str]:
        """The command line that a user would type."""
        sizes = (TINY if options.tiny else FULL) | ({"steps": options.steps} if options.steps else {})
        preset, *changes = self.arm.split(",")
        own = {"preset": preset, "seed": self.seed, "out": self.folder, "device": self.device}
        words = [str(word) for name, value in (own | sizes).items() for word in (f"--{name}", value)]
        head = [sys.executable, "-m", "adamac.cli", "moe", "train"]
        return [*head, *words, "--change", *options.change, *changes, "--data", *data]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", help="text files or directories, or one prepared corpus")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--arms", nargs="*", default=ARMS)
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    parser.add_argument("--change", nargs="*", default=("sound_init=True",), help="fields of every layer")
    parser.add_argument("--steps", type=int, help="updates of each run, in place of the usual number")
    parser.add_argument("--devices", nargs="*", default=("auto",), help="runs are dealt out to these")
    parser.add_argument("--at-once", type=int, default=11, help="runs that share a device")
    parser.add_argument("--minutes", type=float, default=9.0, help="runs under way are ended after this")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "h100" / "moe_quality.jsonl"
    )
    options = parser.parse_args()
    jobs = deal(options)
    run_all(jobs, options)
    rows = [row for job in jobs for row in rows_of(job)]
    jsonl.write(options.out, rows)
    print(table(rows))


def deal(options: argparse.Namespace) -> list[Job]:
    """All runs, seed by seed, in turn to the devices: shifted by a place at every seed, so that no arm keeps one."""
    jobs = []
    for seed in options.seeds:
        for place, arm in enumerate(options.arms):
            device = options.devices[(place + seed) % len(options.devices)]
            jobs.append(Job(arm, seed, options.work / f"{arm.replace(',', '-')}-{seed}", device))
    return jobs


def run_all(jobs: list[Job], options: argparse.Namespace) -> None:
    """Run all jobs, the first alone until its corpus is there for the others."""
    deadline = time.monotonic() + 60 * options.minutes
    waiting, under_way = list(jobs), list[tuple[Job, subprocess.Popen]]()
    given = len(options.data) == 1 and is_corpus(Path(options.data[0]))
    shared = Path(options.data[0]) if given else jobs[0].folder / "data"
    while waiting or under_way:
        under_way = [(job, process) for job, process in under_way if not finished(job, process)]
        if time.monotonic() > deadline:
            end(process for _, process in under_way)
            return
        ready = is_corpus(shared)
        most = options.at_once * len(options.devices) if ready else 1
        while waiting and len(under_way) < most:
            job = waiting.pop(0)
            data = [str(shared)] if ready and (given or job is not jobs[0]) else options.data
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


def end(processes: Iterable[subprocess.Popen]) -> None:
    """End what still runs; what it has measured is in its rows."""
    processes = list(processes)
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()


def rows_of(job: Job) -> list[dict[str, Any]]:
    """One row for each evaluation of a run, and what tells it apart."""
    try:
        steps = RunFolder(job.folder).read_rows()
    except ValueError:
        return []
    recipe = json.loads((job.folder / "run.json").read_text(encoding="utf-8"))["recipe"]
    shape = ("hidden", "layers", "num_experts", "top_k", "ratio", "context", "steps", "batch", "lr")
    model = {name: recipe[name] for name in shape}
    about = {"benchmark": "moe_quality", "arm": job.arm, "seed": job.seed, **model, "changes": recipe["moe"]}
    about |= costs(recipe)
    measured = ("step", "tokens", "loss", "imbalance", "tokens_per_s", "time_s", "bits_per_byte")
    return [
        about | {name: row[name] for name in measured} for row in steps if row["bits_per_byte"] is not None
    ]


def costs(recipe: dict[str, Any]) -> dict[str, int]:
    """Of all layers of experts; the rest of the model is the same for all."""
    from adamac.moe import traffic
    from adamac.moe.lm.recipe import Recipe

    config = Recipe.from_dict(recipe).model(recipe["vocab"]).moe
    layers = recipe["layers"]
    return {
        "parameters": layers * traffic.parameters(config),
        "flops_per_token": layers * traffic.flops_per_token(config),
    }


def common_step(rows: list[dict[str, Any]]) -> int | None:
    """The last step at which every run that began was evaluated."""
    by_run: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        by_run.setdefault((row["arm"], row["seed"]), set()).add(row["step"])
    shared = set.intersection(*by_run.values()) if by_run else set()
    return max(shared, default=None)


def table(rows: list[dict[str, Any]]) -> str:
    """Bits per byte by arm at the last step that all reached, mean and standard deviation over seeds."""
    step = common_step(rows)
    if step is None:
        return "no step was reached by all runs"
    whole = step == rows[0]["steps"]
    lines = [
        f"After step {step} of {rows[0]['steps']}{'' if whole else ', where time ran out'}, {rows[0]['batch'] * rows[0]['context'] * step:,} tokens:",
        "",
        "| arm | expert parameters | FLOPs a token | bits per byte | sd | seeds | time, s (shared device) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = [row for row in rows if row["arm"] == arm and row["step"] == step]
        values = [row["bits_per_byte"] for row in found]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        seconds = statistics.mean(row["time_s"] for row in found)
        lines.append(
            f"| {arm} | {found[0]['parameters']:,} | {found[0]['flops_per_token']:,} | {statistics.mean(values):.4f} | {spread} "
            f"| {len(values)} | {seconds:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
