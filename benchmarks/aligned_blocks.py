"""What would whole blocks of tokens cost in place of clusters? A dense-tile block-sparse kernel would run on them.

On captured tensors (`capture.py`), every plan a first one, everything compensated. "blocks" are tokens in an order in which
neighbours are alike, found by halving each head's tokens under the forms of `adamac.attention.logit_metric` (principal
direction, then four balanced 2-means updates), cut into equal pieces on both sides. "blocks in cluster order" cuts the
default's clusters, one after another as they are numbered. Blocks of 32 beside clusters of 17 keys on average, at 4,368
tokens, are as blocks of 128 beside clusters of 69 at 75,600.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import jsonl
from adamac.attention import AdaCluster, Clusters, Layout, Plan, Tokens, TopK
from adamac.attention.logit_metric import form_of_keys, form_of_queries
from adamac.attention.select import score_clusters
from adamac.bakeoff.metrics.plan import DenseRows
from adamac.ops.segment import Segments, segment_mean

KEEPS = (0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3)
ASKED = (0.08, 0.15)
CLUSTERS = "clusters (the default)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("captured", type=Path, help="safetensors file that capture.py wrote")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--rows", type=int, default=384, help="query rows that are judged in each call")
    parser.add_argument("--every", type=int, default=6, help="judge every so many captured calls only")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "aligned_blocks.jsonl"
    )
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with safe_open(str(options.captured), framework="pt") as captured:
        names = captured.keys()
        for call in sorted({name.rpartition("/")[0] for name in names})[:: options.every]:
            tensors = [captured.get_tensor(f"{call}/{part}").float() for part in ("query", "key", "value")]
            dense = DenseRows.sample(*tensors, Layout.video_only(tensors[0].shape[2]), rows=options.rows)
            for arm, keep, plan in plans(*tensors[:2], options.block):
                facts = {"benchmark": "aligned_blocks", "call": call, "block": options.block, "arm": arm}
                judged = dense.judge(plan)
                rows.append(
                    facts
                    | {
                        "keep": keep,
                        "density": float(plan.density().mean()),
                        "output_error": judged.overall_error,
                    }
                )
            jsonl.write(options.out, rows)
    print(table(rows))


def plans(query: Tensor, key: Tensor, block: int) -> Iterator[tuple[str, float, Plan]]:
    """Arm, budget and plan."""
    layout = Layout.video_only(query.shape[2])
    clusters = AdaCluster()(query, key, layout=layout)
    of_queries, of_keys, _ = clusters.parts()
    halved = (
        cut(query, halves(query, form_of_queries(key), block), block),
        cut(key, halves(key, form_of_keys(query), block), block),
    )
    numbered = (
        cut(query, of_queries.members.order.long(), block),
        cut(key, of_keys.members.order.long(), block),
    )
    for keep in KEEPS:
        yield CLUSTERS, keep, AdaCluster(budget=Tokens(keep))(query, key, layout=layout)
        for arm, (queries, keys) in (("blocks", halved), ("blocks in cluster order", numbered)):
            score = score_clusters("residual", queries.means, key, keys)
            reads = TopK(keep).reads(score, keys.counts)
            yield arm, keep, Plan(layout, queries, keys, reads, compensate=True)


def cut(points: Tensor, order: Tensor, block: int) -> Clusters:
    """Consecutive blocks of tokens in an order ``[1, heads, tokens]``."""
    number = (torch.arange(order.shape[-1]) // block).expand(order.shape).contiguous()
    labels = torch.empty_like(order).scatter_(-1, order, number)
    members = Segments(labels, math.ceil(order.shape[-1] / block))
    return Clusters(members, segment_mean(points, members))


def halves(points: Tensor, form: Tensor, block: int) -> Tensor:
    """Order in which tokens near each other under a form stand together, halved at whole blocks again and again."""
    values, vectors = torch.linalg.eigh(form.double())
    seen = points.double() @ (vectors * values.clamp_min(0).sqrt().unsqueeze(-2))
    return torch.stack([_halved(x, torch.arange(len(x)), block) for x in seen[0]])[None]


def _halved(x: Tensor, tokens: Tensor, block: int) -> Tensor:
    blocks = math.ceil(len(tokens) / block)
    if blocks <= 1:
        return tokens
    own, left = x[tokens], blocks // 2 * block
    centred = own - own.mean(0)
    order = (centred @ torch.linalg.eigh(centred.T @ centred)[1][:, -1]).argsort()
    for _ in range(4):
        order = (own @ (own[order[left:]].mean(0) - own[order[:left]].mean(0))).argsort()
    return torch.cat([_halved(x, tokens[half], block) for half in (order[:left], order[left:])])


def table(rows: list[dict[str, Any]]) -> str:
    """Mean error of each arm, and the density at which it errs as clusters do."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["arm"], row["keep"]].append(row)

    def curve(arm: str) -> list[tuple[float, float]]:
        return [
            (mean(row["density"] for row in own), mean(row["output_error"] for row in own))
            for own in (found[arm, keep] for keep in KEEPS)
        ]

    lines = []
    clusters = curve(CLUSTERS)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = curve(arm)
        for keep in ASKED:
            error = clusters[KEEPS.index(keep)][1]
            needed = density_at(own, error)
            times = f"{needed / keep:.2f}" if needed else f"more than {own[-1][0] / keep:.2f}"
            at = own[KEEPS.index(keep)]
            lines.append(
                f"{arm:<26} {keep:.0%}: density {at[0]:.3f}, error {at[1]:.4f}; as clusters at {times} times"
            )
    return "\n".join(lines)


def density_at(curve: list[tuple[float, float]], error: float) -> float | None:
    """Density at which a falling curve reaches an error, between its points in logarithms; ``None`` if beyond its end."""
    for (low, worse), (high, better) in itertools.pairwise(curve):
        if worse >= error >= better:
            share = math.log(worse / error) / math.log(worse / better)
            return low * (high / low) ** share
    return None


if __name__ == "__main__":
    main()
