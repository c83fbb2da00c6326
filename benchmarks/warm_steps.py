"""Do better clusters stay better? The output error of consecutive steps, each started from the last one's centroids.

On captured tensors of consecutive steps (`capture.py --steps 1 2 3 4 5 6`), a chain for each prompt and layer; the first step of
a chain starts from nothing.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean

from safetensors import safe_open

import jsonl
from adamac.attention import AdaCluster, Layout, Plan, Tokens
from adamac.bakeoff.metrics.plan import DenseRows
from rounded_centroids import chains

ARMS = {
    "by tokens, stages": AdaCluster(metric="tokens", outlier_factor=2.0),
    "by tokens": AdaCluster(metric="tokens", outlier_factor=math.inf),
    "by logits, stages": AdaCluster(metric="logits", outlier_factor=2.0),
    "by logits": AdaCluster(metric="logits", outlier_factor=math.inf),
    "by logits, as many clusters as stages end with": AdaCluster(metric="logits", key_clusters=396),
}
assert all(method.budget == Tokens(0.1) for method in ARMS.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("captured", type=Path, help="safetensors file that capture.py wrote")
    parser.add_argument("--grid", type=int, nargs=3, default=[13, 14, 24])
    parser.add_argument("--rows", type=int, default=256, help="query rows that are judged in each call")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "warm_steps.jsonl"
    )
    options = parser.parse_args()
    rows = []
    with safe_open(str(options.captured), framework="pt") as captured:
        for prompt, layer, steps in chains(captured.keys()):
            former: dict[str, Plan | None] = dict.fromkeys(ARMS)
            for place, step in enumerate(steps):
                call = f"{prompt}/{step}/{layer}"
                tensors = [
                    captured.get_tensor(f"{call}/{part}").float() for part in ("query", "key", "value")
                ]
                layout = Layout.video_only(tensors[0].shape[2], tuple(options.grid))
                dense = DenseRows.sample(*tensors, layout, rows=options.rows)
                for arm, method in ARMS.items():
                    plan = method(*tensors[:2], layout=layout, previous=former[arm])
                    former[arm] = plan.carried()
                    facts = {"benchmark": "warm_steps", "call": call, "steps_before": place, "arm": arm}
                    error = dense.judge(plan).overall_error
                    rows.append(facts | {"key_clusters": plan.parts()[1].num_clusters, "output_error": error})
            jsonl.write(options.out, rows)
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Mean error of each arm by the number of steps before."""
    errors = defaultdict(list)
    for row in rows:
        errors[row["arm"], row["steps_before"]].append(row["output_error"])
    places = sorted({place for _, place in errors})
    return "\n".join(
        f"{arm:<48} " + " ".join(f"{mean(errors[arm, place]):.4f}" for place in places) for arm in ARMS
    )


if __name__ == "__main__":
    main()
