"""How coarsely may centroids be kept between steps? The output error of later steps that start from rounded ones.

On captured tensors of consecutive steps (`capture.py --steps 2 3 4 5 6`), a chain of steps for each layer; the first, which
starts from nothing, is not judged. "exact" keeps float32; the others keep so many levels over the range of each coordinate.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

from safetensors import safe_open
from torch import Tensor

import jsonl
from adamac.attention import AdaCluster, Clusters, Layout, Plan, Tokens
from adamac.bakeoff.metrics.plan import DenseRows

LEVELS = {"exact": None, "256": 256, "16": 16, "4": 4}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("captured", type=Path, help="safetensors file that capture.py wrote")
    parser.add_argument("--grid", type=int, nargs=3, default=[13, 14, 24])
    parser.add_argument("--rows", type=int, default=384, help="query rows that are judged in each call")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "rounded_centroids.jsonl"
    )
    options = parser.parse_args()
    method = AdaCluster(budget=Tokens(0.15))
    rows = []
    with safe_open(str(options.captured), framework="pt") as captured:
        for prompt, layer, steps in chains(captured.keys()):
            former: dict[str, Plan | None] = dict.fromkeys(LEVELS)
            for step in steps:
                place = f"{prompt}/{step}/{layer}"
                tensors = [
                    captured.get_tensor(f"{place}/{part}").float() for part in ("query", "key", "value")
                ]
                layout = Layout.video_only(tensors[0].shape[2], tuple(options.grid))
                dense = DenseRows.sample(*tensors, layout, rows=options.rows)
                for arm, levels in LEVELS.items():
                    plan = method(*tensors[:2], layout=layout, previous=former[arm])
                    former[arm] = plan if levels is None else rounded(plan, levels)
                    error = dense.judge(plan).overall_error
                    if step > steps[0]:
                        rows.append(
                            {
                                "benchmark": "rounded_centroids",
                                "call": place,
                                "arm": arm,
                                "output_error": error,
                            }
                        )
            jsonl.write(options.out, rows)
    errors = {arm: [row["output_error"] for row in rows if row["arm"] == arm] for arm in LEVELS}
    for arm, found in errors.items():
        ratio = geometric_mean(own / exact for own, exact in zip(found, errors["exact"], strict=True))
        print(f"{arm:<6} error {sum(found) / len(found):.4f}, {ratio:.3f} of exact")


def chains(names: list[str]) -> list[tuple[str, int, list[int]]]:
    """Prompt, layer and steps of what was captured."""
    calls = {tuple(name.split("/")[:3]) for name in names}
    return [
        (prompt, layer, sorted(int(step) for p, step, own in calls if (p, int(own)) == (prompt, layer)))
        for prompt, layer in sorted({(prompt, int(layer)) for prompt, _, layer in calls})
    ]


def rounded(plan: Plan, levels: int) -> Plan:
    """The plan, with centroids of so many levels over the range of each coordinate."""

    def coarse(clusters: Clusters, centroids: Tensor) -> Clusters:
        low, high = centroids.aminmax(dim=2, keepdim=True)
        step = ((high - low) / (levels - 1)).clamp_min(1e-30)
        return replace(clusters, centroids=((centroids - low) / step).round() * step + low)

    queries, keys, _ = plan.parts()
    starts = plan.centroids()
    return replace(plan, queries=coarse(queries, starts[0]), keys=coarse(keys, starts[1]))


if __name__ == "__main__":
    main()
