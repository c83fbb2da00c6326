"""How many clusters? The output error of the default method with other numbers of query and key clusters, at what cost.

On captured tensors (`capture.py`), every plan a first one. "queries" varies the query clusters at 15 % exact keys; "keys" trades
key clusters against exact keys at about equal cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors import safe_open

import jsonl
from adamac.attention import AdaCluster, Layout, Tokens
from adamac.bakeoff.metrics.plan import DenseRows

QUERIES = (16, 24, 32, 48, 66, 100)
KEYS = ((132, 0.18), (264, 0.15), (400, 0.12), (528, 0.09), (700, 0.05))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("captured", type=Path, help="safetensors file that capture.py wrote")
    parser.add_argument("--grid", type=int, nargs=3, default=[13, 14, 24])
    parser.add_argument("--rows", type=int, default=384, help="query rows that are judged in each call")
    parser.add_argument("--every", type=int, default=7, help="judge every so many captured calls only")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "cluster_counts.jsonl"
    )
    options = parser.parse_args()
    methods = {
        ("queries", f"{number}"): AdaCluster(budget=Tokens(0.15), query_clusters=number) for number in QUERIES
    }
    for number, keep in KEYS:
        name = ("keys", f"{number} and {keep:.0%}")
        methods[name] = AdaCluster(budget=Tokens(keep), key_clusters=number)
    rows = []
    with safe_open(str(options.captured), framework="pt") as captured:
        names = captured.keys()
        calls = sorted({name.rpartition("/")[0] for name in names})[2 :: options.every]
        for call in calls:
            tensors = [captured.get_tensor(f"{call}/{part}").float() for part in ("query", "key", "value")]
            layout = Layout.video_only(tensors[0].shape[2], tuple(options.grid))
            dense = DenseRows.sample(*tensors, layout, rows=options.rows)
            for (question, arm), method in methods.items():
                judged = dense.judge(method(*tensors[:2], layout=layout))
                facts = {"benchmark": "cluster_counts", "call": call, "question": question, "arm": arm}
                rows.append(facts | {"output_error": judged.overall_error, "cost": float(judged.cost.mean())})
            jsonl.write(options.out, rows)
    for question, arm in methods:
        mine = [row for row in rows if (row["question"], row["arm"]) == (question, arm)]
        error, cost = (sum(row[name] for row in mine) / len(mine) for name in ("output_error", "cost"))
        print(f"{question:<8} {arm:<14} error {error:.4f} cost {cost:.3f}")


if __name__ == "__main__":
    main()
