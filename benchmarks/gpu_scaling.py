"""One video on several GPUs: what twice the cards bring, and where the time goes. Part of `gpu_page.py`."""

from __future__ import annotations

from collections.abc import Iterable

from .gpu_steps import Row, p50_ms, usual

TARGET = 0.05  # by how much a sparse step may scale worse than a dense one
DENSE, SPARSE = "best_dense", "default_15"


def scaling_rows(rows: list[Row]) -> Iterable[list[str]]:
    """Rows of the table: steps by the number of ranks, and what of them is attention."""
    for row in sorted(rows, key=lambda row: (row["model"], row["arm"], row["ranks"])):
        step, attention = p50_ms(row), attention_ms(row)
        steps = usual(row) or {}
        balance = f"{steps['imbalance']:.3f}" if steps.get("imbalance") else "-"
        yield [
            row["model"],
            row["arm"],
            str(row["ranks"]),
            f"{step:,.0f}",
            f"{steps['p99_ms']:,.0f}" if steps.get("steps", 1) > 1 else "-",
            f"{attention:,.0f}",
            f"{step - attention:,.0f}",
            f"{efficiency(rows, row['model'], row['arm'], row['ranks']):.2f}",
            balance,
            f"{row['peak_gib']:.1f}",
        ]


def verdict_rows(rows: list[Row]) -> Iterable[list[str]]:
    """Rows of the table of targets: does sparse attention scale as well as dense?"""
    for model in dict.fromkeys(row["model"] for row in rows):
        for ranks in sorted({row["ranks"] for row in rows} - {1}):
            dense, sparse = (efficiency(rows, model, arm, ranks) for arm in (DENSE, SPARSE))
            met = "yes" if sparse >= dense * (1 - TARGET) else "**no**"
            what = f"efficiency on {ranks} GPUs, sparse over dense"
            yield [what, model, f"≥ {1 - TARGET:.2f}", f"{sparse / dense:.3f}", "-", met]


def efficiency(rows: list[Row], model: str, arm: str, ranks: int) -> float:
    """Time on one GPU over ranks times the time on them."""
    found = {row["ranks"]: p50_ms(row) for row in rows if (row["model"], row["arm"]) == (model, arm)}
    return found[1] / (ranks * found[ranks])


def attention_ms(row: Row) -> float:
    """What the clocks of the stages saw of a step: planning and attention on the first rank."""
    steps = usual(row) or {}
    return sum(steps["stage_ms_per_step"].values())
