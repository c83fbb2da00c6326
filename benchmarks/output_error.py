"""What does each method, score, budget and compensation do to the output of trained attention?

Every arm plans on captured tensors (`capture.py`) and is judged by its output error, ||out - dense||/||dense|| in float64. Arms of
one column read the same number of keys in every row, so that rules are compared and not budgets; at the end stand the
published settings with whatever they read. Every plan is a first one, without a former step to start from.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from safetensors import safe_open
from torch import Tensor

import jsonl
from adamac.attention import SVG2, AdaCluster, BlockTopK, Layout, Method, Oracle, Plan, SparseD, Tokens
from adamac.bakeoff.metrics.plan import DenseRows

KEEPS = (0.08, 0.15, 0.3)
BOX = (3, 6, 7)  # 126 tokens

# Pinned, so that an arm is what its name says, whatever the defaults become.
BY_LOGITS = AdaCluster(score="centroid", metric="logits", outlier_factor=math.inf)
BY_TOKENS = replace(BY_LOGITS, metric="tokens")
# Each is tried at every budget, with and without compensation.
METHODS: dict[str, Any] = {
    "clusters by logits, centroid": BY_LOGITS,
    "clusters by logits, quest": replace(BY_LOGITS, score="quest"),
    "clusters by logits, moment": replace(BY_LOGITS, score="moment"),
    "clusters by logits, residual": replace(BY_LOGITS, score="residual"),
    "clusters by logits, true mass (oracle)": Oracle(BY_LOGITS),
    "clusters by logits, queries by distance, residual": replace(BY_LOGITS, score="residual", angular=False),
    "clusters by logits, stages for outliers, residual": replace(
        BY_LOGITS, score="residual", outlier_factor=2.0
    ),
    "clusters by logits, half as many again of both, residual": replace(
        BY_LOGITS, score="residual", query_clusters=99, key_clusters=396
    ),
    "clusters by tokens, centroid": BY_TOKENS,
    "clusters by tokens, residual": replace(BY_TOKENS, score="residual"),
    "clusters by tokens, true mass (oracle)": Oracle(BY_TOKENS),
    "clusters by tokens, stages for outliers, residual": replace(
        BY_TOKENS, score="residual", outlier_factor=2.0
    ),
    "clusters by tokens, stages for outliers (1.5x), centroid": replace(BY_TOKENS, outlier_factor=1.5),
    "32 x 96 clusters by logits, centroid": replace(BY_LOGITS, query_clusters=32, key_clusters=96),
    "65 x 192 clusters by logits, centroid": replace(BY_LOGITS, query_clusters=65, key_clusters=192),
    "144 x 384 clusters by logits, centroid": replace(BY_LOGITS, query_clusters=144, key_clusters=384),
    "SVG2's clusters, centroid": SVG2(query_clusters=100, key_clusters=200),
    "runs of 128, centroid": BlockTopK(tile=128),
    "boxes of 126, centroid": BlockTopK(tile=BOX),
    "boxes of 126, quest": BlockTopK(tile=BOX, score="quest"),
    "boxes of 24, centroid": BlockTopK(tile=(1, 4, 6)),
    "runs of 128, true mass (SparseD)": SparseD(block=128),
}
PUBLISHED: dict[str, Method] = {"AdaCluster as published": AdaCluster.paper(), "SVG2 as published": SVG2()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("captured", type=Path, help="safetensors file that capture.py wrote")
    parser.add_argument(
        "--grid", type=int, nargs=3, default=[13, 14, 24], help="frames, height, width in tokens"
    )
    parser.add_argument("--rows", type=int, default=512, help="query rows that are judged in each call")
    parser.add_argument("--every", type=int, default=1, help="judge every so many captured calls only")
    parser.add_argument("--only", default="", help="judge only arms whose name contains this")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "output_error.jsonl"
    )
    options = parser.parse_args()
    rows = []
    with safe_open(str(options.captured), framework="pt") as captured:
        names = captured.keys()
        calls = sorted({name.rpartition("/")[0] for name in names})[:: options.every]
        for number, call in enumerate(calls):
            tensors = [captured.get_tensor(f"{call}/{part}").float() for part in ("query", "key", "value")]
            prompt, step, layer = call.split("/")
            place = {"benchmark": "output_error", "prompt": prompt, "step": int(step), "layer": int(layer)}
            rows += [place | row for row in judged(tensors, tuple(options.grid), options.rows, options.only)]
            jsonl.write(options.out, rows)
            print(f"{number + 1}/{len(calls)} {call}", flush=True)
    print(table(rows))


def judged(
    tensors: list[Tensor], grid: tuple[int, int, int], num_rows: int, only: str
) -> Iterator[dict[str, Any]]:
    """Judge every arm on one call."""
    query, key, value = tensors
    layout = Layout.video_only(query.shape[2], grid=grid)
    dense = DenseRows.sample(query, key, value, layout, rows=num_rows)
    for name, method in METHODS.items():
        for keep in KEEPS if only in name else ():
            plan = replace(method, budget=Tokens(keep))(query, key, layout=layout)
            for compensate in (False, True):
                arm = {"arm": name, "keep": keep, "compensate": compensate}
                yield arm | outcome(dense, replace(plan, compensate=compensate))
    for name, method in PUBLISHED.items():
        if only in name:
            arm = {"arm": name, "keep": None, "compensate": False}
            yield arm | outcome(dense, method(query, key, layout=layout))


def outcome(dense: DenseRows, plan: Plan) -> dict[str, Any]:
    """What a plan does, and how many clusters it has; a dense plan has its reason instead."""
    clusters = None if plan.is_dense else [side.num_clusters for side in plan.parts()[:2]]
    return dense.judge(plan).summary() | {"clusters": clusters, "dense_reason": plan.dense_reason}


def table(rows: list[dict[str, Any]]) -> str:
    """Condense the rows into Markdown: means over the calls that an arm planned sparsely, by arm and budget."""
    groups = defaultdict(list)
    calls = len({(row["prompt"], row["step"], row["layer"]) for row in rows})
    for row in rows:
        if row["dense_reason"] is None:
            groups[row["arm"], row["compensate"], row["keep"]].append(row)
    lines = [
        "| plan | "
        + " | ".join(f"{keep:.0%}" for keep in KEEPS)
        + " | mass kept at 15% | cost at 15% | calls |",
        "| --- " * (len(KEEPS) + 4) + "|",
    ]
    for compensate in (False, True):
        for name in METHODS:
            if middle := groups.get((name, compensate, KEEPS[1])):
                figures = [_mean(groups[name, compensate, keep], "output_error") for keep in KEEPS]
                figures += [_mean(middle, figure) for figure in ("mass_kept", "cost")]
                cells = [f"{number:.3f}" for number in figures] + [str(len(middle))]
                arm = f"{name} **+ compensation**" if compensate else name
                lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines.append("")
    for name in PUBLISHED:
        if published := groups.get((name, False, None)):
            error, density, mass = (
                _mean(published, figure) for figure in ("output_error", "density", "mass_kept")
            )
            lines.append(
                f"{name}, where it is not dense ({len(published)} of {calls} calls): error {error:.3f} at density "
                f"{density:.3f}, mass kept {mass:.3f}."
            )
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], figure: str) -> float:
    return mean(row[figure] for row in rows)


if __name__ == "__main__":
    main()
